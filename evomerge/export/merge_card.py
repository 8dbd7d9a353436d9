"""What a merged folder says of its making: the recipe as mergekit_config.yml, and a card with the parents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge import __version__
from evomerge._escaping import markdown, markdown_code
from evomerge._redaction import scrub
from evomerge.checkpoints import Parent
from evomerge.checkpoints.reference import split_reference
from evomerge.errors import ConfigError, RecipeError
from evomerge.recipes import Recipe, mergekit_yaml

CONFIG = "mergekit_config.yml"
"""Name of the file with the recipe, by which the Hub's tools know a merge."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a merge is made by.

    Attributes:
        recipe: The recipe.
        references: Name of each of its models -> repository[@revision], folder, or either with an adapter.
        text: The recipe in mergekit's language, None if it was given in another.
        notes: What was ignored of it, each a sentence.
    """

    recipe: Recipe
    references: Mapping[str, str]
    text: str | None = None
    notes: tuple[str, ...] = ()


def write_origin(
    directory: Path, origin: Origin, parents: Mapping[str, Parent], notes: Sequence[str] = ()
) -> None:
    """Writes the recipe and the card of a merge into its folder.

    The recipe is mergekit_config.yml, or recipe.json where mergekit has no words for it.

    Args:
        directory: The folder.
        origin: What it was made by.
        parents: The recipe's models, open.
        notes: What speaks against the merge, each a sentence.
    """
    text = origin.text
    if text is None:
        try:
            text = _yaml_of(origin, parents)
        except RecipeError:
            (directory / "recipe.json").write_text(origin.recipe.canonical() + "\n", encoding="utf-8")
    if text is not None:
        text = scrub(text)
        (directory / CONFIG).write_text(text, encoding="utf-8")
    (directory / "README.md").write_text(_card(origin, text, notes), encoding="utf-8")


def front_matter(references: Iterable[str]) -> list[str]:
    """The head of a model card that the Hub reads.

    Args:
        references: What the models merged are called.

    Returns:
        Lines with the models as base_model, adapters apart from the models that they change.
    """
    names = dict.fromkeys(name for reference in references for name in _models(scrub(reference)))
    models = [f"- {json.dumps(name, ensure_ascii=False)}" for name in names]
    return [
        "---",
        *(["base_model:", *models] if models else []),
        "library_name: transformers",
        "tags:",
        "- merge",
        "- evomerge",
        "---",
    ]


def _card(origin: Origin, text: str | None, notes: Sequence[str]) -> str:
    recipe = origin.recipe
    recipes = [recipe, *(stage for _, stage in recipe.stages)]
    methods = sorted({mix.method for one in recipes for mix in one.mixes})
    base = origin.references.get(recipe.base)
    described = f", on the base {markdown_code(scrub(base))}" if base else ""
    lines = [
        *front_matter(origin.references.values()),
        "# A merge of language models",
        "",
        f"Made by evomerge {__version__} ({', '.join(methods)}{described}) of",
        "",
        *(f"- {markdown_code(scrub(reference))}" for reference in origin.references.values()),
        "",
        "The license is not set: it follows from those of the models merged.",
    ]
    if text is None:
        lines += ["", "## Recipe", "", "`recipe.json`: mergekit has no words for it."]
    else:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        lines += ["", "## Recipe", "", f"{fence}yaml", text.rstrip("\n"), fence]
    if notes:
        lines += ["", "## Warnings", "", *(f"- {markdown(scrub(note))}" for note in notes)]
    return "\n".join(lines) + "\n"


def _yaml_of(origin: Origin, parents: Mapping[str, Parent]) -> str:
    """The recipe in mergekit's language. Raises RecipeError."""
    recipe = origin.recipe
    if recipe.scales:
        raise RecipeError("mergekit has no scales between layers")
    named = recipe
    if recipe.base in parents:
        layout = parents[recipe.base].layout
        named = mergekit_yaml.with_outer_filters(
            recipe, layout.outer_names("embeddings"), layout.outer_names("head")
        )
    return mergekit_yaml.dump(named, origin.references)


def _models(reference: str) -> list[str]:
    """The model and the adapter of a reference, without revisions."""
    try:
        parts = split_reference(reference)
    except ConfigError:
        return [reference]
    return [parts.model, *([parts.adapter] if parts.adapter else [])]
