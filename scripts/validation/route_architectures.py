"""Routes through tiny random models of every architecture, against physical copies: python
scripts/validation/route_architectures.py [NAME ...]

Without names writes results/routes_architectures.md. Takes about two minutes on one core.
"""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from evomerge.errors import FoldError, RouteError
from evomerge.merging.routing import checks, decoder_layers, plain_checkpoint, routed_model
from evomerge.merging.routing.routed_model import Hop, RoutedModel
from scripts.benchmarks import machine
from tests.support import route_oracle as oracle
from tests.support import text_architectures, vision_architectures

ROOT = Path(__file__).resolve().parents[2]
_ROUTES = (
    ("mixed", oracle.MIXED),
    ("periodic", oracle.PERIODIC),
    ("leading", oracle.LEADING),
    ("in place", oracle.IN_PLACE),
)
Build = Callable[..., nn.Module]


@dataclass
class Row:
    name: str
    refused: str = ""  # by check_routable or routable_by_numbers
    unscalable: str = ""
    plain: str = "no"  # which route is a plain checkpoint
    bitwise: str = ""
    cached: str = ""
    scaled: str = ""
    gain_bits: str = ""
    half: str = ""
    why: str = ""

    def line(self) -> str:
        why = self.refused or self.unscalable or self.why
        cells = [
            self.name,
            self.plain,
            self.bitwise,
            self.cached,
            self.scaled,
            self.gain_bits,
            self.half,
            why if len(why) < 260 else why[:257] + "...",
        ]
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def sweep(name: str, build: Build) -> Row:
    row = Row(name)
    models = [build(name, seed=seed) for seed in (0, 1)]
    try:
        checks.check_routable({"a": models[0], "b": models[1]}, "a")
        for model in models:
            checks.check_routable_numerically(model)
    except RouteError as error:
        row.refused = f"refused: {error}"
        return row
    routed = RoutedModel(models[0], models)
    route = _plain_route(routed, models, row)
    _compare(routed, models, route, row)
    try:
        for model in models:
            checks.check_scalable(model)
    except FoldError as error:
        row.unscalable = f"no scales: {error}"
        return row
    _scaled(routed, models, route, row)
    _bfloat16(name, build, route, row)
    return row


def _plain_route(routed: RoutedModel, models: list[nn.Module], row: Row) -> tuple[tuple[int, int], ...]:
    """The first of the routes that is a plain checkpoint, the first of all if none is."""
    for label, route in _ROUTES:
        routed.install(oracle.hops(models, route))
        why = plain_checkpoint.reasons(routed)
        if not why:
            row.plain = label
            return route
        row.why = row.why or f"not a checkpoint: {why[0]}"
    return oracle.MIXED


def _compare(
    routed: RoutedModel, models: list[nn.Module], route: tuple[tuple[int, int], ...], row: Row
) -> None:
    hops = oracle.hops(models, route)
    routed.install(hops)
    inputs = oracle.batch()
    error, steps = _cache_error(routed.model)
    own = 0.0 if error < 1e-3 else _cache_error(models[0])[0]
    row.cached = (
        f"{error:.0e}"
        if error < 1e-3
        else f"{error:.0e}, as alone ({own:.0e})"
        if error <= 10 * own
        else f"**{error:.0e}**"
    )
    if row.plain != "no":
        copied = oracle.copied(models[0], decoder_layers.stack(models[0])[0], hops)
        expected, found = oracle.logits(copied, inputs), oracle.logits(routed.model, inputs)
        same_steps = all(torch.equal(a, b) for a, b in zip(_cache_error(copied)[1], steps, strict=True))
        row.bitwise = (
            "yes"
            if torch.equal(found, expected) and same_steps
            else f"**{oracle.deviation(found, expected):.1e}, steps {same_steps}**"
        )


def _cache_error(model: nn.Module) -> tuple[float, list[torch.Tensor]]:
    """Largest error of cached step logits, infinite where tokens differ, and those logits."""
    (a, steps), (b, others) = (oracle.generated(model, oracle.batch(), cached) for cached in (True, False))
    error = max(oracle.deviation(x, y) for x, y in zip(steps, others, strict=True))
    return error if torch.equal(a, b) or error > 0.1 else float("inf"), steps


def _scaled(
    routed: RoutedModel, models: list[nn.Module], route: tuple[tuple[int, int], ...], row: Row
) -> None:
    error, found = _fold_error(routed, models, route)
    row.scaled = f"{error:.0e}"
    if error > 5e-4:  # is it the norms' epsilon, which hidden states that are scaled see and gains do not?
        kept = _epsilons(models, 1e-3)
        exact, _ = _fold_error(RoutedModel(models[0], models), models, route)
        _restore(kept)
        row.scaled = (
            f"{error:.0e}, {exact:.0e} at ε/1000"
            if exact <= 5e-4
            else f"**{error:.0e}, {exact:.0e} at ε/1000**"
        )
    gained = oracle.hops(models, route, routed_model.gains(oracle.SCALES[: len(route)], len(route)))
    if row.plain != "no":
        expected = oracle.logits(
            oracle.copied(models[0], decoder_layers.stack(models[0])[0], gained), oracle.batch()
        )
        row.gain_bits = "yes" if torch.equal(found, expected) else "**no**"


def _fold_error(
    routed: RoutedModel, models: list[nn.Module], route: tuple[tuple[int, int], ...]
) -> tuple[float, torch.Tensor]:
    """Gains in the weights against hidden states that are scaled: (error, logits with gains)."""
    scales = oracle.SCALES[: len(route)]
    routed.install(oracle.hops(models, route))
    handles = oracle.scale(routed.model, decoder_layers.stack(models[0])[0], scales)
    expected = oracle.logits(routed.model, oracle.batch())
    for handle in handles:
        handle.remove()
    routed.install(oracle.hops(models, route, routed_model.gains(scales, len(route))))
    found = oracle.logits(routed.model, oracle.batch())
    real = oracle.batch()[
        "attention_mask"
    ].bool()  # what a padded position holds is read by nobody, and may be nothing but zeros
    return oracle.deviation(found[real], expected[real]), found


def _epsilons(models: list[nn.Module], by: float) -> list[tuple[nn.Module, str, float]]:
    """Multiplies the epsilon of every norm; what they were."""
    kept = [
        (part, name, value)
        for model in models
        for part in model.modules()
        for name, value in vars(part).items()
        if isinstance(value, float) and "eps" in name and 0 < value < 1e-2
    ]
    for part, name, value in kept:
        setattr(part, name, value * by)
    return kept


def _restore(kept: list[tuple[nn.Module, str, float]]) -> None:
    for part, name, value in kept:
        setattr(part, name, value)


def _bfloat16(name: str, build: Build, route: tuple[tuple[int, int], ...], row: Row) -> None:
    """Scaled in bfloat16: the routed model and the exported tensors, bit for bit."""
    if row.plain == "no":
        return
    models = [build(name, dtype=torch.bfloat16, seed=seed) for seed in (0, 1)]
    gained = oracle.hops(models, route, routed_model.gains(oracle.SCALES[: len(route)], len(route)))
    try:
        routed = RoutedModel(models[0], models)
        routed.install(gained)
        expected = oracle.logits(
            oracle.copied(models[0], decoder_layers.stack(models[0])[0], gained), oracle.batch()
        )
        row.half = "yes" if torch.equal(oracle.logits(routed.model, oracle.batch()), expected) else "**no**"
    except (RouteError, FoldError, RuntimeError) as error:
        row.half = f"{type(error).__name__}: {str(error)[:60]}"


def half_billion() -> Iterator[str]:
    """Memory and time of 65 hops over two models of the shape of Qwen2 0.5B, in bfloat16."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    models: list[nn.Module] = [
        Qwen2ForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False) for _ in range(2)
    ]
    routes = [[(i * 7 + 3 * k) % 48 for i in range(65)] for k in range(3)]
    gains = routed_model.gains([1.0, *(0.9 + 0.005 * i for i in range(64))], 65)
    plain = [[Hop(models[j // 24], j % 24) for j in route] for route in routes]
    scaled = [
        [Hop(models[j // 24], j % 24, g) for j, g in zip(route, gains, strict=True)] for route in routes
    ]
    yield from _times(models, plain, scaled)
    gc.collect()
    yield from _memory(models, plain, scaled)


def _times(models: list[nn.Module], plain: list[list[Hop]], scaled: list[list[Hop]]) -> Iterator[str]:
    """Seconds of the checks and milliseconds of installing routes, a row of the table each."""
    for what, check in (
        ("check_routable_numerically", checks.check_routable_numerically),
        ("check_scalable", checks.check_scalable),
    ):
        start = time.perf_counter()
        for model in models:
            check(model)
        yield f"| {what}, each model once | {(time.perf_counter() - start) / 2:.1f} s |"
    routed = RoutedModel(models[0], models)
    for what, hops in (
        ("another route", plain[1]),
        ("the same route again", plain[1]),
        ("scaled, first", scaled[2]),
        ("scaled, again", scaled[2]),
    ):
        # Python's own full pass over all modules takes some 200 ms, in one install or another of many
        gc.collect()
        start = time.perf_counter()
        routed.install(hops)
        yield f"| install 65 hops: {what} | {1000 * (time.perf_counter() - start):.0f} ms |"
    start = time.perf_counter()
    why = plain_checkpoint.reasons(routed)
    yield f"| reasons ({len(why)}) | {1000 * (time.perf_counter() - start):.0f} ms |"


def _memory(models: list[nn.Module], plain: list[list[Hop]], scaled: list[list[Hop]]) -> Iterator[str]:
    """Memory that a routed model takes beside its parents' weights, a row of the table each."""
    weights = sum(p.numel() * p.element_size() for model in models for p in model.parameters())

    def traced() -> str:
        return f"{tracemalloc.get_traced_memory()[0] / weights:.3%}"

    tracemalloc.start()
    routed = RoutedModel(models[0], models)
    routed.install(plain[0])
    yield f"| Python memory of an unscaled view, of {weights / 2**30:.2f} GiB of weights | {traced()} |"
    routed.install(scaled[0])
    routed.model(input_ids=torch.arange(8)[None], use_cache=False)
    gc.collect()
    yield f"| Python memory of a scaled view after a forward | {traced()} |"
    for k in range(8):
        routed.install(scaled[k % 3][k:] + scaled[(k + 1) % 3][:k])
    gc.collect()
    yield f"| Python memory after ten routes | {traced()} |"
    of_parents = {
        t.untyped_storage().data_ptr() for model in models for t in (*model.parameters(), *model.buffers())
    }
    of_route = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*routed.model.parameters(), *routed.model.buffers())
    }
    alone = sum(nbytes for pointer, nbytes in of_route.items() if pointer not in of_parents)
    yield f"| tensor bytes that the view alone holds | {alone} |"


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1:]
    rows = []
    for module in (text_architectures, vision_architectures):
        for name in module.CONFIGS:
            if not names or name in names:
                rows.append((module is vision_architectures, sweep(name, module.build)))
                print(rows[-1][1].line(), flush=True)
    if not names:
        target = ROOT / "results" / "routes_architectures.md"
        target.write_text(_document(rows, list(half_billion())))


def _document(rows: list[tuple[bool, Row]], numbers: list[str]) -> str:
    head = [
        "# Routes through every architecture",
        "",
        f"{machine.stamp('torch', 'transformers')}. "
        "Tiny random models of 4 layers; made by `scripts/validation/route_architectures.py`.",
        "",
        "Two parents, 4 to 8 hops out of order and with repeats, a padded batch. *plain*: which route is a "
        "plain checkpoint and was compared: any "
        "(`mixed`), one in the config's period (`periodic`), one whose first layers are first layers "
        "(`leading`), one of layers at their own numbers "
        "(`in place`). *bitwise*: logits and cached step logits against a physically copied model. "
        "*cached*: largest difference of step logits of "
        "greedy generation with and without a cache, of their deviation; *as alone*: the parent has it too. "
        "*scaled*: gains in the weights against "
        "hidden states multiplied by s in [0.48, 1.4], of the logits' deviation, without padding; *no "
        "scales*: refused at `run`; above "
        "5e-4 also with the norms' ε made a thousandth, which a scaled "
        "hidden state sees and a gain does not. *gain bits*, *bf16*: scaled logits against a copy that "
        "holds the folded tensors, bit for bit.",
        "",
    ]
    names = ("architecture", "plain", "bitwise", "cached", "scaled", "gain bits", "bf16", "why not")
    columns = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    counts = []
    for vision in (False, True):
        own = [row for is_vision, row in rows if is_vision is vision]
        scaled = sum(bool(row.scaled) and "*" not in row.scaled for row in own)
        counts.append(
            f"{'Vision-language' if vision else 'Text'}: {len(own)} architectures, "
            f"{sum(not row.refused for row in own)} can be routed, "
            f"{sum(row.bitwise == 'yes' for row in own)} bitwise equal to a copy, {scaled} with exact "
            "scales, "
            f"{sum(row.half == 'yes' for row in own)} with the exported bits in bfloat16."
        )
    body = [row.line() for _, row in rows]
    cost = [
        "",
        "## Cost: 65 hops over two models of the shape of Qwen2 0.5B (bfloat16)",
        "",
        "| | |",
        "| --- | --- |",
        *numbers,
    ]
    cost += [
        "",
        "The installs are timed after a full pass of Python's garbage collector; one that falls into an "
        "install adds some 200 ms.",
    ]
    return "\n".join([*head, *counts, "", *columns, *body, *cost]) + "\n"


if __name__ == "__main__":
    main()
