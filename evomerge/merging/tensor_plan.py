"""What every output tensor of a recipe is made of, checked and planned from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from evomerge.checkpoints import Parent
from evomerge.checkpoints.comparison import first_difference
from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.errors import CheckpointError, RecipeError, suggest
from evomerge.merging.routing.layer_config import LEADING, LayerConfig
from evomerge.merging.vocabulary.alignment import Vocabulary
from evomerge.merging.vocabulary.embedding_tables import vocabulary_tensors
from evomerge.methods import Method, method
from evomerge.methods.row_sums import takes_rows
from evomerge.recipes import STORED, Filtered, Mix, ParamValue, PerRow, Recipe, Setting

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""Name of a type in a recipe -> torch's type."""
DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
"""Name of a type in a recipe -> safetensors' name of it."""


@dataclass(frozen=True, slots=True)
class Step:
    """The plan of one output tensor.

    Attributes:
        name: Its name on disk.
        info: Its header facts.
        mix: How it is merged; None for a tensor that is taken over from the base as it is.
        inputs: Its name in each source of the mix.
        base: Its name in the mix's base, None if the mix has none.
        place: Number of the mix in `Recipe.mixes`, None without a mix.
    """

    name: str
    info: TensorInfo
    mix: Mix | None = None
    inputs: tuple[str, ...] = ()
    base: str | None = None
    place: int | None = None

    def with_mix(self, mix: Mix) -> Step:
        """The plan of the same tensor by a mix of the same models.

        Args:
            mix: The mix, which differs in its numbers alone.

        Returns:
            The plan.
        """
        return Step(self.name, self.info, mix, self.inputs, self.base, self.place)


def check(recipe: Recipe) -> None:
    """Checks that every mix of a recipe is one that its method accepts.

    Args:
        recipe: The recipe; intermediate merges in it are not checked.

    Raises:
        RecipeError: A type, method, parameter or number of models is refused; names layer and model.
    """
    for name in (recipe.dtype, recipe.out_dtype):
        is_stored = name == STORED and recipe.policy == "mergekit" and recipe.out_dtype != STORED
        if name not in DTYPES and not is_stored:
            raise RecipeError(f"unknown dtype '{name}'. Known: {', '.join(DTYPES)}")
    for where, mix in zip(output_places(recipe), recipe.mixes, strict=True):
        _check_models(mix, where)
        for name, value in mix.params:
            _check_param(method(mix.method), name, value, mix, where)
        _check_row_settings(mix, recipe.policy, where)


def output_places(recipe: Recipe) -> list[str]:
    """What messages call the mixes of a recipe.

    Args:
        recipe: The recipe.

    Returns:
        'embeddings', 'layer 0', ..., 'head', in the order of `Recipe.mixes`.
    """
    return ["embeddings", *(f"layer {i}" for i in range(len(recipe.layers))), "head"]


def plan(recipe: Recipe, parents: Mapping[str, Parent], vocabulary: Vocabulary | None) -> tuple[Step, ...]:
    """Plans every output tensor: finds its inputs and compares their shapes, from headers alone.

    Args:
        recipe: A recipe that `check` accepts.
        parents: Name -> parent, for every model that the recipe reads.
        vocabulary: The output's vocabulary, None if the recipe keeps the base's rows.

    Returns:
        The steps in output order: embeddings, layers, head, other towers.

    Raises:
        CheckpointError: A model lacks a tensor, the shapes of a tensor's inputs differ, or the base's config
            has no layer of a shape that is stacked.
    """
    shell = parents[recipe.base].layout
    resized = resized_tensors(parents[recipe.base], vocabulary)
    planner = _Planner(recipe, recipe.mixes, parents, vocabulary, resized)
    steps = [planner.step(0, name, None) for name in shell.outer_names("embeddings")]
    for position, mix in enumerate(recipe.layers):
        for suffix in planner.suffixes(mix):
            steps.append(planner.step(position + 1, shell.layer_name(position, suffix), suffix))
    last = len(recipe.layers) + 1
    steps += [planner.step(last, name, None) for name in shell.outer_names("head")]
    planner.check_fits_base(steps)
    steps += [planner.taken_over(name) for name in shell.outer_names("tower")]
    return tuple(steps)


def resized_tensors(base: Parent, vocabulary: Vocabulary | None) -> frozenset[str]:
    """The tensors of a merge whose rows are aligned by token.

    Args:
        base: The base of the merge.
        vocabulary: The output's vocabulary, None if the recipe keeps the base's rows.

    Returns:
        Names of the base's tensors with one row a token; none without a vocabulary.
    """
    return frozenset(vocabulary_tensors(base)) if vocabulary else frozenset()


def layer_index(layer: int | None) -> int:
    """The layer of a source inside the stack.

    Args:
        layer: Second half of a recipe's source.

    Returns:
        The layer.

    Raises:
        RecipeError: The source names no layer.
    """
    if layer is None:
        raise RecipeError("a source of an output layer must name a layer")
    return layer


@dataclass(frozen=True, slots=True)
class _Planner:
    """Plans single steps.

    mixes: of the recipe; resized: names of the output tensors whose rows the vocabulary numbers anew.
    """

    recipe: Recipe
    mixes: tuple[Mix, ...]
    parents: Mapping[str, Parent]
    vocabulary: Vocabulary | None
    resized: frozenset[str]

    def suffixes(self, mix: Mix) -> list[str]:
        """Names inside a layer of all tensors that any model of its mix has there, sorted."""
        suffixes: set[str] = set()
        for model, layer in (*mix.sources, *([mix.base] if mix.base else ())):
            suffixes.update(self.parents[model].layout.layer_suffixes(layer_index(layer)))
        return sorted(suffixes)

    def step(self, place: int, output: str, suffix: str | None) -> Step:
        """The plan of one merged tensor.

        place: number of its mix; suffix: its name inside a layer, None outside the stack.
        """
        mix = self.mixes[place]
        models = [*mix.sources, *([mix.base] if mix.base else [])]
        names = [self._name(model, layer, output, suffix) for model, layer in models]
        infos = [self.parents[model].tensors[name] for (model, _), name in zip(models, names, strict=True)]
        is_resized = self.vocabulary is not None and output in self.resized
        last = infos[-1]
        for (model, _), info in zip(models, infos, strict=True):
            if info.shape[is_resized:] != last.shape[is_resized:]:
                shapes = f"{list(info.shape)} in '{model}' and {list(last.shape)} in '{models[-1][0]}'"
                raise CheckpointError(f"'{output}' is {shapes}{self._cause(model, models[-1][0])}")
        shape = last.shape
        if is_resized and self.vocabulary is not None:
            shape = (self.vocabulary.size, *last.shape[1:])
        sources = len(mix.sources)
        info = replace(self._header(last), shape=shape)
        base = names[sources] if mix.base else None
        return Step(output, info, mix, tuple(names[:sources]), base, place)

    def taken_over(self, name: str) -> Step:
        """The plan of a tensor that is the base's own."""
        return Step(name, self._header(self.parents[self.recipe.base].tensors[name]))

    def check_fits_base(self, steps: Sequence[Step]) -> None:
        """Raises CheckpointError for tensors taken from other models that the base's config has no place for.

        A tensor that is merged with the base's has been compared with it already.
        """
        base = self.parents[self.recipe.base]
        kinds, shapes = _layers_of(base)
        suffixes: dict[int, set[str]] = {}
        for step in steps:
            assert step.mix is not None
            assert step.place is not None
            if self.recipe.base in step.mix.models:
                continue
            place = base.layout.place(step.name)
            known = shapes.get(place.suffix, set())
            shape = step.info.shape
            if known and shape not in known and not (step.name in self.resized and self.vocabulary):
                own = " or ".join(str(list(one)) for one in sorted(known))
                model = step.mix.sources[0][0]
                raise CheckpointError(
                    f"'{step.name}' is {list(shape)} from '{model}' and {own} in base '{self.recipe.base}', "
                    f"whose config.json the merge has{self._cause(model)}"
                )
            if place.layer is not None:
                suffixes.setdefault(step.place, set()).add(place.suffix)
        for number, own_suffixes in suffixes.items():
            model = self.mixes[number].sources[0][0]
            if frozenset(own_suffixes) not in kinds and not _has_layer_lists(base, self.parents[model]):
                nearest = min(kinds, key=lambda kind: len(kind ^ own_suffixes))
                name = min(nearest ^ own_suffixes)
                has, lacks = (model, self.recipe.base) if name in own_suffixes else (self.recipe.base, model)
                raise CheckpointError(
                    f"layer {number - 1} of the merge comes from '{model}': '{has}' has the tensor '{name}' "
                    f"there and '{lacks}' has none, so the config.json of base '{self.recipe.base}' does not "
                    "fit; stack layers of one architecture"
                )

    def _name(self, model: str, layer: int | None, output: str, suffix: str | None) -> str:
        """A model's name of an output tensor's input; the embeddings for a head that is tied to them."""
        parent = self.parents[model]
        name = output if suffix is None else parent.layout.layer_name(layer_index(layer), suffix)
        if name in parent.tensors:
            return name
        text = parent.config.get("text_config", parent.config)
        is_head = parent.layout.place(name).part == "head" and name.endswith(".weight") and "norm" not in name
        if is_head and text.get("tie_word_embeddings", parent.config.get("tie_word_embeddings", True)):
            tables = vocabulary_tensors(parent)
            if tables:
                return tables[0]
        raise CheckpointError(f"model '{model}' lacks the tensor '{name}'{self._cause(model)}")

    def _cause(self, *models: str) -> str:
        """Why one of the models does not fit the base, to end a sentence."""
        base = self.recipe.base
        rows = "set tokenizer_source: union" if self.vocabulary is None else None
        for name in models:
            one, two = self.parents[name], self.parents[base]
            cause = None if name == base else first_difference(name, one, base, two, rows=rows, deeper=True)
            if cause:
                return f": {cause}"
        return ""

    def _header(self, info: TensorInfo) -> TensorInfo:
        """The header facts of the output: of the recipe's type, unless it holds whole numbers."""
        is_floating = info.dtype in ("F64", "F32", "F16", "BF16")
        return TensorInfo(info.shape, DTYPE_CODES[self.recipe.out_dtype] if is_floating else info.dtype, "")


def _layers_of(base: Parent) -> tuple[set[frozenset[str]], dict[str, set[tuple[int, ...]]]]:
    """(the sets of suffixes that its layers have, suffix or outer name -> its shapes)."""
    layout = base.layout
    kinds = {frozenset(layout.layer_suffixes(layer)) for layer in range(layout.num_layers)}
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, info in base.tensors.items():
        shapes.setdefault(layout.place(name).suffix, set()).add(info.shape)
    return kinds, shapes


def _has_layer_lists(*parents: Parent) -> bool:
    """Whether configs of one architecture say something of each layer, which a stack takes along."""
    if len({parent.config.get("model_type") for parent in parents}) > 1:
        return False
    texts = [parent.config.get("text_config") or parent.config for parent in parents]
    read = [
        LayerConfig("", text, p.layout.num_layers, "", {}) for text, p in zip(texts, parents, strict=True)
    ]
    return any(one.lists() or one.index_sets() or set(LEADING) & set(one.values) for one in read)


def _check_models(mix: Mix, where: str) -> None:
    """Raises RecipeError unless the method takes as many models as the mix has."""
    rule = method(mix.method)
    least, most = rule.models
    if not least <= len(mix.sources) <= most:
        expected = str(least) if least == most else f"{least} to {most}"
        raise RecipeError(
            f"{mix.method} takes {expected} source models besides the base, got {len(mix.sources)} ({where})"
        )
    if rule.needs_base and mix.base is None:
        raise RecipeError(f"{mix.method} needs a base model ({where})")
    if mix.base is not None and not (rule.needs_base or rule.takes_base):
        raise RecipeError(f"{mix.method} has no base model; list '{mix.base[0]}' among its sources ({where})")


def _check_row_settings(mix: Mix, policy: str, where: str) -> None:
    """Raises RecipeError for values by row where they mean nothing."""
    for name, value in mix.params:
        if not any(isinstance(s, PerRow) for s in (value if isinstance(value, tuple) else (value,))):
            continue
        if not takes_rows(method(mix.method)) or name != "weight" or not isinstance(value, tuple):
            raise RecipeError(
                f"{name} of {mix.method} cannot have a value for each row ({where}): only the weights of a "
                "plain sum can, such as task_arithmetic or linear"
            )
        if policy != "float32":
            raise RecipeError(
                f"mergekit has no weights for rows, so the policy '{policy}' cannot have them ({where}); "
                "use the policy 'float32'"
            )


def _check_param(rule: Method, name: str, value: ParamValue, mix: Mix, where: str) -> None:
    param = rule.param(name)
    if param is None:
        advice = suggest(name, [p.name for p in rule.params])
        raise RecipeError(f"{rule.name} has no parameter '{name}' ({where}). {advice}")
    is_per_model = isinstance(value, tuple)
    if is_per_model and param.per == "merge":
        raise RecipeError(
            f"{name} of {rule.name} is one value for the merge, not one for each model ({where})"
        )
    for i, setting in enumerate(value if isinstance(value, tuple) else (value,)):
        place = f"{where}, model {mix.sources[i][0]}" if is_per_model else where
        for number in _extremes(setting):
            param.check(number, place)


def _extremes(setting: Setting) -> Sequence[float]:
    """The numbers of a setting; of one by row the least and the largest."""
    if isinstance(setting, PerRow):
        return (min(setting.numbers), max(setting.numbers))
    return [number for _, number in setting.cases] if isinstance(setting, Filtered) else [setting]
