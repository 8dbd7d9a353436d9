"""Tables of `plan`, `compare` and `status` as text."""

from __future__ import annotations

from typing import Any

from evomerge.cli.analysis_tables import _model_lines, _task_lines, comparison_table
from evomerge.cli.study_tables import study_table
from evomerge.reports.tally import Figures

LONG = "real_blimp_sentential_negation_npi_scope"


def task(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "task": name,
        "metric": "exact_match",
        "filter": None,
        "weight": 1.0,
        "higher_is_better": True,
        "soft": [],
        "items": {"search": 7, "validation": 8, "test": 9},
        "items_of_a_generation": 5,
    } | changes


def test_long_names_ran_into_the_next_column() -> None:
    heading, *lines = _task_lines([task(LONG, metric="acc_norm_of_a_long_name"), task("gsm8k")])
    for line, name in zip(lines, (LONG, "gsm8k"), strict=True):
        assert line.split()[0] == name
    starts = {heading.index("metric"), lines[0].index("acc_norm_of"), lines[1].index("exact_match")}
    assert len(starts) == 1
    assert len({line.index("   none") for line in lines}) == 1

    models = [{"name": LONG, "base": True}, {"name": "b", "base": False}]
    sizes = {"parameters": 1, "dtype": "f", "bytes": 1, "architecture": "A", "layers": 1, "path": "p"}
    assert all(
        line[2:].split("A, 1 layers")[0].endswith(" ") for line in _model_lines([m | sizes for m in models])
    )

    row = {"task": LONG, "items": 5, "higher_is_better": False, "scores": [0.5], "differences": []}
    candidate = {"name": "a/1", "id": 1, "study": "a", "label": None}
    data = {"items": 5, "candidates": [candidate], "notes": [], "rows": [row]}
    assert f"{LONG} ↓ " in comparison_table(data, "test")


def test_the_chosen_filter_was_shown_nowhere() -> None:
    """gsm8k has strict-match and flexible-extract, and which one is searched by decides what is found."""
    _, first, second = _task_lines([task("gsm8k", filter="strict-match"), task("piqa", metric="acc")])
    assert first.split()[:3] == ["gsm8k", "exact_match,", "strict-match"]
    assert second.split()[:3] == ["piqa", "acc", "1"]
    row = {"id": 3, "label": None, "origin": "cma", "search": 0.5}
    empty = ("references", "retention", "pareto", "agreements", "flat", "alike", "labels", "stages")
    lists: dict[str, Any] = {key: [] for key in empty}
    numbers = dict.fromkeys(("seed", "evaluations", "generations", "failed", "partial", "dropped"), 0)
    words = {"study": "s", "state": "done", "store": "ok"}
    metrics = {"gsm8k": "exact_match, strict-match", "piqa": "acc"}
    uses = {"winners": 0, "looks": 0}
    verdict = {"kind": "none", "sentence": ""}
    more = {"metrics": metrics, "figures": Figures().to_json(), "verdict": verdict}
    study = {**lists, **numbers, **words, "best": row, "test_items": uses, **more}
    assert "scored: gsm8k by exact_match, strict-match" in study_table(study).splitlines()
