"""Repositories of the Hub with a revision, offline, from a cache folder as huggingface_hub writes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from evomerge.checkpoints import open_parent
from evomerge.errors import CheckpointError
from tests.support.tiny_models import build
from tests.support.toy import in_process, search_file, zoo_folder

COMMITS = {"main": "a" * 40, "v2": "b" * 40, "refs/pr/3": "c" * 40}

Publish = Callable[[str, str, Path], Path]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Puts a folder into an offline cache as a revision of a repository: links to blobs, named by a ref."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repository: str, ref: str, model: Path) -> Path:
        folder = cache / f"models--{repository.replace('/', '--')}"
        commit = COMMITS[ref]
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (folder / "blobs").mkdir(exist_ok=True)
        for file in model.iterdir():
            blob = folder / "blobs" / f"{commit[0]}-{file.name}"
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
        named = folder / "refs" / ref
        named.parent.mkdir(parents=True, exist_ok=True)
        named.write_text(commit)
        return snapshot

    return put


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models with other weights."""
    return build(tmp_path_factory.mktemp("two"), torch.float32, names=("base", "math"))


def test_a_revision_is_a_branch_a_tag_a_pull_request_or_a_commit(
    publish: Publish, two: dict[str, Path]
) -> None:
    main = publish("org/name", "main", two["base"])
    tagged = publish("org/name", "v2", two["math"])
    asked = publish("org/name", "refs/pr/3", two["math"])
    opened = {
        ref: open_parent(f"org/name{ref}")
        for ref in ("", "@main", "@v2", "@refs/pr/3", f"@{COMMITS['v2']}", f"@{COMMITS['main']}")
    }
    assert {ref: parent.path for ref, parent in opened.items()} == {
        "": main,
        "@main": main,
        "@v2": tagged,
        "@refs/pr/3": asked,
        f"@{COMMITS['v2']}": tagged,
        f"@{COMMITS['main']}": main,
    }
    name = next(name for name in opened[""].tensors if "mlp" in name)
    assert torch.equal(opened["@v2"].tensor(name), opened[f"@{COMMITS['v2']}"].tensor(name))
    assert not torch.equal(opened["@v2"].tensor(name), opened["@main"].tensor(name))


def test_a_revision_that_is_not_in_the_cache_is_named_with_those_that_are(
    publish: Publish, two: dict[str, Path]
) -> None:
    publish("org/name", "main", two["base"])
    tagged = publish("org/name", "v2", two["math"])
    (tagged.parents[1] / "refs" / "v2").unlink()
    with pytest.raises(CheckpointError) as error:
        open_parent("org/name@v9")
    message = str(error.value)
    assert message.startswith("revision 'v9' of 'org/name' is neither a folder here")
    assert f"the cache has main, {COMMITS['v2']}; run `hf download org/name --revision v9`" in message
    assert str(tagged.parents[2]) in message


def test_a_repository_that_is_not_in_the_cache_is_fetched_by_the_named_command(publish: Publish) -> None:
    with pytest.raises(CheckpointError, match=r"'org/name' is neither .* run `hf download org/name` where"):
        open_parent("org/name")


def test_plan_takes_a_parent_by_its_revision_and_names_one_that_is_missing(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    tagged = publish("org/name", "v2", zoo_folder() / "math")
    file = search_file(tmp_path, "trial")
    settings = json.loads(file.read_text())
    settings["models"]["math"] = "org/name@v2"
    file.write_text(json.dumps(settings))
    code, out, err = in_process("plan", file, "--json")
    assert code == 0, err
    assert {model["name"]: model["path"] for model in json.loads(out)["models"]}["math"] == str(tagged)

    settings["models"]["math"] = "org/name@v3"
    file.write_text(json.dumps(settings))
    code, out, err = in_process("plan", file)
    assert (code, out) == (3, "")
    assert err.startswith("error[E210] ")
    assert "revision 'v3' of 'org/name'" in err
    assert "the cache has v2; run `hf download org/name --revision v3`" in err
