"""Shared by the tests: small Llama folders, a pool with a known landscape, stored rows as plain data, the
command line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evomerge.evaluation import Attempt, Evaluation, Items
from evomerge.methods import method
from evomerge.recipes import Recipe
from evomerge.spaces import Range, WeightSpace
from evomerge.workers import InProcessPool, Job, Pool
from tests.support import landscape

REPO = Path(__file__).resolve().parents[2]
SEGMENTS = ((".self_attn.", "attention"), (".mlp.", "mlp"))
HIDDEN, HEADS, INTERMEDIATE, VOCABULARY = 8, 2, 12, 16


def llama_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a small Llama."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        stem = f"model.layers.{i}"
        shapes |= {f"{stem}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {f"{stem}.mlp.{p}_proj.weight": (INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
        shapes[f"{stem}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{stem}.{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def llama(
    folder: Path,
    seed: int,
    *,
    layers: int = 5,
    near: Path | None = None,
    same: Callable[[str], bool] = lambda name: False,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes a small Llama.

    near: a folder whose weights this one is a fine-tune of; same: tensors left as they are there.
    """
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(seed)
    start = load_file(near / "model.safetensors") if near else {}
    tensors = {}
    for name, shape in llama_shapes(layers).items():
        noise = torch.randn(shape, generator=generator)
        if name in start:
            tensors[name] = start[name] if same(name) else (start[name].float() + 0.05 * noise).to(dtype)
        else:
            tensors[name] = ((1.0 if "norm" in name else 0.0) + 0.3 * noise).to(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def zoo_folder() -> Path:
    """The trained zoo of the repository; fails the test where it has not been made."""
    folder = REPO / "results" / "zoo"
    missing = [
        name
        for name in ("base", "math", "lang", "string")
        if not (folder / name / "model.safetensors").is_file()
    ]
    if missing:
        pytest.fail(f"{folder} lacks {', '.join(missing)}; run scripts/zoo/make_zoo.py")
    return folder


def weight_space(
    name: str = "task_arithmetic",
    models: tuple[str, ...] = ("a", "b"),
    groups: tuple[int, ...] = (2, 1),
    components: tuple[str, ...] = ("attention", "mlp"),
    ranges: Mapping[str, Range] | None = None,
    **more: Any,
) -> WeightSpace:
    """A space over `models` and a base called 'base'."""
    return WeightSpace(
        method=method(name),
        base="base",
        models=models,
        groups=groups,
        components=components,
        segments=SEGMENTS,
        ranges=ranges if ranges is not None else {"weight": Range(-0.5, 2.0, 0.5)},
        **more,
    )


# ---- a landscape that needs no model -----------------------------------------------------------------------


class ToyPool(InProcessPool):
    """Scores recipes by `height`: each item is right with that probability, decided by a hash of recipe and
    item.

    calls: (recipe id, items) of every evaluation made. fails: recipes that cannot be scored. before, after:
    called with the number of evaluations made before each is handed over, and after; they may raise, or stop
    the study.
    """

    def __init__(
        self,
        fails: Callable[[Recipe], bool] = lambda recipe: False,
        after: Callable[[int], None] = lambda made: None,
        before: Callable[[int], None] = lambda made: None,
    ) -> None:
        super().__init__(self)
        self.calls: list[tuple[str, Items]] = []
        self._fails, self._after, self._before = fails, after, before
        self._told = 0

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        """Evaluates the next job."""
        found = super().result(timeout)
        if found is not None:
            self.calls.append((found[0].recipe.id, found[0].items))
            self._before(len(self.calls))
        return found

    def attempts(self) -> list[Attempt]:
        """None: asked for after each result, which is when `after` is called."""
        super().attempts()
        if self._told < len(self.calls):
            self._told = len(self.calls)
            self._after(self._told)
        return []

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        """The evaluation of one recipe."""
        if self._fails(recipe):
            seconds = {"merge": 0.0, "score": 0.0}
            return Evaluation(recipe.id, (), {}, seconds, error=f"recipe {recipe.id} fails on purpose")
        return landscape.evaluation(recipe, items)


# ---- what a store holds ------------------------------------------------------------------------------------

TIMINGS = ("seconds", "created", "finished", "digest")
_TELL_TIME = ("attempts", "runs")  # tables that no two runs share


def stored_rows(file: Path, without: Sequence[str] = TIMINGS) -> dict[str, list[dict[str, Any]]]:
    """Table -> rows, the columns that hold times left out.

    Evaluations go by what they are of, for they are stored as they come.
    """
    connection = sqlite3.connect(file)
    try:
        tables = [
            row[0]
            for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        ]
        found = {}
        for table in tables:
            cursor = connection.execute(f"SELECT * FROM {table} ORDER BY rowid")
            names = [column[0] for column in cursor.description]
            found[table] = [
                {k: v for k, v in zip(names, row, strict=True) if k not in without} for row in cursor
            ]
        names_of = {
            row["id"]: f"{row['role']} {row['recipe']} {row['item_set']}" for row in found["evaluations"]
        }
        for row in found["evaluations"]:
            row["id"] = names_of[row["id"]]
        for row in [*found["trials"], *found.get("front", ())]:
            row["evaluation"] = names_of[row["evaluation"]]
        for table in ("evaluations", "recipes", "item_sets"):
            found[table].sort(key=lambda row: str(row["id"]))
        if "front" in found:
            found["front"].sort(key=lambda row: str(row["evaluation"]))
        return {table: rows for table, rows in found.items() if table not in _TELL_TIME}
    finally:
        connection.close()


def results(pool: Pool, jobs: Sequence[Job]) -> list[tuple[Job, Evaluation]]:
    """What a pool makes of jobs, in their order."""
    pool.submit(jobs)
    found = {}
    while pool.out:
        if result := pool.result():
            found[result[0].slot] = result
    return [found[job.slot] for job in jobs]


# ---- the command line --------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """What subprocesses of the tests run under: this checkout, one thread, no network, one output width."""
    quiet = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "EVOMERGE_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    own = {k: v for k, v in os.environ.items() if k != "EVOMERGE_ROOT"}
    paths = [
        str(REPO),
        *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p not in ("", str(REPO))),
    ]
    return own | quiet | {"NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": os.pathsep.join(paths)}


def command(*words: object) -> list[str]:
    """The command line of `evomerge` in this interpreter."""
    return [sys.executable, "-c", "from evomerge.cli import main; main()", *map(str, words)]


def evomerge(*words: object, cwd: Path = REPO, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs `evomerge` to its end."""
    return subprocess.run(
        command(*words),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def in_process(*words: object) -> tuple[int, str, str]:
    """Runs `evomerge` through its real entry point in this process: (exit code, stdout, stderr)."""
    from evomerge.cli import main

    out, err, kept = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = ["evomerge", *map(str, words)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.argv = kept
    return code, out.getvalue(), err.getvalue()


# A process with every library imported and nothing run: what is forked from it starts in a fraction of the
# time.
_PREPARED = """
import os, sys
import evomerge.launch.prepare, evomerge.evaluation.lm_harness.harness
import transformers.models.llama.modeling_llama
from evomerge.cli import main
for line in sys.stdin:
    verb, *words = line.rstrip("\\n").split("\\t")
    if verb == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(words[0]), 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        for number, file in ((0, os.devnull), (1, words[0]), (2, words[1])):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["evomerge", *words[2:]]
        code = 1
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
"""


class Prepared:
    """Starts `evomerge` in forks of a process that has imported everything; a context manager that ends that
    process.
    """

    def __init__(self, folder: Path, *, cwd: Path = REPO, env: Mapping[str, str] | None = None) -> None:
        """folder: for the output of what is started."""
        self.folder, self._count = folder, 0
        pipe, program = subprocess.PIPE, [sys.executable, "-c", _PREPARED]
        self._process = subprocess.Popen(
            program, cwd=cwd, env=env or environment(), stdin=pipe, stdout=pipe, text=True
        )

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def start(self, *words: object) -> Fork:
        """Starts `evomerge`."""
        self._count += 1
        out, err = (self.folder / f"{self._count}.{name}" for name in ("out", "err"))
        out.touch(), err.touch()
        return Fork(int(self.ask("start", out, err, *words)), out, err, self)

    def ask(self, *words: object) -> str:
        """One line to the process, one line back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


@dataclass(frozen=True)
class Fork:
    """A started `evomerge`."""

    pid: int
    out: Path
    err: Path
    prepared: Prepared

    def alive(self) -> bool:
        """Whether it runs (a zombie does not)."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def wait(self) -> int:
        """Its exit code; minus the signal that killed it."""
        return int(self.prepared.ask("wait", self.pid))


def count_rows(store: Path, table: str) -> int:
    """Rows of a table; 0 where there is no store yet."""
    try:
        connection = sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)
    except sqlite3.Error:
        return 0
    try:
        return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
    except sqlite3.Error:
        return 0
    finally:
        connection.close()


def search_file(
    folder: Path,
    study: str,
    *,
    evaluations: int = 16,
    population: int = 8,
    batch: int = 64,
    dtype: str = "float32",
    **evaluation: Any,
) -> Path:
    """Writes a small search over the zoo and the shipped tasks.

    dtype: of the merged models; bfloat16, the default of a search, costs more on many processors.
    """
    zoo = zoo_folder()
    document = {
        "study": study,
        "models": {name: str(zoo / name) for name in ("base", "math", "lang", "string")},
        "base": "base",
        "method": "task_arithmetic",
        "out_dtype": dtype,
        "space": {
            "groups": 2,
            "components": ["attention", "mlp"],
            "parameters": {"weight": {"low": -0.5, "high": 2.5, "start": 0.8}},
        },
        "tasks": [{"task": f"zoo_{name}"} for name in ("arithmetic", "lookup", "string", "cross")],
        "evaluation": {
            "splits": "declared",
            "items": 8,
            "validation": 8,
            "test": 8,
            "batch_size": batch,
            **evaluation,
        },
        "search": {"evaluations": evaluations, "population": population, "sigma": 0.1, "finalists": 3},
    }
    file = folder / f"{study}.yaml"
    file.write_text(json.dumps(document, indent=1))  # JSON is YAML
    return file
