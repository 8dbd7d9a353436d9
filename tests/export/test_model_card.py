"""The card of an exported candidate, as huggingface_hub reads it and beside what is stored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.utils import validate_repo_id
from scipy.stats import binomtest

from evomerge import reports
from evomerge.export.candidate import export_candidate
from evomerge.launch.opening import stored_parents
from evomerge.store import Store
from tests.support.toy import in_process, zoo_folder

FRONT = "---\nlicense: {}\nbase_model: org/start\n---\n# A model\n"
LICENSES = {"base": "apache-2.0", "math": "apache-2.0", "lang": "apache-2.0", "string": "apache-2.0"}


def parents_with_cards(folder: Path, licenses: dict[str, str]) -> list[str]:
    """Copies of the zoo's models with cards, as values of --models; a license '' writes no card."""
    given = []
    for name, license in licenses.items():
        if not (zoo_folder() / name).is_dir():
            continue
        path = shutil.copytree(zoo_folder() / name, folder / name)
        if license:
            (path / "README.md").write_text(FRONT.format(license))
            (path / "LICENSE").write_text(f"Terms of {name}")
        given.append(f"{name}={path}")
    return given


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The winner of the finished study, exported without weights, of models that all are apache-2.0."""
    folder = tmp_path_factory.mktemp("exported")
    root = shutil.copytree(finished, folder / "root")
    given = parents_with_cards(folder / "models", LICENSES)
    with Store.open(root / "small" / "study.db") as store:
        known = set(store.study().facts.parents)  # type: ignore[union-attr]
        given = [text for text in given if text.partition("=")[0] in known]
        parents = stored_parents(store, given)
        warnings = export_candidate(store, reports.resolve(store, "best"), parents, folder / "out")
    assert warnings == ()
    return folder


def test_huggingface_hub_reads_the_cards_metadata(exported: Path) -> None:
    """What huggingface_hub checks without the Hub: YAML, model-index, names of repositories."""
    card = ModelCard.load(exported / "out" / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == ["org/start"]
    assert data["base_model_relation"] == "merge"
    assert data["tags"] == ["merge", "mergekit", "evomerge"]
    for name in data["base_model"]:
        validate_repo_id(name)
    assert metadata_load(exported / "out" / "README.md") == data
    assert card.data.eval_results, "parsed from model-index"


def test_the_results_are_those_stored_with_wilsons_interval_and_the_number_of_items(exported: Path) -> None:
    card = ModelCard.load(exported / "out" / "README.md")
    with Store.open(exported / "root" / "small" / "study.db") as store:
        trial = reports.resolve(store, "best")
        (tested,) = [scored for role, scored in store.evaluations(trial.recipe_id) if role == "test"]
    evaluation = tested.evaluation
    results = {result.dataset_type: result for result in card.data.eval_results or ()}
    assert results.keys() == {item.task for item in evaluation.items}
    for task, result in results.items():
        values = [item.value for item in evaluation.items if item.task == task]
        assert result.metric_value == evaluation.metrics[task]
        assert result.metric_args["items"] == len(values)
        expected = binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
        assert result.metric_args["interval_95"] == pytest.approx([expected.low, expected.high], abs=1e-9)
        low, high = result.metric_args["interval_95"]
        assert f"{result.metric_value:.4f} [{low:.4f}, {high:.4f}]" in card.text


def test_the_card_says_what_was_searched_its_limits_and_the_recipe(exported: Path) -> None:
    text = (exported / "out" / "README.md").read_text()
    with Store.open(exported / "root" / "small" / "study.db") as store:
        data = reports.study_summary(store, check=False)
    assert f"{data['evaluations']} candidates in {data['generations']} generations" in text
    assert "## Limits" in text
    assert (exported / "out" / "recipe.yaml").read_text() in text
    assert "on the same test items" in text


def test_the_licenses_of_the_models_lie_beside_the_card(exported: Path) -> None:
    copies = (exported / "out" / "LICENSES").rglob("LICENSE")
    assert {copy.read_text() for copy in copies} >= {"Terms of base"}


def test_an_export_of_models_without_a_license_warns_and_sets_none(finished: Path, tmp_path: Path) -> None:
    code, _, err = in_process("export", "small/best", tmp_path / "out", "--root", finished)
    assert code == 0
    assert "warning: the license is not set" in err
    assert "license" not in metadata_load(tmp_path / "out" / "README.md")
