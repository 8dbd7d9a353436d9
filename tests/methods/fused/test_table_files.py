"""Tables on disk: the numbers that were measured, or none; never another table's, never a failure."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from evomerge.methods import random_masks
from evomerge.methods.fused import c_library, one_pass, table_files
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.table_files import TableFiles
from evomerge.methods.fused.weighted_sum import MaskKind, Summand, TensorPair

HASHES = {"base": "b" * 64, "math": "a" * 64, "code": "c" * 64}
ID = (("math", "up"), ("base", "up"))
WHAT = ("top table",)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    c_library.library()  # from the usual folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "evomerge" / "tables"


def written(files: TableFiles) -> Path:
    """The one file after a table was written."""
    files.write(ID, WHAT, [np.arange(5), np.arange(3, dtype=np.float32)])
    assert files.folder is not None
    [file] = files.folder.iterdir()
    return file


def test_a_table_is_read_as_it_was_written_by_another_process() -> None:
    file = written(TableFiles(HASHES))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = TableFiles(HASHES).read(ID, WHAT)
    assert found is not None
    assert [x.tolist() for x in found] == [[0, 1, 2, 3, 4], [0.0, 1.0, 2.0]]
    assert [x.dtype for x in found] == [np.arange(5).dtype, np.dtype(np.float32)]


@pytest.mark.parametrize("what", ["a bit", "cut short", "empty", "longer", "another table's", "no table"])
def test_a_file_that_is_not_whole_is_none(what: str) -> None:
    files = TableFiles(HASHES)
    file = written(files)
    data = file.read_bytes()
    if what == "a bit":
        data = data[:100] + bytes([data[100] ^ 1]) + data[101:]
    elif what == "cut short":
        data = data[:-1]
    elif what == "empty":
        data = b""
    elif what == "longer":
        data += b"x"
    elif what == "another table's":
        file.unlink()
        files.write((("code", "up"), ("base", "up")), WHAT, [np.zeros(5)])
        [other] = file.parent.iterdir()
        data = other.read_bytes()
    else:
        data = table_files._checksum(file.stem, b"no table") + b"no table"
    file.write_bytes(data)
    assert files.read(ID, WHAT) is None
    files.write(ID, WHAT, [np.ones(2)])
    again = files.read(ID, WHAT)
    assert again is not None
    assert again[0].tolist() == [1.0, 1.0]


def test_other_content_other_tensors_and_other_tables_have_files_of_their_own() -> None:
    files = TableFiles(HASHES)
    written(files)
    assert TableFiles(HASHES | {"math": "d" * 64}).read(ID, WHAT) is None
    assert TableFiles(HASHES | {"base": "d" * 64}).read(ID, WHAT) is None
    assert files.read((("math", "down"), ("base", "up")), WHAT) is None
    assert files.read(ID, ("hashes", (1, 2))) is None
    renamed = TableFiles({"x": HASHES["math"], "y": HASHES["base"]})
    assert renamed.read((("x", "up"), ("y", "up")), WHAT) is not None


@pytest.mark.parametrize(
    "pair_id", [None, "t", ("t", 0), (("other", "up"), ("base", "up")), (("math", "up"),)]
)
def test_a_model_without_a_hash_has_no_file(pair_id: object, cache: Path) -> None:
    files = TableFiles(HASHES | {"other": ""})
    files.write(pair_id, WHAT, [np.zeros(2)])
    assert files.read(pair_id, WHAT) is None
    assert list(cache.iterdir()) == []


def test_many_writers_at_once_leave_one_whole_file(cache: Path) -> None:
    arrays = [np.arange(5000)]

    def write() -> None:
        for _ in range(10):
            TableFiles(HASHES).write(ID, WHAT, arrays)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(cache.iterdir())) == 1
    found = TableFiles(HASHES).read(ID, WHAT)
    assert found is not None
    assert np.array_equal(found[0], arrays[0])


def test_the_least_recently_used_tables_make_room(cache: Path) -> None:
    files = TableFiles(HASHES)
    for number in range(4):
        files.write(ID, ("top table", number), [np.zeros(1000)])
        newest = max(cache.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    size = newest.stat().st_size
    later = TableFiles(HASHES, most_bytes=4 * size)  # half of it stays for old ones
    assert [later.read(ID, ("top table", n)) is None for n in range(4)] == [True, True, False, False]
    for number in range(10, 20):
        later.write(ID, ("top table", number), [np.zeros(1000)])
    assert sum(file.stat().st_size for file in cache.iterdir()) <= 4 * size


@pytest.mark.parametrize("what", ["others can write", "a file"])
def test_a_folder_that_is_not_ours_alone_is_not_used(what: str, cache: Path) -> None:
    cache.parent.mkdir(mode=0o700)
    if what == "a file":
        cache.write_text("")
    else:
        cache.mkdir()
        cache.chmod(0o777)
    files = TableFiles(HASHES)
    assert files.folder is None
    files.write(ID, WHAT, [np.zeros(2)])
    assert files.read(ID, WHAT) is None


def test_a_folder_that_goes_away_stops_nothing(cache: Path) -> None:
    files = TableFiles(HASHES)
    cache.rmdir()
    files.write(ID, WHAT, [np.zeros(2)])
    assert files.read(ID, WHAT) is None


def test_a_search_reads_what_another_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(70_000, generator=g).bfloat16()
    pair = TensorPair(base, (base.float() + 0.01 * torch.randn(70_000, generator=g)).bfloat16(), ID)
    random = Summand(MaskKind.RANDOM, 1.0, key=(1, 3), bound=random_masks.bound(0.3))

    def answers() -> list[object]:
        tables = MagnitudeTables(build=True)
        tables.keep_on_disk(TableFiles(HASHES))
        top = tables.top(pair, 35_000)
        return [top, tables.scale(pair, random), tables.scale(pair, Summand(MaskKind.BAND, 1.0, inner=top))]

    measured = answers()
    for name in ("backend_for", "l1_norms", "largest_difference"):
        monkeypatch.setattr(one_pass, name, None)
    assert answers() == measured
