"""Models that many tests read: built once a session, never written to."""

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import build
from tests.support.toy import in_process, search_file


@pytest.fixture(scope="module", autouse=True)
def one_ray_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Files of tests that start Ray take turns: two of them on two cores starve each other's start.

    Those that start it in this process have one token: a process keeps the first that it reads.
    """
    name = request.module.__name__.rpartition(".")[2]
    if not name.startswith(("test_ray_", "test_cluster_scripts")):
        yield
        return
    with (
        (Path(tempfile.gettempdir()) / "evomerge-tests-ray.lock").open("w") as turn,
        pytest.MonkeyPatch.context() as patch,
    ):
        fcntl.flock(turn, fcntl.LOCK_EX)
        if name.startswith("test_ray_"):
            patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("bf16"), torch.bfloat16)


@pytest.fixture(scope="session")
def tiny32(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("float32"), torch.float32)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished study 'small' over the zoo, beside its search file small.yaml.

    To be copied, not written to.
    """
    root = tmp_path_factory.mktemp("finished")
    file = search_file(root, "small", evaluations=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOMERGE_THREADS", "1")
        code, _, err = in_process("run", file, "--root", root)
    assert code == 0, err
    return root


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a study's store is to be made."""
    folder = tmp_path / "trial"
    folder.mkdir()
    return folder / "study.db"
