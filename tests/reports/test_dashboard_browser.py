"""The dashboard and the report in a browser: no error, nothing from elsewhere, keyboard, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from evomerge.reports.dashboard.access import Access
from evomerge.reports.dashboard.app import Dashboard
from evomerge.reports.html import study_html
from evomerge.store import Store
from tests.support.browser import browser, damage, served, watched
from tests.support.large_study import StudyMaker, StudyPlan, make_study, making

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

LARGE = StudyPlan(candidates=5000, population=25, name="large", budget=5100)
CHARTS = ("history", "beliefs", "tasks", "tradeoff", "parallel", "timeline", "optimizer")


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, opened: Browser) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    make_study(folder, StudyPlan(candidates=60, population=20, name="paused", budget=90), "paused")
    make_study(folder, StudyPlan(candidates=60, population=20, name="routes", routes=True))
    damage(make_study(folder, StudyPlan(candidates=60, population=20, name="damaged")))
    return folder


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[StudyMaker]:
    """A search of 5,000 candidates that goes on."""
    with making(root, LARGE) as maker:
        maker.add_candidates(LARGE.candidates)
        yield maker


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with served(Dashboard(root, Access("a token of tests", is_local=True))) as url:
        yield url


def drawn(page: Page, panel: str) -> bool:
    return page.locator(f"#{panel}-chart canvas").count() > 0


def wait_for_charts(page: Page) -> None:
    """Until the first changes have come, which are all panels."""
    page.locator("body[data-updates]").wait_for(timeout=60_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_five_thousand_candidates_are_shown(
    opened: Browser, address: str, running: StudyMaker, scheme: str
) -> None:
    with watched(opened, address, scheme) as tab:
        tab.page.goto(f"{address}/study/large/")
        assert "5,000 / 5,100" in tab.page.locator(".tiles").inner_text()
        wait_for_charts(tab.page)
        assert [panel for panel in (*CHARTS, "failures") if not drawn(tab.page, panel)] == []
        shade = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness = sum(map(int, shade.removeprefix("rgb(").removesuffix(")").split(", ")))
        assert (lightness > 600) == (scheme == "light")
        tab.check()


def test_a_commit_is_shown_without_loading_the_page_again(
    opened: Browser, address: str, running: StudyMaker
) -> None:
    with watched(opened, address) as tab:
        tab.page.goto(f"{address}/study/large/")
        wait_for_charts(tab.page)
        tab.page.evaluate("window.notLoadedAgain = true")
        before = running.store.count_trials() - 6
        running.add_candidates(5)
        tab.page.locator(".tiles", has_text=f"{before + 5:,} / 5,100").wait_for(timeout=60_000)
        assert tab.page.evaluate("window.notLoadedAgain")
        tab.check()


def test_the_table_keeps_its_filters_in_the_address(opened: Browser, address: str, root: Path) -> None:
    with watched(opened, address) as tab:
        page = tab.page
        page.goto(f"{address}/study/paused/")
        wait_for_charts(page)
        page.locator("#candidates select[name=origin]").select_option("parent")
        assert page.locator("#candidates tbody tr").count() == 4
        page.get_by_role("button", name="candidate", exact=True).click()
        assert "origin=parent" in page.url
        assert "sort=-candidate" in page.url
        first = page.locator("#candidates tbody tr").first.inner_text()
        page.reload()
        wait_for_charts(page)
        assert page.locator("#candidates tbody tr").first.inner_text() == first
        tab.check()


def test_everything_is_reached_with_the_keyboard(opened: Browser, address: str, root: Path) -> None:
    with watched(opened, address) as tab:
        page = tab.page
        page.goto(f"{address}/study/paused/")
        wait_for_charts(page)
        reached = set()
        for _ in range(120):
            page.keyboard.press("Tab")
            reached.add(
                page.evaluate(
                    "(() => { const e = document.activeElement; const s = e.closest('section');"
                    "return [s ? s.id : '', e.tagName.toLowerCase()].join(' '); })()"
                )
            )
        needed = {
            " button",
            " a",
            "beliefs input",
            "tradeoff select",
            "candidates input",
            "candidates button",
        }
        assert needed <= reached
        assert {"pair input", "history summary"} <= reached
        page.locator("#beliefs input[type=range]").focus()
        before = page.locator("#beliefs output").inner_text()
        page.keyboard.press("ArrowLeft")
        assert page.locator("#beliefs output").inner_text() != before
        tab.check()


def test_the_reader_switches_between_light_and_dark(opened: Browser, address: str, root: Path) -> None:
    with watched(opened, address) as tab:
        page = tab.page
        page.goto(f"{address}/study/paused/")
        wait_for_charts(page)
        shade = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(shade)
        page.locator("button.theme").press("Enter")
        assert page.evaluate(shade) != before
        page.reload()
        assert page.evaluate(shade) != before
        tab.check()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/", "cannot be read"),
        ("/study/paused/", "The search is paused"),
        ("/study/damaged/", "This study cannot be read"),
        ("/study/routes/", "Routes"),
    ],
)
def test_every_state_has_its_page(opened: Browser, address: str, root: Path, path: str, text: str) -> None:
    with watched(opened, address) as tab:
        tab.page.goto(address + path)
        assert text in tab.page.locator("main").inner_text()
        if path == "/study/routes/":
            wait_for_charts(tab.page)
            assert drawn(tab.page, "routes")
        tab.check()


def test_two_candidates_are_chosen_and_compared(opened: Browser, address: str, root: Path) -> None:
    with watched(opened, address) as tab:
        page = tab.page
        page.goto(f"{address}/study/routes/")
        page.locator("#pair input[name=other]").fill("lang")
        page.locator("#pair button").click()
        page.wait_for_url("**other=lang**")
        wait_for_charts(page)
        assert "lang" in page.locator("#pair table").first.inner_text()
        tab.check()


def test_the_report_opens_from_a_file(opened: Browser, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    with Store.open(root / "routes" / "study.db") as store:
        file.write_text(study_html(store))
    with watched(opened, "file://") as tab:
        tab.page.goto(file.as_uri())
        tab.page.wait_for_selector("#history-chart canvas")
        assert [panel for panel in (*CHARTS, "pair", "routes") if not drawn(tab.page, panel)] == []
        assert tab.page.locator("#candidates tbody tr").count() == 25
        tab.page.get_by_role("button", name="Next").click()
        assert "page 2 of 3" in tab.page.locator("#candidates .pager").inner_text()
        tab.check()


def test_the_report_is_read_without_scripts(opened: Browser, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    with Store.open(root / "routes" / "study.db") as store:
        file.write_text(study_html(store))
    context = opened.new_context(java_script_enabled=False)
    try:
        page = context.new_page()
        page.goto(file.as_uri())
        assert not page.locator("#history-chart").is_visible()
        assert page.locator("#history table").is_visible()
        assert page.locator("#tasks table").is_visible()
    finally:
        context.close()
