"""What is shipped loads, and every mistake in a search file is answered with its place and the right word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from evomerge import _resources, _yaml, config
from evomerge.config import loading
from evomerge.errors import ConfigError
from evomerge.methods import METHODS
from evomerge.optimizers import OPTIMIZERS

GOOD = """\
study: trial
models:
  base: models/base
  math: models/math
  lang: {path: models/lang, revision: main}
base: base
method: ties
objective: mean
space:
  groups: [2, 3]
  components: [attention, mlp]
  embeddings: true
  parameters:
    weight: {low: -0.5, high: 2.0, start: 0.5}
    density: 0.7
tasks:
  - task: first
    weight: 2.0
  - task: second
    num_fewshot: 2
evaluation:
  items: 100
  splits: hash
search:
  evaluations: 500
  population: 8
  sigma: 0.15
"""

# what is wrong: (text replaced, by what, words the answer must hold). § marks where the answer must point.
MISTAKES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # a misspelt key at every level
    "optional key at the top": ("objective: mean", "§objctive: mean", ("'objctive'", "'objective'")),
    "required key at the top": ("method: ties", "§metod: ties", ("'metod'", "'method'")),
    "required table at the top": ("tasks:\n", "§taks:\n", ("'taks'", "'tasks'")),
    "key of a model": (
        "{path: models/lang, revision: main}",
        "{path: models/lang, §revison: main}",
        ("revison", "'revision'"),
    ),
    "required key of a model": (
        "{path: models/lang, revision: main}",
        "{§pth: models/lang, revision: main}",
        ("pth", "'path'"),
    ),
    "key of the space": ("  groups: [2, 3]", "  §grups: [2, 3]", ("grups", "'groups'")),
    "key of a range": ("high: 2.0, start: 0.5", "high: 2.0, §strat: 0.5", ("strat", "'start'")),
    "extra key of a range": ("start: 0.5}", "start: 0.5, §stat: 0.5}", ("stat", "'start'")),
    "key of a task": ("    weight: 2.0", "    §weigth: 2.0", ("weigth", "'weight'")),
    "required key of a task": ("  - task: second", "  - §tsak: second", ("tsak", "'task'")),
    "key of the evaluation": ("  items: 100", "  §itmes: 100", ("itmes", "'items'")),
    "key of the search": ("  evaluations: 500", "  §evalutions: 500", ("evalutions", "'evaluations'")),
    "key like no other": ("  sigma: 0.15", "  §qqq: 0.15", ("qqq", "Known: ", "sigma", "population")),
    # names
    "unknown method": ("method: ties", "§method: tise", ("'tise'", "'ties'")),
    "unknown base": ("base: base\n", "§base: bsae\n", ("'bsae'", "'base'")),
    "parameter of no method": ("    density: 0.7", "    §densty: 0.7", ("densty", "'density'")),
    "parameter of another method": ("    density: 0.7", "    §t: 0.7", ("'t'", "density")),
    "component": ("[attention, mlp]", "[attention, §mpl]", ("mpl", "'mlp'")),
    "objective": ("objective: mean", "§objective: meen", ("meen", "'mean'")),
    # numbers
    "start on the upper bound": ("start: 0.5}", "start: 2.0}", ("start 2", "(-0.5, 2)")),
    "start on the lower bound": ("start: 0.5}", "start: -0.5}", ("start -0.5", "(-0.5, 2)")),
    "bounds in the wrong order": ("low: -0.5, high: 2.0", "low: 2.0, high: -0.5", ("start 0.5",)),
    "infinite bound": ("high: 2.0, start", "high: .inf, start", ("finite",)),
    "number that is none": ("    weight: 2.0", "    §weight: .nan", ("weight",)),
    "infinite weight": ("    weight: 2.0", "    §weight: .inf", ("finite",)),
    "density above one": ("    density: 0.7", "    §density: 1.7", ("density", "[0, 1]", "1.7")),
    "density range above one": (
        "    density: 0.7",
        "    §density: {low: 0.1, high: 1.2, start: 0.5}",
        ("density", "[0, 1]", "1.2"),
    ),
    "switch that is searched": (
        "    density: 0.7",
        "    §normalize: {low: 0, high: 1, start: 0.5}",
        ("normalize",),
    ),
    "switch that is half on": ("    density: 0.7", "    §normalize: 0.5", ("normalize",)),
    "negative budget": ("evaluations: 500", "§evaluations: -5", ("evaluations", "-5")),
    "no items": ("items: 100", "§items: 0", ("items", "0")),
    "population too small": ("population: 8", "§population: 3", ("population", "4", "3")),
    "sigma of nothing": ("sigma: 0.15", "§sigma: 0", ("sigma", "0")),
    "negative weight": ("    weight: 2.0", "    §weight: -2.0", ("weight", "-2")),
    "negative few-shot": ("num_fewshot: 2", "§num_fewshot: -2", ("num_fewshot", "-2")),
    "group of size nothing": ("  groups: [2, 3]", "  §groups: [2, 0, 3]", ("groups", "1", "[2, 0, 3]")),
    "no groups": ("  groups: [2, 3]", "  §groups: 0", ("groups", "1", "0")),
    "empty groups": ("  groups: [2, 3]", "  §groups: []", ("groups",)),
    # types
    "word for a number": ("evaluations: 500", "§evaluations: many", ("evaluations", "'many'")),
    "fraction for a whole number": ("evaluations: 500", "§evaluations: 10.5", ("evaluations", "10.5")),
    "truth for a number": ("evaluations: 500", "§evaluations: true", ("evaluations", "True")),
    "word among group sizes": ("[2, 3]", "[2, §two]", ("groups", "'two'")),
    "word for a parameter": ("    density: 0.7", "    §density: much", ("density", "'much'")),
    "list for a number": ("items: 100", "§items: [100]", ("items",)),
    "list of models": (
        "models:\n  base: models/base\n  math: models/math\n",
        "§models: [a, b]\nother:\n  base: models/base\n",
        ("models",),
    ),
    "model without a path": ("  math: models/math", "  §math:", ("math",)),
    "one task, not a list": (
        "  - task: first\n    weight: 2.0\n  - task: second\n    num_fewshot: 2\n",
        "  {}\n",
        ("tasks",),
    ),
    "no task": (
        "tasks:\n  - task: first\n    weight: 2.0\n  - task: second\n    num_fewshot: 2\n",
        "§tasks: []\n",
        ("tasks", "1"),
    ),
    "no component": ("components: [attention, mlp]", "§components: []", ("components",)),
    "number for a name": ("study: trial", "§study: 7", ("study", "7")),
    # repetition
    "repeated key at the top": (
        "objective: mean",
        "objective: mean\n§objective: worst",
        ("repeats", "'objective'"),
    ),
    "repeated key below": ("  items: 100", "  items: 100\n  §items: 200", ("repeats", "'items'")),
    "repeated model": (
        "  math: models/math",
        "  math: models/math\n  §math: models/other",
        ("repeats", "'math'"),
    ),
    "repeated task": ("  - task: second", "  - §task: first", ("'first'", "twice")),
    "repeated component": ("components: [attention, mlp]", "§components: [mlp, mlp]", ("mlp", "twice")),
    # names of studies
    "study that is a path": ("study: trial", "§study: ../trial", ("study", "'../trial'")),
    "study without a name": ("study: trial", "§study: ''", ("study",)),
    "study that looks like a flag": ("study: trial", "§study: -rf", ("study", "'-rf'")),
    # counts
    "too many models for the method": ("method: ties", "method: slerp", ("slerp", "1", "2")),
    "two models for a method of one, among others": (
        "method: ties",
        "method: [ties, slerp]",
        ("slerp", "1", "2"),
    ),
    # several methods
    "one method in a list": ("method: ties", "§method: [ties]", ("two or more", "method: ties")),
    "no method in a list": ("method: ties", "§method: []", ("two or more", "got 0")),
    "a method twice": ("method: ties", "§method: [ties, della, ties]", ("'ties'", "twice")),
    "unknown method among others": ("method: ties", "§method: [ties, dellla]", ("'dellla'", "'della'")),
    "number among methods": ("method: ties", "method: [ties, §7]", ("string", "7")),
    "parameter of none of the methods": (
        "method: ties",
        "method: [linear, nuslerp]",
        ("none of linear, nuslerp", "'density'"),
    ),
    "gradient of several methods": (
        "method: ties",
        "method: [ties, della]\nstages: [§learned]",
        ("gradient", "one method", "stage of weights"),
    ),
    "several methods after routes": (
        "method: ties",
        "§method: [ties, della]\nstages: [routes, weights]",
        ("first stage of weights", "begins with routes"),
    ),
    # optimizers
    "optimizer of categories for numbers": (
        "  sigma: 0.15",
        "  §optimizer: cat_cma",
        ("cat_cma", "needs categorical genes", "cma or random"),
    ),
    "base alone": ("  math: models/math\n  lang: {path: models/lang, revision: main}\n", "", ("models", "2")),
    # YAML itself
    "tab": ("  items: 100", "§\titems: 100", ("not valid YAML",)),
    "bracket left open": ("[attention, mlp]", "[attention, mlp", ("not valid YAML",)),
    "alias of nothing": ("items: 100", "items: §*n", ("undefined alias 'n'",)),
    "anchor of a wrong value": ("items: 100", "items: &n many", ("items", "'many'")),
    "merge key of a number": ("  items: 100", "  §<<: 100", ("merge key", "mapping")),
    "python object": ("study: trial", "§study: !!python/object/apply:os.getcwd []", ("study", "string")),
    "python name": ("study: trial", "study: §!!python/name:os.getcwd ''", ("not valid YAML",)),
    "second document": ("search:\n", "---\n§search:\n", ("second of 2 documents",)),
}


def read(text: str, folder: Path) -> config.Config:
    file = folder / "search.yaml"
    file.write_text(text)
    return loading.load(str(file))[0]


def test_the_example_is_good(tmp_path: Path) -> None:
    settings = read(GOOD, tmp_path)
    assert settings.parents == ("math", "lang")
    assert settings.models["lang"].revision == "main"
    assert settings.space.groups == (2, 3)
    assert settings.space.parameters["density"] == 0.7
    assert settings.search.seed == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_choice_of_methods_takes_every_optimizer_of_categories(optimizer: str, tmp_path: Path) -> None:
    text = GOOD.replace("method: ties", "method: [ties, della]") + f"  optimizer: {optimizer}\n"
    settings = read(text, tmp_path)
    assert (settings.method, settings.methods) == (("ties", "della"), ("ties", "della"))
    text += "stages: [weights, routes, weights]\n"  # of which the last one is of numbers alone
    if OPTIMIZERS[optimizer].takes_numbers:
        read(text, tmp_path)
    else:
        with pytest.raises(ConfigError, match=rf"{optimizer} needs categorical genes; .* use cma or random"):
            read(text, tmp_path)


def test_an_optimizer_that_takes_no_categories_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "cma", replace(OPTIMIZERS["cma"], categorical_name=""))
    text = GOOD.replace("method: ties", "method: [ties, della]")
    with pytest.raises(ConfigError, match=r"cma takes continuous genes alone; for categories use cat_cma or"):
        read(text, tmp_path)


@pytest.mark.parametrize("name", _resources.search_spaces())
def test_a_shipped_search_space_loads_by_name_and_by_path(name: str) -> None:
    path = _resources.search_spaces()[name]
    assert loading.load(name) == loading.load(str(path)) == (loading.load(name)[0], path.read_text())


def test_search_spaces_are_shipped() -> None:
    assert "demo" in _resources.search_spaces()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_its_place_and_the_right_word(mistake: str, tmp_path: Path) -> None:
    old, new, words = MISTAKES[mistake]
    assert GOOD.count(old) == 1
    marked = GOOD.replace(old, new)
    before, pointed, _ = marked.partition("§")
    with pytest.raises(ConfigError) as caught:
        read(marked.replace("§", ""), tmp_path)
    message = str(caught.value)
    place, _, sentence = message.partition(" ")
    file, line, column = place.rsplit(":", 2)
    assert file == str(tmp_path / "search.yaml"), message
    assert line.isdigit(), message
    assert column.isdigit(), message
    for word in words:
        assert word in sentence, f"{word} is not in: {message}"
    assert "\n" not in message
    if pointed:
        wanted = (before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1)
        assert (int(line), int(column)) == wanted, message


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just words\n", "7\n"])
def test_a_file_that_is_no_mapping_is_refused_at_its_start(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.yaml:\d+:\d+ must be a mapping"):
        read(text, tmp_path)


@pytest.mark.parametrize(
    ("bytes_", "words"),
    [
        (b"study: \xff\xfe\n", "not UTF-8"),
        (("study: " + "x" * 1_000_001).encode(), "at most"),
        (("a: " + "[" * 40 + "]" * 40).encode(), "nested deeper"),
        (b"study: a\x00b\n", "YAML"),
        (b"seed: !!int abc\n", "YAML"),
    ],
)
def test_a_file_that_is_no_search_file_is_refused_by_name(bytes_: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_bytes(bytes_)
    with pytest.raises(ConfigError, match=words) as caught:
        loading.load(str(file))
    assert str(file) in str(caught.value)


def test_a_missing_file_names_what_is_shipped(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'demo'"):
        loading.load("dmeo")
    with pytest.raises(ConfigError, match="no search file"):
        loading.load(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="cannot read"):
        loading.load(str(tmp_path))


@pytest.mark.parametrize(("written", "meant"), [("1e2", 100), ("0100", 100), ("+7", 7), ("100", 100)])
def test_whole_numbers_are_those_of_yaml_1_2(written: str, meant: int, tmp_path: Path) -> None:
    assert (
        read(GOOD.replace("evaluations: 500", f"evaluations: {written}"), tmp_path).search.evaluations
        == meant
    )


@pytest.mark.parametrize(
    ("written", "meant"), [("1e-2", 0.01), ("2.5e-1", 0.25), (".5", 0.5), ("1", 1.0), ("1.", 1.0)]
)
def test_fractions_are_those_of_yaml_1_2(written: str, meant: float, tmp_path: Path) -> None:
    assert read(GOOD.replace("sigma: 0.15", f"sigma: {written}"), tmp_path).search.sigma == meant


@pytest.mark.parametrize("word", ["no", "on", "12:30:00", "2024-01-01", "0x1F", "1_000"])
def test_words_that_old_yaml_reads_as_something_else_stay_words(word: str) -> None:
    assert _yaml.parse(f"key: {word}", "text").data == {"key": word}


@pytest.mark.parametrize("study", ["other", "2024", "1e5", "true", "a.b-c_d"])
def test_another_study_name_replaces_the_files(study: str) -> None:
    settings, text = loading.rename(GOOD, study)
    assert settings.study == study
    assert loading.stored(study, text, {})[0] == settings
    assert settings.model_copy(update={"study": "trial"}) == loading.check(_yaml.parse(GOOD, "good"))


@pytest.mark.parametrize(
    "style",
    ['"study": trial', "'study': trial", "study:\n  trial", "study: trial  # the first", "study : trial"],
)
def test_another_study_name_is_never_ignored(style: str) -> None:
    text = GOOD.replace("study: trial", style)
    assert loading.check(_yaml.parse(text, "text")).study == "trial"
    try:
        settings, _ = loading.rename(text, "other")
    except ConfigError:
        return  # said, not ignored
    assert settings.study == "other"


@pytest.mark.parametrize("study", ["a/b", "", "-x", "a b", "x" * 65, "a: b", "'"])
def test_another_study_name_must_be_one(study: str) -> None:
    with pytest.raises(ConfigError):
        loading.rename(GOOD, study)


def test_flags_replace_the_budget_and_the_seed() -> None:
    settings = loading.check(_yaml.parse(GOOD, "good"))
    changed = loading.override(settings, {"evaluations": 7, "seed": 3})
    assert (changed.search.evaluations, changed.search.seed) == (7, 3)
    assert changed.model_copy(update={"search": settings.search}) == settings
    assert loading.stored("trial", GOOD, {"evaluations": 7, "seed": 3})[0] == changed
    for bad in ({"evaluations": 0}, {"seed": -1}, {"seed": 2**31}):
        with pytest.raises(ConfigError, match=f"--{next(iter(bad))}"):
            loading.override(settings, bad)


@pytest.mark.parametrize("name", [n for n in METHODS if not all(p.flag for p in METHODS[n].params)])
def test_every_method_has_a_search_file(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    searched = [p for p in method.params if not p.flag]
    middle = {p.name: f"{{low: {p.low}, high: {p.high}, start: {(p.low + p.high) / 2}}}" for p in searched}
    ranges = "".join(f"    {k}: {v}\n" for k, v in middle.items())
    text = GOOD.replace("method: ties", f"method: {name}")
    text = text.replace("    weight: {low: -0.5, high: 2.0, start: 0.5}\n    density: 0.7\n", ranges)
    if method.models[1] == 1:
        text = text.replace("  lang: {path: models/lang, revision: main}\n", "")
    assert set(read(text, tmp_path).space.parameters) == {p.name for p in searched}


@pytest.mark.parametrize("option", ["trust_remote_code", "worker_extension_cls", "tokenizer", "load_format"])
def test_a_search_file_does_not_have_an_engine_run_other_code(option: str, tmp_path: Path) -> None:
    text = _resources.search_spaces()["demo"].read_text()
    file = tmp_path / "search.yaml"
    file.write_text(text.replace("evaluation:", f"evaluation:\n  engine: {{options: {{{option}: true}}}}"))
    with pytest.raises(ConfigError, match="enforce_eager"):
        loading.load(str(file))


def test_a_search_file_names_no_interpreter(tmp_path: Path) -> None:
    text = _resources.search_spaces()["demo"].read_text()
    file = tmp_path / "search.yaml"
    file.write_text(text.replace("evaluation:", "evaluation:\n  engine: {python: ./mine}"))
    with pytest.raises(ConfigError, match=r"unknown key 'evaluation\.engine\.python'"):
        loading.load(str(file))
