"""A candidate to export: its trial and recipe, with the study and the parents that they are of."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge import _yaml
from evomerge.checkpoints import Parent
from evomerge.checkpoints.lora import AdaptedCheckpoint
from evomerge.errors import NothingToExport, StudyError
from evomerge.export.source_models import SourceModel, snapshot_commit, source_models
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
    def settings(self) -> Mapping[str, Any]:
        """The study's search file as written: key -> plain value."""
        data = _yaml.parse(self.study.config, f"{self.study.name} (stored)").data
        return data if isinstance(data, dict) else {}

    @property
    def models(self) -> tuple[SourceModel, ...]:
        """The models and adapters that its recipe reads, with their cards."""
        return source_models(self.recipe.models, self.references, self.parents)

    @property
    def mergekit_command(self) -> str:
        """The command of mergekit 0.1.5 that merges its recipe.yaml, run in the folder of that file."""
        command = "mergekit-yaml recipe.yaml OUT"
        if self.recipe.stages or len({mix.method for mix in self.recipe.mixes}) > 1:
            command = "mergekit-multi recipe.yaml --out-path OUT -I STAGES"
        if any(isinstance(self.parents[name], AdaptedCheckpoint) for name in self.recipe.models):
            command += " --lora-merge-cache ADAPTERS"
        return command

    def build_commands(self, directory: Path) -> tuple[str, ...]:
        """The commands that make the model from an exported folder.

        Args:
            directory: The folder.

        Returns:
            Of evomerge, and of mergekit where the folder has a recipe for it.
        """
        commands = [f"evomerge merge {shlex.quote(str(directory / 'recipe.json'))} OUT"]
        if (directory / "recipe.yaml").is_file():
            commands.append(f"(cd {shlex.quote(str(directory))} && {self.mergekit_command})")
        return tuple(commands)


def _place(fact: ParentFacts, parent: Parent) -> ParentFacts:
    """What a parent is, with the folders of now where one has moved, and the commit of a repository."""
    parts, now = [fact.path], str(parent.path)
    if isinstance(parent, AdaptedCheckpoint):
        parts, now = fact.path.split("+"), f"{parent.path}+{parent.adapter}"
    folders = [Path(part).expanduser() for part in parts]
    has_moved = any(folder.is_absolute() and not folder.exists() for folder in folders)
    if has_moved:
        return replace(fact, path=now)
    if len(folders) == 1 and fact.revision != (commit := snapshot_commit(parent.path)) and commit:
        return fact if folders[0].exists() else replace(fact, revision=commit)
    return fact
