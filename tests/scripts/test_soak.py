"""Short runs of every part of scripts/validation/soak.py, and what each of them must notice: a soak that
finds nothing has to be able to.
"""

from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ConfigError
from scripts.validation.soak_parts import damage, inputs, kills, machines, races, report, toy_study
from scripts.validation.soak_parts.toy_study import Work
from tests.support.toy import REPO, environment


@pytest.fixture(scope="module")
def over(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A small study that nobody broke off."""
    work = Work(tmp_path_factory.mktemp("soak") / "over", 32, references=6)
    work.folder.mkdir()
    assert toy_study.drive(work) == "done"
    return work


# ---- short runs --------------------------------------------------------------------------------------------


def test_a_driver_killed_again_and_again_ends_where_the_others_do_and_a_second_call_has_nothing_left_to_do(
    tmp_path: Path,
) -> None:
    found = kills.run(tmp_path, evaluations=48, kills=4, ray=0, seed=3)
    assert kills.failures(found) == []
    part = found["parts"][0]
    assert part["kills"] == 4
    assert part["acknowledged"] == part["evaluations"] > 48
    assert part["begun"] >= part["begun_unbroken"] == part["evaluations"]
    again = kills.run(tmp_path, evaluations=48, kills=4, ray=0, seed=3)
    assert again["parts"][0]["starts"] == part["starts"]
    with pytest.raises(SystemExit, match="other sizes"):
        kills.run(tmp_path, evaluations=49, kills=4, ray=0, seed=3)


def test_machines_that_fail_at_three_of_ten_attempts_change_no_row(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"evaluations": 4, "rate": 0.3, "seed": 0, "references": 2, "population": 2}
    found = machines.run(tmp_path, pools=("in-process", "processes"), **sizes)
    assert machines.failures(found) == []
    assert [part["pool"] for part in found["pools"]] == ["in-process", "processes"]
    for part in found["pools"]:
        assert part["causes"]["done"] == found["evaluations"]
        assert sum(part["faults"].values()) > 3
    file = tmp_path / "soak.md"
    file.write_text("# The soak\n\n## Drivers killed\n\nsaid\n")
    for _ in range(2):  # the second in the place of the first
        report.put(file, "machines", found, list(machines.lines(found)))
        text = file.read_text()
        assert text.count("## Machines that fail\n") == 1
        assert text.startswith("# The soak\n\n## Drivers killed\n\nsaid\n\n")
        assert "| processes |" in text


def test_of_two_drivers_one_runs(tmp_path: Path) -> None:
    found = races.run(tmp_path, races=2, evaluations=2000, seed=1)
    assert found["wrong"] == []
    assert (found["races"], found["one"], found["fresh"]) == (2, 2, 1)
    assert 0 < found["slowest"] < 1


def test_damage_is_found_or_harmless(tmp_path: Path) -> None:
    found = damage.run(tmp_path, damages=8, evaluations=16, seed=2)
    assert found["found"] == []
    assert sum(sum(own.values()) for own in found["ends"].values()) == 16
    assert sum(own["refused"] + own["found"] for own in found["ends"].values()) > 3
    assert {where.partition(",")[0] for where in found["ends"]} <= set(damage.STATES)


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_mutated_inputs_are_read_or_refused(kind: str) -> None:
    found = inputs.slice_(kind, 0, 60, 11, bytearray(8))
    assert found["found"] == []
    assert found["read"] > 2
    assert found["refused"] > 15
    assert found["read"] + found["refused"] == 60


def test_the_command_line_writes_what_a_part_came_to(tmp_path: Path) -> None:
    words = [
        str(REPO / "scripts" / "validation" / "soak.py"),
        "inputs",
        "--work",
        str(tmp_path),
        "--configs",
        "0",
        "--headers",
        "40",
        "--processes",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, *words], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| safetensors header | 40 |" in done.stdout
    assert "inputs: nothing found" in done.stdout


# ---- what they must notice ---------------------------------------------------------------------------------


def test_an_account_of_a_diary_tells_what_was_lost_repeated_and_interleaved(
    over: Work, tmp_path: Path
) -> None:
    assert toy_study.account(over).again == 0
    assert toy_study.account(over).acknowledged == toy_study.account(over).begun
    work = dataclasses.replace(over, folder=tmp_path)
    work.store.write_bytes(over.store.read_bytes())
    known = next(line for line in over.diary.read_text().splitlines() if line.startswith("ack")).split()[1:3]
    text = over.diary.read_text()
    mine = text.split()[1]
    work.diary.write_text(
        text + f"open 1\nbegin {' '.join(known)} 1\nack gone gone 1\nack late late {mine}\n"
    )
    found = toy_study.account(work)
    assert found.repeated == [" ".join(known)]
    assert found.lost == ["gone gone", "late late"]
    assert found.interleaved == [f"ack late late {mine}"]


def test_a_pool_that_blames_a_candidate_is_found() -> None:
    fine = {"pool": "ray", "differ": [], "failed": 0, "best": True}
    assert machines.failures({"pools": [fine]}) == []
    bad = {"differ": ["trials"], "failed": 2, "best": False}
    assert len(machines.failures({"pools": [fine, fine | bad]})) == 3


def test_rows_that_differ_in_one_score_are_told_apart(over: Work, tmp_path: Path) -> None:
    other = tmp_path / "study.db"
    other.write_bytes(over.store.read_bytes())
    assert toy_study.rows(other) == toy_study.rows(over.store)
    db = sqlite3.connect(other)
    db.execute("UPDATE evaluations SET score = score + 1e-9 WHERE id = 5")
    db.commit()
    db.close()
    ours, theirs = toy_study.rows(other), toy_study.rows(over.store)
    assert [table for table in ours if ours[table] != theirs[table]] == ["evaluations"]


def test_a_damage_that_no_one_reports_is_silent(over: Work, tmp_path: Path) -> None:
    with toy_study.Store.open(over.store) as store:
        before = damage.snapshot(store)
    assert damage.verdict(over.store, before, write=False) == ("correct", "")
    ended, said = damage.verdict(over.store, before | {"trials": before["trials"][:-1]}, write=False)
    assert (ended, said) == ("wrong", "silent: trials differ")


def test_a_traceback_a_hang_and_an_empty_error_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: BaseException) -> bool:
        raise error

    assert inputs.verdict(lambda: raises(ConfigError("a file that is wrong"))) == (
        "refused",
        "a file that is wrong",
    )
    assert inputs.verdict(lambda: raises(ConfigError("one\ntwo")))[0] == "refused", "it is shown as one line"
    for error in (ConfigError(""), KeyError("x"), RecursionError()):
        assert inputs.verdict(lambda e=error: raises(e))[0] == "wrong"  # type: ignore[misc]
    monkeypatch.setattr(inputs, "SECONDS", 0.05)
    inputs.slice_("recipe", 0, 0, 0, bytearray(8))  # takes the alarm's signal

    def turns() -> bool:
        while True:
            pass

    ended, said = inputs.verdict(turns)
    assert ended == "wrong"
    assert said.startswith("Hang")


def test_a_race_that_two_win_or_that_names_nobody_is_wrong(over: Work, tmp_path: Path) -> None:
    work = dataclasses.replace(over, folder=tmp_path)
    work.store.write_bytes(over.store.read_bytes())
    both: Any = [type("Process", (), {"pid": pid})() for pid in (11, 12)]
    refused = tmp_path / "refused"
    work.diary.write_text("open 11\nopen 12\n")
    assert "2 of the two ran" in races._judged(work, both, 0, refused)[0]
    work.diary.write_text("open 11\n")
    refused.write_text("12 1.5 somebody else is writing\n")
    wrong, seconds = races._judged(work, both, 0, refused)
    assert seconds == 1.5
    assert [said.split(" ")[0:2] for said in wrong] == [["refused", "after"], ["refused", "without"]]
