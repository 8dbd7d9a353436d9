"""A local page on stored studies that follows running searches: starlette, uvicorn, server-sent events.

`app` answers requests, `access` says who may read and who may stop a search, `watch` reads a study again when
its file has changed, `server` listens. Studies are read only, while their drivers write; the one thing that
is written is a request to stop, as `evomerge stop` makes it. Needs `pip install "evomerge[dashboard]"`.
"""

from __future__ import annotations
