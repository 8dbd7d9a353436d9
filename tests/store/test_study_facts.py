"""Facts and outcome of a study are what was stored, also by the version before, and say what differs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from evomerge.store import Outcome, ParentFacts, StageOutcome, StudyFacts, TermFacts

FACTS_OF_0_5_0: dict[str, Any] = json.loads("""{
 "axes": ["weight of math in embeddings", "weight of lang in embeddings"],
 "backends": {"zoo_cross": "compiled", "zoo_lookup": "compiled"},
 "budgets": [960], "crew": 2, "depth": 6, "diagonal": false, "gate": null,
 "item_sets": {"search": {"zoo_cross": "3a533e04"}, "test": {"zoo_cross": "a904fc6d"},
  "validation": {"zoo_cross": "1095e77c"}},
 "items": {"search": {"zoo_cross": 500}, "test": {"zoo_cross": 937}, "validation": {"zoo_cross": 300}},
 "metrics": {"zoo_cross": "exact_match", "zoo_lookup": "acc"},
 "parents": {"base": {"path": "results/zoo/base", "revision": null, "sha256": "fd5ca54c"},
  "lang": {"path": "org/lang", "revision": "main", "sha256": "e4ae9bbb"}},
 "scoring": {"backend": "resident", "base": "base", "batch_size": 256, "device": "cpu", "dtype": "bfloat16",
  "tokenizer": "dd5f303e"},
 "tasks": {"zoo_cross": "280368e0", "zoo_lookup": "12838dbc"},
 "terms": {"zoo_cross": {"leaves": [["zoo_cross", 1.0]], "mean": true, "measures": [], "sign": 1},
  "zoo_lookup": {"leaves": [["a", 0.25], ["b", 0.75]], "mean": true, "measures": ["probability", "logprob"],
   "sign": -1}},
 "threads": 1,
 "versions": {"evomerge": "0.5.0", "torch": "2.13.0+cpu"}
}""")

OUTCOME_OF_0_5_0: dict[str, Any] = json.loads("""{
 "best": {"id": 7, "label": null, "origin": "mean", "recipe": "r7", "search": 0.75, "test": 0.5,
  "validation": 0.6},
 "estimates": {"3": [0.5, 0.01], "12": [0.25, 0.02]},
 "finalists": [{"id": 7, "origin": "mean", "search": 0.75}],
 "generations": 4,
 "references": [{"id": 1, "lead": 0.1, "label": "base", "origin": "parent"}],
 "retention": [{"difference": -0.1, "error": 0.01, "lost": true, "parent": "base", "task": "zoo_cross"}],
 "stages": [{"best": 7, "first": 1, "last": 4, "stage": "weights"}]
}""")


def test_facts_of_0_5_0_are_read() -> None:
    facts = StudyFacts.from_json(FACTS_OF_0_5_0)
    assert (facts.num_workers, facts.base_layers, facts.max_nats_per_token) == (2, 6, None)
    assert facts.parents["lang"] == ParentFacts("org/lang", "main", "e4ae9bbb")
    soft = ("probability", "logprob")
    assert facts.terms["zoo_lookup"] == TermFacts(-1, True, soft, (("a", 0.25), ("b", 0.75)))
    assert facts.axes == ("weight of math in embeddings", "weight of lang in embeddings")
    assert facts.budgets == (960,)
    assert facts.extra == {}


H200 = {"device": "cuda", "card": "NVIDIA H200", "capability": "9.0", "budgets": {"tokens": 16384}}
A100 = H200 | {"card": "NVIDIA A100-SXM4-80GB", "capability": "8.0"}


@pytest.mark.parametrize(
    ("stored", "now", "expected"),
    [
        (H200, H200, []),
        ({"device": "cuda"}, H200, []),  # begun before cards were stored
        ({"device": "cpu"}, {"device": "cpu"}, []),
        (
            H200,
            A100,
            [
                "scoring.capability was 9.0, is 8.0",
                "scoring.card was NVIDIA H200, is NVIDIA A100-SXM4-80GB",
            ],
        ),
        (
            {"device": "cpu"},
            H200,
            [
                "scoring.budgets was None, is {'tokens': 16384}",
                "scoring.capability was None, is 9.0",
                "scoring.card was None, is NVIDIA H200",
                "scoring.device was cpu, is cuda",
            ],
        ),
    ],
)
def test_another_kind_of_card_is_another_way_of_scoring(
    stored: dict[str, Any], now: dict[str, Any], expected: list[str]
) -> None:
    facts = StudyFacts(scoring=now)
    assert StudyFacts(scoring=stored).differences(facts) == expected
    assert facts.scoring == now, "the facts themselves stay whole"


def test_facts_are_stored_under_the_keys_of_0_5_0_but_for_the_number_of_workers() -> None:
    expected = {key: value for key, value in FACTS_OF_0_5_0.items() if key != "crew"} | {"num_workers": 2}
    assert StudyFacts.from_json(FACTS_OF_0_5_0).to_json() == expected
    assert StudyFacts.from_json(expected).to_json() == expected


def test_the_outcome_of_0_5_0_is_read_and_stored_as_it_was() -> None:
    outcome = Outcome.from_json(OUTCOME_OF_0_5_0)
    assert outcome.stages == (StageOutcome("weights", 1, 4, 7),)
    assert outcome.estimates == {3: (0.5, 0.01), 12: (0.25, 0.02)}
    assert outcome.to_json() == OUTCOME_OF_0_5_0


def test_keys_that_an_old_store_lacks_have_defaults() -> None:
    facts = StudyFacts.from_json({"tasks": {"a": "hash"}})
    assert facts == StudyFacts(tasks={"a": "hash"})
    assert (facts.num_workers, facts.budgets, facts.terms, facts.backends) == (1, (), {}, {})
    assert Outcome.from_json({"best": {"id": 1}}) == Outcome({"id": 1})


def test_keys_of_another_version_are_kept() -> None:
    assert StudyFacts.from_json({"colour": "red"}).to_json()["colour"] == "red"
    assert Outcome.from_json({"best": {"id": 1}, "colour": "red"}).to_json()["colour"] == "red"


def test_what_differs_is_named_with_both_values() -> None:
    stored = StudyFacts.from_json(FACTS_OF_0_5_0)
    assert stored.differences(stored) == []
    now = replace(
        stored,
        versions={"evomerge": "0.5.0", "torch": "3"},
        threads=2,
        max_nats_per_token=3.5,
        tasks={"zoo_cross": "x" * 50, "zoo_lookup": "12838dbc"},
    )
    assert stored.differences(now) == [
        "gate was None, is 3.5",
        f"tasks.zoo_cross was 280368e0, is {'x' * 40}…",
        "threads was 1, is 2",
        "versions.torch was 2.13.0+cpu, is 3",
    ]
    other = StudyFacts.from_json(FACTS_OF_0_5_0 | {"colour": "red"})
    assert other.differences(stored) == ["colour was red, is None"]


@pytest.mark.parametrize("data", [{"parents": []}, {"parents": {"a": {}}}, {"terms": {"a": {"sign": 1}}}])
def test_facts_of_another_form_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        StudyFacts.from_json(data)


@pytest.mark.parametrize(("before", "differs"), [("0.5.0", False), ("0.4.0", True)])
def test_a_study_of_0_5_0_goes_on_and_one_of_an_older_version_is_refused(before: str, differs: bool) -> None:
    stored = StudyFacts(versions={"evomerge": before, "torch": "2.13.0"})
    now = StudyFacts(versions={"evomerge": "0.6.0", "torch": "2.13.0"})
    assert bool(stored.differences(now)) is differs


def test_a_study_of_0_5_0_goes_on_with_the_version_that_stores_the_same_rows() -> None:
    stored = StudyFacts.from_json(FACTS_OF_0_5_0)
    now = replace(stored, versions={**stored.versions, "evomerge": "0.6.0"})
    assert stored.differences(now) == []
    later = replace(stored, versions={**stored.versions, "evomerge": "9.0.0"})
    assert len(stored.differences(later)) == 1
