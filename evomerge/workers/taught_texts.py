"""A teacher's next-token distributions on texts, computed once in each worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from evomerge.evaluation import Teacher

if TYPE_CHECKING:  # loads transformers, which a search that is refused should not
    from evomerge.evaluation.inference.divergence import Distributions


class TaughtTexts:
    """Keeps the distributions of one teacher.

    Each text is computed by itself, so that its numbers do not depend on which others a worker has seen.
    """

    def __init__(self) -> None:
        self._teacher: str | None = None
        self._known: dict[str, Distributions] = {}

    def lacks(self, teacher: Teacher, texts: Sequence[str]) -> bool:
        """Returns whether the teacher is needed.

        Args:
            teacher: Whose distributions are wanted.
            texts: Where they are wanted.

        Returns:
            True unless all of them are known.
        """
        return self._teacher != teacher.recipe.id or any(text not in self._known for text in texts)

    def distributions(
        self, teacher: Teacher, texts: Sequence[str], compute: Callable[[Sequence[str]], Distributions]
    ) -> Distributions:
        """Returns the teacher's distributions on texts.

        Args:
            teacher: Whose distributions are wanted.
            texts: Where they are wanted.
            compute: Computes those of texts; the teacher is the live model wherever some are lacking.

        Returns:
            The distributions, in the order of the texts.
        """
        from evomerge.evaluation.inference.divergence import MAX_NUMBERS, Distributions

        if self._teacher != teacher.recipe.id:
            self._known.clear()
        self._teacher = teacher.recipe.id
        for text in dict.fromkeys(texts):
            if text not in self._known:
                self._known[text] = compute([text])
        found = [self._known[text] for text in texts]
        held = sum(own.logprobs[0].numel() for own in self._known.values())
        if held > MAX_NUMBERS:  # the next step computes its own again
            self._known.clear()
        return Distributions([own.ids[0] for own in found], [own.logprobs[0] for own in found])
