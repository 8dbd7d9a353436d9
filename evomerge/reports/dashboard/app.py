"""The dashboard's answers: a page of all studies, a page of each, changes as events, and the stop button.

Every address in a page is relative, so that it works behind any prefix of a proxy and through a tunnel.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from evomerge.errors import EvomergeError, StudyError
from evomerge.reports.dashboard.access import HEADERS, Access
from evomerge.reports.dashboard.watch import StudyWatch, View, change
from evomerge.reports.page import STATIC, digest, render
from evomerge.reports.panels import Panel, TableQuery
from evomerge.store import paths
from evomerge.store.stop_request import ask_to_stop

POLL = 0.25
"""Seconds between two looks at a study's file."""
_ALIVE = 15.0  # seconds after which a silent connection is told that it lives
_FORM = 2000  # bytes of a form
_PANELS = "<!-- panels -->"  # where they stand in the template
_STREAMS = 64  # pages that are followed at once


@dataclass
class Dashboard:
    """The studies of a folder, as an ASGI application::

        uvicorn.run(Dashboard(Path("results"), Access(new_token(), is_local=True)).app())

    Attributes:
        root: Folder of the studies.
        access: Who may read and stop.
        prefix: Path that a proxy leaves before every address, '' for none.
    """

    root: Path
    access: Access
    prefix: str = ""
    _watches: dict[str, StudyWatch] = field(default_factory=dict)
    _streams: int = 0

    def app(self) -> Starlette:
        """The application.

        Returns:
            It, with headers and access rules on every answer.
        """
        routes: list[BaseRoute] = [
            Route("/", self.index),
            Route("/events", self.index_events),
            Route("/study/{name}", self.without_slash),
            Route("/study/{name}/", self.study),
            Route("/study/{name}/events", self.study_events),
            Route("/study/{name}/stop", self.stop, methods=["POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]
        if self.prefix:
            routes.insert(0, Mount(self.prefix, routes=list(routes)))
        handlers: Any = {404: self.not_found, EvomergeError: self.failed}
        guard = Middleware(BaseHTTPMiddleware, dispatch=self.guard)
        app = Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app

    # ---- pages --------------------------------------------------------------------------------------------

    async def index(self, request: Request) -> Response:
        """All studies.

        Args:
            request: The request.

        Returns:
            The page.
        """
        html = await run_in_threadpool(self._cards)
        studies = await run_in_threadpool(self._studies)
        return HTMLResponse(
            render("index.html", base="./", root=str(self.root), studies=studies, digest=digest(html))
        )

    async def study(self, request: Request) -> Response:
        """One study.

        Args:
            request: The request.

        Returns:
            The page; with why it cannot be read where that is so.
        """
        watch = self._watch(request.path_params["name"])

        async def parts() -> AsyncIterator[str]:
            """What a reader wants first is painted before the rest is made."""
            start = render("start.html", base="../../")
            yield start  # the browser asks for style and scripts while the study is read
            head = await run_in_threadpool(watch.head)
            html = self._unreadable(request, head) if head.overview is None else self._page(request, head)
            before, has_panels, after = html.removeprefix(start).partition(_PANELS)
            yield before
            if has_panels:
                yield await run_in_threadpool(self._panels, watch, request)
                yield after

        return StreamingResponse(parts(), media_type="text/html")

    async def without_slash(self, request: Request) -> Response:
        """Leads to the address with its last slash.

        Args:
            request: The request.

        Returns:
            The way there.
        """
        return RedirectResponse(f"{quote(request.path_params['name'], safe='')}/", status_code=307)

    async def stop(self, request: Request) -> Response:
        """Asks a search to end, as `evomerge stop` does.

        Args:
            request: The request, with the key of the page's form.

        Returns:
            The way back to the page, or why nothing was asked.
        """
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _FORM:
                break
        keys = parse_qs(body[:_FORM].decode("latin-1")).get("key", [""])
        if not self.access.may_stop(request, keys[0]):
            text = "To stop a search, open the address with the token that `evomerge dashboard` printed."
            return self._problem("not allowed", "Nothing was stopped", text, 403, base="../../")
        watch = self._watch(request.path_params["name"])
        try:
            driver = await run_in_threadpool(ask_to_stop, watch.path)
        except OSError as error:
            text = f"The request to stop cannot be written: {error.strerror or error}."
            return self._problem("not stopped", "Nothing was stopped", text, 409, base="../../")
        if driver is None:
            text = "No driver runs this search, so there is nothing to stop."
            return self._problem("not running", "Nothing was stopped", text, 409, base="../../")
        return RedirectResponse("./", status_code=303)

    # ---- events -------------------------------------------------------------------------------------------

    async def study_events(self, request: Request) -> Response:
        """The changes of a study, from all of it on.

        Args:
            request: The request, with the parameters of the page that asks.

        Returns:
            Server-sent events.
        """
        watch = self._watch(request.path_params["name"])
        one, other = (request.query_params.get(name, "")[:200] for name in ("one", "other"))
        sent: dict[str, str] = {}

        def head() -> str | None:  # before the panels, which take longer; a page that is new has its head
            return change(watch.head(), sent, head_only=True) if sent else None

        def panels() -> str | None:
            return change(watch.view(), sent, watch.pair(one, other) if one or other else None)

        return self._stream(head, panels)

    async def index_events(self, request: Request) -> Response:
        """The changes of the page of all studies.

        Args:
            request: The request.

        Returns:
            Server-sent events.
        """
        sent: dict[str, str] = {}

        def news() -> str | None:
            html = self._cards()
            if sent.get("cards") == digest(html):
                return None
            sent["cards"] = digest(html)
            head = {"html": html, "digest": digest(html), "title": "Studies · evomerge"}
            return json.dumps({"overview": head})

        return self._stream(news)

    def _stream(self, *news: Callable[[], str | None]) -> Response:
        """Events of what each of `news` has to tell, in this order, at every look."""
        if self._streams >= _STREAMS:
            return Response("too many pages are open", status_code=503)

        async def events() -> AsyncIterator[str]:
            self._streams += 1
            try:
                silent = _ALIVE
                while True:
                    for part in news:
                        text = await run_in_threadpool(part)
                        if text is not None:
                            yield f"data: {text}\n\n"
                            silent = 0.0
                    if silent >= _ALIVE:
                        yield ": \n\n"
                        silent = 0.0
                    await anyio.sleep(POLL)
                    silent += POLL
            finally:
                self._streams -= 1

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)

    # ---- what goes around every answer --------------------------------------------------------------------

    async def guard(self, request: Request, following: Callable[[Request], Awaitable[Response]]) -> Response:
        """Lets in who may read, and adds the headers of every answer.

        Args:
            request: The request.
            following: What answers it.

        Returns:
            The answer.
        """
        response = self.access.let_in(request)
        if response is None and not self.access.may_read(request):
            text = (
                "Open the address with ?token=… that `evomerge dashboard` printed where it runs; the browser "
                "then remembers it for a week."
            )
            response = self._problem("token needed", "This page needs its token", text, 401, base="")
        if response is None:
            response = await following(request)
        response.headers.update(HEADERS)
        if "cache-control" not in response.headers:
            is_static = "/static/" in request.url.path
            response.headers["Cache-Control"] = "no-cache" if is_static else "no-store"
        return response

    async def not_found(self, request: Request, error: Exception) -> Response:
        """The answer to an address that leads nowhere.

        Args:
            request: The request.
            error: What was raised.

        Returns:
            A page.
        """
        return self._problem("not found", "There is no such page", "", 404, base=self._base(request))

    async def failed(self, request: Request, error: Exception) -> Response:
        """The answer where a study is not there, or cannot be read.

        Args:
            request: The request.
            error: What was raised.

        Returns:
            A page with the error's own words.
        """
        status = 404 if isinstance(error, StudyError) else 503
        return self._problem(
            "not found", "This study cannot be shown", str(error), status, self._base(request)
        )

    # ---- parts --------------------------------------------------------------------------------------------

    def _watch(self, name: str) -> StudyWatch:
        if name not in self._watches or not self._watches[name].path.parent.is_dir():
            self._watches.pop(name, None)
            self._watches[name] = StudyWatch(paths.store_path(name, self.root))
        return self._watches[name]

    def _studies(self) -> list[dict[str, Any]]:
        rows = []
        for name in paths.studies(self.root):
            view = self._watch(name).head()
            if view.is_empty:
                continue
            row = {"name": name, "address": quote(name, safe=""), "overview": view.overview}
            rows.append(row | {"error": view.error})
        return rows

    def _cards(self) -> str:
        return render("cards.html", studies=self._studies(), root=str(self.root))

    def _panels(self, watch: StudyWatch, request: Request) -> str:
        """Panels as this page wants them, as HTML; each has the digest of its tables."""
        view, address = watch.view(), request.query_params
        asked = [address.get(name, "")[:200] for name in ("one", "other")]
        panels = []
        for panel in view.panels:
            shown: Panel | None = panel
            if panel.id == "candidates" and address:
                shown = watch.table(address)
            elif panel.id == "pair" and any(asked):
                shown = watch.pair(*asked)
            panels.append((shown or panel, view.messages[panel.id].table_digest if shown is panel else ""))
        return render("panels.html", panels=panels, query=TableQuery.of(address), error=view.error)

    def _page(self, request: Request, view: View) -> str:
        """A study's page with a mark where its panels belong."""
        assert view.overview is not None
        return render(
            "study.html",
            base="../../",
            overview=view.overview,
            overview_digest=view.head["digest"],
            panels_mark=_PANELS,
            address=f"?{request.url.query}" if request.url.query else "",
            **self._stop_form(request, view),
        )

    def _stop_form(self, request: Request, view: View) -> dict[str, Any]:
        assert view.overview is not None
        can_stop = view.overview.state == "running" and self.access.has_token(request)
        return {"can_stop": can_stop, "stop_key": self.access.stop_key if can_stop else ""}

    def _unreadable(self, request: Request, view: View) -> str:
        name = request.path_params["name"]
        if view.is_empty:
            text = "Its file holds no study yet: the search has not begun. This page does not follow it."
            return self._problem_page(name, "Nothing to show yet", text, "../../")
        advice = f"evomerge status {name} says more."
        return self._problem_page(name, "This study cannot be read", view.error, "../../", advice)

    @staticmethod
    def _base(request: Request) -> str:
        """The way from an address to the page of all studies."""
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        return "../" * max(0, path.count("/") - 1) or "./"

    def _problem(self, title: str, heading: str, message: str, status: int, base: str) -> Response:
        return HTMLResponse(self._problem_page(title, heading, message, base), status_code=status)

    @staticmethod
    def _problem_page(title: str, heading: str, message: str, base: str, advice: str = "") -> str:
        words = {"title": title, "heading": heading, "message": message, "advice": advice}
        return render("problem.html", base=base, **words)
