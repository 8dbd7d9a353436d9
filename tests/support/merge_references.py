"""The formulas of the merge methods in loops over Python numbers; calls of their kernels."""

import itertools
import math
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from evomerge.methods import METHODS, Method

Row = list[float]
SPREAD = {"near": 0.001, "far": 0.5}


def length(v: Row) -> float:
    return math.sqrt(math.fsum(a * a for a in v))


def inner(v: Row, w: Row) -> float:
    return math.fsum(a * b for a, b in zip(v, w, strict=True))


def add(*terms: tuple[float, Row]) -> Row:
    return [math.fsum(c * v[j] for c, v in terms) for j in range(len(terms[0][1]))]


def mean(vs: list[Row]) -> Row:
    return add(*((1 / len(vs), v) for v in vs))


def minus(xs: list[Row], b: Row | None) -> list[Row]:
    return xs if b is None else [add((1, x), (-1, b)) for x in xs]


def lines(shape: tuple[int, ...], axis: int) -> list[list[int]]:
    """Places in the flat tensor of each vector along an axis."""
    if not shape:
        return [[0]]
    return torch.arange(math.prod(shape)).reshape(shape).movedim(axis, -1).reshape(-1, shape[axis]).tolist()


def linear(xs, b, values, shape):
    return add(
        *(
            (w / (sum(values["weight"]) if values["normalize"] else 1), x)
            for w, x in zip(values["weight"], xs, strict=True)
        )
    )


def passthrough(xs, b, values, shape):
    return [v * values["scale"][0] for v in xs[0]]


def slerp(xs, b, values, shape):
    [x], t = xs, values["t"]
    dot = max(-1.0, min(1.0, inner(b, x) / ((length(b) or 1) * (length(x) or 1))))
    if abs(dot) > 0.9995:
        return add((1 - t, b), (t, x))
    angle = math.acos(dot)
    return add((math.sin((1 - t) * angle) / math.sin(angle), b), (math.sin(t * angle) / math.sin(angle), x))


def nuslerp(xs, b, values, shape):
    weights = values["weight"]
    t = weights[1] / sum(weights) if abs(sum(weights)) >= 1e-6 else 0.5
    groups = (
        [list(range(len(xs[0])))]
        if values["nuslerp_flatten"]
        else lines(shape, 0 if values["nuslerp_row_wise"] else -1)
    )
    deltas, out = minus(xs, b), list(b or [0.0] * len(xs[0]))
    for places in groups:
        v, w = ([d[j] for j in places] for d in deltas)
        size = length(v) * length(w)
        angle = math.acos(max(-1.0, min(1.0, inner(v, w) / size))) if size else 0.0
        straight = math.sin(angle) < 1e-8
        c = (1 - t, t) if straight else [math.sin(part * angle) / math.sin(angle) for part in (1 - t, t)]
        for j, value in zip(places, add((c[0], v), (c[1], w)), strict=True):
            out[j] += value
    return out


def multislerp(xs, b, values, shape):
    if len(xs) == 1:
        return xs[0]
    weights = values["weight"]
    if values["normalize_weights"]:
        weights = [w / sum(weights) for w in weights] if sum(weights) else [1 / len(xs)] * len(xs)
    deltas = minus(xs, b)
    direction = add(
        *((w / ((length(d) + values["eps"]) or 1), d) for w, d in zip(weights, deltas, strict=True))
    )
    if length(direction) <= max(values["eps"], 1e-6):
        out = add(*zip(weights, deltas, strict=True))
    else:
        out = add(
            (sum(w * length(d) for w, d in zip(weights, deltas, strict=True)) / length(direction), direction)
        )
    return add((1, out), (1, b)) if b else out


def karcher(xs, b, values, shape):
    if len(xs) == 1:
        return xs[0]
    units = [add((1 / length(x), x)) for x in xs if length(x)]
    radius = sum(map(length, xs)) / len(xs)
    if not units:
        return xs[0]
    if length(mean(units)) < 1e-6:
        return mean(xs)
    point = add((1 / length(mean(units)), mean(units)))
    for _ in range(int(values["max_iter"])):
        logs = []
        for u in units:
            angle = math.acos(max(-1.0, min(1.0, inner(u, point))))
            if math.sin(angle) > 1e-6:
                logs.append(add((angle / math.sin(angle), u), (-angle / math.tan(angle), point)))
            else:
                logs.append(add((1, u), (-1, point)) if angle < 1 else [0.0] * len(u))
        step = mean(logs)
        angle = length(step)
        if angle < values["tol"] or not angle:
            break
        point = add((math.cos(angle), point), (math.sin(angle) / angle, step))
        point = add((1 / length(point), point))
    return add((radius, point))


def model_stock(xs, b, values, shape):
    groups = lines(shape, -1) if values["filter_wise"] else [list(range(len(b)))]
    deltas, n, out = minus(xs, b), len(xs), list(b)
    for places in groups:
        rows = [[d[j] for j in places] for d in deltas]
        pairs = [(v, w) for i, v in enumerate(rows) for w in rows[:i]]
        cosines = [inner(v, w) / (length(v) * length(w)) if length(v) * length(w) else 0.0 for v, w in pairs]
        cos = max(0.0, sum(cosines) / len(pairs))
        t = n * cos / (1 + (n - 1) * cos)
        for j, value in zip(places, mean(rows), strict=True):
            out[j] = t * (value + b[j]) + (1 - t) * b[j]
    return out


def sce(xs, b, values, shape):
    deltas = minus(xs, b)
    columns = list(zip(*deltas, strict=True))
    share = values["select_topk"]
    if share < 1 and share > 0 and any(len(set(c)) > 1 for c in columns):
        variance = [statistics.pvariance(c) for c in columns]
        k = max(1, int(share * sum(len(set(c)) > 1 for c in columns)))
        chosen = set(sorted(range(len(columns)), key=lambda j: (-variance[j], j))[:k])
        deltas = [[v if j in chosen else 0.0 for j, v in enumerate(d)] for d in deltas]
    elif share <= 0:
        deltas = [[0.0] * len(b) for _ in deltas]
    energy = [math.fsum(v * v for v in d) for d in deltas]
    out = list(b)
    for j, column in enumerate(zip(*deltas, strict=True)):
        sign = 1 if math.fsum(column) >= 0 else -1
        agree = [(e, v) for e, v in zip(energy, column, strict=True) if v * sign > 0]
        out[j] += sum(e * v for e, v in agree) / sum(e for e, _ in agree) if agree else 0.0
    return out


def nearswap(xs, b, values, shape):
    t = values["t"]
    return [x if abs(x - v) <= t else v + math.copysign(t, x - v) for x, v in zip(xs[0], b, strict=True)]


def arcee_fusion(xs, b, values, shape):
    [x], importance = xs, [0.0] * len(b)
    for places in lines(shape, -1):
        p, q = ([math.exp(v[j]) for j in places] for v in (x, b))
        p, q = ([v / math.fsum(row) for v in row] for row in (p, q))
        divergence = max(0.0, math.fsum(v * math.log(v / w) for v, w in zip(p, q, strict=True)))
        for j in places:
            importance[j] = abs(x[j] - b[j]) * divergence
    q1, median, q3 = (sorted(importance)[int(q * (len(b) - 1))] for q in (0.25, 0.5, 0.75))
    return [x[j] if importance[j] >= median + 1.5 * (q3 - q1) else b[j] for j in range(len(b))]


def ram(xs, b, values, shape):
    return reinforced(xs, b, values, lambda shared, alone: 1.0)


def ramplus_tl(xs, b, values, shape):
    return reinforced(
        xs, b, values, lambda shared, alone: 1 + values["r"] * min(shared / alone, values["alpha"])
    )


def reinforced(xs, b, values, enlarge):
    deltas, out = minus(xs, b), list(b)
    changed = [[i for i, d in enumerate(deltas) if abs(d[j]) > values["epsilon"]] for j in range(len(b))]
    shared, alone = (
        [sum(i in models and (len(models) > 1) is several for models in changed) for i in range(len(xs))]
        for several in (True, False)
    )
    for j, models in enumerate(changed):
        if len(models) == 1:
            [i] = models
            out[j] += enlarge(shared[i], alone[i]) * deltas[i][j]
        elif models:
            out[j] += sum(deltas[i][j] for i in models) / len(models)
    return out


# ---- sums of task vectors


def task_vectors(xs, b, values, shape, keys, keep=None, *, elect):
    """keep: (delta, the model's own numbers, mask key, shape) -> places that stay, at densities in (0, 1)."""
    trimmed = []
    for i, delta in enumerate(minus(xs, b)):
        own = {name: v[i] for name, v in values.items() if isinstance(v, tuple)}
        density = own.get("density", 1.0)
        if density < 1:
            places = keep(delta, own, keys[i], shape) if density > 0 else set()
            kept = [d if j in places else 0.0 for j, d in enumerate(delta)]
            before, after = math.fsum(map(abs, delta)), math.fsum(map(abs, kept))
            if values["rescale"] and before >= 1e-7 and after >= 1e-7:
                kept = [d * (before / after) for d in kept]
            delta = kept
        trimmed.append(delta)
    out, weight = [], values["weight"]
    for j in range(len(b)):
        y = [w * delta[j] for w, delta in zip(weight, trimmed, strict=True)]
        if elect:
            sign = 1.0 if sum(y) >= 0 else -1.0
            agree = [i for i, v in enumerate(y) if v * sign > 0]
            total, divisor = sum(y[i] for i in agree), sum(weight[i] for i in agree) or 1.0
        else:
            total, divisor = sum(y), sum(weight)
            divisor = 1.0 if abs(divisor) < 1e-8 else divisor
        out.append(b[j] + values["lambda"] * (total / divisor if values["normalize"] else total))
    return out


def largest_first(delta):
    """Of entries of equal magnitude the first come first."""
    return sorted(range(len(delta)), key=lambda j: (-abs(delta[j]), j))


def keep_largest(delta, own, key, shape):
    """The int(d * n) largest, but one at least."""
    return set(largest_first(delta)[: max(1, int(own["density"] * len(delta)))])


def keep_band(delta, own, key, shape):
    """int(d * n) entries, after the int(gamma * n) largest have gone, or as many as leave enough entries."""
    n = len(delta)
    stay = int(own["density"] * n)
    gone = min(int(own["gamma"] * n), n - stay)
    return set(largest_first(delta)[gone : gone + stay])


def keep_random(delta, own, key, shape):
    return {j for j in range(len(delta)) if hash_reference(j, key) < own["density"] * 2**32}


def keep_by_rank(delta, own, key, shape):
    """Probabilities evenly spaced over density ± epsilon, by rank within a row."""
    places, density = set(), own["density"]
    for row in lines(shape, -1):
        epsilon = min(own["epsilon"], density, 1 - density) if len(row) > 1 else 0.0
        for rank, j in enumerate(sorted(row, key=lambda j: (abs(delta[j]), j))):
            share = density - epsilon + 2 * epsilon * rank / max(1, len(row) - 1)
            if hash_reference(j, key) < share * 2**32:
                places.add(j)
    return places


def hash_reference(index: int, key: int) -> int:
    """The hash of an entry in [0, 2**32): that of random_masks.py, which is signed, plus 2**31."""
    word = 2**32 - 1
    x = index & word
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & word
    x = ((x ^ (x >> 15)) * 0x846CA68B) & word
    x ^= x >> 16
    return ((((x ^ (key & word)) * (((key >> 32) & word) | 1)) & word) + 2**31) & word


REFERENCES = {
    rule.__name__: rule
    for rule in (
        linear,
        slerp,
        nuslerp,
        multislerp,
        karcher,
        model_stock,
        sce,
        nearswap,
        arcee_fusion,
        passthrough,
        ram,
        ramplus_tl,
    )
}  # (rows of the sources, row of the base or None, values, shape) -> row
OF_TASK_VECTORS = {
    "task_arithmetic": partial(task_vectors, elect=False),
    "ties": partial(task_vectors, keep=keep_largest, elect=True),
    "dare_linear": partial(task_vectors, keep=keep_random, elect=False),
    "dare_ties": partial(task_vectors, keep=keep_random, elect=True),
    "breadcrumbs": partial(task_vectors, keep=keep_band, elect=False),
    "breadcrumbs_ties": partial(task_vectors, keep=keep_band, elect=True),
    "della": partial(task_vectors, keep=keep_by_rank, elect=True),
    "della_linear": partial(task_vectors, keep=keep_by_rank, elect=False),
}  # the same with mask keys


def lacking(name: str) -> str:
    return f"method '{name}' lacks its formula in loops: write it in {Path(__file__).name}, in REFERENCES"


def reference(name: str, tensors: list[Tensor], base: Tensor | None, values, keys) -> Tensor:
    """What the method of that name should make of the tensors, float64."""
    xs = [x.double().flatten().tolist() for x in tensors]
    b, shape = base.double().flatten().tolist() if base is not None else None, tuple(tensors[0].shape)
    if name in OF_TASK_VECTORS:
        out = OF_TASK_VECTORS[name](xs, b, values, shape, keys)
    else:
        assert name in REFERENCES, lacking(name)
        out = REFERENCES[name](xs, b, values, shape)
    return torch.tensor(out, dtype=torch.float64).reshape(shape)


# ---- calls


def corners(rule: Method, n: int) -> Iterator[dict[str, float | tuple[float, ...]]]:
    """Bounds of a search in every combination; of a model's parameter also low for one and high for the rest.

    Left out: weights that are all zero in a normalized average, which has no value.
    """
    choices = {}
    for p in rule.params:
        low, high = p.low, p.high
        some = {(low,) * n, (high,) * n, (low, *(high,) * (n - 1)), (high, *(low,) * (n - 1))}
        choices[p.name] = [low, high] if p.per == "merge" else sorted(some)
    for combination in itertools.product(*choices.values()):
        values = dict(zip(choices, combination, strict=True))
        if not is_empty_average(rule, values):
            yield values


def is_empty_average(rule: Method, values) -> bool:
    """Whether models, not differences from a base, are to be averaged with weights that sum to zero."""
    return bool(
        rule.task_vector_sum
        and rule.task_vector_sum.without_base
        and values["normalize"]
        and not sum(values["weight"])
    )


def complete(
    method: str, n: int, given: dict[str, float | tuple[float, ...]]
) -> dict[str, float | tuple[float, ...]]:
    """Those values, and defaults for the rest."""
    return {
        p.name: (p.default,) * n if p.per == "model" else p.default for p in METHODS[method].params
    } | given


def merge(
    method: str,
    tensors: list[Tensor],
    base: Tensor | None = None,
    *,
    mergekit_compatible: bool = False,
    **given: float | tuple[float, ...],
) -> Tensor:
    return METHODS[method].kernel(
        tensors,
        base,
        complete(method, len(tensors), given),
        [0] * len(tensors),
        mergekit_compatible=mergekit_compatible,
    )


def random(shape, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def models(kind: str, shape: tuple[int, ...], n: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Fine-tunes of a base and the base.

    near: small changes of a third of the entries; far: large ones of all.
    """
    base = random(shape, 0).to(dtype)
    some = [(random(shape, 100 + i) > 0.4) if kind == "near" else 1.0 for i in range(n)]
    return [(base.double() + random(shape, i + 1, SPREAD[kind]) * some[i]).to(dtype) for i in range(n)], base
