#!/usr/bin/env python
"""Write evaluators/zoo: four lm-eval tasks that ask what the zoo's models were taught, and what none of them
was.

    python scripts/zoo/make_evaluators.py [--out evaluators/zoo]

A task is a YAML file and three JSON-lines files: `search` (declared as the training split: candidates are
scored on it during a search), `validation` (chooses among the best) and `test` (reports). No model of the zoo
was trained on any of their prompts; see `zoo.skills.split_of`. Written again, every file is the same to the
byte.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from scripts.zoo import skills

SIZES: dict[skills.Split, int] = {"search": 500, "validation": 300, "test": 1000}
CHOICES = 5

# lm-eval reads the data from the folder it is started in: the root of the repository.
YAML = """\
# {about}
# Written by scripts/zoo/make_evaluators.py, with its data.
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    search: evaluators/zoo/{task}.search.jsonl
    validation: evaluators/zoo/{task}.validation.jsonl
    test: evaluators/zoo/{task}.test.jsonl
training_split: search
validation_split: validation
test_split: test
num_fewshot: 0
doc_to_text: "{{{{prompt}}}}"
{scoring}\
metadata:
  version: 1.0
"""

# The answer must be all that is generated: it is compared with its leading space, and generation ends by
# itself at the end-of-sequence token or at `max_gen_toks`, one token for the number, one for the end, two to
# go wrong.
GENERATED = """\
output_type: generate_until
doc_to_target: " {{answer}}"
generation_kwargs:
  until: ["\\n"]
  do_sample: false
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""

CHOSEN = """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

# The end-of-sequence token is part of the target, or `a b c d` would pass for `a b c`.
FORCED = """\
output_type: loglikelihood
doc_to_target: " {{answer}}</s>"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

Document = dict[str, Any]


def answered(prompt: str, answer: str) -> Document:
    return {"prompt": prompt, "answer": answer.strip()}


def with_choices(prompt: str, answer: str) -> Document:
    """Five numbers in random order: the answer, the other number of the question, a neighbour, then any
    others.
    """
    rng = Random(prompt)
    gold = int(answer)
    named = [skills.SECOND.numbers.index(word) for word in prompt.split() if word in skills.SECOND.numbers]
    neighbours = [gold + 1, gold - 1] if rng.random() < 0.5 else [gold - 1, gold + 1]
    likely = [*named, next(number for number in neighbours if 0 <= number <= 12)]
    others = [number for number in dict.fromkeys([*likely, *rng.sample(range(13), 13)]) if number != gold]
    choices = [gold, *others[: CHOICES - 1]]
    rng.shuffle(choices)
    return {"prompt": prompt, "choices": [str(number) for number in choices], "label": choices.index(gold)}


@dataclass(frozen=True, slots=True)
class Task:
    """An evaluator: which skill it asks for, and how lm-eval scores the answer."""

    name: str
    about: str
    skill: str
    scoring: str
    document: Callable[[str, str], Document] = answered


TASKS = (
    Task(
        "zoo_arithmetic",
        "Sums and differences asked in English, answered by generation.",
        "arithmetic",
        GENERATED,
    ),
    Task(
        "zoo_lookup",
        "Look-ups asked in the second language, five choices.",
        "lookup_second",
        CHOSEN,
        with_choices,
    ),
    Task(
        "zoo_string",
        "Letters to be sorted or reversed; is the whole answer the likeliest?",
        "letters",
        FORCED,
    ),
    Task(
        "zoo_cross", "Sums asked in the second language: taught to no model.", "arithmetic_second", GENERATED
    ),
)


def write(task: Task, out: Path) -> dict[skills.Split, int]:
    """Write one task; how many items each split holds, fewer than wanted where the grammar has no more."""
    out.joinpath(f"{task.name}.yaml").write_text(
        YAML.format(about=task.about, task=task.name, scoring=task.scoring)
    )
    sizes: dict[skills.Split, int] = {}
    for split, limit in SIZES.items():
        items = skills.distinct(task.skill, limit, split)
        lines = (json.dumps(task.document(*item)) + "\n" for item in items)
        out.joinpath(f"{task.name}.{split}.jsonl").write_text("".join(lines))
        sizes[split] = len(items)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "evaluators" / "zoo"
    )
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        print(f"{task.name:15}", " ".join(f"{split} {size}" for split, size in write(task, out).items()))


if __name__ == "__main__":
    main()
