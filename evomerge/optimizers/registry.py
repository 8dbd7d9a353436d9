"""The optimizers by the name that a search file calls them; a new one is a file and an entry here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evomerge.optimizers.base import Optimizer, OptimizerSettings
from evomerge.optimizers.cat_cma import CatCma
from evomerge.optimizers.cma_es import CmaEs
from evomerge.optimizers.elitist import Elitist
from evomerge.optimizers.random_search import RandomSearch


@dataclass(frozen=True, slots=True)
class OptimizerEntry:
    """An optimizer that a search can choose.

        optimizer = OPTIMIZERS["cma"].make([0.0] * 6, OptimizerSettings(sigma=0.15, seed=1))

    Attributes:
        name: what the search file calls it.
        title: what reports call it.
        summary: one line on what it does.
        from_settings: makes one from a start of shape [n] and settings.
        takes_categories: whether a genome may begin with categorical genes.
        takes_numbers: whether a genome may have continuous genes alone.
        learns_covariance: whether `OptimizerSettings.diagonal` is used.
        categorical_name: the entry that takes its place for a genome with categories; empty for none.
    """

    name: str
    title: str
    summary: str
    from_settings: Callable[[Sequence[float], OptimizerSettings], Optimizer]
    takes_categories: bool
    takes_numbers: bool
    learns_covariance: bool = False
    categorical_name: str = ""

    def make(self, start: Sequence[float], settings: OptimizerSettings) -> Optimizer:
        """A new optimizer.

        Args:
            start: [n] the genome to begin at, the categorical genes first.
            settings: what it is made with; what it does not take is ignored.

        Returns:
            The optimizer.

        Raises:
            ValueError: where it does not take genomes of this kind.
        """
        if settings.categories and not self.takes_categories:
            raise ValueError(
                f"{self.title} takes continuous genes alone, got categories {settings.categories}"
            )
        if not settings.categories and not self.takes_numbers:
            raise ValueError(f"{self.title} needs categorical genes, got none")
        return self.from_settings(start, settings)


OPTIMIZERS: dict[str, OptimizerEntry] = {
    entry.name: entry
    for entry in (
        OptimizerEntry(
            "cma",
            "CMA-ES",
            "learns a normal distribution, with a full or a diagonal covariance matrix",
            CmaEs.from_settings,
            takes_categories=False,
            takes_numbers=True,
            learns_covariance=True,
            categorical_name="cat_cma",
        ),
        OptimizerEntry(
            "cat_cma",
            "CatCMA",
            "learns the probability of each category together with a normal distribution of the numbers",
            CatCma.from_settings,
            takes_categories=True,
            takes_numbers=False,
        ),
        OptimizerEntry(
            "elitist",
            "elitist evolution",
            "(mu + lambda) selection that evaluates the survivors again, with crossover and mutation",
            Elitist.from_settings,
            takes_categories=True,
            takes_numbers=False,
        ),
        OptimizerEntry(
            "random",
            "random search",
            "samples the initial distribution and learns nothing; the baseline",
            RandomSearch.from_settings,
            takes_categories=True,
            takes_numbers=True,
        ),
    )
}
"""Name in the search file -> entry."""


def optimizer_for(name: str, *, categorical: bool) -> OptimizerEntry:
    """The optimizer of a name for genomes of a kind.

    Args:
        name: a key of `OPTIMIZERS`. 'cma' means CatCMA for categorical genes.
        categorical: whether genomes begin with categorical genes.

    Returns:
        The entry.

    Raises:
        KeyError: for an unknown name.
        ValueError: where the optimizer does not take such genomes.
    """
    entry = OPTIMIZERS[name]
    if categorical and not entry.takes_categories and entry.categorical_name:
        entry = OPTIMIZERS[entry.categorical_name]
    if categorical and not entry.takes_categories:
        raise ValueError(
            f"{name} takes continuous genes alone; for categories use {_alternatives(categorical)}"
        )
    if not categorical and not entry.takes_numbers:
        raise ValueError(
            f"{name} needs categorical genes; for continuous ones alone use {_alternatives(categorical)}"
        )
    return entry


def _alternatives(categorical: bool) -> str:
    """Names of the optimizers for genomes of a kind."""
    entries = OPTIMIZERS.values()
    names = [e.name for e in entries if (e.takes_categories if categorical else e.takes_numbers)]
    return " or ".join(names)
