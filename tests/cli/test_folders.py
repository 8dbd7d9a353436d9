"""The folder of a study, from outside: gone, renamed, copied, without rights, with what others put there."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge.store import Store, integrity, paths
from tests.support.command_line import Call, one_line
from tests.support.toy import REPO, command, environment, search_file, stored_rows

# ---- a store that is gone ----------------------------------------------------------------------------------


def test_a_store_that_is_gone_is_refused_by_every_verb(root: Path, call: Call) -> None:
    folder = root / "small"
    with Store.open(folder / "study.db", write=True) as store:
        store.backup()
    before = stored_rows(folder / paths.BACKUP)
    (folder / "study.db").unlink()
    verbs = (
        ("run", root / "small.yaml", "--resume"),
        ("run", root / "small.yaml"),
        ("resume", "small"),
        ("status", "small"),
        ("show", "small/best"),
    )
    for words in verbs:
        code, out, err = call(*words, "--root", root)
        assert (code, out) == (2, ""), err
        line = one_line(err, "E300")
        assert "study.db is gone" in line
        assert f"cp {paths.BACKUP} study.db" in line
    code, out, err = call("status", "--root", root)
    assert code == 0
    assert "study.db is gone" in one_line(err, "E300")
    assert stored_rows(folder / paths.BACKUP) == before
    assert not (folder / "study.db").exists()


# ---- a start that fails ------------------------------------------------------------------------------------


def broken(folder: Path) -> Path:
    """A search file whose model is missing."""
    file = search_file(folder, "trial")
    settings = json.loads(file.read_text())
    settings["models"]["math"] = "./nowhere"
    file.write_text(json.dumps(settings))
    return file


def test_a_failed_start_deletes_nothing_that_it_did_not_make(tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "root" / "trial"
    folder.mkdir(parents=True)
    names = ("study.db.damaged", "study.db.bak", "study.db-notes", "study.db.rows.old", "notes.txt")
    for name in names:
        (folder / name).write_text(name)
    code, _, err = call("run", broken(tmp_path), "--root", tmp_path / "root")
    assert code == 3, err
    one_line(err, "E210")
    assert {p.name: p.read_text() for p in folder.iterdir()} == {name: name for name in names}


def test_a_failed_start_leaves_a_store_that_was_there(tmp_path: Path, call: Call) -> None:
    """One that was made by a start that was killed, and holds no study yet."""
    file = tmp_path / "root" / "trial" / "study.db"
    file.parent.mkdir(parents=True)
    Store.open(file, write=True).close()
    before = {p.name for p in file.parent.iterdir()}
    code, _, err = call("run", broken(tmp_path), "--root", tmp_path / "root")
    assert code == 3, err
    assert {p.name for p in file.parent.iterdir()} == before


def test_a_failed_start_leaves_a_folder_that_was_there(tmp_path: Path, call: Call) -> None:
    (tmp_path / "root" / "trial").mkdir(parents=True)
    assert call("run", broken(tmp_path), "--root", tmp_path / "root")[0] == 3
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["trial"]
    assert not list((tmp_path / "root" / "trial").iterdir())


# ---- places that cannot be written -------------------------------------------------------------------------


def without_privileges(*words: object) -> tuple[int, str, str]:
    """Runs a verb so that the modes of files hold for it, also for root: (exit code, stdout, stderr)."""
    dropped = "-dac_override,-dac_read_search"
    drop = ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}"] if os.getuid() == 0 else []
    done = subprocess.run(
        [*drop, *command(*words)],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def shut(root: Path) -> Iterator[Path]:
    """A root in which nothing may be written."""
    search_file(root, "other")
    paths_below = [root, *root.rglob("*")]
    for path in paths_below:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield root
    for path in paths_below:
        path.chmod(0o755)


def test_a_file_in_the_place_of_a_folder_is_one_line_and_code_three(tmp_path: Path, call: Call) -> None:
    search = search_file(tmp_path, "trial")
    (tmp_path / "file").write_text("")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "trial").write_text("")
    for root in (tmp_path / "file", tmp_path / "root", tmp_path / "file" / "below"):
        code, out, err = call("run", search, "--root", root)
        assert (code, out) == (3, ""), err
        line = one_line(err, "E200")
        assert str(root) in line
        assert "is no folder" in line
    assert (tmp_path / "root" / "trial").read_text() == ""


def test_an_export_into_a_place_that_is_no_folder_is_code_three(root: Path, call: Call) -> None:
    (root / "file").write_text("")
    code, out, err = call("export", "small/best", root / "file" / "below", "--root", root)
    assert (code, out) == (3, ""), err
    assert str(root / "file") in one_line(err, "E200")


@pytest.mark.parametrize(
    "words",
    [("run", "other.yaml"), ("run", "small.yaml", "--resume"), ("export", "small/best")],
    ids=str,
)
def test_a_place_without_rights_is_one_line_and_code_three(words: tuple[str, ...], shut: Path) -> None:
    """Not 75, which asks a batch system to start it again, and again."""
    verb, what, *more = words
    given = [shut / what] if verb == "run" else [what, shut / "out"]
    code, out, err = without_privileges(verb, *given, *more, "--root", shut)
    assert (code, out) == (3, ""), err
    line = one_line(err, "E200")
    assert str(shut) in line
    assert "cannot be written" in line


def test_reading_needs_no_rights_to_write(shut: Path) -> None:
    code, out, err = without_privileges("status", "--root", shut)
    assert (code, err) == (0, "")
    assert "small: done" in out


def test_what_may_not_be_read_is_one_line_and_hides_no_other_study(root: Path, call: Call) -> None:
    shutil.copytree(root / "small", root / "other")
    (root / "other" / "study.db").chmod(0)
    code, out, err = without_privileges("status", "--root", root)
    assert "small: done" in out
    assert str(root / "other") in one_line(err, "E200")
    code, out, err = without_privileges("status", "other", "--root", root)
    assert (code, out) == (3, ""), err
    assert "may not be read" in one_line(err, "E200")
    (root / "small.yaml").chmod(0)
    code, out, err = without_privileges("run", root / "small.yaml", "--root", root)
    assert (code, out) == (2, ""), err
    assert "cannot read" in one_line(err, "E100")


# ---- stores of strangers -----------------------------------------------------------------------------------


def test_status_lists_the_other_studies_beside_those_of_strangers(root: Path, call: Call) -> None:
    for name in ("trigger", "deep", "text", "folder", "name\x1b[2J\nsmall2: done"):
        shutil.copytree(root / "small", root / name)
    with sqlite3.connect(root / "trigger" / "study.db") as db:
        db.execute("CREATE TRIGGER t AFTER INSERT ON trials BEGIN SELECT 1; END")
    with sqlite3.connect(root / "deep" / "study.db") as db:
        db.execute("UPDATE study SET outcome = ?", ("[" * 100_000,))
    (root / "text" / "study.db").write_text("no database " * 1000)
    (root / "folder" / "study.db").unlink()
    (root / "folder" / "study.db").mkdir()
    code, out, err = call("status", "--root", root)
    assert code == 0
    assert "small: done" in out
    assert out.count("\n") == 2, "one line for each that can be read"
    assert "\x1b" not in out
    assert len(err.splitlines()) == 4
    assert all(line.startswith("error[E") for line in err.splitlines()), err
    assert "E000" not in err


def test_a_store_whose_scores_were_edited_is_not_listed_with_its_best(root: Path, call: Call) -> None:
    file = root / "small" / "study.db"
    with sqlite3.connect(file) as db:
        db.row_factory = sqlite3.Row
        db.execute("UPDATE study SET outcome = json_set(outcome, '$.best.test', 0.999)")
        integrity.seal(db, "study", 1)
    code, out, _ = call("status", "--root", root)
    assert code == 0
    assert "0.999" not in out
    assert "small: done" in out
    assert "damaged" in out
    code, out, _ = call("status", "small", "--root", root)
    assert "contradict" in out
