"""Small lm-eval tasks that the zoo's models can read, written to a folder, and what lm-eval itself says of
them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.evaluation import Role
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec

BATCH = 64


def own_id(doc: Mapping[str, Any]) -> str:
    """What an item's id is said to be: 16 digits of the SHA-256 of the document's canonical JSON."""
    return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()[:16]


def lm_eval_itself(
    model: Any, tokenizer: Any, tasks: Sequence[str], folder: Path, metrics: Mapping[str, str], **more: Any
) -> dict[str, Any]:
    """(item id -> value, prompts by item, metric) per task, as `lm_eval.simple_evaluate` gives them."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
        tasks=list(tasks),
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        **more,
    )
    out = {}
    for task in tasks:
        metric, first = metrics[task], found["samples"][task][0]["filter"]
        rows = [r for r in found["samples"][task] if r["filter"] == first]
        values = {own_id(r["doc"]): r[metric] for r in rows}
        prompts = {own_id(r["doc"]): [arguments[0] for arguments in r["arguments"]] for r in rows}
        out[task] = (values, prompts, found["results"][task][f"{metric},{first}"])
    return out


WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def sums(n: int, first: int = 0) -> list[dict[str, Any]]:
    """Documents that the zoo's models can read."""
    docs = []
    for i in range(first, first + n):
        a, b = divmod(i, 10)
        choices = [str(a + b + d) for d in (0, 1, 2, 3)]
        docs.append(
            {
                "prompt": f"Q: {WORDS[a % 10]} plus {WORDS[b]} A:",
                "answer": str(a + b),
                "choices": choices,
                "label": 0,
                "n": i,
            }
        )
    return docs


GENERATE: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
    "filter_list": [
        {
            "name": "number",
            "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}],
        },
        {"name": "plain", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOOSE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [
        {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
    ],
}
LIKELIHOOD: dict[str, Any] = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": " {{answer}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc"},
    ],
}
ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{prompt}} {{answer}}",
    "metric_list": [{"metric": "word_perplexity"}],
}
SPLITS: dict[Role, str] = {"search": "training_split", "validation": "validation_split", "test": "test_split"}


def write_task(
    folder: Path, name: str, settings: Mapping[str, Any], docs: Mapping[str, Sequence[Any]] | None = None
) -> Path:
    """Writes a task: YAML and a JSON-lines file for each role."""
    folder.mkdir(parents=True, exist_ok=True)
    docs = (
        docs if docs is not None else {"search": sums(30), "validation": sums(20, 30), "test": sums(40, 50)}
    )
    files = {}
    for role, rows in docs.items():
        file = folder / f"{name}-{role}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[role] = str(file)
    given = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        **{SPLITS[r]: r for r in docs if r in SPLITS},
        **settings,
    }
    lines = [
        f"{key}: {value if str(value).startswith('!function') else json.dumps(value)}\n"
        for key, value in given.items()
    ]
    (folder / f"{name}.yaml").write_text("".join(lines))
    return folder


def load(folder: Path, tokenizer: Any, *specs: TaskSpec, **more: Any) -> LmHarness:
    return LmHarness(list(specs), tokenizer, batch_size=BATCH, include=[folder], **more)
