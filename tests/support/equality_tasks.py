"""lm-eval tasks of every kind, written at run time: documents, YAML and code, and the names of what each
reports.

A task is written twice over: once as lm-eval has it, with all its metrics and filters, and once for each
metric and filter, as evomerge scores one of them. The documents are the same. Knows nothing of models.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TEXT = (
    "river stone the amber hill in winter seven birds over an inn near café she sang on then other rain "
    "for 12 €"
)
WORDS = tuple(_TEXT.split())
# as choices of one token one of them may be the likeliest of all
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:?!#%&*"
ROLES = {"search": "training_split", "validation": "validation_split", "test": "test_split"}
CODE = """
def measure(doc, results):
    text = results[0] if isinstance(results[0], str) else " ".join(results[0])
    letters = sum((i + 1) * ord(c) for i, c in enumerate(text)) % 9973
    return {"length": len(text), "letters": letters, "same": float(text == doc["answer"])}


def texts(doc):
    return doc["prompt"] + " :"
"""
_MEASURED = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("letters", "same")]


def _metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name} for name in names]


def _mean(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def _until(*stops: str, new: int = 14, **more: Any) -> dict[str, Any]:
    return {"until": list(stops), "do_sample": False, "max_gen_toks": new, **more}


_CHOOSE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{prompt}}\nA:",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": _mean("acc", "acc_norm"),
}
_LETTERS: dict[str, Any] = {
    **_CHOOSE,
    "doc_to_text": "Q: {{prompt}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nA:",
    "doc_to_choice": ["A", "B", "C"],
}
_LIKELIHOOD: dict[str, Any] = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": " {{answer}}",
    "metric_list": _metrics("perplexity", "acc"),
}
_ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{prompt}} {{answer}}",
    "metric_list": _metrics("word_perplexity", "byte_perplexity", "bits_per_byte"),
}
_GENERATE: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "Q: {{prompt}}\nA:",
    "doc_to_target": " {{answer}}",
    "generation_kwargs": _until("\n"),
    "process_results": "!function code.measure",
    "metric_list": _MEASURED,
}
_FIRST = {"function": "take_first"}

TASKS: dict[str, dict[str, Any]] = {
    "choose_0shot": _CHOOSE,
    "choose_5shot": {**_CHOOSE, "num_fewshot": 5},
    "choose_letters": {**_LETTERS, "num_fewshot": 2},
    "choose_brier": {**_CHOOSE, "num_fewshot": 1, "metric_list": [*_mean("acc"), *_metrics("brier_score")]},
    "choose_mutual": {**_CHOOSE, "metric_list": _mean("acc", "acc_mutual_info")},
    "choose_contexts": {
        **_CHOOSE,
        "doc_to_text": "label",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": " so {{answer}}",
        "metric_list": _mean("acc"),
    },
    "choose_delimited": {
        **_CHOOSE,
        "target_delimiter": "",
        "doc_to_text": "{{prompt}} ",
        "fewshot_delimiter": "\n##\n",
        "num_fewshot": 2,
    },
    "choose_characters": {**_CHOOSE, "doc_to_choice": list(CHARACTERS), "target_delimiter": ""},
    "choose_long": {**_CHOOSE, "doc_to_text": "Q: {{story}} {{prompt}}\nA:"},
    "likelihood": _LIKELIHOOD,
    "likelihood_3shot": {**_LIKELIHOOD, "num_fewshot": 3, "description": "Go on:\n\n"},
    "likelihood_empty": {**_LIKELIHOOD, "doc_to_text": "", "doc_to_target": "{{prompt}}"},
    "likelihood_long": {**_LIKELIHOOD, "doc_to_text": "{{story}}", "doc_to_target": " {{prompt}} {{answer}}"},
    "rolling": _ROLLING,
    "rolling_long": {**_ROLLING, "doc_to_target": "{{story}}"},
    "generate": _GENERATE,
    "generate_3shot": {
        **_GENERATE,
        "num_fewshot": 3,
        "generation_kwargs": _until("\n\n", "the", "Q:", new=20),
    },
    "generate_stops": {
        **_GENERATE,
        "generation_kwargs": _until("e o", "ther", "er", ". ", "a", "z1", "é", new=40),
    },
    "generate_none": {
        **_GENERATE,
        "generation_kwargs": {"until": [], "max_new_tokens": 24, "temperature": 0.0},
    },
    "generate_one": {**_GENERATE, "generation_kwargs": {"until": "b", "do_sample": False, "max_gen_toks": 1}},
    "generate_filters": {
        **_GENERATE,
        "generation_kwargs": _until("Q", new=24),
        "filter_list": [
            {
                "name": "letters",
                "filter": [{"function": "regex", "regex_pattern": "([a-z]+)", "group_select": -1}, _FIRST],
            },
            {"name": "plain", "filter": [{"function": "remove_whitespace"}, _FIRST]},
        ],
    },
    "generate_match": {
        **{k: v for k, v in _GENERATE.items() if k != "process_results"},
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "regexes_to_ignore": [".+"],
            }
        ],
    },
    "generate_repeats": {
        **_GENERATE,
        "repeats": 3,
        "generation_kwargs": _until("t", new=8),
        "filter_list": [
            {
                "name": "majority",
                "filter": [
                    {"function": "regex", "regex_pattern": "([A-Za-z0-9 ])"},
                    {"function": "majority_vote"},
                    _FIRST,
                ],
            },
            {"name": "first", "filter": [_FIRST]},
        ],
    },
    "generate_prefix": {
        **_GENERATE,
        "gen_prefix": "Well, ",
        "num_fewshot": 1,
        "description": "You answer.\n",
    },
    "generate_long": {**_GENERATE, "doc_to_text": "{{story}} {{prompt}}\nA:"},
    "generate_penalty": {**_GENERATE, "generation_kwargs": _until("\n", new=20, repetition_penalty=1.4)},
    "generate_code": {
        **_GENERATE,
        "doc_to_text": "!function code.texts",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": 1,
    },
    "group_small": {**_LETTERS, "doc_to_text": "{{prompt}}?"},
    "group_large": {**_CHOOSE, "doc_to_text": "{{prompt}}?"},
}
_SIZED = [{"metric": "acc", "weight_by_size": True}, {"metric": "acc_norm", "weight_by_size": False}]
GROUP: dict[str, Any] = {
    "group": "pair",
    "task": ["group_small", "group_large"],
    "aggregate_metric_list": _SIZED,
}
_FEW = {
    "group_small": 3,
    "rolling_long": 2,
    "generate_none": 4,
    "choose_long": 4,
    "generate_long": 4,
    "likelihood_long": 4,
}


@dataclass(frozen=True, slots=True)
class Score:
    """One thing that a task reports. twin: name of the task that reports it alone."""

    task: str
    metric: str
    filter: str
    twin: str


def documents(task: str, role: str, count: int, vocabulary: Sequence[str] = WORDS) -> list[dict[str, Any]]:
    """Documents of a role: prompts of 2 to 14 words, choices of one to four words of which some begin alike,
    stories longer than a model.
    """
    rnd = random.Random(f"{task} {role}")

    def some(low: int, high: int) -> str:
        return " ".join(rnd.choice(vocabulary) for _ in range(rnd.randint(low, high)))

    found = []
    for number in range(count):
        choices = [some(1, 3), some(1, 2), some(1, 4)]
        if number % 3 == 0:
            choices[1] = choices[0] + " " + some(1, 1)
        if len(set(choices)) < 3:
            choices[2] = " ".join(reversed(choices[1].split())) + " " + some(5, 5)
        label = rnd.randrange(3)
        found.append(
            {
                "prompt": some(2, 14),
                "choices": choices,
                "label": label,
                "answer": choices[label],
                "story": some(130, 180),
                "n": f"{role} {number}",
            }
        )
    return found


def scores(tasks: Sequence[str] = tuple(TASKS)) -> list[Score]:
    """Everything that the tasks report, task by task."""
    found = []
    for task in tasks:
        settings = TASKS[task]
        filters = [f["name"] for f in settings.get("filter_list", [])] or ["none"]
        found += [
            Score(task, m["metric"], f, f"{task}--{m['metric']}--{f}")
            for f in filters
            for m in settings["metric_list"]
        ]
    return found


def write(folder: Path, count: int = 6, vocabulary: Sequence[str] = WORDS) -> Path:
    """Writes every task, its twins, their documents and the group into a new folder."""
    folder.mkdir(parents=True)
    (folder / "code.py").write_text(CODE)
    _write_yaml(folder / "pair.yaml", GROUP)
    for task, settings in TASKS.items():
        files = {}
        for role in ROLES:
            file = folder / f"{task}.{role}.jsonl"
            rows = documents(
                task,
                role,
                min(count, _FEW.get(task, count)) if role == "test" else 9 if role == "search" else 1,
                vocabulary,
            )
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[role] = str(file)
        given = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            **{ROLES[r]: r for r in files},
            "fewshot_split": "search",
            **settings,
        }
        _write_yaml(folder / f"{task}.yaml", {"task": task, **given})
        for score in scores([task]):
            _write_yaml(folder / f"{score.twin}.yaml", {"task": score.twin, **given})
    return folder


def _write_yaml(file: Path, settings: Mapping[str, Any]) -> None:
    lines = [
        f"{key}: {value if str(value).startswith('!function') else json.dumps(value)}\n"
        for key, value in settings.items()
    ]
    file.write_text("".join(lines))


SOME = (
    "choose_5shot",
    "choose_letters",
    "choose_mutual",
    "likelihood_empty",
    "rolling_long",
    "generate_3shot",
    "generate_stops",
    "generate_filters",
)
