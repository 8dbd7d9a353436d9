"""A route's recipe -> files: the models opened, the route made live, and what is shipped of it written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.checkpoints import Parent
from evomerge.errors import NothingToExport, RecipeError
from evomerge.export import route_checkpoint, route_mergekit
from evomerge.export.route_checkpoint import Agreement
from evomerge.export.route_mergekit import NO_MERGEKIT_FILE
from evomerge.merging.live_model import CandidateModel, ModelBuilder
from evomerge.merging.model_loading import load_base
from evomerge.merging.routing.routed_model import RoutedModel
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import Recipe, mergekit_yaml


@dataclass(frozen=True, slots=True)
class OpenRoute:
    """A route made live; its files are written from what it computes with.

        route = load_route(recipe, parents)
        print(route.write_checkpoint_files(Path("out")))

    Attributes:
        recipe: The recipe of the route.
        parents: The models that it reads, open.
        view: The route as a live model.
    """

    recipe: Recipe
    parents: Mapping[str, Parent]
    view: CandidateModel

    @property
    def routed(self) -> RoutedModel:
        """The module of the route, installed. Raises NothingToExport for a recipe that is no route."""
        if self.view.routed is None:
            raise NothingToExport("the recipe is no route")
        self.view.install()
        return self.view.routed

    @property
    def donor(self) -> Path:
        """Folder whose tokenizer and other files the route gets."""
        return self.parents[self.recipe.base].path

    def write_checkpoint_files(self, directory: Path) -> Agreement:
        """Writes the Hugging Face folder and verifies it in a fresh process; the caller makes it whole.

        Args:
            directory: A folder that exists.

        Returns:
            How near the reloaded folder comes to the live route.

        Raises:
            NothingToExport: If the route is no plain checkpoint, or the folder computes something else.
        """
        route_checkpoint.write_checkpoint_files(self.routed, self.view.hops, directory, self.donor)
        return route_checkpoint.verify_checkpoint(directory, self.routed)

    def write_mergekit(self, directory: Path, references: Mapping[str, str], header: Sequence[str]) -> str:
        """Writes recipe.yaml for mergekit 0.1.5, and the shell that it needs, into a folder.

        Args:
            directory: A folder that exists.
            references: Model name -> what the YAML calls it.
            header: Comment lines of the YAML.

        Returns:
            '', or a sentence that says why nothing was written.
        """
        model: Any = self.routed.model
        model_type = str(model.config.get_text_config(decoder=True).model_type)
        reordered = not self.recipe.scales and not self.recipe.stages
        reordered = reordered and all(mix.method != "passthrough" for mix in self.recipe.mixes)
        if reordered and model_type in route_mergekit.VERIFIED:
            return self._write_slices(directory, references, header)
        if reason := route_mergekit.refusal(self.recipe, model_type):
            return reason
        text = route_mergekit.yaml_document(
            self.recipe, self.view.hops, self.parents, references, header=header
        )
        (directory / "recipe.yaml").write_text(text, encoding="utf-8")
        route_mergekit.write_shell(self.routed, self.view.hops, directory / route_mergekit.SHELL, self.donor)
        return ""

    def _write_slices(self, directory: Path, references: Mapping[str, str], header: Sequence[str]) -> str:
        """Writes merged layers in another order: slices of one method."""
        layout = self.parents[self.recipe.base].layout
        try:
            named = mergekit_yaml.with_outer_filters(
                self.recipe, layout.outer_names("embeddings"), layout.outer_names("head")
            )
            (directory / "recipe.yaml").write_text(
                mergekit_yaml.dump(named, references, header), encoding="utf-8"
            )
        except RecipeError as error:
            return f"{NO_MERGEKIT_FILE}: {error}"
        return ""


def load_route(recipe: Recipe, parents: Mapping[str, Parent]) -> OpenRoute:
    """Loads what a route's recipe reads, on the CPU.

    Args:
        recipe: Of a route of layers.
        parents: Its models, open.

    Returns:
        The route as a live model.

    Raises:
        RecipeError: If the recipe asks for a tokenizer or chat template of its own.
        RouteError: If the layers cannot be routed.
        FoldError: If a scale cannot be folded into a layer's weights.
        CheckpointError: If a model's files are broken.
    """
    if recipe.tokenizer is not None or recipe.chat_template is not None:
        raise RecipeError(
            "a route gets the tokenizer and chat template of its base; "
            "merge without scales for others, or leave them out"
        )
    base = recipe.stages[0][1].base if recipe.stages else recipe.base
    skeleton = load_base(parents[base], recipe.out_dtype)
    builder = ModelBuilder(parents, parents, base, skeleton, recipe.out_dtype, "cpu", MagnitudeTables())
    with torch.no_grad():
        return OpenRoute(recipe, parents, builder.build(recipe))
