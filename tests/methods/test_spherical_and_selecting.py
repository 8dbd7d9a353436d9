"""The methods on spheres and those that select: mergekit's kernels bit for bit, and laws of theirs.

That they are the formulas of tests/merge_references.py is in tests/test_methods.py, where they leave mergekit
on purpose in tests/test_mergekit_faults.py.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.methods import METHODS
from tests.support.merge_references import REFERENCES, SPREAD, complete, merge, models, random

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENT = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV") or REPO / ".venv-mergekit")
DRIVER = """
import json, sys
import torch
from mergekit.merge_methods.api import merge_tensors
from mergekit.merge_methods.registry import get
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
folder = sys.argv[1]
inputs, outputs, errors = load_file(folder + "/inputs"), {}, {}
for job in json.load(open(folder + "/jobs")):
    tensors = [inputs[key] for key in job["tensors"]]
    try:
        with torch.no_grad():
            out = merge_tensors(tensors, job["method"], parameters=job["parameters"], base_index=job["base"])
        # two of the methods widen bfloat16
        outputs[job["name"]] = out.to(tensors[0].dtype).contiguous().clone()
    except Exception as error:
        errors[job["name"]] = f"{type(error).__name__}: {error}"
for job in json.load(open(folder + "/jobs")):
    spec = get(job["method"]).spec
    about = {p.name: [p.scope.value, None if p.required else float(p.default)] for p in spec.parameters}
    errors["about " + spec.name] = [about, spec.contract.base.value]
save_file(outputs, folder + "/outputs")
json.dump(errors, open(folder + "/errors", "w"))
"""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = {
    "matrix": (33, 17),
    "vector": (65,),
    "cube": (4, 5, 6),
    "scalar": (),
    "one": (1,),
    "row": (1, 9),
    "column": (9, 1),
}
DYADIC = st.integers(-8, 8).map(lambda i: i / 8)  # exact in float32, with many ties and zeros
SHARES = st.integers(0, 16).map(lambda i: i / 16)
LARGE = {"long": ((1 << 20) + 77,), "wide": (1030, 1021)}


@dataclass(frozen=True)
class Job:
    """One call of one kernel. rows: the tensors themselves, the base last, where they are not `models`."""

    method: str
    n: int
    dtype: str
    kind: str = "far"
    shape: tuple[int, ...] = (33, 17)
    based: bool = True
    values: tuple[tuple[str, float | tuple[float, ...]], ...] = ()
    rows: tuple[tuple[float, ...], ...] = ()

    @property
    def name(self) -> str:
        given = ",".join(f"{k}={v}" for k, v in self.values)
        data = str(self.rows) if self.rows else f"{self.kind}-{'x'.join(map(str, self.shape))}"
        return f"{self.method}-{self.n}-{self.dtype}-{data}{'-base' * self.based}-{given}"

    def inputs(self) -> tuple[list[Tensor], Tensor | None]:
        if self.rows:
            tensors = [torch.tensor(row, dtype=DTYPES[self.dtype]) for row in self.rows]
            return (tensors[:-1], tensors[-1]) if self.based else (tensors, None)
        tensors, base = models(self.kind, self.shape, self.n, DTYPES[self.dtype])
        return tensors, base if self.based else None

    def merge(self, *, mergekit_compatible: bool) -> Tensor:
        tensors, base = self.inputs()
        return METHODS[self.method].kernel(
            tensors,
            base,
            complete(self.method, len(tensors), dict(self.values)),
            [0] * len(tensors),
            mergekit_compatible=mergekit_compatible,
        )


@dataclass(frozen=True)
class Plan:
    """What to try of a method: numbers of models, with or without base, values."""

    counts: tuple[int, ...]
    based: tuple[bool, ...] = (True,)
    values: list[dict[str, float | tuple[float, ...]]] = field(default_factory=lambda: [{}])


W = (0.7, 0.4, 0.25, 0.9)
PLANS = {
    "nuslerp": Plan(
        (2,),
        (True, False),
        [
            {"weight": w, "nuslerp_flatten": float(flat), "nuslerp_row_wise": float(rows)}
            for w, flat, rows in [
                ((0.7, 0.4), 1, 0),
                ((0.3, 0.9), 1, 1),
                ((0.7, 0.4), 0, 0),
                ((1.0, 0.2), 0, 1),
                ((0, 0), 1, 0),
                ((1.5, -0.3), 0, 0),
            ]
        ],
    ),
    "multislerp": Plan(
        (1, 2, 3, 4),
        (True, False),
        [
            {"weight": W},
            {"weight": W, "normalize_weights": 0.0},
            {"weight": W[::-1], "eps": 0.01},
            {"weight": (0.5,) * 4},
        ],
    ),
    "karcher": Plan(
        (1, 2, 3, 4),
        (False,),
        [{}, {"max_iter": 1.0}, {"max_iter": 0.0}, {"tol": 0.01}, {"max_iter": 40.0, "tol": 1e-9}],
    ),
    "model_stock": Plan((2, 3, 4), (True,), [{}, {"filter_wise": 1.0}]),
    "sce": Plan(
        (1, 2, 3, 4),
        (True,),
        [{}, {"select_topk": 0.5}, {"select_topk": 0.13}, {"select_topk": 0.0}, {"select_topk": 1e-6}],
    ),
    "nearswap": Plan((1,), (True,), [{"t": t} for t in (0.0, 1e-7, 1e-4, 0.003, 0.2, 5.0)]),
    "arcee_fusion": Plan((1,)),
    "ram": Plan((1, 2, 3, 4), (True,), [{}, {"epsilon": 0.3}, {"epsilon": 0.0}]),
    "ramplus_tl": Plan(
        (1, 2, 3, 4), (True,), [{}, {"epsilon": 0.3}, {"epsilon": 0.001, "r": 0.8, "alpha": 0.9}, {"r": 0.0}]
    ),
}
COLUMNS = ((1.0, -2.0, 0.5, 0.0), (-1.0, 2.0, -0.5, 0.0), (0.25, 0.25, -0.25, 1.0), (0.0, 0.0, 0.0, 0.0))


def settings(method: str, n: int, plan: Plan):
    for values in plan.values:
        yield tuple((k, v[:n] if isinstance(v, tuple) else v) for k, v in values.items())


def jobs():
    for method, plan in PLANS.items():
        for dtype in DTYPES:
            for n in plan.counts:
                for based in plan.based:
                    for values in settings(method, n, plan):
                        for kind in SPREAD:
                            for shape in SHAPES.values() if n == max(plan.counts) else [SHAPES["matrix"]]:
                                yield Job(method, n, dtype, kind, shape, based, values)
            values = next(settings(method, plan.counts[-1], plan))
            for shape in (
                LARGE.values() if method != "arcee_fusion" else [(1000, 1000)]
            ):  # above that mergekit draws a sample
                yield Job(method, plan.counts[-1], dtype, "far", shape, plan.based[0], values)


def odd_jobs():
    """Zeros, equal and opposite models, and parameters at which mergekit has a fault of its own."""
    x, opposite, other, zero = COLUMNS
    for method, plan in PLANS.items():
        sets = {
            1: [(zero, zero), (x, zero), (x, x)],
            2: [(x, x, zero), (x, opposite, zero), (x, zero, zero), (zero, zero, zero), (x, other, x)],
        }
        sets |= {3: [(x, x, x, zero), (x, opposite, zero, zero), (x, other, zero, x), (zero,) * 4]}
        for n in set(plan.counts) - {4}:
            for rows in sets[n]:
                for based in plan.based:
                    for values in settings(method, n, plan):
                        yield Job(
                            method,
                            n,
                            "float32",
                            based=based,
                            values=values,
                            rows=rows if based else rows[:-1],
                        )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor | str]:
    """Of all jobs in one process of mergekit: the tensor or the message; and what its methods declare."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no mergekit in {ENVIRONMENT}; run scripts/make_mergekit_env")
    folder, inputs, listed = tmp_path_factory.mktemp("kernels"), {}, []
    for job in [*jobs(), *odd_jobs()]:
        tensors, base = job.inputs()
        data = f"{job.rows or (job.kind, job.shape)}-{job.dtype}"
        keys = [f"{data}-{i}" for i in range(len(tensors))] + [f"{data}-base"] * job.based
        inputs |= dict(zip(keys, [*tensors, *([] if base is None else [base])], strict=True))
        parameters = {
            k: bool(v) if (p := METHODS[job.method].param(k)) and p.flag else v for k, v in job.values
        }
        if "max_iter" in parameters:
            parameters["max_iter"] = int(parameters["max_iter"])
        listed.append(
            {
                "name": job.name,
                "method": job.method,
                "tensors": keys,
                "parameters": parameters,
                "base": job.n if job.based else None,
            }
        )
    save_file(inputs, folder / "inputs")
    (folder / "jobs").write_text(json.dumps(listed))
    done = subprocess.run(
        [python, "-c", DRIVER, str(folder)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "outputs") | json.loads((folder / "errors").read_text())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of a million entries depend on the number of threads; mergekit ran with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same_bits(job: Job, theirs: dict[str, Tensor | str]) -> None:
    want = theirs[job.name]
    if isinstance(want, str):
        assert "weighted sum of the input tensors is zero" in want, f"{job.name}: mergekit said {want}"
        with pytest.raises(CandidateError, match="cancel"):
            job.merge(mergekit_compatible=True)
        return
    got = job.merge(mergekit_compatible=True).to(want.dtype)
    assert (got.shape, got.dtype) == (want.shape, want.dtype), job.name
    differ = ~((got == want) | (got.isnan() & want.isnan()))
    assert not differ.any(), (
        f"{job.name}: {differ.sum()} of {got.numel()} differ, by {(got - want).abs().max()}"
    )


@pytest.mark.parametrize("method", PLANS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compatible_with_mergekit_the_bits_are_mergekits(
    method: str, dtype: str, theirs: dict[str, Tensor | str], one_thread: None
):
    for job in jobs():
        if (job.method, job.dtype) == (method, dtype):
            assert_same_bits(job, theirs)


@pytest.mark.parametrize("method", PLANS)
def test_compatible_with_mergekit_zeros_and_equal_and_opposite_models_give_mergekits_bits(
    method: str, theirs: dict[str, Tensor | str], one_thread: None
):
    for job in odd_jobs():
        if job.method == method:
            assert_same_bits(job, theirs)


@pytest.mark.parametrize("method", PLANS)
def test_parameters_and_their_defaults_are_mergekits(method: str, theirs: dict):
    parameters, base = theirs[f"about {method}"]
    parameters.pop("int8_mask", None)  # has no effect on the result
    rule = METHODS[method]
    ours = {
        p.name: ["non_base" if p.per == "model" else "shared", None if p.required else p.default]
        for p in rule.params
    }
    assert ours == parameters
    assert (rule.needs_base, rule.takes_base) == (base == "required", base == "optional")


@pytest.mark.parametrize("method", PLANS)
def test_not_compatible_with_mergekit_odd_inputs_give_the_reference(method: str):
    for job in odd_jobs():
        if job.method == method:
            tensors, base = job.inputs()
            rows = [x.tolist() for x in tensors]
            values = complete(method, len(rows), dict(job.values))
            want = REFERENCES[method](rows, None if base is None else base.tolist(), values, (4,))
            torch.testing.assert_close(
                job.merge(mergekit_compatible=False),
                torch.tensor(want),
                rtol=1e-5,
                atol=1e-6,
                msg=lambda m, j=job: f"{j.name}: {m}",
            )


# ---- laws


@pytest.mark.parametrize("method", PLANS)
def test_equal_parents_give_that_parent(method: str):
    plan, x = PLANS[method], random((12, 7), 1).float()
    for n in plan.counts:
        if method in ("nearswap", "arcee_fusion"):  # of the model they take a part, as they are meant to
            continue
        for scale in (1.0, 1e-3):
            base = random((12, 7), 2, scale).float()
            for based in plan.based:
                for values in settings(method, n, plan):
                    given = dict(values)
                    if given.get("select_topk") == 0 or (
                        "weight" in given and (given.get("normalize_weights") == 0 or given.get("eps"))
                    ):
                        continue  # nothing is selected; weights that do not sum to one
                    out = merge(
                        method, [x + base if based else x * scale] * n, base if based else None, **given
                    )
                    slack = float(METHODS[method].param("epsilon") is not None) * given.get("epsilon", 1e-5)
                    torch.testing.assert_close(
                        out, x + base if based else x * scale, rtol=2e-6, atol=2e-6 * scale + slack
                    )


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_a_base_of_zeros_is_no_base_and_another_is_the_origin(method: str):
    for seed in range(3):
        x, y, base = (random((8, 5), seed + i) for i in range(3))
        zeros = merge(method, [x, y], torch.zeros(8, 5), weight=(0.7, 0.4))
        torch.testing.assert_close(zeros.double(), merge(method, [x, y], weight=(0.7, 0.4)))
        moved = merge(method, [x + base, y + base], base, weight=(0.7, 0.4))
        torch.testing.assert_close(moved, merge(method, [x, y], weight=(0.7, 0.4)) + base)


@pytest.mark.parametrize("method", PLANS)
def test_the_number_of_threads_changes_no_more_than_rounding(method: str, one_thread: None):
    plan = PLANS[method]
    n = plan.counts[-1]
    tensors, base = models("far", (1030, 1021), n, torch.float32)
    for values in settings(method, n, plan):
        given = (tensors, base if plan.based[0] else None)
        torch.set_num_threads(1)
        alone = merge(method, *given, **dict(values))
        torch.set_num_threads(4)
        torch.testing.assert_close(merge(method, *given, **dict(values)), alone, rtol=1e-6, atol=1e-7)
        torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(1030, 1021), (3, 1 << 20), (1 << 20, 3)], ids=str)
def test_vectors_longer_and_more_than_a_chunk(shape: tuple[int, ...]):
    x, y = (random(shape, i).float() for i in range(2))
    for rows, axis in ((0.0, -1), (1.0, 0)):
        p, q = x.double(), y.double()
        angle = torch.acos(
            (p * q).sum(axis, keepdim=True)
            / (p.norm(dim=axis, keepdim=True) * q.norm(dim=axis, keepdim=True))
        )
        want = (torch.sin(0.75 * angle) * p + torch.sin(0.25 * angle) * q) / torch.sin(angle)
        got = merge("nuslerp", [x, y], weight=(0.75, 0.25), nuslerp_flatten=0.0, nuslerp_row_wise=rows)
        torch.testing.assert_close(
            got.double(), want, rtol=1e-4, atol=1e-4 if min(shape) == 3 else 1e-5
        )  # nearly opposite vectors of 3
    if shape[0] == 1030:
        base = torch.zeros(shape)
        cos = (p * q).sum(-1, keepdim=True) / (p.norm(dim=-1, keepdim=True) * q.norm(dim=-1, keepdim=True))
        want = (2 * cos / (1 + cos)).clamp(min=0) * (p + q) / 2
        torch.testing.assert_close(
            merge("model_stock", [x, y], base, filter_wise=1.0).double(), want, rtol=1e-5, atol=1e-6
        )


@settings_of_hypothesis(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(2, 5).flatmap(
        lambda n: st.lists(st.lists(DYADIC, min_size=9, max_size=9), min_size=n, max_size=n)
    ),
    share=SHARES,
)
def test_ties_among_variances_and_signs_are_broken_as_the_reference_breaks_them(
    rows: list[list[float]], share: float
):
    *tensors, base = [torch.tensor(row) for row in rows]
    for method, values in (
        ("sce", {"select_topk": share}),
        ("ram", {"epsilon": share}),
        ("ramplus_tl", {"epsilon": share}),
    ):
        want = REFERENCES[method](rows[:-1], rows[-1], complete(method, len(tensors), values), (9,))
        torch.testing.assert_close(
            merge(method, tensors, base, **values), torch.tensor(want), rtol=1e-5, atol=1e-6
        )
