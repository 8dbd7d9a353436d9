"""The scripts for clusters, run with stand-ins for SLURM's commands, and on a real Ray of this machine where
that is what they start.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.support.toy import REPO

SCRIPTS = REPO / "scripts" / "cluster"
SLURM = SCRIPTS / "evomerge.slurm"

# What SLURM's commands do as far as the script can tell. Each writes what it was called with.
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
if [ "$1 $2" = "show hostnames" ]; then printf '%s\\n' ${3//,/ }; fi
"""
SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
echo $$ >> "$CALLS.steps"
exec sleep 600
"""
RAY = """#!/bin/bash
echo "ray $*" >> "$CALLS"
[ "$1" != health-check ] || [ -e "$CALLS.healthy" ]
"""
# Drains when it is told to: goes on for a moment, says so, and ends with 75. Otherwise it ends with $CODE at
# once, or never.
DRIVER = """#!/bin/bash
echo "evomerge $*" >> "$CALLS"
[ ! -e "$RAY_AUTH_TOKEN_PATH" ] || stat -c 'token %a %s' "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"
trap 'echo signalled >> "$CALLS"; told=1' USR1
echo listening >> "$CALLS"
[ -z "${CODE:-}" ] || exit "$CODE"
told=
while [ -z "$told" ]; do sleep 0.02; done
if [ -n "${SECOND:-}" ]; then told=; while [ -z "$told" ]; do sleep 0.02; done; fi
sleep 0.2
echo drained >> "$CALLS"
exit 75
"""


@dataclass
class Cluster:
    """Stand-ins on a PATH of their own. calls: what was called, a line each."""

    folder: Path
    environment: dict[str, str]

    def lines(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            ["bash", SLURM, *words],
            env=self.environment | environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
            cwd=self.folder,
        )

    def wait_for(self, text: str, process: subprocess.Popen[str]) -> None:
        limit = time.monotonic() + 30
        while not any(text in line for line in self.lines()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < limit, self.lines()
            time.sleep(0.01)

    def steps(self) -> list[int]:
        file = self.folder / "calls.steps"
        return [int(line) for line in file.read_text().split()] if file.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("ray", RAY), ("evomerge", DRIVER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    own = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "CALLS": str(tmp_path / "calls"),
    }
    found = Cluster(tmp_path, own | {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost,node2,node3"})
    (tmp_path / "calls.healthy").touch()
    yield found
    for pid in found.steps():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ended(cluster: Cluster, process: subprocess.Popen[str]) -> int:
    """The script's exit code, with its steps and its token gone."""
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    for pid in cluster.steps():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not list((cluster.folder / "home" / ".evomerge").iterdir()), "the token is gone"
    return process.returncode


@pytest.mark.parametrize("script", ["evomerge.slurm", "submit.sh"])
def test_a_script_is_well_formed_and_says_how_it_is_used(script: str) -> None:
    assert os.access(SCRIPTS / script, os.X_OK)
    assert subprocess.run(["bash", "-n", SCRIPTS / script], check=False).returncode == 0
    done = subprocess.run([SCRIPTS / script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_slurm_is_asked_for_a_warning_and_a_requeue() -> None:
    asked = re.findall(r"^#SBATCH (.*)$", SLURM.read_text(), re.M)
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(asked)
    grace = re.search(r"EVOMERGE_GRACE:-(\d+)", SLURM.read_text())
    assert grace is not None
    assert int(grace[1]) < 300, "what is in flight has ended before the job has"


def test_a_signal_drains_and_puts_the_job_back(cluster: Cluster) -> None:
    process = cluster.start("search.yaml", "--root", "/shared/a b")
    cluster.wait_for("listening", process)
    process.send_signal(signal.SIGUSR1)
    assert ended(cluster, process) == 75
    calls = cluster.lines()
    assert calls[-3:] == ["signalled", "drained", "scontrol requeue 4711"], "in this order"
    address = "127.0.0.1:24711"
    assert f"evomerge run search.yaml --root /shared/a b --resume --ray {address} --grace 240" in calls
    assert "token 600 64" in calls
    head, workers = sorted(
        (line for line in calls if line.startswith("srun")), key=lambda line: "--head" not in line
    )
    assert (
        "--nodes=1 --ntasks=1 --nodelist=localhost ray start --head --block --node-ip-address=127.0.0.1 "
        "--port=24711" in head
    )
    assert f"--nodes=2 --ntasks=2 --exclude=localhost ray start --block --address={address}" in workers


def test_the_signal_of_a_preemption_is_answered_too(cluster: Cluster) -> None:
    process = cluster.start("search.yaml")
    cluster.wait_for("listening", process)
    process.send_signal(signal.SIGTERM)
    assert ended(cluster, process) == 75
    assert cluster.lines()[-1] == "scontrol requeue 4711"


def test_a_second_signal_reaches_the_driver_and_its_code_is_kept(cluster: Cluster) -> None:
    process = cluster.start("search.yaml", SECOND="1")
    cluster.wait_for("listening", process)
    process.send_signal(signal.SIGUSR1)
    cluster.wait_for("signalled", process)
    process.send_signal(signal.SIGUSR1)
    assert ended(cluster, process) == 75
    assert cluster.lines()[-4:] == ["signalled", "signalled", "drained", "scontrol requeue 4711"]


@pytest.mark.parametrize("code", [0, 2, 3, 5])
def test_any_other_end_is_the_jobs(code: int, cluster: Cluster) -> None:
    process = cluster.start("search.yaml", CODE=str(code))
    assert ended(cluster, process) == code
    assert not any("requeue" in line for line in cluster.lines())


def test_a_pause_by_itself_puts_the_job_back_too(cluster: Cluster) -> None:
    """As of a full disk."""
    assert ended(cluster, cluster.start("search.yaml", CODE="75")) == 75
    assert cluster.lines()[-1] == "scontrol requeue 4711"


def test_a_job_is_not_put_back_for_ever(cluster: Cluster) -> None:
    process = cluster.start("search.yaml", CODE="75", SLURM_RESTART_COUNT="3", EVOMERGE_REQUEUES="3")
    assert ended(cluster, process) == 75
    assert not any("requeue" in line for line in cluster.lines())


def test_a_signal_before_the_driver_has_begun_begins_nothing(cluster: Cluster) -> None:
    (cluster.folder / "calls.healthy").unlink()
    process = cluster.start("search.yaml")
    cluster.wait_for("ray health-check", process)
    process.send_signal(signal.SIGUSR1)
    assert ended(cluster, process) == 75
    assert not any(line.startswith("evomerge") for line in cluster.lines())
    assert cluster.lines()[-1] == "scontrol requeue 4711"


def test_a_signal_before_the_driver_listens_is_a_pause(cluster: Cluster) -> None:
    """Python takes a second to begin, and a signal kills it until then."""
    (cluster.folder / "tools" / "evomerge").write_text('#!/bin/bash\necho begun >> "$CALLS"\nexec sleep 60\n')
    process = cluster.start("search.yaml")
    cluster.wait_for("begun", process)
    process.send_signal(signal.SIGUSR1)
    assert ended(cluster, process) == 75
    assert cluster.lines()[-1] == "scontrol requeue 4711"


def test_a_driver_that_is_not_there_is_no_pause(cluster: Cluster) -> None:
    (cluster.folder / "tools" / "evomerge").unlink()
    path = f"{cluster.folder / 'tools'}:/usr/bin:/bin"
    assert shutil.which("evomerge", path=path) is None
    assert ended(cluster, cluster.start("search.yaml", PATH=path)) == 127
    assert not any("requeue" in line for line in cluster.lines())


def test_one_node_starts_no_other(cluster: Cluster) -> None:
    assert ended(cluster, cluster.start("search.yaml", CODE="0", SLURM_JOB_NODELIST="localhost")) == 0
    assert sum(line.startswith("srun") for line in cluster.lines()) == 1


# ---- Kubernetes --------------------------------------------------------------------------------------------


def test_the_rayjob_is_one_that_kuberay_knows() -> None:
    """Fields of ray.io/v1 as KubeRay's types name them; nothing was started on Kubernetes."""
    job = yaml.safe_load((SCRIPTS / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= {
        "activeDeadlineSeconds",
        "backoffLimit",
        "rayClusterSpec",
        "submitterPodTemplate",
        "metadata",
        "clusterSelector",
        "submitterConfig",
        "managedBy",
        "deletionStrategy",
        "entrypoint",
        "runtimeEnvYAML",
        "jobId",
        "submissionMode",
        "entrypointResources",
        "entrypointNumCpus",
        "entrypointNumGpus",
        "ttlSecondsAfterFinished",
        "shutdownAfterJobFinishes",
        "suspend",
    }
    assert spec["entrypoint"].startswith("evomerge run /data/")
    assert "--resume --ray auto" in spec["entrypoint"]
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= {
        "rayVersion",
        "authOptions",
        "headGroupSpec",
        "workerGroupSpecs",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
    }
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"].keys() <= {"rayStartParams", "template", "serviceType"}
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() == {
            "groupName",
            "replicas",
            "minReplicas",
            "maxReplicas",
            "rayStartParams",
            "template",
        }
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


# ---- a real Ray --------------------------------------------------------------------------------------------

JOINS = """#!/bin/bash
# Joins the cluster as the driver would, waits for its second node, and writes what it saw.
exec {python} - "$@" <<'PROGRAM'
import os, sys, time
import ray
words = sys.argv[1:]
address = words[words.index("--ray") + 1]
ray.init(address=address, log_to_driver=False)
limit = time.monotonic() + 60
nodes = int(os.environ.get("NODES", "1"))
while sum(node["Alive"] for node in ray.nodes()) < nodes and time.monotonic() < limit:
    time.sleep(0.2)
alive = sum(node["Alive"] for node in ray.nodes())
with open(os.environ["SEEN"], "w") as file:
    file.write(f"{{alive}} nodes: {{' '.join(words)}}")
PROGRAM
"""
# Runs its command here, as a step on a node would.
SRUN_HERE = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@" --num-cpus=1 --object-store-memory=80000000
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def ray_tools(tmp_path: Path) -> dict[str, str]:
    """An environment with Ray's command and a driver that only joins."""
    pytest.importorskip("ray")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "evomerge").write_text(JOINS.format(python=sys.executable))
    (tools / "srun").write_text(SRUN_HERE)
    (tools / "scontrol").write_text(SCONTROL)
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    own = {
        "PATH": path,
        "HOME": str(tmp_path),
        "SEEN": str(tmp_path / "seen"),
        "CALLS": str(tmp_path / "calls"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return kept | own


@pytest.mark.cluster
def test_the_slurm_script_starts_a_real_cluster(tmp_path: Path, ray_tools: dict[str, str]) -> None:
    """Two nodes of this machine, with a token; the driver sees both."""
    port = free_port()
    more = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost,second",
        "RAY_PORT": str(port),
        "NODES": "2",
    }
    process = subprocess.Popen(
        ["bash", SLURM, "search.yaml"],
        env=ray_tools | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        shutil.rmtree(f"/tmp/ray-{os.getpid()}", ignore_errors=True)
    assert process.returncode == 0, out
    seen = (tmp_path / "seen").read_text()
    assert seen == f"2 nodes: run search.yaml --resume --ray 127.0.0.1:{port} --grace 240"


@pytest.mark.cluster
def test_ray_job_submit_runs_the_driver_on_a_real_cluster(tmp_path: Path, ray_tools: dict[str, str]) -> None:
    port, dashboard = free_port(), free_port()
    folder = Path(f"/tmp/rj-{os.getpid()}")  # sockets have short names
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    (tmp_path / "token").chmod(0o600)
    own = ray_tools | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    words = [
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        "--include-dashboard=true",
        f"--dashboard-port={dashboard}",
    ]
    words += ["--num-cpus=1", "--object-store-memory=80000000", f"--temp-dir={folder}"]
    head = subprocess.Popen(
        ["ray", "start", *words], env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        limit = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", dashboard), timeout=1):
                break
            assert head.poll() is None, head.communicate()[0]
            assert time.monotonic() < limit
            time.sleep(0.2)
        url = f"http://127.0.0.1:{dashboard}"
        done = subprocess.run(
            [SCRIPTS / "submit.sh", "/data/search.yaml", "--root", "/data/studies"],
            env=own | {"RAY_ADDRESS": url},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        seen = (tmp_path / "seen").read_text()
        assert seen == "1 nodes: run /data/search.yaml --root /data/studies --resume --ray auto --grace 600"
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.communicate(timeout=30)
        head.kill()
        shutil.rmtree(folder, ignore_errors=True)
