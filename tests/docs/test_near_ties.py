"""Where documents say how near bfloat16 scores are to lm-eval's, it is what was measured."""

from __future__ import annotations

import re

from tests.support.toy import REPO


def test_documents_claimed_lm_evals_numbers_where_near_ties_differ() -> None:
    measured = (REPO / "results" / "near_ties.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in measured.splitlines()]
    tasks = [row for row in rows if row and row[0].startswith("real_")]
    assert len(tasks) == 15
    items, values = (sum(int(row[column]) for row in tasks) for column in (1, 2))
    assert f"{values} of {items} test items" in measured
    scoring = " ".join((REPO / "docs" / "scoring.md").read_text().split())
    assert f"{values} of {items} test items" in scoring
    for page in ("scoring.md", "tasks.md"):
        text = " ".join((REPO / "docs" / page).read_text().split())
        claims = re.findall(r"its numbers.{0,60}", text)
        assert claims
        assert all("near-ties" in claim for claim in claims)
