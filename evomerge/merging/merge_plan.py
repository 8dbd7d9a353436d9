"""What a merge does, planned once for all recipes that differ in their numbers alone.

Candidates of a search have one shape: the same models, methods, layers and filters. For it the output
tensors, their inputs and the checks of structure are worked out once; a candidate then takes its numbers to
the tensors by array operations.

    plans = MergePlans(parents)
    Merge(recipe, parents, plans=plans)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.checkpoints import Parent
from evomerge.errors import RecipeError, suggest
from evomerge.merging.row_weights import check_rows_of_steps
from evomerge.merging.tensor_plan import Step, plan, resized_tensors
from evomerge.merging.vocabulary.alignment import Vocabulary
from evomerge.methods import Method, Param, Values, method
from evomerge.recipes import Filtered, Mix, ParamValue, PerRow, Recipe, Setting

if TYPE_CHECKING:
    from evomerge.merging.candidate_launch import CandidateLaunches

Array = np.ndarray[Any, np.dtype[Any]]
_MOST_PLANS = 64  # shapes that are remembered; routes have many


@dataclass(frozen=True, slots=True)
class ValueGroup:
    """Output tensors that are merged by one method from one number of models.

    Attributes:
        rule: The method.
        steps: Numbers of their steps in the plan, ascending.
        indices: Parameter -> where its values stand among the numbers of a recipe: [tensors, sources] of a
            parameter of each model, [tensors] of one of the merge.
    """

    rule: Method
    steps: tuple[int, ...]
    indices: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class MergePlan:
    """The plan of all recipes of one shape.

    Attributes:
        steps: The output tensors in order, with the mixes of the recipe that was planned.
        vocabulary: The output's vocabulary, None if the recipes keep the base's rows.
        resized: Names of the tensors whose rows the vocabulary numbers anew.
        groups: The merged tensors by method and number of models.
        places: Number of a step -> (group, row of the group).
        bounds: Of the numbers that parameters were given: [3, numbers] least and largest value, and whether
            it is a switch.
        constants: Numbers that stand after those of a recipe: defaults.
    """

    steps: tuple[Step, ...]
    vocabulary: Vocabulary | None
    resized: frozenset[str]
    groups: tuple[ValueGroup, ...]
    places: Mapping[int, tuple[int, int]]
    bounds: Array
    constants: tuple[float, ...]

    def steps_of(self, recipe: Recipe) -> tuple[Step, ...]:
        """The output tensors with the mixes of another recipe of the shape.

        Args:
            recipe: The recipe.

        Returns:
            The steps in output order.
        """
        mixes = recipe.mixes
        return tuple(step if step.place is None else step.with_mix(mixes[step.place]) for step in self.steps)

    def accepts(self, numbers: Sequence[float]) -> bool:
        """Whether the methods are defined at the numbers of a recipe of the shape.

        Args:
            numbers: What `shape_and_numbers` gives.

        Returns:
            False if `tensor_plan.check` refuses the recipe.
        """
        given = np.array(numbers, np.float64)
        low, high, is_switch = self.bounds
        with np.errstate(invalid="ignore"):
            inside = np.isfinite(given) & (low <= given) & (given <= high)
            return bool(np.all(inside & ((is_switch == 0) | (given == 0) | (given == 1))))


class RecipeValues:
    """The values of the methods' parameters for every output tensor of one recipe.

    Attributes:
        plan: The plan of the recipe's shape.
    """

    def __init__(self, plan: MergePlan, numbers: Sequence[float]) -> None:
        """Takes the numbers of a recipe.

        Args:
            plan: The plan of its shape.
            numbers: What `shape_and_numbers` gives.
        """
        self.plan = plan
        self._numbers = np.array([*numbers, *plan.constants], np.float64)
        self._arrays: dict[int, Mapping[str, Array]] = {}
        self._rows: dict[int, list[Values]] = {}

    def arrays(self, group: int) -> Mapping[str, Array]:
        """The values of a group of tensors.

        Args:
            group: Number of the group in the plan.

        Returns:
            Parameter -> [tensors, sources] float64 of a parameter of each model, [tensors] of one of the
            merge.
        """
        if group not in self._arrays:
            indices = self.plan.groups[group].indices
            self._arrays[group] = {name: self._numbers[at] for name, at in indices.items()}
        return self._arrays[group]

    def of(self, step: int) -> Values:
        """The values of one tensor.

        Args:
            step: Number of its step in the plan, of one that is merged.

        Returns:
            A float for a parameter of the merge, a tuple with one float per source for one of each model.
        """
        group, row = self.plan.places[step]
        if group not in self._rows:
            self._rows[group] = _rows(self.arrays(group), len(self.plan.groups[group].steps))
        return self._rows[group][row]


class MergePlans:
    """Plans of the shapes that a search meets, for parents that stay the same.

    Attributes:
        parents: Name -> parent.
        launches: What merges whole candidates at once, None where tensors are merged one by one.
    """

    def __init__(self, parents: Mapping[str, Parent], launches: CandidateLaunches | None = None) -> None:
        """No plans yet.

        Args:
            parents: Name -> parent, those that `Merge` is given.
            launches: What merges whole candidates at once, None for one tensor after the other.
        """
        self.parents = parents
        self.launches = launches
        self._plans: OrderedDict[Hashable, MergePlan] = OrderedDict()

    def find(self, recipe: Recipe) -> tuple[MergePlan, RecipeValues] | None:
        """The remembered plan of a recipe's shape.

        Args:
            recipe: The recipe.

        Returns:
            The plan and the recipe's values; None for a shape not seen yet, one with intermediate merges,
            and a recipe that `make_plan` refuses.
        """
        if recipe.stages:
            return None
        shape, numbers = shape_and_numbers(recipe)
        found = self._plans.get(shape)
        if found is None or not found.accepts(numbers):
            return None
        self._plans.move_to_end(shape)
        return found, RecipeValues(found, numbers)

    def keep(self, recipe: Recipe, made: MergePlan) -> None:
        """Remembers a plan.

        Args:
            recipe: A recipe of its shape; one with intermediate merges has parents of its own, so its plan is
                forgotten.
            made: The plan.
        """
        if recipe.stages:
            return
        self._plans[shape_and_numbers(recipe)[0]] = made
        if len(self._plans) > _MOST_PLANS:
            self._plans.popitem(last=False)


def make_plan(recipe: Recipe, parents: Mapping[str, Parent]) -> MergePlan:
    """Plans a recipe from headers, configs and tokenizer files.

    Args:
        recipe: A recipe that `tensor_plan.check` accepts.
        parents: Name -> parent, for every model that the recipe reads, intermediate merges included.

    Returns:
        The plan.

    Raises:
        RecipeError: The recipe reads a model that is not there.
        CheckpointError: The parents' tensors do not fit together.
    """
    for name in recipe.reads:
        if name not in parents:
            raise RecipeError(
                f"the recipe reads model '{name}', which is not there. {suggest(name, parents)}"
            )
    vocabulary = None
    if recipe.tokenizer is not None:
        read = {name: parents[name] for name in recipe.reads}
        vocabulary = Vocabulary(recipe.tokenizer, recipe.base, read)
    steps = plan(recipe, parents, vocabulary)
    check_rows_of_steps(steps)
    index = _NumberIndex(recipe)
    groups = _groups(steps, index)
    return MergePlan(
        steps,
        vocabulary,
        resized_tensors(parents[recipe.base], vocabulary),
        groups,
        {step: (g, row) for g, group in enumerate(groups) for row, step in enumerate(group.steps)},
        index.bounds(),
        tuple(index.constants),
    )


def shape_and_numbers(recipe: Recipe) -> tuple[Hashable, list[float]]:
    """Takes a recipe apart into what its plan depends on and what it does not.

    Args:
        recipe: The recipe; its intermediate merges are left out.

    Returns:
        (a value that recipes of one shape have in common, the numbers of its parameters; of settings by row
        those of the first rows, the least and the largest).
    """
    numbers: list[float] = []
    mixes = tuple(_mix_shape(mix, numbers) for mix in recipe.mixes)
    return (recipe.base, recipe.dtype, recipe.out_dtype, recipe.policy, recipe.tokenizer, mixes), numbers


def _mix_shape(mix: Mix, numbers: list[float]) -> Hashable:
    """The shape of a mix; adds its numbers."""
    parts = tuple((name, _value_shape(value, numbers)) for name, value in mix.params)
    return mix.method, mix.sources, mix.base, parts


def _value_shape(value: ParamValue, numbers: list[float]) -> Hashable:
    if isinstance(value, tuple):
        return tuple(_setting_shape(setting, numbers) for setting in value)
    return (_setting_shape(value, numbers), "one for the merge")


def _setting_shape(setting: Setting, numbers: list[float]) -> Hashable:
    """Texts of a filter, numbers of rows; None for a plain number."""
    if isinstance(setting, Filtered):
        numbers.extend([number for _, number in setting.cases])
        return tuple([text for text, _ in setting.cases])
    if isinstance(setting, PerRow):
        numbers.extend(values[0] for _, values in setting.cases)
        numbers += (setting.rest, min(setting.numbers), max(setting.numbers))
        return tuple((text, len(values)) for text, values in setting.cases)
    numbers.append(setting)
    return None


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where the numbers of a setting stand.

    cases: (text, position); rest: position for tensors that no case names, None for the default.
    """

    cases: tuple[tuple[str, int], ...]
    rest: int | None
    has_wildcard: bool = False

    def at(self, tensor: str) -> int | None:
        """The position of a tensor's value, as `Filtered.at` and `PerRow.at` choose it."""
        for text, position in self.cases:
            if text in tensor or (self.has_wildcard and text == "*"):
                return position
        return self.rest


class _NumberIndex:
    """The positions of a recipe's numbers in the order of `shape_and_numbers`, and the bounds of each."""

    def __init__(self, recipe: Recipe) -> None:
        self.mixes = recipe.mixes
        self.constants: list[float] = []
        self._bounds: list[tuple[float, float, float]] = []
        self._slots = [self._of_mix(mix) for mix in recipe.mixes]

    def bounds(self) -> Array:
        """[3, numbers] least value, largest value, switch."""
        return np.array(self._bounds, np.float64).reshape(-1, 3).T

    def positions(self, mix: int, param: Param, names: Sequence[str]) -> list[int]:
        """Where the values of a parameter stand.

        names: of the tensor in each model, or of the output for a parameter of the merge.
        """
        slots = self._slots[mix].get(param.name, [_Slot((), None)])
        if len(slots) == 1:
            slots = slots * len(names)
        found = [slot.at(name) for slot, name in zip(slots, names, strict=True)]
        return [self._constant(param.default) if position is None else position for position in found]

    def _constant(self, number: float) -> int:
        if number not in self.constants:
            self.constants.append(number)
        return len(self._bounds) + self.constants.index(number)

    def _of_mix(self, mix: Mix) -> dict[str, list[_Slot]]:
        rule = method(mix.method)
        slots: dict[str, list[_Slot]] = {}
        for name, value in mix.params:
            param = rule.param(name)
            assert param is not None  # which `tensor_plan.check` would have refused
            settings = value if isinstance(value, tuple) else (value,)
            slots[name] = [self._slot(setting, param) for setting in settings]
        return slots

    def _slot(self, setting: Setting, param: Param) -> _Slot:
        first = len(self._bounds)
        numbers: list[float] = []
        _setting_shape(setting, numbers)
        self._bounds += [(param.hard_low, param.hard_high, float(param.flag))] * len(numbers)
        if isinstance(setting, Filtered | PerRow):
            cases = tuple((text, first + i) for i, (text, _) in enumerate(setting.cases))
            is_filter = isinstance(setting, Filtered)
            return _Slot(cases, None if is_filter else first + len(cases), is_filter)
        return _Slot((), first)


def _groups(steps: Sequence[Step], index: _NumberIndex) -> tuple[ValueGroup, ...]:
    """The merged tensors by method and number of models, in order of first appearance."""
    members: dict[tuple[str, int], list[int]] = {}
    for number, step in enumerate(steps):
        if step.mix is not None:
            members.setdefault((step.mix.method, len(step.inputs)), []).append(number)
    return tuple(_group(method(name), numbers, steps, index) for (name, _), numbers in members.items())


def _group(rule: Method, numbers: Sequence[int], steps: Sequence[Step], index: _NumberIndex) -> ValueGroup:
    indices: dict[str, Array] = {}
    for param in rule.params:
        rows = []
        for number in numbers:
            step = steps[number]
            assert step.place is not None
            names = (step.name,) if param.per == "merge" else step.inputs
            rows.append(index.positions(step.place, param, names))
        at = np.array(rows, np.intp)
        indices[param.name] = at[:, 0] if param.per == "merge" else at
    return ValueGroup(rule, tuple(numbers), indices)


def _rows(arrays: Mapping[str, Array], count: int) -> list[Values]:
    """Arrays of values as one mapping for each tensor, of python's floats."""
    columns = {
        name: [tuple(row) for row in array.tolist()] if array.ndim == 2 else array.tolist()
        for name, array in arrays.items()
    }
    return [{name: column[row] for name, column in columns.items()} for row in range(count)]
