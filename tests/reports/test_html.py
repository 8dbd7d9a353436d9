"""The report as one HTML file: whole, small, safe with anybody's names, and readable without scripts."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evomerge.evaluation import Objective, Term
from evomerge.reports.html import study_html
from evomerge.reports.page import STATIC
from evomerge.store import Store
from tests.support import large_study
from tests.support.large_study import StudyPlan, make_study
from tests.support.toy import in_process


class Page(HTMLParser):
    """Elements of a page, and its texts outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open and data.strip():
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = make_study(tmp_path_factory.mktemp("html"), StudyPlan(candidates=120, population=20, name="small"))
    with Store.open(file) as store:
        return study_html(store)


def test_the_first_sentence_is_the_verdict_and_every_panel_has_its_numbers(report: str) -> None:
    page = Page(report)
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert sections[:3] == ["history", "beliefs", "tasks"]
    assert sum(tag == "table" for tag, _ in page.elements) >= len(sections)
    sentences = [text for text in page.texts if text.endswith(".")]
    assert sentences[0].startswith("small/")
    assert " on test (95 %" in sentences[0]


def test_the_report_loads_nothing_from_elsewhere(report: str) -> None:
    for tag, attributes in Page(report).elements:
        for name in ("src", "href", "action", "data", "srcset"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:")) or not value, f"{tag} {name}={value}"
    style = re.sub(r"data:[^)\"']*", "", re.search(r"<style>(.*?)</style>", report, re.DOTALL)[1])  # type: ignore[index]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_just_the_scripts_that_are_inside(report: str) -> None:
    policy = next(a["content"] for t, a in Page(report).elements if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    allowed = set(re.findall(r"sha256-([A-Za-z0-9+/=]+)", policy))
    scripts = re.findall(r"<script>(.*?)</script>", report, re.DOTALL)
    own = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts}
    assert own == allowed
    assert "unsafe-eval" not in policy


def test_names_that_are_html_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    tasks = (evil, "translation", "strings")
    monkeypatch.setattr(large_study, "MODELS", (evil, "lang", "string"))
    monkeypatch.setattr(large_study, "TASKS", tasks)
    terms = tuple(Term(task, subtasks=((task, 1.0),)) for task in tasks)
    monkeypatch.setattr(large_study, "OBJECTIVE", Objective(terms))
    file = make_study(tmp_path, StudyPlan(candidates=40, population=20, name="evil"), "paused")
    with Store.open(file) as store:
        text = study_html(store)
    page = Page(text)
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert "alert(2)</script>" not in text
    assert any(evil.partition("<")[2][:20] in text for text in page.texts)


def test_the_vendored_library_is_the_published_one() -> None:
    folder = STATIC / "echarts"
    sums = [line.split() for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in sums} == {f.name for f in folder.iterdir()} - {"SHA256SUMS"}
    for expected, name in sums:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
    assert "Apache License" in (folder / "LICENSE").read_text()


def test_report_writes_either_kind(tmp_path: Path) -> None:
    make_study(tmp_path, StudyPlan(candidates=40, population=20, name="one"))
    for name, start in (("r.html", "<!doctype html>"), ("r.md", "# one: ")):
        code, out, err = in_process("report", "one", "-o", tmp_path / name, "--root", tmp_path)
        assert code == 0, err
        assert "report of one" in out
        assert (tmp_path / name).read_text().startswith(start)
    assert (tmp_path / "r.html").stat().st_size < 2_000_000
    code, _, err = in_process("report", "one", "-o", tmp_path / "r.pdf", "--root", tmp_path)
    assert (code, "end it with .html or .md" in err) == (2, True)
    code, _, err = in_process("report", "one", "-o", tmp_path / "no" / "r.html", "--root", tmp_path)
    assert code == 3
    assert "cannot be written" in err
