"""What a merged folder says of its making: the recipe as mergekit_config.yml, and a card with the parents."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge import __version__
from evomerge._escaping import markdown, markdown_code
from evomerge._redaction import scrub
from evomerge.checkpoints import Parent
from evomerge.errors import RecipeError
from evomerge.export.front_matter import front_matter
from evomerge.export.licenses import MergedLicense, license_cell, merged_license, write_licenses
from evomerge.export.source_models import SourceModel, source_models
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
    """Writes the recipe, the card and the licenses of a merge into its folder.

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
    models = source_models(origin.recipe.models, origin.references, parents)
    license = merged_license(models)
    if any(model.card.license or model.card.files for model in models):
        write_licenses(directory, models, license)
    card = _card(origin, models, license, text, notes)
    (directory / "README.md").write_text(card, encoding="utf-8")


def model_table(models: Sequence[SourceModel]) -> list[str]:
    """Lists the models of a merge with their licenses and what they are made from.

    Args:
        models: The models.

    Returns:
        A Markdown table.
    """
    lines = [
        "| model | repository or folder | license | made from, by its card |",
        "| --- | --- | --- | --- |",
    ]
    for model in models:
        at = f" at {markdown(scrub(model.revision))}" if model.revision else ""
        cells = [
            markdown(scrub(model.name)),
            markdown_code(model.repository or model.reference) + at,
            license_cell(model.card.license),
            ", ".join(markdown(scrub(name)) for name in model.card.base_models),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def license_section(license: MergedLicense, models: Sequence[SourceModel]) -> list[str]:
    """Says which license a merge has, by which rule, and what is missing of its front matter.

    Args:
        license: Of the merge.
        models: The models that it is made of.

    Returns:
        Lines of Markdown.
    """
    folders = [model.name for model in models if model.repository is None]
    lines = ["## License", "", markdown(scrub(license.rule))]
    lines += [f"- {markdown(scrub(warning))}" for warning in license.warnings]
    if folders:
        names = ", ".join(markdown(scrub(name)) for name in folders)
        lines += [
            "",
            f"`base_model` takes names on the Hub, which {names} have not as folders; once they are there, "
            "add their names.",
        ]
    return lines


def fenced(text: str, language: str) -> list[str]:
    """A block of code in Markdown that nothing in it can end.

    Args:
        text: The code.
        language: Its language.

    Returns:
        Lines.
    """
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text.rstrip("\n"), fence]


def _card(
    origin: Origin,
    models: Sequence[SourceModel],
    license: MergedLicense,
    text: str | None,
    notes: Sequence[str],
) -> str:
    recipe = origin.recipe
    recipes = [recipe, *(stage for _, stage in recipe.stages)]
    methods = sorted({mix.method for one in recipes for mix in one.mixes})
    base = origin.references.get(recipe.base)
    described = f", on the base {markdown_code(scrub(base))}" if base else ""
    lines = [
        *front_matter(models, license),
        "# A merge of language models",
        "",
        f"Made by evomerge {__version__} ({', '.join(methods)}{described}) of",
        "",
        *model_table(models),
        "",
        *license_section(license, models),
    ]
    if text is None:
        lines += ["", "## Recipe", "", "`recipe.json`: mergekit has no words for it."]
    else:
        lines += ["", "## Recipe", "", *fenced(text, "yaml")]
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
