"""Every claim of the documents about durability and honesty names a test that there is."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.toy import REPO

CLAIMS = (REPO / "docs" / "claims.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[^`]+\.py)::(test_\w+)`", CLAIMS)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda value: str(value).rpartition("/")[2])
def test_a_claim_names_a_test_that_there_is(file: str, name: str) -> None:
    tree = ast.parse((REPO / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_claims_names_a_test() -> None:
    rows = [line for line in CLAIMS.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    rows = [row for row in rows if not row.startswith("| claim")]
    assert len(rows) > 20
    assert [row for row in rows if "::test_" not in row] == []


def test_what_the_readme_holds_to_is_among_the_claims() -> None:
    section = (REPO / "README.md").read_text().partition("## What it holds to")[2].partition("\n## ")[0]
    promises = re.findall(r"^- \*\*(.+?)\*\*", section, re.MULTILINE)
    assert len(promises) >= 4
    headings = re.findall(r"^## (.+)$", CLAIMS, re.MULTILINE)
    assert [promise for promise in promises if promise not in headings] == []
