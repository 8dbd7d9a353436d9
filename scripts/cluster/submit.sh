#!/bin/sh
# A search as a job of a Ray cluster that runs already: the driver runs on its head node, workers wherever
# there is room.
#
#   RAY_ADDRESS=http://HEAD:8265 scripts/cluster/submit.sh search.yaml [options of evomerge run]
#
# search.yaml, models and studies are paths on the cluster's machines (a disk that all see); nothing is
# uploaded. To end it: `evomerge stop STUDY` where that disk is seen. `ray job stop` kills after 3 seconds;
# the study is whole all the same, and the same command goes on with it. Where the cluster asks for a token,
# set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH as on the cluster.
set -eu
if [ $# -eq 0 ]; then
    echo "usage: RAY_ADDRESS=http://HEAD:8265 $0 CONFIG [options of evomerge run]" >&2
    exit 2
fi
exec ray job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" ${EVOMERGE_NO_WAIT:+--no-wait} -- \
    evomerge run "$@" --resume --ray auto --grace "${EVOMERGE_GRACE:-600}"
