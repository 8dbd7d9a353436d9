"""Where a search would run is checked before anything is opened; what is refused leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.config import loading
from evomerge.errors import ConfigError, SetupError
from evomerge.launch.placement import check_place
from tests.support.toy import evomerge, in_process, search_file


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster is named, none was begun on this machine, and there is no card."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def run(folder: Path, *words: object) -> tuple[int, str]:
    """(exit code, what was said) of a refused `run` in a folder with models that are not there."""
    file = search_file(folder, "trial")
    document = json.loads(file.read_text())
    document["models"] = {name: str(folder / "none" / name) for name in document["models"]}
    file.write_text(json.dumps(document))
    code, out, err = in_process("run", file, "--root", folder / "studies", *words)
    assert not (folder / "studies").exists() or not any((folder / "studies").iterdir())
    return code, out + err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--ray", "foo"), 3, "is HOST:PORT, got 'foo'"),
        (("--ray", "ray://x:10001"), 3, "is HOST:PORT"),
        (("--ray", "127.0.0.1:1"), 3, "no Ray cluster answers at 127.0.0.1:1"),
        (("--ray", "127.0.0.1:99999999"), 3, "127.0.0.1:99999999"),
        (("--ray", "127.0.0.1:²"), 3, "is HOST:PORT"),
        (("--ray", "a\nb:1"), 3, "no Ray cluster answers at"),
        (("--ray", "x" * 5000 + ":1"), 3, "no Ray cluster answers at"),
        (("--ray", "\udcff:1"), 3, "no Ray cluster answers at"),
        (("--ray", "auto"), 3, "no Ray cluster is found for 'auto'.*--ray local"),
        (("--gpus", "1"), 2, "--gpus .* add --ray"),
        (("--gpus", "0"), 2, "--gpus .* add --ray"),
        (("--ray", "local", "--gpus", "0.5"), 3, "0.5 of a GPU, and this machine has none"),
    ],
    ids=str,
)
def test_a_place_that_cannot_be_had_is_refused_before_a_model_is_opened(
    words: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    found, text = run(tmp_path, *words)
    assert found == code, text
    line = text.strip().splitlines()[-1]
    assert line.startswith("error[E")
    assert "E000" not in line
    import re

    assert re.search(said, line), line


@pytest.mark.parametrize(
    ("device", "code"), [("foo", 2), ("cuda", 3), ("cuda:99", 3), ("\x1b[2J", 2), ("cpu:-7", 2), ("²", 2)]
)
def test_an_odd_device_is_refused_before_a_model_is_opened(
    device: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_DEVICE", device)
    found, text = run(tmp_path)
    assert (found, "EVOMERGE_DEVICE" in text) == (code, True), text


def test_after_a_refused_start_the_corrected_command_starts(tmp_path: Path) -> None:
    file = search_file(tmp_path, "trial", evaluations=4, population=4)
    refused = evomerge("run", file, "--root", tmp_path, "--ray", "foo")
    assert refused.returncode == 3
    assert not (tmp_path / "trial").exists()
    done = evomerge("run", file, "--root", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "evaluated on the CPU" in done.stderr


def test_the_place_of_a_plain_search_is_said(tmp_path: Path) -> None:
    settings, _ = loading.load(str(search_file(tmp_path, "trial")))
    assert "CPU" in check_place(settings)
    asked = loading.placed(settings, ray="auto", workers=None, gpus=None, grace=None, reuse=None)
    with pytest.raises(SetupError, match="'auto'"):
        check_place(asked)


@pytest.mark.parametrize(
    "budget", ["²", "+²", "+" + "1" * 24, "1" * 24, "-5", "+-5", "1e3", "", "+", " 7", "٣"]
)
def test_an_odd_budget_is_one_sentence(budget: str, tmp_path: Path) -> None:
    file = search_file(tmp_path, "trial")
    settings, text = loading.load(str(file))
    from evomerge.store import Store, StudyFacts
    from evomerge.store.paths import store_path

    path = store_path("trial", tmp_path, new=True)
    path.parent.mkdir()
    with Store.open(path, write=True) as store:
        store.begin("trial", 0, text, {}, StudyFacts(axes=("x",)))
    code, out, err = in_process("resume", "trial", "--root", tmp_path, f"--evaluations={budget}")
    assert code == 2, out + err
    assert "E000" not in err
    with pytest.raises(ConfigError):
        loading.override(settings, {"evaluations": 10**23})
