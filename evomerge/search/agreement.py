"""Whether what a learned stage climbs ranks candidates as the tasks' metrics do.

The probability of the right answer and the metric are compared over parents, hand recipes and the stage's
finalists, on the same validation items: of choices and log-likelihood tasks, whose metrics come from the same
logits, on all of them at no cost; of other tasks on a few, by forward passes without a backward one, which
are counted. Nothing is chosen by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from evomerge.evaluation import Evaluation, GradientRequest, Items, ItemScore
from evomerge.evaluation.objective import Objective
from evomerge.evaluation.rank_correlation import spearman
from evomerge.evaluation.records import GOLD, soft_metric_name
from evomerge.recipes import Recipe
from evomerge.search.generation_runner import GenerationRunner
from evomerge.search.item_windows import ItemWindows
from evomerge.search.labels import LabelledItems, Labeller, by_subtask
from evomerge.search.plan import LearnedOpening, Progress
from evomerge.store import Agreement, NewEvaluation, Trial
from evomerge.workers import Job

ITEMS_ASKED = 24
"""Validation items of a task whose right answers have to be asked for."""
MOST_COMPARED = 16
"""Candidates that are compared at most: of more it costs more than it says."""
_FEWEST = 5  # candidates of which a correlation says something
_Means = dict[str, tuple[float, float]]
"""Task -> (mean surrogate, mean of its metric's values), both better where they are higher."""


@dataclass(frozen=True, slots=True)
class AgreementCheck:
    """Compares the surrogate of a learned stage with the metrics.

    Attributes:
        opening: The stage.
        runner: Of the study.
        show: Called with the progress.
    """

    opening: LearnedOpening
    runner: GenerationRunner
    show: Callable[[Progress], None]

    def measure(self, trials: Sequence[Trial]) -> Agreement | None:
        """Measures the rank correlation.

        Args:
            trials: The stage's finalists, parents and hand recipes; of too many the last are left out.

        Returns:
            The correlations; None for fewer than five candidates with all scores.
        """
        store, plan = self.runner.store, self.runner.plan
        names = list(dict.fromkeys(t.recipe_id for t in trials if t.score is not None))
        recipes = {name: store.recipe(name) for name in names[:MOST_COMPARED]}
        scored = self.runner.score_all("validation", list(recipes.values()))
        metrics = {name: s.evaluation for name, s in scored.items() if s.score is not None}
        sources = by_subtask(self.opening.labels, plan.objective)
        kept = Labeller(self.runner, self.opening.labels, self.show).kept(plan.items["validation"])
        known = {
            task
            for task in kept
            if sources.get(task, GOLD) == GOLD and all(_is_known(e, task) for e in metrics.values())
        }
        asked = self._asked({task: ids for task, ids in kept.items() if task not in known})
        probabilities = self._scored({name: recipes[name] for name in metrics}, asked)
        means: list[_Means] = []
        for name, evaluation in metrics.items():
            other = probabilities.get(name)
            if other is None or other.error is None:
                items = () if other is None else other.items
                means.append(self._means(evaluation.items, known, items))
        if len(means) < _FEWEST:
            return None
        tasks = {
            task: spearman([own[task][0] for own in means], [own[task][1] for own in means])
            for task in means[0]
        }
        shares = {task: abs(share) for task, share in plan.objective.shares().items()}
        sums = [[math.fsum(shares[t] * own[t][side] for t in own) for own in means] for side in (0, 1)]
        return Agreement(
            correlation=spearman(*sums),
            tasks=tasks,
            candidates=len(means),
            items=sum(len(kept[task]) for task in known) + sum(map(len, asked.items.values())),
            forwards=len(probabilities) * sum(map(len, asked.items.values())),
        )

    def _asked(self, items: Items) -> LabelledItems:
        """A few items of the tasks whose probabilities are not known, with their labels."""
        windows = ItemWindows(items, ITEMS_ASKED, self.runner.plan.seed)
        labeller = Labeller(self.runner, self.opening.labels, self.show)
        found = labeller.label(windows.items(1), needed=False)
        return replace(found, items={task: ids for task, ids in found.items.items() if ids})

    def _scored(self, recipes: Mapping[str, Recipe], asked: LabelledItems) -> dict[str, Evaluation]:
        """Recipe id -> its probabilities of right answers; empty where none are asked for."""
        store, items = self.runner.store, asked.items
        if not items:
            return {}
        request = GradientRequest(
            dict.fromkeys(items, 1.0), self.opening.surrogate, asked.of(items), derivatives=False
        )
        found: dict[str, Evaluation] = {}
        jobs: list[Job] = []
        for slot, (name, recipe) in enumerate(recipes.items()):
            stored = store.evaluation(name, "surrogate", items)
            if stored is None:
                cost = float(len(recipe.layers) * sum(map(len, items.values())))
                jobs.append(Job(slot, recipe, items, cost, gradient=request))
            else:
                found[name] = stored.evaluation
        for job, evaluation in self.runner.evaluate(jobs):
            store.add_evaluation(NewEvaluation(job.recipe, "surrogate", job.items, evaluation, None))
            found[job.recipe.id] = evaluation
            self.show(Progress("surrogate and metric", len(found), len(recipes)))
        return found

    def _means(self, metrics: Sequence[ItemScore], known: set[str], asked: Sequence[ItemScore]) -> _Means:
        """The two means of each task of one candidate, on the same items."""
        values = {(s.task, s.item): s.value for s in metrics}
        pairs: dict[str, list[tuple[float, float]]] = {}
        for score in (*(s for s in metrics if s.task in known), *asked):
            pair = (_surrogate(score), values[score.task, score.item])
            pairs.setdefault(score.task, []).append(pair)
        signs = {t: -1 if share < 0 else 1 for t, share in self.runner.plan.objective.shares().items()}
        return {
            task: (
                math.fsum(own for own, _ in found) / len(found),
                signs[task] * math.fsum(value for _, value in found) / len(found),
            )
            for task, found in pairs.items()
        }


def sure_of_answers(opening: LearnedOpening, objective: Objective, trial: Trial) -> float | None:
    """How likely a candidate finds the right answers of the search items.

    Args:
        opening: The stage that would begin at it.
        objective: Of the study.
        trial: The candidate.

    Returns:
        The mean over the tasks of the probability of the right answer, weighted as the objective weighs them;
        None where a task has none, or labels of another model stand for its right answers.
    """
    sources = by_subtask(opening.labels, objective)
    shares = {task: abs(share) for task, share in objective.shares().items() if share}
    terms: list[float] = []
    for task, share in shares.items():
        mean = trial.metrics.get(soft_metric_name(task, "probability"))
        if mean is None or sources.get(task, GOLD) != GOLD:
            return None
        terms.append(share * mean)
    return math.fsum(terms)


def _is_known(evaluation: Evaluation, task: str) -> bool:
    """Whether an evaluation of the metrics holds what a surrogate climbs."""
    own = [score for score in evaluation.items if score.task == task]
    return bool(own) and all(s.probability is not None or s.logprob is not None for s in own)


def _surrogate(score: ItemScore) -> float:
    """The probability of the right answer; of a text the mean log-probability of a token."""
    if score.probability is not None:
        return score.probability
    return score.value if score.logprob is None else score.logprob
