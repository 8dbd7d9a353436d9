"""The license of a merge, by the rule that its models' licenses give; their texts, copied beside it.

Terms of a model hold for what is made of it. So a license is stated where all models share it, a mixture is
'other' with all of them, and where one is unknown nothing is stated: there is no default.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge._escaping import markdown, markdown_code
from evomerge._redaction import scrub
from evomerge.checkpoints.licenses import OTHER, License
from evomerge.export.source_models import SourceModel

FOLDER = "LICENSES"
"""Name of the folder with the models' license files."""
_LONGEST_NAME = 96


@dataclass(frozen=True, slots=True)
class MergedLicense:
    """What may be said of a merge's license.

    Attributes:
        identifier: Of the Hub; None where it is not stated.
        name: `license_name` of a card, of 'other' alone.
        link: `license_link` of a card, of 'other' alone.
        rule: The rule that gave it, a sentence.
        warnings: What a publisher has to see to, each a sentence.
    """

    identifier: str | None
    name: str | None
    link: str | None
    rule: str
    warnings: tuple[str, ...] = ()


def merged_license(models: Sequence[SourceModel]) -> MergedLicense:
    """Derives the license of a merge from those of its models.

    Args:
        models: The models and adapters that it is made of.

    Returns:
        The same license where all have one; 'other' for a mixture; nothing where one is unknown.
    """
    unknown = [model for model in models if model.card.license is None]
    known = [model.card.license for model in models if model.card.license is not None]
    restricted = _restricted(models)
    if unknown or not known:
        listed = "; ".join(f"'{model.name}': {model.card.shown}" for model in unknown)
        sentence = f"the license is not set, as that of a model is not known ({listed})"
        return MergedLicense(
            None,
            None,
            None,
            "The license is not set: the terms of all models hold for a merge, and those of "
            f"{', '.join(model.name for model in unknown)} are not known.",
            (f"{sentence}; state it in its card, or ask its author before you publish", *restricted),
        )
    first = known[0]
    if all(license.terms == first.terms for license in known) and (
        first.identifier != OTHER or first.terms[1] or len(known) == 1
    ):
        name, link = (first.name, f"{FOLDER}/README.md") if first.identifier == OTHER else (None, None)
        rule = f"All models have the license {first.shown}, which holds for the merge."
        return MergedLicense(first.identifier, name, link, rule, restricted)
    return MergedLicense(
        OTHER,
        _joined(known),
        f"{FOLDER}/README.md",
        "The models have different licenses, and the terms of each hold for what is made of it: all of them "
        f"together, listed in {FOLDER}/README.md. The Hub calls that 'other'.",
        restricted,
    )


def write_licenses(directory: Path, models: Sequence[SourceModel], license: MergedLicense) -> None:
    """Writes the folder LICENSES: a table of the models with their licenses, and their license files.

    Args:
        directory: The folder of the merge, which exists.
        models: The models and adapters that it is made of.
        license: As `merged_license` gives it.
    """
    target = directory / FOLDER
    target.mkdir()
    rows = []
    for model in models:
        folder = _folder_name(model, target)
        for file in model.card.files:
            (target / folder).mkdir(exist_ok=True)
            shutil.copyfile(file, target / folder / file.name)
        files = ", ".join(markdown_code(f"{folder}/{file.name}") for file in model.card.files) or "none"
        rows.append(f"| {markdown(scrub(model.shown))} | {license_cell(model.card.license)} | {files} |")
    text = [
        "# Licenses of the models merged",
        "",
        markdown(scrub(license.rule)),
        "",
        "| model | license | files |",
    ]
    text += ["| --- | --- | --- |", *rows]
    text += ["", *(f"- {markdown(scrub(warning))}" for warning in license.warnings)]
    (target / "README.md").write_text("\n".join(text).rstrip("\n") + "\n", encoding="utf-8")


def license_cell(license: License | None) -> str:
    """A model's license for a table of Markdown.

    Args:
        license: The license, None where it is unknown.

    Returns:
        Its identifier, name and link.
    """
    if license is None:
        return "unknown"
    link = f", {markdown(scrub(license.link))}" if license.link else ""
    return f"{markdown(scrub(license.shown))}{link}"


def _restricted(models: Sequence[SourceModel]) -> tuple[str, ...]:
    """Terms that forbid a merge, or its commercial use, by the names of their licenses."""
    warnings = []
    for model in models:
        shown = "" if model.card.license is None else model.card.license.identifier
        parts = re.split(r"[-. ]", shown)
        if "nd" in parts:
            warnings.append(
                f"'{model.name}' has the license {shown}, which forbids publishing what is made of it"
            )
        if "nc" in parts or "noncommercial" in parts or "research" in parts:
            warnings.append(f"'{model.name}' has the license {shown}, which forbids commercial use")
    return tuple(warnings)


def _joined(licenses: Sequence[License]) -> str:
    """A name for a mixture, of what the Hub allows in one: 'apache-2.0-and-llama3.1'."""
    words = [license.name or license.identifier for license in licenses]
    words = [re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.") for word in words]
    name = "-and-".join(sorted({word for word in words if word}))
    return name if len(name) <= _LONGEST_NAME else "licenses-of-the-merged-models"


def _folder_name(model: SourceModel, target: Path) -> str:
    """A name for the folder of a model's files that no other has and any file system takes."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", model.name).strip("._")[:80] or "model"
    name, number = plain, 2
    while (target / name).exists():
        name, number = f"{plain}-{number}", number + 1
    return name
