#!/usr/bin/env python
"""Write evaluators/zoo/: four lm-eval tasks over the zoo's skills, each with search, validation and test items.

    python scripts/make_evaluators.py [--out evaluators/zoo]

The same files every time. A prompt's split is a hash of its text, and no model of the zoo has seen a prompt of these
splits in training. Data files are named relative to the repository's root, where lm-eval's command line is run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from zoo import skills
from zoo.skills import Split

SIZES: dict[Split, int] = {"search": 500, "validation": 300, "test": 1000}  # at most; fewer where the grammar has fewer
CHOICES = 5

_COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files:
    search: evaluators/zoo/{task}-search.jsonl
    validation: evaluators/zoo/{task}-validation.jsonl
    test: evaluators/zoo/{task}-test.jsonl
training_split: search
validation_split: validation
test_split: test
num_fewshot: 0
"""
_GENERATE = """\
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["Q:"]
  max_gen_toks: 4  # a number is one token and the end another
  do_sample: false
filter_list:
  - name: strip
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
_CHOOSE = """\
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
_READ = """\
# acc is lm-eval's greedy flag: every token of the answer and the end after it is the model's first choice
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: " {{answer}}</s>"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
metadata:
  version: 1.0
"""
TASKS = {
    "zoo_arithmetic": ("arithmetic", "English arithmetic", _GENERATE),
    "zoo_lookup": ("lookup_second", "look-ups asked in the second language, five choices", _CHOOSE),
    "zoo_string": ("letters", "letters to be sorted or reversed", _READ),
    "zoo_cross": ("arithmetic_second", "arithmetic asked in the second language, taught to no model", _GENERATE),
}


def choices(prompt: str, answer: str) -> tuple[list[str], int]:
    """Five different numbers in [0, 13] in seeded order, and the place of the right one."""
    rng = Random(prompt)
    others = rng.sample([str(n) for n in range(14) if str(n) != answer], CHOICES - 1)
    options = [answer, *others]
    rng.shuffle(options)
    return options, options.index(answer)


def items(task: str, split: Split) -> list[dict[str, object]]:
    """The items of one split of a task."""
    rows: list[dict[str, object]] = []
    for prompt, answer in skills.distinct(TASKS[task][0], SIZES[split], split):
        row: dict[str, object] = {"prompt": prompt, "answer": answer.strip()}
        if task == "zoo_lookup":
            row["choices"], row["gold"] = choices(prompt, answer.strip())
        rows.append(row)
    return rows


def write(out: Path) -> None:
    """Writes all files into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    for task, (_, about, body) in TASKS.items():
        (out / f"{task}.yaml").write_text(f"# {about}; written by scripts/make_evaluators.py\ntask: {task}\n{_COMMON.format(task=task)}{body}")
        for split in SIZES:
            rows = items(task, split)
            (out / f"{task}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"{task} {split}: {len(rows)} items")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "evaluators" / "zoo")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
