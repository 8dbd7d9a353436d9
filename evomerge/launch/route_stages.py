"""Stages that search routes: their space, their perplexity screen, the routes written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge import _yaml
from evomerge.checkpoints import Parent, locate, stored_dtype
from evomerge.config import Config
from evomerge.config.schema import StageConfig
from evomerge.errors import ConfigError
from evomerge.evaluation import TaskSet
from evomerge.evaluation import perplexity_screen as gating
from evomerge.evaluation.perplexity_screen import PerplexityScreen
from evomerge.launch import pool
from evomerge.merging.model_loading import load_tokenizer
from evomerge.optimizers import (
    Optimizer,
    OptimizerEntry,
    OptimizerSettings,
    is_diagonal,
    optimizer_for,
)
from evomerge.recipes import Mix, Recipe, mergekit_yaml
from evomerge.search import Opening, Start
from evomerge.search.plan import ISLAND_SEED_STEP, STAGE_SEED_STEP
from evomerge.spaces import Baseline
from evomerge.spaces.routes.hand_routes import hand_routes
from evomerge.spaces.routes.layer_indicators import LayerIndicatorSpace
from evomerge.spaces.routes.position_choices import PositionChoiceSpace
from evomerge.workers.worker import Worker

MERGED = "merged"
"""What a route calls the best model of the stage before it, where that is no parent."""
_SHARE, _LEAST_TOKENS, _MOST_TOKENS = 0.01, 64, 2000  # of the tokens of a candidate, that a gate looks at
_TOKENS_A_PROMPT = 8  # prompts are at least about so long: how many are asked for


def route_space(
    settings: Config, parents: Mapping[str, Parent], start: Start
) -> PositionChoiceSpace | LayerIndicatorSpace:
    """The space of routes that begins at the identity path of what the stages before came to."""
    routes = settings.routes
    own = _outer(start.recipe)
    name = (own or MERGED) if routes.start == "best" else routes.start
    models = [(n, parents[n].layout.num_layers) for n in (routes.models or settings.models)]
    stage = None
    if name == MERGED:
        stage = (MERGED, start.recipe)
        models = [(MERGED, len(start.recipe.layers)), *models]
    elif name not in dict(models):
        models = [(name, parents[name].layout.num_layers), *models]
    depth = dict(models)[name]
    bounds = routes.layers or (max(1, depth // 2), 2 * depth)
    common: dict[str, Any] = {
        "models": tuple(models), "begin": name, "stage": stage, "bounds": bounds, "scales": routes.scales, "scale_range": routes.scale_range,
        "changes": routes.expected_mutations, "out_dtype": settings.out_dtype,
    }  # fmt: skip
    if routes.genome == "indicator":
        return LayerIndicatorSpace(**common, repeats=routes.repeats)
    return PositionChoiceSpace(
        **common,
        spans=routes.spans,
        categorical=routes.genome == "categorical",
        outer=routes.embeddings == "any",
    )


def check_routes(
    settings: Config, parents: Mapping[str, Parent], scorer: Worker, tasks: TaskSet, limit: float | None
) -> float | None:
    """Checks that the parents' layers can be routed, and sets the worker's gate; its limit in nats a token, None without one.

    limit: that of a study which is gone on with. Raises RouteError or FoldError where a route would be wrong.
    """
    if "routes" not in settings.kinds:
        return None
    names = settings.routes.models or tuple(settings.models)
    scorer.builder.check_routable(names, settings.routes.scales != "none")
    scorer.screen = gate(settings, tasks, scorer, limit)
    return scorer.screen.max_nats_per_token if scorer.screen else None


def gate(settings: Config, tasks: TaskSet, scorer: Worker, limit: float | None) -> PerplexityScreen | None:
    """What a route has to pass before it is scored in full; limit: nats a token, found from the parents where it is None."""
    asked = settings.routes.perplexity_screen
    if asked is None or "routes" not in settings.kinds:
        return None
    tokenizer = load_tokenizer(scorer.parents[settings.base])

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])  # type: ignore[operator]

    tokens = asked.tokens or _MOST_TOKENS
    texts = [
        (ids(prompt), ids(prompt + answer)) for prompt, answer in tasks.examples(tokens // _TOKENS_A_PROMPT)
    ]
    if (
        asked.tokens is None and texts
    ):  # a hundredth of what a candidate is scored on, as far as one prompt for each item tells
        items = {
            leaf: settings.evaluation.items_of(t.task)
            for t in settings.tasks
            for leaf, _ in tasks.subtasks(t.task)
        }
        count = sum(min(len(own), items.get(leaf, 0)) for leaf, own in tasks.items("search").items())
        mean = sum(len(whole) for _, whole in texts) / len(texts)
        tokens = max(_LEAST_TOKENS, min(_MOST_TOKENS, int(_SHARE * count * mean)))
    rows = gating.screen_texts(texts, tokens)
    if not rows:
        return None
    if limit is None:
        found = [gating.nats_per_token(scorer.builder.model(name), rows) for name in settings.models]
        limit = round(min(found) + math.log(asked.factor), 4)
        if not math.isfinite(limit):
            raise ConfigError("no parent gives finite logits on the prompts of the search; check the models")
    return PerplexityScreen(rows, limit)


def open_route_stage(
    settings: Config,
    stage: StageConfig,
    parents: Mapping[str, Parent],
    begun: int,
    number: int,
    num_workers: int,
) -> Callable[[Start], Opening]:
    def opened(start: Start) -> Opening:
        space = route_space(settings, parents, start)
        sigma = stage.sigma or space.sigma
        population = stage.population or pool.population(settings, num_workers, len(space.axes))

        entry = route_optimizer(settings)
        category_weights = (
            space.likely if isinstance(space, PositionChoiceSpace) and space.categories else None
        )

        def optimizer(genome: Sequence[float], island: int) -> Optimizer:
            optimizer_settings = OptimizerSettings(
                sigma=sigma,
                population=population,
                seed=settings.search.seed + STAGE_SEED_STEP * number + ISLAND_SEED_STEP * island,
                diagonal=is_diagonal(settings.search.diagonal, begun, len(space.axes)),
                categories=space.categories,
                keep_probability=space.stay,
                category_weights=category_weights,
            )
            return entry.make(genome, optimizer_settings)

        return Opening(
            space,
            optimizer,
            hand_baselines(settings, parents, start) if number else (),
            at_best=True,
            late=0.0,
        )

    return opened


def route_optimizer(settings: Config) -> OptimizerEntry:
    """The optimizer of the stages that search routes: elitist for choices and CMA-ES for numbers, unless named."""
    categorical = settings.routes.genome == "categorical"
    name = settings.routes.optimizer or ("elitist" if categorical else "cma")
    return optimizer_for(name, categorical=categorical)


def hand_baselines(settings: Config, parents: Mapping[str, Parent], start: Start | None) -> list[Baseline]:
    """Routes that people write by hand, of the start's model where it is no parent, and the stacks of the search file."""
    names = settings.routes.models or tuple(settings.models)
    models = tuple((n, parents[n].layout.num_layers) for n in names)
    stage = None
    if start is not None and _outer(start.recipe) is None:
        stage, models = (MERGED, start.recipe), ((MERGED, len(start.recipe.layers)),)
    found = [
        Baseline(label, "hand", recipe)
        for label, recipe in hand_routes(models, stage=stage, out_dtype=settings.out_dtype)
    ]
    return found + [
        Baseline(Path(file).name, "hand", _stack(file, settings, parents)) for file in settings.routes.stacks
    ]


def _stack(file: str, settings: Config, parents: Mapping[str, Parent]) -> Recipe:
    """A mergekit passthrough file as a recipe over the search's models. Raises ConfigError for any other."""
    by_path = {str(locate(m.path, m.revision)): name for name, m in settings.models.items()}

    def known(reference: str) -> str:
        name = reference if reference in settings.models else by_path.get(str(locate(reference)))
        if name is None:
            raise ConfigError(
                f"routes.stacks: {file} takes layers of '{reference}', which is not among the models of this search"
            )
        return name

    if not Path(file).is_file():
        raise ConfigError(f"routes.stacks: there is no file '{file}'; correct the path")
    read = mergekit_yaml.load(
        _yaml.read_all(Path(file)),
        lambda r: parents[known(r)].layout.num_layers,
        lambda r: stored_dtype(parents[known(r)]),
        "float32",
    )
    if any(mix.method != "passthrough" for mix in read.mixes):
        raise ConfigError(
            f"routes.stacks: {file} is no stack of layers passed through; write it with merge_method: passthrough"
        )

    def renamed(mix: Mix) -> Mix:
        if any(value not in (1.0, (1.0,)) for _, value in mix.params):
            raise ConfigError(
                f"routes.stacks: {file} scales tensors; a route begins with layers as they are, so leave `scale` out"
            )
        return Mix(mix.method, tuple((known(model), layer) for model, layer in mix.sources))

    layers = tuple(renamed(mix) for mix in read.layers)
    return Recipe(
        known(read.base), layers, renamed(read.embeddings), renamed(read.head), out_dtype=settings.out_dtype
    )


def _outer(recipe: Recipe) -> str | None:
    """The model that a stack of its and others' layers has the embeddings and the head of; None for a merge."""
    if recipe.stages or any(mix.method != "passthrough" for mix in recipe.mixes):
        return None
    names = {mix.sources[0][0] for mix in (recipe.embeddings, recipe.head)}
    return names.pop() if len(names) == 1 else None
