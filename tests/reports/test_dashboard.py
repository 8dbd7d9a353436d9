"""The dashboard's answers, without a browser: who may read and stop, what a damaged study says, prefixes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from evomerge.errors import ConfigError, SetupError
from evomerge.reports.dashboard.access import Access, is_loopback
from evomerge.reports.dashboard.app import Dashboard
from evomerge.reports.dashboard.server import Listening, serve
from evomerge.reports.dashboard.watch import StudyWatch, change
from evomerge.store.stop_request import stop_requested
from tests.support.browser import damage
from tests.support.large_study import StudyPlan, make_study, making
from tests.support.toy import command, environment, in_process

TOKEN = "a token of tests"
SMALL = StudyPlan(candidates=40, population=20, name="small")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    make_study(folder, SMALL)
    make_study(folder, StudyPlan(candidates=30, population=10, name="half way", budget=90), "paused")
    damage(make_study(folder, StudyPlan(candidates=60, population=20, name="broken")))
    return folder


def client(root: Path, *, is_local: bool = True, host: str = "localhost", prefix: str = "") -> TestClient:
    dashboard = Dashboard(root, Access(TOKEN, is_local), prefix)
    return TestClient(dashboard.app(), base_url=f"http://{host}", raise_server_exceptions=True)


@pytest.fixture
def local(root: Path) -> Iterator[TestClient]:
    with client(root) as opened:
        yield opened


def test_the_page_of_all_studies_has_a_card_for_each(local: TestClient) -> None:
    page = local.get("/")
    assert page.status_code == 200
    assert page.text.count('<li class="card') == 3
    assert 'href="study/half%20way/"' in page.text
    assert "cannot be read" in page.text


def test_a_damaged_study_is_a_card_and_no_fault_of_the_server(local: TestClient) -> None:
    page = local.get("/study/broken/")
    assert page.status_code == 200
    assert "This study cannot be read" in page.text
    assert "damaged" in page.text


def test_the_numbers_are_in_the_page_before_any_script(local: TestClient) -> None:
    text = local.get("/study/small/").text
    assert " on test (95 %" in text
    assert len(re.findall("<table", text)) > 8
    sorted_page = local.get("/study/small/?sort=objective&origin=parent").text
    assert "4 of 46 candidates" in sorted_page


@pytest.mark.parametrize(
    "path", ["/study/none/", "/study/../small/", "/study/..%2Fsmall/", "/nothing", "/static/"]
)
def test_an_address_that_leads_nowhere_is_not_found(local: TestClient, path: str) -> None:
    assert local.get(path).status_code == 404


def test_every_answer_has_a_policy_that_lets_nothing_in(local: TestClient) -> None:
    for path in ("/", "/study/small/", "/study/none/", "/static/page.css"):
        headers = local.get(path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_pages_have_no_script_or_style_inside_and_no_address_of_elsewhere(local: TestClient) -> None:
    for path in ("/", "/study/small/"):
        text = local.get(path).text
        assert "<style" not in text
        assert not re.search(r"<script(?![^>]*\bsrc=)", text)
        assert not re.search(r"\son\w+=|\sstyle=", text)
        assert not re.search(r'(src|href|action)="(https?:)?//', text)
        assert not re.search(r'(src|href|action)="/', text), "an absolute path breaks behind a prefix"


def test_on_a_loopback_address_other_names_need_the_token(root: Path) -> None:
    with client(root, host="127.0.0.1") as opened:
        assert opened.get("/").status_code == 200
    with client(root, host="rebound.example") as opened:
        assert opened.get("/study/small/").status_code == 401


def test_elsewhere_the_token_lets_in_once_and_is_then_a_cookie(root: Path) -> None:
    with client(root, is_local=False, host="node-7") as opened:
        assert opened.get("/").status_code == 401
        assert opened.get("/static/page.css").status_code == 401
        assert opened.get("/?token=wrong").status_code == 401
        entered = opened.get(f"/study/small/?sort=objective&token={TOKEN}", follow_redirects=False)
        assert entered.status_code == 303
        assert entered.headers["location"] == "./?sort=objective"
        assert TOKEN not in entered.headers["set-cookie"]
        assert "HttpOnly" in entered.headers["set-cookie"]
        opened.get(f"/?token={TOKEN}")
        assert opened.get("/").status_code == 200


def test_a_search_is_stopped_with_the_token_alone(tmp_path: Path) -> None:
    plan = StudyPlan(candidates=20, population=10, name="going", budget=100)
    with making(tmp_path, plan) as maker, client(tmp_path) as opened:
        maker.add_candidates(20)
        folder = maker.store.path.parent
        assert "Stop the search" not in opened.get("/study/going/").text
        assert opened.post("/study/going/stop", data={}).status_code == 403
        opened.get(f"/?token={TOKEN}")
        key = re.search(r'name="key" value="(\w+)"', opened.get("/study/going/").text)
        assert key is not None
        assert opened.post("/study/going/stop", data={"key": "0" * 64}).status_code == 403
        assert not stop_requested(folder)
        answer = opened.post("/study/going/stop", data={"key": key[1]}, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "./")
        assert stop_requested(folder)
    with client(tmp_path) as opened:
        opened.get(f"/?token={TOKEN}")
        assert opened.post("/study/going/stop", data={"key": key[1]}).status_code == 409


def test_a_folder_without_studies_says_what_to_do(tmp_path: Path) -> None:
    with client(tmp_path) as opened:
        assert "No studies here yet" in opened.get("/").text


def test_the_same_pages_are_behind_a_prefix(root: Path) -> None:
    with client(root, prefix="/proxy/8377") as opened:
        page = opened.get("/proxy/8377/study/small/")
        assert page.status_code == 200
        sheet = re.search(r'href="([^"]*page.css)"', page.text)
        assert sheet is not None
        assert opened.get(f"/proxy/8377/study/small/{sheet[1]}").status_code == 200
        assert opened.get("/study/small/").status_code == 200


# ---- changes -----------------------------------------------------------------------------------------------


def test_only_what_has_changed_is_sent(tmp_path: Path) -> None:
    plan = StudyPlan(candidates=40, population=10, name="going", budget=100)
    seconds = [0.0]
    with making(tmp_path, plan) as maker:
        maker.add_candidates(20)
        watch = StudyWatch(maker.store.path, clock=lambda: seconds[0])
        sent: dict[str, str] = {}
        first = json.loads(change(watch.view(), sent) or "")
        assert {panel["id"] for panel in first["panels"]} >= {"history", "candidates", "optimizer"}
        assert change(watch.view(), sent) is None
        maker.add_candidates(10)
        second = json.loads(change(watch.view(), sent) or "")
    assert "30 / 100" in second["overview"]["html"]
    changed = {panel["id"] for panel in second["panels"]}
    assert "history" in changed
    assert len(second["panels"][0]["chart"]["points"]) > len(first["panels"][0]["chart"]["points"])


def test_a_page_with_a_comparison_of_its_own_is_not_told_it_again_and_again(tmp_path: Path) -> None:
    plan = StudyPlan(candidates=40, population=10, name="going", budget=100)
    with making(tmp_path, plan) as maker:
        maker.add_candidates(20)
        watch = StudyWatch(maker.store.path)
        sent: dict[str, str] = {}
        first = json.loads(change(watch.view(), sent, watch.pair("11", "12")) or "")
        assert "pair" in {panel["id"] for panel in first["panels"]}
        for _ in range(2):
            assert change(watch.head(), sent, head_only=True) is None
            assert change(watch.view(), sent, watch.pair("11", "12")) is None


def test_the_head_is_told_before_the_panels(tmp_path: Path) -> None:
    plan = StudyPlan(candidates=40, population=10, name="going", budget=100)
    seconds = [0.0]
    with making(tmp_path, plan) as maker:
        maker.add_candidates(20)
        watch = StudyWatch(maker.store.path, clock=lambda: seconds[0])
        sent: dict[str, str] = {}
        change(watch.view(), sent)
        maker.add_candidates(10)
        head = json.loads(change(watch.head(), sent, head_only=True) or "")
        rest = json.loads(change(watch.view(), sent) or "")
    assert head.keys() == {"overview"}
    assert "30 / 100" in head["overview"]["html"]
    assert rest.keys() == {"panels"}


def test_a_search_whose_driver_is_gone_is_seen_without_a_change_of_its_file(tmp_path: Path) -> None:
    seconds = [0.0]
    with making(tmp_path, StudyPlan(candidates=20, population=10, name="going")) as maker:
        maker.add_candidates(20)
        watch = StudyWatch(maker.store.path, clock=lambda: seconds[0])
        states = [watch.view().overview]
    seconds[0] = 60.0
    states.append(watch.view().overview)
    assert [head.state for head in states if head is not None] == ["running", "interrupted"]


def test_a_study_that_is_mended_is_shown_again(tmp_path: Path) -> None:
    file = make_study(tmp_path, StudyPlan(candidates=60, population=20, name="broken"))
    whole = file.read_bytes()
    damage(file)
    watch = StudyWatch(file)
    assert watch.view().error
    file.write_bytes(whole)
    watch.clock = lambda: 1e9
    assert watch.view().error == ""


# ---- the verb ----------------------------------------------------------------------------------------------


def test_what_cannot_be_served_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no folder"):
        serve(tmp_path / "none", Listening(), print)
    with pytest.raises(SetupError, match="choose another with --port"):
        serve(tmp_path, Listening(host="203.0.113.1"), print)
    with pytest.raises(ConfigError, match="at least 8"):
        Listening(token="short")
    with pytest.raises(ConfigError, match="a slash before"):
        Listening(prefix="proxy/")
    code, _, err = in_process("dashboard", tmp_path / "none")
    assert (code, "no folder" in err) == (3, True)


@pytest.mark.parametrize("named", ["argument", "variable"])
def test_the_verb_serves_a_root_until_it_is_interrupted(tmp_path: Path, named: str) -> None:
    with making(tmp_path, StudyPlan(name="elsewhere")):
        words = ["dashboard", "--port", "0", *([tmp_path] if named == "argument" else [])]
        more = {"EVOMERGE_ROOT": str(tmp_path)} if named == "variable" else {}
        process = subprocess.Popen(
            command(*words),
            env=environment() | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        with urllib.request.urlopen(address, timeout=60) as page:
            assert "elsewhere" in page.read().decode()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def test_loopback_addresses_are_known() -> None:
    assert [is_loopback(host) for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "node-7")] == [False] * 4
