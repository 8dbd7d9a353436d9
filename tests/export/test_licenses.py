"""The license of a merge follows from those of its models by a rule that is said."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
from huggingface_hub import ModelCardData

from evomerge.checkpoints.licenses import FolderCard, License
from evomerge.export.front_matter import front_matter
from evomerge.export.licenses import MergedLicense, merged_license, write_licenses
from evomerge.export.source_models import SourceModel


def model(name: str, license: License | None, files: tuple[Path, ...] = ()) -> SourceModel:
    return SourceModel(name, f"org/{name}", f"org/{name}", None, FolderCard(Path(name), license, (), files))


def of(*licenses: License | None) -> MergedLicense:
    return merged_license([model(f"m{i}", license) for i, license in enumerate(licenses)])


APACHE, MIT, LLAMA = (License(name) for name in ("apache-2.0", "mit", "llama3.1"))


def test_one_license_of_all_is_that_of_the_merge() -> None:
    found = of(APACHE, License("apache-2.0", source="LICENSE"), APACHE)
    assert (found.identifier, found.name, found.link, found.warnings) == ("apache-2.0", None, None, ())
    named = of(License("other", "qwen-research"), License("other", "qwen-research"))
    assert (named.identifier, named.name, named.link) == ("other", "qwen-research", "LICENSES/README.md")


@pytest.mark.parametrize("order", list(permutations([APACHE, MIT, LLAMA])))
def test_a_mixture_is_other_in_any_order_even_where_all_are_permissive(order: tuple[License, ...]) -> None:
    found = of(*order)
    assert (found.identifier, found.name) == ("other", "apache-2.0-and-llama3.1-and-mit")
    assert found.link == "LICENSES/README.md"
    assert of(APACHE, MIT).identifier == "other"


def test_licenses_that_cannot_be_told_apart_are_not_the_same() -> None:
    assert of(License("other"), License("other")).name == "other"
    assert "different licenses" in of(License("other"), License("other")).rule


@pytest.mark.parametrize("known", [(), (APACHE,), (APACHE, MIT)])
def test_an_unknown_license_is_a_warning_and_never_a_default(known: tuple[License, ...]) -> None:
    found = of(*known, None)
    assert (found.identifier, found.name, found.link) == (None, None, None)
    assert f"'m{len(known)}'" in found.warnings[0]
    assert "license" not in ModelCardData(**_head(found)).to_dict()


def test_a_license_that_forbids_merges_or_their_sale_is_a_warning() -> None:
    assert "commercial" in of(License("cc-by-nc-4.0"), License("cc-by-nc-4.0")).warnings[0]
    assert "forbids publishing" in of(APACHE, License("cc-by-nd-4.0")).warnings[0]
    assert of(LLAMA, LLAMA).warnings == ()


def test_the_folder_has_the_files_of_every_model_and_the_rule(tmp_path: Path) -> None:
    texts = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        texts[name] = tmp_path / name / "LICENSE"
        texts[name].write_text(f"Terms of {name}")
    models = [model("a/b", APACHE, (texts["one"],)), model("a b", MIT, (texts["two"],)), model("c", MIT)]
    license = merged_license(models)
    write_licenses(tmp_path, models, license)
    copies = sorted((tmp_path / "LICENSES").rglob("LICENSE"))
    assert [copy.read_text() for copy in copies] == ["Terms of one", "Terms of two"]
    table = (tmp_path / "LICENSES" / "README.md").read_text()
    assert license.rule in table
    assert table.count("| mit |") == 2


def _head(license: MergedLicense) -> dict[str, object]:
    import yaml

    head: dict[str, object] = yaml.safe_load("\n".join(front_matter([], license)[1:-1]))
    return head
