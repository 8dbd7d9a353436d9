"""What a model said, by kind of task: lm-eval's own rule of choosing, written out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from evomerge.evaluation.lm_harness.samples import sample

CHOICES = ["a rather long answer", "short"]
SUMS = [-6.0, -4.0]  # the short one is likelier, the long one by character


def loaded(kind: str, metric: str = "acc", **task: Any) -> Any:
    """A task as the harness holds it, as far as samples ask it."""
    given = {
        "OUTPUT_TYPE": kind,
        "multiple_input": 0,
        "doc_to_choice": lambda doc: CHOICES,
        "doc_to_target": lambda doc: 0,
    }
    return SimpleNamespace(
        task=SimpleNamespace(**(given | task)), metric=metric, filter="none", spec=SimpleNamespace(task="t")
    )


def asked(*args: str, answer: Any) -> Any:
    return SimpleNamespace(args=args, doc={}, resps=[answer])


@pytest.mark.parametrize(("metric", "chosen"), [("acc", 1), ("acc_norm", 0), ("acc_bytes", 0)])
def test_the_chosen_option_is_the_metrics_own(metric: str, chosen: int) -> None:
    requests = [asked("Q:", c, answer=(s, False)) for c, s in zip(CHOICES, SUMS, strict=True)]
    requests += [
        asked("", c, answer=(-1.0, False)) for c in CHOICES
    ]  # choices without context, as for a mutual information
    found = sample(loaded("multiple_choice", metric), "i", requests, float(chosen == 0))
    assert [o.chosen for o in found.options] == [chosen == 0, chosen == 1]
    assert [o.right for o in found.options] == [True, False]
    assert [o.probability for o in found.options] == pytest.approx(
        [1 / (1 + math.e**2), math.e**2 / (1 + math.e**2)]
    )
    assert (found.prompt, found.target, found.output) == ("Q:", CHOICES[0], CHOICES[chosen])


@pytest.mark.parametrize("target", [1, [1], "short", ["short"]])
def test_a_right_answer_may_be_named_by_place_or_text(target: Any) -> None:
    requests = [asked("Q:", c, answer=(s, False)) for c, s in zip(CHOICES, SUMS, strict=True)]
    assert [
        o.right
        for o in sample(
            loaded("multiple_choice", doc_to_target=lambda doc: target), "i", requests, 1.0
        ).options
    ] == [False, True]


def test_contexts_may_be_the_choices() -> None:
    task = loaded("multiple_choice", multiple_input=1, doc_to_text=lambda doc: 1)
    found = sample(
        task, "i", [asked(c, "the end", answer=(s, False)) for c, s in zip(CHOICES, SUMS, strict=True)], 1.0
    )
    assert (found.prompt, found.target, found.output) == ("the end", "short", "short")


def test_texts_and_likelihoods_are_shown_as_they_are() -> None:
    written = sample(
        loaded("generate_until", doc_to_target=lambda doc: ["4", "four"]),
        "i",
        [asked("2+2=", "{}", answer=" 4")],
        1.0,
    )
    assert (written.prompt, written.target, written.output, written.options) == ("2+2=", "4 | four", " 4", ())
    scored = sample(loaded("loglikelihood"), "i", [asked("2+2=", " 4", answer=(-0.25, True))], 1.0)
    assert (scored.target, scored.output) == (" 4", "log-likelihood -0.250, the likeliest text")
    rolled = sample(loaded("loglikelihood_rolling"), "i", [asked("a text", answer=-12.5)], -12.5)
    assert (rolled.prompt, rolled.target, rolled.output) == ("a text", "", "log-likelihood -12.500")
