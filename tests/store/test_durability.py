"""Faults of a study's file: damage, a full or read-only disk, a lost log, no locks, kill -9 anywhere."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evomerge.errors import ConfigError, EvomergeError, NoRoom, SetupError, StudyError
from evomerge.store import (
    BudgetEnd,
    NewTrial,
    Store,
    StudyFacts,
    file_systems,
    locks,
    migrations,
    stop_request,
)
from tests.support.stored import ITEMS, add, add_many, attempt, evaluation, everything, fill, recipe


def read(file: Path) -> None:
    """Reads all there is, as the verbs do; raises an error of ours where something is damaged."""
    with Store.open(file) as store:
        store.study()
        for trial in store.trials():
            store.recipe(trial.recipe_id)
            store.evaluations(trial.recipe_id)
        (
            store.activity.attempts(),
            store.activity.worker_uses(),
            store.activity.ends(),
            store.activity.runs(),
            store.front("search"),
        )
        if (found := store.check()) != "ok":
            raise StudyError(found)


@pytest.fixture
def filled(file: Path) -> Path:
    with Store.open(file, write=True) as store:
        fill(store)
    return file


def killed(file: Path, work: Callable[[], None]) -> None:
    """Runs `work` in a process that is then killed, with all it has open."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


# ---- damage ----------------------------------------------------------------------------------------------


def test_a_whole_store_is_ok(filled: Path) -> None:
    read(filled)
    assert all(everything(filled).values()), "every table has a row"


def columns() -> list[tuple[str, str]]:
    db = sqlite3.connect(":memory:")
    for script in migrations.MIGRATIONS:
        db.executescript(script)
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return [(table, row[1]) for table in tables for row in db.execute(f"PRAGMA table_info({table})")]


@pytest.mark.parametrize(("table", "column"), columns())
def test_another_value_in_any_column_is_found(table: str, column: str, filled: Path) -> None:
    """Pages that hang together, and a value that nobody stored."""
    with sqlite3.connect(filled) as db:
        old = db.execute(f"SELECT {column} FROM {table} LIMIT 1").fetchone()[0]
        new = old + 1000 if isinstance(old, int | float) else f"{old[:-1]}~" if old else 1
        row = db.execute(f"SELECT rowid FROM {table} LIMIT 1").fetchone()[0]
        db.execute("PRAGMA ignore_check_constraints = ON")
        db.execute(
            f"UPDATE {table} SET {column} = ? WHERE rowid = ?",
            (new if column != "id" or table in ("recipes", "item_sets") else 999, row),
        )
    db.close()
    with Store.open(filled) as store:
        found = store.check()
    assert found != "ok"
    with pytest.raises(StudyError, match="damaged"):
        Store.open(filled, write=True)


@pytest.mark.parametrize("table", ["evaluations", "trials", "sensitivity", "attempts"])
def test_a_row_that_is_gone_is_found(table: str, filled: Path) -> None:
    with sqlite3.connect(filled) as db:
        db.execute(f"DELETE FROM {table} WHERE rowid = (SELECT max(rowid) FROM {table})")
    db.close()
    with Store.open(filled) as store:
        assert "1 of 51 stored rows are gone" in store.check()


def test_an_index_that_is_gone_is_found(filled: Path) -> None:
    with sqlite3.connect(filled) as db:
        db.execute("DROP INDEX trials_by_recipe")
    db.close()
    with Store.open(filled) as store:
        assert "trials_by_recipe" in store.check()


def left_open(file: Path) -> None:
    """A store whose driver was killed: its last rows are in the log alone."""
    with Store.open(file, write=True) as store:
        fill(store, 16)

    def work() -> None:
        store = Store.open(file, write=True)
        for slot in range(16, 24):
            add(store, slot)

    killed(file, work)
    assert file.with_name("study.db-wal").stat().st_size


def test_a_log_that_is_gone_is_found(file: Path) -> None:
    left_open(file)
    copied = file.parent.with_name("copied")
    shutil.copytree(file.parent, copied)
    (copied / "study.db-wal").unlink()
    (copied / "study.db-shm").unlink()
    with Store.open(copied / "study.db") as store:
        assert "16 of 51 stored rows are gone" in store.check(), (
            "a trial and an evaluation of each of eight candidates"
        )
    with pytest.raises(StudyError, match="stored rows are gone"):
        Store.open(copied / "study.db", write=True)
    read(file)
    with Store.open(file, write=True) as store:
        assert store.count_trials() == 24


def damages(rng: random.Random, content: bytes) -> bytes:
    """The content with one random damage."""
    size, page = len(content), 4096
    kind = rng.randrange(6)
    at = rng.randrange(size)
    if kind <= 1:  # a bit; twice as often, it is the most likely to go unseen
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if kind == 2:
        return content[:at]
    first = at // page * page
    if kind == 3:
        return content[:first] + bytes(page) + content[first + page :]
    if kind == 4:
        other = rng.randrange(size) // page * page
        low, high = sorted((first, other))
        swapped = (
            content[:low]
            + content[high : high + page]
            + content[low + page : high]
            + content[low : low + page]
            + content[high + page :]
        )
        return swapped if low != high else content
    return content + rng.randbytes(rng.randrange(1, 9000))


@pytest.mark.parametrize("damaged", ["study.db", "study.db-wal", "study.db.rows"])
def test_no_damage_is_silent(damaged: str, file: Path) -> None:
    """Random bits, cuts, zeros, swaps, tails: all rows are right, or an error of ours says they are not."""
    left_open(file)
    true = everything(file)
    names = ("study.db", "study.db-wal", "study.db-shm", "study.db.rows")
    whole = {name: file.with_name(name).read_bytes() for name in names}
    rng, seen = random.Random(7), 0
    for turn in range(60):
        for name, content in whole.items():
            file.with_name(name).write_bytes(damages(rng, content) if name == damaged else content)
        file.with_name("study.db-shm").unlink()  # an index of the log, made anew
        try:
            read(file)
        except EvomergeError:
            seen += 1
            continue
        assert everything(file) == true, f"turn {turn}"
    assert seen >= (0 if damaged == "study.db.rows" else 12)


@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_opening_alone_changes_nothing(journal: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that is refused, for its settings say, is left as it is."""
    monkeypatch.setenv("EVOMERGE_JOURNAL", journal)
    with Store.open(file, write=True) as store:
        fill(store)
    before = file.read_bytes()
    Store.open(file, write=True).close()
    assert file.read_bytes() == before


def test_a_damaged_file_is_left_as_it_is(file: Path) -> None:
    """Also what is beside it: the log may hold what the file has lost."""
    left_open(file)
    content = bytearray(file.with_name("study.db-wal").read_bytes())
    content[len(content) // 2] ^= 1
    file.with_name("study.db-wal").write_bytes(content)
    before = {
        p.name: p.read_bytes()
        for p in file.parent.iterdir()
        if p.name not in ("study.db.lock", "study.db-shm")
    }
    for _ in range(2):
        with pytest.raises(StudyError, match="damaged"):
            Store.open(file, write=True)
    assert {p.name: p.read_bytes() for p in file.parent.iterdir() if p.name in before} == before


def test_a_driver_killed_while_it_makes_the_tables_is_no_damage(file: Path) -> None:
    for number in range(len(migrations.MIGRATIONS)):
        shutil.rmtree(file.parent)
        file.parent.mkdir()
        db = sqlite3.connect(file)
        for script in migrations.MIGRATIONS[:number]:
            db.executescript(script)
        db.execute(f"PRAGMA user_version = {number}")
        db.execute("PRAGMA journal_mode = WAL")
        db.close()
        with Store.open(file, write=True) as store:
            fill(store, 1)
        read(file)


def test_a_check_beside_a_driver_finds_nothing(file: Path) -> None:
    """Rows that come while it reads are no damage."""
    with Store.open(file, write=True) as store:
        fill(store, 1)
    pid = os.fork()
    if pid == 0:
        try:
            with Store.open(file, write=True) as store:
                for slot in range(1, 200):
                    add(store, slot)
        finally:
            os._exit(0)
    seen = set()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        with Store.open(file) as store:
            assert store.check() == "ok"
            seen.add(store.count_trials())
    assert len(seen) > 3


# ---- backup ----------------------------------------------------------------------------------------------


def test_a_backup_is_the_store_in_one_file(filled: Path) -> None:
    with Store.open(filled, write=True) as store:
        made = store.backup()
        assert made == filled.with_name("study.backup.db")
        assert everything(made) == everything(filled)
        add(store, 30)
        read(made)
    assert sorted(p.name for p in filled.parent.iterdir()) == [
        "study.backup.db",
        "study.db",
        "study.db.lock",
        "study.db.rows",
    ]


def test_a_backup_is_made_when_it_is_due(filled: Path) -> None:
    with Store.open(filled, write=True) as store:
        assert store.backup_every(0) is None, "nothing is new"
        add(store, 30)
        assert store.backup_every(60) is None, "too early"
        assert store.backup_every(0) == filled.with_name("study.backup.db")
        assert store.backup_every(0) is None
    assert everything(filled.with_name("study.backup.db")) == everything(filled)


def test_a_damaged_store_is_never_backed_up_over_a_good_copy(filled: Path) -> None:
    with Store.open(filled, write=True) as store:
        copy = store.backup()
        good = copy.read_bytes()
        with sqlite3.connect(filled) as db:
            db.execute("UPDATE trials SET slot = 77 WHERE id = 3")
        db.close()
        with pytest.raises(StudyError, match="table trials, row 3"):
            store.backup()
    assert copy.read_bytes() == good
    assert not list(filled.parent.glob("*.partial*"))


def test_the_way_back_that_the_error_names_is_one(filled: Path) -> None:
    with Store.open(filled, write=True) as store:
        store.backup()
        held = everything(filled)
        add(store, 30)
    content = filled.read_bytes()
    filled.write_bytes(content[:8192] + bytes(4096) + content[12288:])
    with pytest.raises(StudyError, match="damaged") as caught:
        Store.open(filled, write=True)
    way = re.search(r"To go on from there, in (.*): (mv .*)$", str(caught.value))
    assert way is not None, caught.value
    subprocess.run(["bash", "-ec", way[2]], cwd=way[1], check=True)
    with Store.open(filled, write=True) as store:
        assert store.check() == "ok"
    assert everything(filled) == held


def test_a_backup_killed_anywhere_leaves_a_whole_one(filled: Path) -> None:
    with Store.open(filled, write=True) as store:
        for slot in range(30, 300):
            add(store, slot)
        copy = store.backup()
    rng, rows = random.Random(2), everything(filled)
    for _ in range(15):
        pid = os.fork()
        if pid == 0:
            try:
                with Store.open(filled, write=True) as store:
                    while True:
                        store.backup()
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.02, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert everything(copy) == rows


# ---- a full disk, and one that is read-only --------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of six megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], capture_output=True, check=False
    ).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_a_full_disk_pauses_and_is_gone_on_with(
    journal: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_JOURNAL", journal)
    file, other = small_disk / "study.db", small_disk / "other"
    other.write_bytes(bytes(4_000_000 if journal == "WAL" else 5_400_000))
    with Store.open(file, write=True) as store:
        store.begin("trial", 3, "", {}, StudyFacts())
        with pytest.raises(NoRoom, match="make room") as caught:
            add_many(store, 5000)
        assert caught.value.exit_code == 75
        stored = store.count_trials()
        assert stored > 20
        with pytest.raises(NoRoom):
            store.activity.add_attempts([attempt(log="x" * 7_000_000)])
    with Store.open(file) as store:
        assert store.check() == "ok"
        assert [8 * t.generation + t.slot for t in store.trials()] == list(range(stored)), (
            "no half record, none lost"
        )
    other.unlink()  # room is made
    with Store.open(file, write=True) as store:
        for slot in range(stored, stored + 100):
            add(store, slot)
        assert store.check() == "ok"


def test_a_backup_without_room_does_not_end_the_search(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store.open(small_disk / "study.db", write=True) as store:
        fill(store, 100)
        subprocess.run(["mount", "-o", "remount,size=5m", small_disk], check=True)
        with pytest.raises(OSError, match="No space"):
            (small_disk / "rest").write_bytes(bytes(6_000_000))
        assert store.backup_every(0) is None
        assert "could not be backed up" in caplog.text
    assert [p.name for p in small_disk.glob("*backup*")] == []


def test_a_disk_that_is_read_only_asks_nobody_to_start_again(small_disk: Path) -> None:
    """By exit code 75 a batch system would, for ever."""
    file = small_disk / "study.db"
    with Store.open(file, write=True) as store:
        fill(store)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(SetupError, match="writable") as caught:
        Store.open(file, write=True)
    assert caught.value.exit_code == 3
    read(file)


# ---- the journal -----------------------------------------------------------------------------------------

MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:30 / /home rw - nfs4 server:/home rw
31 30 0:31 / /home/fast\040disk rw master:3 - xfs /dev/sdb rw
32 22 0:32 / /scratch rw - lustre mds:/scratch rw
33 22 0:33 / /gp rw - gpfs gp rw
34 22 0:34 / /remote rw - fuse.sshfs host:/ rw
35 22 0:35 / /plan rw - 9p host rw
36 22 0:36 / /new rw - somethingfs x rw
37 22 0:37 / /twice rw - ext4 /dev/sdc rw
38 37 0:38 / /twice rw - nfs server:/ rw
"""


@pytest.mark.parametrize(
    ("folder", "kind", "journal"),
    [
        ("/srv/x", "ext4", "WAL"), ("/home/me", "nfs4", "DELETE"), ("/home", "nfs4", "DELETE"),
        ("/homely", "ext4", "WAL"),
        ("/home/fast disk/x", "xfs", "WAL"), ("/scratch/x", "lustre", "DELETE"), ("/gp", "gpfs", "DELETE"),
        ("/remote/x", "fuse.sshfs", "DELETE"),
        ("/plan/x", "9p", "DELETE"), ("/new/x", "somethingfs", "DELETE"), ("/twice/x", "nfs", "DELETE"),
    ],
)  # fmt: skip
def test_the_journal_follows_the_file_system(
    folder: str, kind: str, journal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.delenv("EVOMERGE_JOURNAL", raising=False)
    assert file_systems.file_system(Path(folder), mounts) == kind
    assert file_systems.journal_mode(Path(folder), mounts) == journal
    monkeypatch.setenv("EVOMERGE_JOURNAL", "delete")
    assert file_systems.journal_mode(Path(folder), mounts) == "DELETE"
    monkeypatch.setenv("EVOMERGE_JOURNAL", "off")
    with pytest.raises(ConfigError, match="WAL or DELETE, got 'OFF'"):
        file_systems.journal_mode(Path(folder), mounts)


def test_a_machine_that_names_no_file_systems_has_local_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVOMERGE_JOURNAL", raising=False)
    assert file_systems.file_system(tmp_path, tmp_path / "none") is None
    assert file_systems.journal_mode(tmp_path, tmp_path / "none") == "WAL"


def test_this_machines_file_system_is_the_one_that_stat_names(tmp_path: Path) -> None:
    named = subprocess.run(
        ["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True
    ).stdout.strip()
    found = file_systems.file_system(tmp_path)
    assert (
        found == named
        or (found or "").startswith("ext") is named.startswith("ext") is True
        or found == "overlay"
    )


def journal(file: Path) -> str:
    db = sqlite3.connect(file)
    try:
        return str(db.execute("PRAGMA journal_mode").fetchone()[0])
    finally:
        db.close()


def test_a_journal_is_changed_without_loss(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that is moved to another disk, its driver killed before: what is in the log is taken over."""
    left_open(file)
    true = everything(file)
    monkeypatch.setenv("EVOMERGE_JOURNAL", "DELETE")
    with Store.open(file, write=True) as store:
        assert store.check() == "ok"
        with Store.open(file) as reader:
            assert reader.count_trials() == 24
    assert journal(file) == "delete"
    assert everything(file) == true
    monkeypatch.setenv("EVOMERGE_JOURNAL", "WAL")
    with Store.open(file, write=True) as store:
        add(store, 24)
    assert journal(file) == "wal"
    read(file)


def test_a_log_that_fails_at_the_first_write_is_done_without(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a network disk: the mode is set, and then the memory that it needs cannot be had."""
    monkeypatch.setenv("EVOMERGE_JOURNAL", "WAL")
    file.with_name("study.db-shm").mkdir()
    with Store.open(file, write=True) as store:
        assert "no write-ahead log" in caplog.text
        fill(store)
        with Store.open(file) as reader:
            assert reader.count_trials() == 24
    assert journal(file) == "delete"
    read(file)


def test_readers_beside_a_driver_without_a_log(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_JOURNAL", "DELETE")
    with Store.open(file, write=True) as store:
        fill(store, 8)
        with Store.open(file) as reader:
            for slot in range(8, 24):
                add(store, slot)
                assert reader.count_trials() == slot + 1
            assert reader.check() == "ok"


def test_kill_anywhere_without_a_log_loses_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for who looks before the next driver comes: a half done commit is rolled back, by a reader too."""
    monkeypatch.setenv("EVOMERGE_JOURNAL", "DELETE")
    rng, before = random.Random(5), 0
    with Store.open(file, write=True) as store:
        store.begin("trial", 3, "", {}, StudyFacts())
    for _ in range(20):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with Store.open(file, write=True) as store:
                    for slot in range(store.count_trials(), 2000):
                        add(store, slot)
                        os.write(writing, b".")
            finally:
                os._exit(1)
        os.close(writing)
        acknowledged = sum(len(os.read(reading, 1)) for _ in range(rng.randrange(1, 12)))
        time.sleep(rng.random() * 0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acknowledged += len(os.read(reading, 4096))
        os.close(reading)
        with Store.open(file) as reader:
            assert reader.check() == "ok"
            assert reader.count_trials() - before in (acknowledged, acknowledged + 1)
            before = reader.count_trials()
    assert before > 40


def test_a_reader_rolls_a_half_done_commit_back(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_JOURNAL", "DELETE")
    with Store.open(file, write=True) as store:
        fill(store)
    true = everything(file)

    def work() -> None:
        db = sqlite3.connect(file, isolation_level=None)
        db.execute("PRAGMA cache_size = 1")  # spills to the file before the commit
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE evaluations SET scores = scores || ?", ("9" * 5000,))
        db.execute("UPDATE trials SET label = ?", ("x" * 5000,))

    killed(file, work)
    assert file.with_name("study.db-journal").stat().st_size
    read(file)
    assert everything(file) == true


# ---- one driver ------------------------------------------------------------------------------------------


def no_locks(handle: int, how: int) -> None:
    """`flock` of a file system that has none."""
    raise OSError(errno.EOPNOTSUPP, "not supported")


def test_a_disk_without_locks_has_one_driver_too(file: Path) -> None:
    path = locks.lock_path(file)
    assert locks.driver(file, no_locks) is None
    held = locks.lock(path, no_locks)
    assert locks.driver(file, no_locks) == locks.Driver(socket.gethostname(), os.getpid(), True)
    with pytest.raises(StudyError, match=f"pid {os.getpid()}.*delete .*lease"):
        locks.lock(path, no_locks)
    locks.unlock(held)
    found = locks.driver(file, no_locks)
    assert found is not None
    assert found.alive is False
    locks.unlock(locks.lock(path, no_locks))


def test_the_lease_of_a_dead_process_is_taken_over_here_and_not_elsewhere(file: Path) -> None:
    path = locks.lock_path(file)
    killed(file, lambda: locks.lock(path, no_locks) and None)
    found = locks.driver(file, no_locks)
    assert found is not None
    assert found.alive is False
    locks.unlock(locks.lock(path, no_locks))
    Path(f"{path}.lease").write_text("host another, pid 1")
    assert locks.driver(file, no_locks) == locks.Driver("another", 1, None)
    with pytest.raises(StudyError, match="host another, pid 1"):
        locks.lock(path, no_locks)


# ---- stop ------------------------------------------------------------------------------------------------


def test_a_stop_reaches_the_driver_as_a_file(filled: Path) -> None:
    with Store.open(filled, write=True):
        own = locks.Driver(socket.gethostname(), os.getpid(), True)
        assert not stop_request.stop_requested(filled.parent)
        assert locks.driver(filled) == stop_request.ask_to_stop(filled) == own
        assert stop_request.stop_requested(filled.parent)
        stop_request.clear_stop(filled.parent)
        assert not stop_request.stop_requested(filled.parent)
        stop_request.clear_stop(filled.parent)


def test_a_stop_of_nothing_leaves_no_request(filled: Path) -> None:
    """The next driver must not find it."""
    assert stop_request.ask_to_stop(filled) is None
    assert not stop_request.stop_requested(filled.parent)


# ---- attempts, runs, ends --------------------------------------------------------------------------------


def test_attempts_come_back_and_say_what_workers_did(file: Path) -> None:
    own = [
        attempt(1, started=100.0, seconds=2.0),
        attempt(1, started=103.0, seconds=1.0, cause="failed", error="no"),
        attempt(1, started=104.0, seconds=1.0, cause="died", error="killed by 9"),
        attempt(
            2, started=900.0, seconds=5.0, pid=8
        ),  # its process is a new one; the night between is in no span
        attempt(
            1,
            started=100.0,
            seconds=4.0,
            worker="w1",
            device="cuda:1",
            pid=9,
            cause="hung",
            error="longer than 60 s",
        ),
    ]
    with Store.open(file, write=True) as store:
        assert (store.activity.busy_seconds(), store.activity.driven_seconds()) == (0.0, 0.0)
        store.activity.add_attempts(own[:2])
        store.activity.add_attempts(own[2:])
        store.activity.add_attempts([])
        assert store.activity.busy_seconds() == 13.0
    with Store.open(file) as store:
        assert store.activity.attempts() == own
        assert store.activity.busy_seconds() == 13.0
        first, second = store.activity.worker_uses()
        assert (first.worker, first.host, first.device, first.jobs, first.busy, first.span) == (
            "w0",
            "h",
            "cpu",
            3,
            9.0,
            10.0,
        )
        assert (first.first, first.last, first.failures, first.utilisation) == (
            100.0,
            905.0,
            {"died": 1},
            0.9,
        )
        assert (second.worker, second.jobs, second.failures, second.utilisation) == (
            "w1",
            0,
            {"hung": 1},
            1.0,
        )
        assert store.activity.failures() == [
            ("died", 1, "killed by 9"),
            ("failed", 1, "no"),
            ("hung", 1, "longer than 60 s"),
        ]


def test_the_time_of_drivers_adds_up_over_runs(file: Path) -> None:
    for run in range(2):
        with Store.open(file, write=True) as store:
            for _ in range(3):
                store.activity.add_driven_seconds(1.5)
            assert store.activity.driven_seconds() == 4.5 * (run + 1)
    with Store.open(file) as store:
        assert [(r.host, r.pid, r.seconds) for r in store.activity.runs()] == [
            (socket.gethostname(), os.getpid(), 4.5)
        ] * 2


def test_ends_are_kept_until_a_budget_grows(file: Path) -> None:
    with Store.open(file, write=True) as store:
        store.activity.set_end(0, 1, 7, "hours")
        store.activity.set_end(0, 0, 6, "hours")
        store.activity.set_end(0, 1, 9, "cost")
        assert store.activity.ends() == {(0, 0): BudgetEnd(6, "hours"), (0, 1): BudgetEnd(9, "cost")}
        store.activity.remove_ends()
        assert store.activity.ends() == {}


def test_trials_take_the_ids_and_islands_they_are_given(file: Path) -> None:
    with Store.open(file, write=True) as store:
        for number, island in ((9, 1), (2, 0)):
            own = recipe(number / 16)
            store.add_trial(
                NewTrial(
                    generation=number,
                    slot=0,
                    origin="sampled",
                    label=None,
                    genome=None,
                    parents=(),
                    recipe=own,
                    items=ITEMS,
                    evaluation=evaluation(own),
                    score=0.5,
                    island=island,
                    trial_id=number,
                )
            )
        assert [(t.id, t.generation, t.island) for t in store.trials()] == [(2, 2, 0), (9, 9, 1)]
        assert [store.last_trial_before(g) for g in (2, 3, 9, 10)] == [0, 2, 2, 9]
