"""A candidate to export: its trial and recipe, with the study and the parents that they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from evomerge.checkpoints import Parent
from evomerge.errors import NothingToExport, StudyError
from evomerge.recipes import Recipe
from evomerge.store import ParentFacts, Store, StudyRow, Trial


@dataclass(frozen=True, slots=True)
class StoredCandidate:
    """A scored candidate to export.

    Attributes:
        store: The store of its study.
        study: The study's row.
        trial: The candidate.
        recipe: Its recipe.
        parents: The study's models, open.
    """

    store: Store
    study: StudyRow
    trial: Trial
    recipe: Recipe
    parents: Mapping[str, Parent]

    @classmethod
    def of(cls, store: Store, trial: Trial, parents: Mapping[str, Parent]) -> StoredCandidate:
        """Reads what belongs to a trial.

        Args:
            store: The store of its study.
            trial: The candidate.
            parents: The study's models, open.

        Returns:
            The candidate.

        Raises:
            NothingToExport: If it failed.
            StudyError: If the store holds no study.
        """
        if trial.score is None:
            raise NothingToExport(f"candidate {trial.id} failed ({trial.error}); choose another")
        study = store.study()
        if study is None:
            raise StudyError(f"{store.path} holds no study yet")
        places = {name: _place(fact, parents[name]) for name, fact in study.facts.parents.items()}
        study = replace(study, facts=replace(study.facts, parents=places))
        return cls(store, study, trial, store.recipe(trial.recipe_id), parents)

    @property
    def is_route(self) -> bool:
        """Whether it is a route of layers, see `Recipe.is_route`."""
        depths = {name: parent.layout.num_layers for name, parent in self.parents.items()}
        return self.recipe.is_route(depths)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the merge methods that it is made by, those of intermediate merges included, sorted."""
        recipes = [self.recipe, *(recipe for _, recipe in self.recipe.stages)]
        return tuple(sorted({mix.method for recipe in recipes for mix in recipe.mixes}))

    @property
    def references(self) -> dict[str, str]:
        """Model name -> what a recipe file calls it: repository[@revision], or the folder of a local one.

        A GGUF file is called by the folder that it is dequantised into, which mergekit reads, too.
        """
        references = {}
        for name, fact in self.study.facts.parents.items():
            if Path(fact.path).expanduser().exists():
                references[name] = str(self.parents[name].path)
            else:
                references[name] = f"{fact.path}@{fact.revision}" if fact.revision else fact.path
        return references

    @property
    def mergekit_command(self) -> str:
        """The command of mergekit 0.1.5 that merges its recipe.yaml."""
        if self.recipe.stages:
            return "mergekit-multi recipe.yaml --out-path OUT -I STAGES"
        return "mergekit-yaml recipe.yaml OUT"


def _place(fact: ParentFacts, parent: Parent) -> ParentFacts:
    """What a parent is, with the folder of now where it has moved since."""
    path = Path(fact.path).expanduser()
    if path.is_absolute() and not path.is_dir() and "+" not in fact.path:
        return replace(fact, path=str(parent.path))
    return fact
