"""The compiled functions come from a file that nobody else could have written; an odd compiler is none."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge.methods.fused import c_library

COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, in a folder of ours alone, and a library of one function that is not loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EVOMERGE_NATIVE", raising=False)
    source = tmp_path / "one_function.c"
    source.write_text("int one_function(void) { return 1; }\n")
    monkeypatch.setattr(c_library, "_SOURCES", (source,))
    c_library.library.cache_clear()
    yield
    c_library.library.cache_clear()


def loaded_from() -> Path:
    """The file of the library as it is loaded now."""
    c_library.library.cache_clear()
    library = c_library.library()
    assert library is not None
    return Path(library._name)


def planted(file: Path) -> bytes:
    """A file in the place of the compiled one, which differs from it."""
    content = file.read_bytes() + b"\n planted"
    file.unlink()
    file.write_bytes(content)
    return content


@needs_compiler
def test_a_compiled_file_of_ours_is_loaded_again(tmp_path: Path) -> None:
    file = loaded_from()
    assert file.parent == tmp_path / "cache" / "evomerge"
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) & 0o022 == 0
    before = file.stat()
    assert loaded_from() == file
    assert file.stat() == before


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702])
def test_a_file_in_a_folder_that_others_can_write_is_compiled_again(mode: int) -> None:
    file = loaded_from()
    content = planted(file)
    file.parent.chmod(mode)
    again = loaded_from()
    assert again.read_bytes() != content
    assert stat.S_IMODE(again.parent.stat().st_mode) == 0o700


@needs_compiler
@pytest.mark.parametrize("what", ["mode", "link", "hard link", "owner"])
def test_a_file_that_others_may_have_written_is_compiled_again(what: str, tmp_path: Path) -> None:
    file = loaded_from()
    content = planted(file)
    if what == "mode":
        file.chmod(0o666)
    elif what == "link":
        file.rename(tmp_path / "theirs.so")
        file.symlink_to(tmp_path / "theirs.so")
    elif what == "hard link":
        os.link(file, tmp_path / "theirs.so")
    elif os.getuid() == 0:
        os.chown(file, 12345, -1)
    else:
        pytest.skip("only root can give a file away")
    again = loaded_from()
    assert again.read_bytes() != content
    assert not again.is_symlink()
    assert again.stat().st_uid == os.getuid()


@needs_compiler
@pytest.mark.parametrize("what", ["owner", "mode above", "a file", "a link"])
def test_a_cache_folder_that_is_not_ours_alone_is_not_used(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "cache"
    (home / "evomerge").mkdir(parents=True, mode=0o700)
    if what == "owner":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(home / "evomerge", 12345, -1)
    elif what == "mode above":
        home.chmod(0o777)
    elif what == "a file":
        (home / "evomerge").rmdir()
        (home / "evomerge").write_text("")
    else:
        (home / "evomerge").rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").chmod(0o777)
        (home / "evomerge").symlink_to(tmp_path / "elsewhere")
    file = loaded_from()
    assert not file.is_relative_to(home)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


COMPILERS = {
    "says nothing": "exit 0",
    "says no text": r"printf '\377\376\000'",
    "fails": "exit 3",
    "makes no library": 'echo odd 1.0; while [ $# -gt 1 ]; do [ "$1" = -o ] && echo x > "$2"; shift; done',
    "makes an empty library": f'[ "$1" = --version ] && echo 1 && exit; while [ "$1" != -o ]; do shift; '
    f'done; echo "int nothing;" > "$2.c"; exec {COMPILER} -shared -fPIC -o "$2" "$2.c"',
    "says very much": "yes compiler | head -c 3000000",
}


@needs_compiler
@pytest.mark.parametrize("what", COMPILERS)
def test_an_odd_compiler_is_no_compiler(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "odd-cc"
    program.write_text(f"#!/bin/sh\n{COMPILERS[what]}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CC", str(program))
    assert c_library.library() is None


@pytest.mark.parametrize(
    "value", ["", " ", "no such compiler", "/dev/null", "/", "cc -O2", "\x01", "a" * 5000]
)
def test_an_odd_name_of_a_compiler_is_no_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", value)
    assert c_library._compiler() == (shutil.which("cc") or COMPILER)


@needs_compiler
def test_without_a_home_the_functions_are_compiled_in_a_folder_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    for home in ("relative", "/dev/null"):
        monkeypatch.setenv("HOME", home)
        assert loaded_from().is_file()
