"""A route's recipe -> files: the models opened, the route made live, and what is shipped of it written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from evomerge.checkpoints import Parent
from evomerge.errors import NothingToExport, RecipeError
from evomerge.export import route_checkpoint, route_mergekit
from evomerge.export.route_checkpoint import Agreement
from evomerge.merging import atomic_folder
from evomerge.merging.live_model import CandidateModel, ModelBuilder
from evomerge.merging.model_loading import load_base
from evomerge.merging.routing.routed_model import RoutedModel
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import Recipe, mergekit_yaml


@dataclass(frozen=True, slots=True)
class OpenRoute:
    """A route made live. Its files are written from what it computes with."""

    recipe: Recipe
    parents: Mapping[str, Parent]
    view: CandidateModel

    @property
    def routed(self) -> RoutedModel:
        """The module of the route, installed."""
        if self.view.routed is None:
            raise NothingToExport("the recipe is no route")
        self.view.install()
        return self.view.routed

    @property
    def donor(self) -> Path:
        """Folder whose tokenizer and other files the route gets."""
        return self.parents[self.recipe.base].path

    def checkpoint(self, directory: Path) -> Agreement:
        """Writes the Hugging Face folder and verifies it in a fresh process. Raises NothingToExport,
        SetupError."""
        return route_checkpoint.checkpoint(self.routed, self.view.hops, directory, self.donor)

    def checkpoint_into(self, directory: Path) -> Agreement:
        """Like `checkpoint`, into a folder that exists and that the caller makes whole."""
        route_checkpoint.write_into(self.routed, self.view.hops, directory, self.donor)
        return route_checkpoint.verify(directory, self.routed)

    def mergekit(self, directory: Path, references: Mapping[str, str], header: list[str]) -> str:
        """Writes recipe.yaml for mergekit 0.1.5, and the shell that it needs, into a folder; '' or why that
        was not done."""
        kind = str(self.routed.model.config.get_text_config(decoder=True).model_type)  # type: ignore[union-attr, operator]
        flat = (
            not self.recipe.scales
            and not self.recipe.stages
            and all(mix.method != "passthrough" for mix in self.recipe.mixes)
        )
        if flat and kind in route_mergekit.VERIFIED:  # merged layers in another order: slices of one method
            return self._slices(directory, references, header)
        if reason := route_mergekit.why_not(self.recipe, kind):
            return reason
        text = route_mergekit.yaml_document(
            self.recipe, self.view.hops, self.parents, references, header=header
        )
        (directory / "recipe.yaml").write_text(text)
        route_mergekit.write_shell(self.routed, self.view.hops, directory / route_mergekit.SHELL, self.donor)
        return ""

    def _slices(self, directory: Path, references: Mapping[str, str], header: list[str]) -> str:
        shell = self.parents[self.recipe.base]
        try:
            keyed = mergekit_yaml.with_outer_filters(
                self.recipe, shell.layout.outer_names("embeddings"), shell.layout.outer_names("head")
            )
            (directory / "recipe.yaml").write_text(mergekit_yaml.dump(keyed, references, header))
        except RecipeError as error:
            return f"No mergekit file: {error}"
        return ""


def open_route(recipe: Recipe, parents: Mapping[str, Parent]) -> OpenRoute:
    """Loads what a route's recipe reads, on the CPU. Raises RouteError, FoldError, RecipeError or
    CheckpointError where
    it cannot be made."""
    if recipe.tokenizer is not None or recipe.chat_template is not None:
        raise RecipeError(
            "a route gets the tokenizer and chat template of its base; merge without scales for "
            "others, or "
            "leave them out"
        )
    base = recipe.stages[0][1].base if recipe.stages else recipe.base
    skeleton = load_base(parents[base], recipe.out_dtype)
    live = ModelBuilder(parents, parents, base, skeleton, recipe.out_dtype, "cpu", MagnitudeTables())
    with torch.no_grad():
        return OpenRoute(recipe, parents, live.build(recipe))


def write(recipe: Recipe, parents: Mapping[str, Parent], directory: Path) -> Agreement:
    """Writes a route as a Hugging Face folder, verified, whole or not at all."""
    atomic_folder.check_new(directory)
    return open_route(recipe, parents).checkpoint(directory)
