"""A study's file that is gone, replaced or moved: nothing begins anew, no larger backup is overwritten."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from evomerge.errors import Paused, StudyError
from evomerge.store import Store, StudyFacts, paths
from tests.support.stored import add, everything, fill

JOURNALS = ("WAL", "DELETE")


def filled(file: Path, trials: int = 24, backup: bool = True) -> None:
    """A closed store with its backup."""
    with Store.open(file, write=True) as store:
        fill(store, trials)
        if backup:
            store.backup()


def remove(file: Path) -> None:
    """Removes the file and its log, as `rm study.db*` does, but not what is beside it."""
    for name in ("study.db", "study.db-wal", "study.db-shm"):
        file.with_name(name).unlink(missing_ok=True)


@pytest.mark.parametrize("left", ["count and backup", "count", "backup", "earlier backup", "log"])
def test_a_store_that_is_gone_does_not_begin_anew(left: str, file: Path) -> None:
    filled(file, backup="backup" in left)
    remove(file)
    if "count" not in left:
        file.with_name("study.db.rows").unlink()
    if left == "earlier backup":
        file.with_name(paths.BACKUP).rename(file.with_name(paths.EARLIER_BACKUP))
    if left == "log":
        file.with_name("study.db-wal").write_bytes(bytes(4096))
    before = {p.name: p.read_bytes() for p in file.parent.iterdir() if p.name != "study.db.lock"}
    for write in (True, False):
        with pytest.raises(StudyError, match="is gone") as caught:
            Store.open(file, write=write)
        assert str(file) in str(caught.value)
    after = {p.name: p.read_bytes() for p in file.parent.iterdir() if p.name != "study.db.lock"}
    assert after == before, "what is left is left as it is"


def test_the_way_back_from_a_store_that_is_gone_is_one(file: Path) -> None:
    filled(file)
    true = everything(file)
    remove(file)
    with pytest.raises(StudyError) as caught:
        Store.open(file, write=True)
    way = re.search(r"in (\S+): (rm -f .*|cp .*)$", str(caught.value))
    assert way is not None, caught.value
    subprocess.run(["bash", "-ec", way[2]], cwd=way[1], check=True)
    with Store.open(file, write=True) as store:
        assert store.check() == "ok"
    assert everything(file) == true


@pytest.mark.parametrize("smaller", ["an older copy", "begun anew"])
def test_a_smaller_store_never_overwrites_a_larger_backup(smaller: str, file: Path) -> None:
    """Whoever put a file in the place of the one that is gone, the copy with more rows stays."""
    with Store.open(file, write=True) as store:
        fill(store, 8)
        old = store.backup(file.with_name("old.db"))
        for slot in range(8, 24):
            add(store, slot)
        kept = store.backup()
    good = everything(kept)
    content = kept.read_bytes()
    remove(file)
    for name in ("study.db.rows", paths.BACKUP):
        file.with_name(name).unlink()
    if smaller == "an older copy":
        old.rename(file)
    with Store.open(file, write=True) as store:
        if smaller == "begun anew":
            fill(store, 7)
        kept.write_bytes(content)
        with pytest.raises(StudyError, match="the backup is not overwritten"):
            store.backup()
        add(store, 30)
        with pytest.raises(StudyError, match="the backup is not overwritten"):
            store.backup_every(0)
    assert everything(kept) == good
    with pytest.raises(StudyError, match=r"study\.db (holds \d+ rows|is not the study)"):
        Store.open(file, write=True)
    assert not list(file.parent.glob("*.partial*"))


def test_a_backup_of_another_study_is_not_overwritten(file: Path) -> None:
    filled(file, 8)
    other = file.parent.with_name("other") / "study.db"
    other.parent.mkdir()
    with Store.open(other, write=True) as store:
        store.begin("other", 4, "", {}, StudyFacts())
        for slot in range(24):
            add(store, slot)
    shutil.copy(other, file)
    file.with_name("study.db.rows").unlink()
    before = file.with_name(paths.BACKUP).read_bytes()
    with pytest.raises(StudyError, match="is not the study that its backup"):
        Store.open(file, write=True)
    assert file.with_name(paths.BACKUP).read_bytes() == before


def test_the_last_two_backups_are_kept(file: Path) -> None:
    with Store.open(file, write=True) as store:
        fill(store, 8)
        first = everything(store.backup())
        add(store, 8)
        second = everything(store.backup())
        assert everything(file.with_name(paths.EARLIER_BACKUP)) == first
        add(store, 9)
        store.backup()
    assert everything(file.with_name(paths.EARLIER_BACKUP)) == second
    assert everything(file.with_name(paths.BACKUP)) == everything(file)


def test_a_damaged_backup_takes_the_place_of_no_good_one(file: Path) -> None:
    with Store.open(file, write=True) as store:
        fill(store, 8)
        first = everything(store.backup())
        add(store, 8)
        store.backup()
        copy = file.with_name(paths.BACKUP)
        copy.write_bytes(copy.read_bytes()[:5000])
        add(store, 9)
        store.backup()
    assert everything(file.with_name(paths.EARLIER_BACKUP)) == first
    assert everything(file.with_name(paths.BACKUP)) == everything(file)


@pytest.mark.parametrize("journal", JOURNALS)
def test_a_driver_whose_file_is_removed_stops_and_saves_what_it_has(
    journal: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_JOURNAL", journal)
    with Store.open(file, write=True) as store:
        fill(store, 8)
        add(store, 8)
        true = [trial.recipe_id for trial in store.trials()]
        remove(file)
        with pytest.raises(Paused, match="was removed") as caught:
            add(store, 9)
    assert caught.value.exit_code == 75
    assert "study.backup.db" in str(caught.value)
    assert not file.exists()
    with Store.open(file.with_name(paths.BACKUP)) as saved:
        assert [trial.recipe_id for trial in saved.trials()] == true, "all that was acknowledged is saved"


@pytest.mark.parametrize("journal", JOURNALS)
def test_a_driver_whose_folder_is_renamed_stops(
    journal: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_JOURNAL", journal)
    moved = file.parent.with_name("moved")
    with Store.open(file, write=True) as store:
        fill(store, 8)
        file.parent.rename(moved)
        with pytest.raises(Paused, match="moved or renamed") as caught:
            add(store, 9)
    assert caught.value.exit_code == 75
    assert not file.parent.exists()
    with Store.open(moved / "study.db", write=True) as store:
        assert store.check() == "ok"
        assert store.count_trials() == 8


def test_a_driver_whose_file_is_replaced_stops(file: Path) -> None:
    with Store.open(file, write=True) as store:
        fill(store, 8)
        store.backup()
        beside = file.with_name("copy")
        shutil.copy(file.with_name(paths.BACKUP), beside)
        os.replace(beside, file)
        with pytest.raises(Paused, match="another file"):
            add(store, 9)


# ---- two drivers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", JOURNALS)
@pytest.mark.parametrize("way", ["lock deleted", "link", "second name"])
def test_a_second_driver_is_refused_whatever_became_of_the_lock(
    way: str, journal: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row is of one driver: the file itself is locked, not only the lock beside it."""
    monkeypatch.setenv("EVOMERGE_JOURNAL", journal)
    other = file.parent.with_name("other") / "study.db"
    other.parent.mkdir()
    with Store.open(file, write=True) as store:
        fill(store, 4)
        if way == "lock deleted":
            other = file
            file.with_name("study.db.lock").unlink()
        elif way == "link":
            other.symlink_to(file)
        else:
            other.hardlink_to(file)
        for _ in range(2):
            with pytest.raises(StudyError, match="another process is writing"):
                Store.open(other, write=True)
        add(store, 5)
        assert store.check() == "ok"
        with Store.open(file) as reader:
            assert reader.count_trials() == 5, "readers are kept out by no lock"
    if way != "second name":
        with Store.open(other, write=True) as store:
            assert store.count_trials() == 5


def test_a_driver_that_has_ended_leaves_no_lock_to_its_children(file: Path) -> None:
    """A process that was forked while the store was open holds what it inherited, and no lock."""
    reading, writing = os.pipe()
    with Store.open(file, write=True) as store:
        fill(store, 4)
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        with Store.open(file, write=True) as store:
            add(store, 5)
    finally:
        os.write(writing, b"x")
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
