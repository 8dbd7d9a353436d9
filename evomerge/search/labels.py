"""Labels of a learned stage: answers that stand for the right ones, made once by the search's models.

A task of a learned stage has as labels its own right answers (`GOLD`, unless its entry says otherwise), the
greedy answers of one model, or the answers of all models that the task's metric finds right (`SAMPLES`); or
it is left out (`LEFT_OUT`). A model's answers are an ordinary evaluation of it on search items, stored with
its answers under the purpose 'labels': its row says which model and when, the study's facts say which version
of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evomerge.errors import ConfigError, FailureBudget
from evomerge.evaluation import Answer, Evaluation, Items, ItemScore, Labels, Objective
from evomerge.evaluation.records import GOLD, LEFT_OUT, SAMPLES
from evomerge.recipes import Recipe
from evomerge.search.generation_runner import GenerationRunner
from evomerge.search.item_windows import ItemWindows
from evomerge.search.plan import Progress
from evomerge.store import NewEvaluation
from evomerge.workers import Job
from evomerge.workers.machine_errors import retry_advice

_SHARD = 256  # items that a model answers in one job


@dataclass(frozen=True, slots=True)
class LabelledItems:
    """The items that a learned stage can be scored on.

    Attributes:
        items: Task -> its items with a right answer; tasks that are left out are missing.
        labels: Of the tasks whose right answers are not their own.
    """

    items: Items
    labels: Labels

    def of(self, items: Items) -> Labels:
        """The labels of some items.

        Args:
            items: Task -> ids.

        Returns:
            Their labels; tasks without any are missing.
        """
        return {
            task: {item: self.labels[task][item] for item in ids}
            for task, ids in items.items()
            if task in self.labels
        }

    def summary(self) -> str:
        """Says how many items of each task have labels."""
        return "labels: " + ", ".join(f"{len(found)} items of {task}" for task, found in self.labels.items())


class Labeller:
    """Makes the labels of a stage, or reads those that the store holds.

    Example:
        labelled = Labeller(runner, {"zoo_string": "string"}, show).label(items)
    """

    def __init__(
        self, runner: GenerationRunner, sources: Mapping[str, str], show: Callable[[Progress], None]
    ) -> None:
        """Makes a labeller.

        Args:
            runner: Of the study: holds its plan and store, and evaluates jobs.
            sources: Task or group -> where its labels come from; `GOLD` for those that are missing.
            show: Called with the progress.
        """
        self._runner = runner
        self._show = show
        self._sources = by_subtask(sources, runner.plan.objective)
        self._models = {str(b.label): b.recipe for b in runner.plan.baselines if b.origin == "parent"}

    def kept(self, items: Items) -> Items:
        """The items of the tasks that are not left out.

        Args:
            items: Task -> ids.

        Returns:
            Fewer tasks, in their order.
        """
        return {task: ids for task, ids in items.items() if self._sources.get(task, GOLD) != LEFT_OUT}

    def label(self, items: Items, *, needed: bool = True) -> LabelledItems:
        """Finds the labels of items.

        Args:
            items: Task -> ids.
            needed: Whether each task needs a label.

        Returns:
            The items that have a right answer, with the labels of those whose right answer is not their own.

        Raises:
            ConfigError: No item of a task has a label.
            FailureBudget: A model could not answer.
        """
        kept = self.kept(items)
        labelled = {task: ids for task, ids in kept.items() if self._sources.get(task, GOLD) != GOLD}
        if not labelled:
            return LabelledItems(kept, {})
        found: dict[str, dict[str, list[Answer]]] = {task: {} for task in labelled}
        for model, recipe in self._models.items():
            own = {task: ids for task, ids in labelled.items() if self._sources[task] in (model, SAMPLES)}
            for evaluation in self._answered(model, recipe, own):
                for score, answer in zip(evaluation.items, evaluation.answers, strict=True):
                    if answer is None or (self._sources[score.task] == SAMPLES and not _is_right(score)):
                        continue
                    answers = found[score.task].setdefault(score.item, [])
                    if answer not in answers:
                        answers.append(answer)
        if needed:
            self._check(found, labelled)
        with_labels = {
            task: tuple(i for i in ids if i in found[task]) if task in found else ids
            for task, ids in kept.items()
        }
        return LabelledItems(with_labels, found)

    def used(self, windows: ItemWindows, steps: int) -> Items:
        """The items of the steps of a stage where their task has labels, and all items of the other tasks.

        Args:
            windows: Of the stage.
            steps: How many it takes.

        Returns:
            Task -> ids, in the order of the pool.
        """
        asked: dict[str, set[str]] = {task: set() for task in windows.pool}
        for step in range(1, steps + 1):
            for task, ids in windows.items(step).items():
                asked[task].update(ids)
        return {
            task: ids if self._sources.get(task, GOLD) == GOLD else tuple(i for i in ids if i in asked[task])
            for task, ids in windows.pool.items()
        }

    def _answered(self, model: str, recipe: Recipe, items: Items) -> list[Evaluation]:
        """The evaluations of a model with its answers, in the order of their items."""
        store = self._runner.store
        shards = [
            {task: tuple(ids[first : first + _SHARD])}
            for task, ids in items.items()
            for first in range(0, len(ids), _SHARD)
        ]
        found: dict[int, Evaluation] = {}
        jobs: list[Job] = []
        for slot, shard in enumerate(shards):
            stored = store.evaluation(recipe.id, "labels", shard)
            if stored is None:
                cost = len(recipe.layers) * sum(map(len, shard.values()))
                jobs.append(Job(slot, recipe, shard, float(cost), answers=True))
            else:
                found[slot] = stored.evaluation
        for job, evaluation in self._runner.evaluate(jobs):
            store.add_evaluation(NewEvaluation(recipe, "labels", job.items, evaluation, None))
            found[job.slot] = evaluation
            self._show(Progress(f"labels by {model}", len(found), len(shards)))
        for evaluation in found.values():
            if evaluation.error is not None:
                raise FailureBudget(
                    f"the answers of '{model}', which are to be labels, cannot be had: "
                    f"{evaluation.error}{retry_advice(evaluation.error)}"
                )
        return [found[slot] for slot in range(len(shards))]

    def _check(self, found: Mapping[str, Mapping[str, Sequence[Answer]]], labelled: Items) -> None:
        """Raises ConfigError for a task without any label."""
        for task, answers in found.items():
            if not answers:
                source = self._sources[task]
                what = f"'{source}' gives no complete answer"
                if source == SAMPLES:
                    what = "no model answers right"
                raise ConfigError(
                    f"task '{task}' has no labels: {what} to any of {len(labelled[task])} items; take the "
                    f"labels of another model, or leave the task out with labels: {{{task}: {LEFT_OUT}}}"
                )


def by_subtask(sources: Mapping[str, str], objective: Objective) -> dict[str, str]:
    """Spells out the labels of groups.

    Args:
        sources: Task or group -> where its labels come from.
        objective: Knows the groups.

    Returns:
        Task with items -> where its labels come from.
    """
    return {
        subtask: sources[term.task]
        for term in objective.terms
        if term.task in sources
        for subtask, _ in term.strata
    }


def _is_right(score: ItemScore) -> bool:
    """Whether a metric finds an answer entirely right."""
    return score.value >= 1.0
