"""What was found as an exported candidate was made and scored again: verify.json, a part of its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge import __version__
from evomerge._escaping import markdown
from evomerge._redaction import scrub, scrub_data
from evomerge.merging.mergekit_check import Comparison

FILE = "verify.json"
"""Name of the file with what was found."""
SAME, ALIKE, DIFFERENT = "same", "alike", "different"
"""Verdicts of a score: all items equal; some differ, and no more than by chance; more than by chance."""
_BEFORE = "## Files\n"  # the section of a card that the verification is written before


@dataclass(frozen=True, slots=True)
class Rescore:
    """A folder scored again on items that its candidate was scored on.

    Attributes:
        score: The objective.
        differing: Number of items with another value than is stored.
        interval: 95 % interval of the difference to the stored score, paired; None where it has none.
    """

    score: float
    differing: int
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """'same', 'alike' or 'different'."""
        if self.differing == 0:
            return SAME
        if self.interval is not None and self.interval[0] <= 0 <= self.interval[1]:
            return ALIKE
        return DIFFERENT

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        interval = None if self.interval is None else list(self.interval)
        return {
            "score": self.score,
            "items_that_differ": self.differing,
            "interval_of_difference": interval,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, slots=True)
class Verification:
    """An exported candidate, made again by mergekit and scored again from its folder.

    Attributes:
        recipe_id: Of the candidate.
        role: Whose items it was scored on again.
        items: How many.
        stored: The objective that is stored.
        rescored: 'exported' and, where mergekit made it, 'mergekit' -> the score of that folder.
        comparison: The two folders' tensors; None where mergekit made none.
        reason: Why mergekit made none, '' if it did.
        is_randomized: Whether the method draws masks, which mergekit draws otherwise.
        mergekit: Version of mergekit.
    """

    recipe_id: str
    role: str
    items: int
    stored: float
    rescored: Mapping[str, Rescore] = field(default_factory=dict)
    comparison: Comparison | None = None
    reason: str = ""
    is_randomized: bool = False
    mergekit: str = ""

    @property
    def passes(self) -> bool:
        """Whether nothing found speaks against the export."""
        if any(score.verdict == DIFFERENT for score in self.rescored.values()):
            return False
        return self.comparison is None or self.comparison.agrees or self.is_randomized

    @property
    def sentence(self) -> str:
        """The verdict in a sentence."""
        return f"{'verified' if self.passes else 'NOT verified'}: {self._tensors}; {self._scores}"

    def to_json(self) -> dict[str, Any]:
        """Plain data, as verify.json holds it."""
        found = self.comparison
        tensors = None
        if found is not None:
            tensors = {
                "tensors": found.tensors,
                "elements": found.elements,
                "unequal": found.unequal,
                "further_than_one_unit_in_the_last_place": found.further,
                "largest_difference": found.largest,
                "only_on_one_side": list(found.only),
                "agrees": found.agrees,
            }
        data = {
            "evomerge": __version__,
            "mergekit": self.mergekit or None,
            "recipe": self.recipe_id,
            "verdict": "verified" if self.passes else "not verified",
            "sentence": self.sentence,
            "tensors": tensors,
            "not_made_by_mergekit": self.reason or None,
            "random_masks": self.is_randomized,
            "items_of": self.role,
            "items": self.items,
            "stored_score": self.stored,
            "scores": {name: score.to_json() for name, score in self.rescored.items()},
        }
        scrubbed: dict[str, Any] = scrub_data(data)
        return scrubbed

    def write(self, directory: Path) -> None:
        """Writes verify.json into an exported folder, and what was found on its card.

        Args:
            directory: The folder.
        """
        (directory / FILE).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        card = directory / "README.md"
        text = card.read_text(encoding="utf-8")
        section = "\n".join(self._section()) + "\n\n"
        before, heading, after = text.rpartition(_BEFORE)
        card.write_text(f"{before}{section}{heading}{after}", encoding="utf-8")

    @property
    def _tensors(self) -> str:
        if self.comparison is None:
            return f"mergekit did not make it ({self.reason})"
        found = self.comparison
        if found.only:
            return f"of mergekit's model {len(found.only)} tensors are on one side alone"
        text = f"{found.unequal:,} of {found.elements:,} elements of mergekit's model differ"
        if found.unequal and found.further == 0:
            text += ", none by more than one unit in the last place"
        return text + (", as its random masks are others" if found.unequal and self.is_randomized else "")

    @property
    def _scores(self) -> str:
        parts = [f"{self.stored:.4f} stored on {self.items} {self.role} items"]
        for name, score in self.rescored.items():
            whose = "the exported folder's" if name == "exported" else "mergekit's"
            differ = f", {score.differing} items differ" if score.differing else ""
            parts.append(f"{whose} {score.score:.4f} ({score.verdict}{differ})")
        return ", ".join(parts)

    def _section(self) -> list[str]:
        lines = ["## Verification", "", markdown(scrub(self.sentence)) + ".", ""]
        lines += ["| model | objective | items that differ | verdict |", "| --- | --- | --- | --- |"]
        lines.append(f"| as scored by the search ({self.role}, n = {self.items}) | {self.stored:.4f} | | |")
        for name, score in self.rescored.items():
            whose = "the exported folder" if name == "exported" else f"mergekit {markdown(self.mergekit)}"
            lines.append(f"| {whose} | {score.score:.4f} | {score.differing} | {score.verdict} |")
        return lines
