"""What a study has used up: generations and candidates of its stages, and its test items."""

from __future__ import annotations

import json
from dataclasses import dataclass

from evomerge.evaluation import FORWARDS_OF_A_SLOPE, Items, Role
from evomerge.store import evaluation_rows
from evomerge.store.connection import StudyFile
from evomerge.store.records import LabelRow, Scored


@dataclass(frozen=True, slots=True)
class Tested:
    """A recipe that was scored on test items.

    Attributes:
        recipe_id: Id of the recipe.
        tests: How often the search scored it there, as its winner or to compare the winner with.
        looks: How often it was scored there by hand, by `evomerge compare --score`.
        is_reference: Whether it is a parent or a hand recipe.
    """

    recipe_id: str
    tests: int
    looks: int
    is_reference: bool


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage has cost, without parents, hand recipes and the choice of its winner.

    Attributes:
        candidates: Candidates and steps.
        forwards: Items that were scored without a gradient.
        gradients: Items that were scored with their gradient, each `FORWARDS_OF_A_SLOPE` forward passes.
    """

    candidates: int
    forwards: int
    gradients: int

    @property
    def item_forwards(self) -> int:
        """Forward passes of an item, a backward pass counted as two."""
        return self.forwards + FORWARDS_OF_A_SLOPE * self.gradients


class Usage:
    """What an open study file says of its use, as `Store.usage`::

    with Store.open(path) as store:
        print(store.usage.searched(0), len(store.usage.test_uses()))
    """

    def __init__(self, file: StudyFile) -> None:
        """Reads an open file.

        Args:
            file: The study's file.
        """
        self._file = file

    def last_generation(self, stage: int, island: int | None = None) -> int:
        """Finds how far a stage has come.

        Args:
            stage: Number of the stage, from 0.
            island: One island of it; None for all.

        Returns:
            The number of its last generation of which a candidate is stored, 0 where there is none.
        """
        sql = "SELECT coalesce(max(generation), 0) FROM trials WHERE stage = ? AND origin != 'mean'"
        if island is None:
            return int(self._file.row(sql, (stage,))[0])
        return int(self._file.row(f"{sql} AND island = ?", (stage, island))[0])

    def searched(self, stage: int) -> int:
        """Counts the candidates of a stage that an optimizer asked for, which its budget counts.

        Args:
            stage: Number of the stage, from 0.

        Returns:
            Their number.
        """
        sql = "SELECT count(*) FROM trials WHERE stage = ? AND origin IN ('sampled', 'injected')"
        return int(self._file.row(sql, (stage,))[0])

    def times(self) -> dict[int, float]:
        """When the trials were scored: id of each -> Unix seconds at which its evaluation was stored."""
        sql = "SELECT t.id, e.created FROM trials t JOIN evaluations e ON e.id = t.evaluation"
        return {int(row[0]): float(row[1]) for row in self._file.rows(sql)}

    def cost(self, stage: int, first: int = 1, last: int | None = None) -> StageCost:
        """Counts the items that the candidates of a stage were scored on.

        Args:
            stage: Number of the stage, from 0.
            first: Number of the first generation that is counted.
            last: Of the last one; None for all.

        Returns:
            The counts.
        """
        items = "(SELECT sum(json_array_length(value, '$[1]')) FROM json_each(i.body))"
        sql = (
            f"SELECT count(*), total({items} * (e.role != 'gradient')), "
            f"total({items} * (e.role = 'gradient')) "
            "FROM trials t JOIN evaluations e ON e.id = t.evaluation JOIN item_sets i ON i.id = e.item_set "
            "WHERE t.stage = ? AND t.generation BETWEEN ? AND ? "
            "AND t.origin IN ('sampled', 'injected', 'learned')"
        )
        end = 2**62 if last is None else last
        candidates, forwards, gradients = self._file.row(sql, (stage, first, end))
        return StageCost(int(candidates), int(forwards), int(gradients))

    def scans(self, centre_id: str) -> list[tuple[Role, Items]]:
        """Lists the sensitivity scans of a candidate.

        Args:
            centre_id: Id of the candidate's recipe.

        Returns:
            (role, items) of each, the one with the most points first; see `Store.sensitivity`.
        """
        sql = (
            "SELECT s.role, i.body FROM sensitivity s JOIN item_sets i ON i.id = s.item_set "
            "WHERE s.centre = ? GROUP BY s.role, s.item_set ORDER BY count(*) DESC, max(s.id) DESC"
        )
        with self._file.reading():
            return [
                (role, {task: tuple(ids) for task, ids in json.loads(body)})
                for role, body in self._file.rows(sql, (centre_id,))
            ]

    def looks(self, recipe_id: str) -> list[Scored]:
        """Reads what a recipe scored on test items when somebody looked by hand.

        Args:
            recipe_id: Id of the recipe.

        Returns:
            The evaluations, the oldest first.
        """
        found = self._file.rows(
            "SELECT * FROM evaluations WHERE recipe = ? AND role = 'look' ORDER BY id", (recipe_id,)
        )
        return [evaluation_rows.scored(self._file, row) for row in found]

    def labels(self) -> list[LabelRow]:
        """Reads what parents answered as labels of a learned stage.

        Returns:
            Their evaluations with answers, the oldest first.
        """
        found = self._file.rows("SELECT * FROM evaluations WHERE role = 'labels' ORDER BY id")
        return [LabelRow(row["created"], evaluation_rows.scored(self._file, row).evaluation) for row in found]

    def test_uses(self) -> list[Tested]:
        """Reads what test items were used for; each use is a row of the table of evaluations.

        Returns:
            Each recipe that was scored on test items, the first first.
        """
        sql = (
            "SELECT recipe, sum(role = 'test'), sum(role = 'look'), EXISTS (SELECT 1 FROM trials t "
            "WHERE t.recipe = e.recipe AND t.origin IN ('parent', 'hand')) "
            "FROM evaluations e WHERE role IN ('test', 'look') GROUP BY recipe ORDER BY min(e.id)"
        )
        return [Tested(row[0], row[1], row[2], bool(row[3])) for row in self._file.rows(sql)]
