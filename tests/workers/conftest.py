"""Small models that workers merge."""

from __future__ import annotations

import pytest

from evomerge.checkpoints import Checkpoint
from tests.support.toy import llama


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("parents")
    base = llama(root / "base", 0, layers=3)
    return {"base": Checkpoint(base)} | {
        m: Checkpoint(llama(root / m, i, layers=3, near=base)) for i, m in enumerate("ab", 1)
    }
