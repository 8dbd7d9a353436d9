"""A merged folder loads and ends its texts in transformers 4 too; the short form of the validation script."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.validation import older_transformers
from scripts.validation.older_transformers import KINDS, compare, transformers4

HERE = transformers4().is_dir()


def test_the_script_covers_twelve_architectures() -> None:
    assert len(KINDS) == 12


@pytest.mark.skipif(not HERE, reason="needs scripts/make_transformers4_env")
def test_a_merged_folder_loads_and_ends_its_texts_in_both_versions() -> None:
    rows, failed = compare(["qwen3, positions by YaRN"])
    assert failed == [], rows
    assert float(rows[0].split("|")[-2]) > 0.01  # what the keys for transformers 4 change


def test_a_folder_that_does_not_load_is_a_row_and_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str, folder: Path) -> Path:
        (folder / "out").mkdir()
        return folder / "out"

    monkeypatch.setattr(older_transformers, "merged", broken)
    monkeypatch.setattr(older_transformers, "transformers4", lambda: None)
    rows, failed = compare(["gpt2"])
    assert failed == ["gpt2"]
    assert "loads" not in rows[0]
