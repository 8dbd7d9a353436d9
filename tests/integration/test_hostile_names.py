"""Names of models and tasks reach terminal, report and card as text: none steers, formats or ends them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from evomerge._escaping import markdown, markdown_code, markdown_data, one_line, printable
from evomerge._redaction import ScrubbedFormatter
from evomerge.config import loading
from evomerge.errors import ConfigError, EvomergeError, TaskError
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging import model_loading
from tests.support.lm_eval_tasks import GENERATE, sums, write_task
from tests.support.toy import environment, in_process, search_file, zoo_folder

UNPRINTABLE = {
    "an escape sequence": "math\x1b[2J\x1b]0;owned\x07",
    "a line end": "math\n---\nlicense: mit",
    "a carriage return": "math\rerror[E000]",
    "a backspace": "math\x08\x08",
    "a C1 control": "math\x9b31m",
    "a text direction": "math\u202ehtam",
    "an isolate": "math\u2066",
    "a line separator": "math\u2028x",
    "a tab": "ma\tth",
    "spaces around": " math ",
    "300 characters": "m" * 300,
    "nothing": "",
}
SIGNS = {
    "a cell and HTML": "a|b <img src=x onerror=alert(1)>",
    "code and a link": "`*[x](javascript:alert(1))",
    "a rule": "---",
}


def changed(folder: Path, change: Any) -> Path:
    """A search file whose content another has changed."""
    file = search_file(folder, "trial", evaluations=4, population=4)
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return file


PLACES = {
    "a model": lambda d, name: d["models"].update({name: d["models"]["math"]}),
    "the base": lambda d, name: d.update(base=name),
    "a task": lambda d, name: d["tasks"].append({"task": name}),
    "a metric": lambda d, name: d["tasks"][0].update(metric=name),
    "a filter": lambda d, name: d["tasks"][0].update(filter=name),
    "a Python task": lambda d, name: d["tasks"].append({"name": name, "python": "x:y"}),
    "a revision": lambda d, name: d["models"].update(math={"path": "x", "revision": name}),
    "a study": lambda d, name: d.update(study=name),
    "a task that is kept": lambda d, name: d.update(keep={name: 0.1}),
    "a study to reuse": lambda d, name: d.update(reuse=[name + "/\x1b"]),
}


@pytest.mark.parametrize("what", UNPRINTABLE)
@pytest.mark.parametrize("place", PLACES)
def test_a_name_that_is_no_printable_text_is_refused_in_one_printable_line(
    place: str, what: str, tmp_path: Path
) -> None:
    file = changed(tmp_path, lambda document: PLACES[place](document, UNPRINTABLE[what]))
    with pytest.raises(ConfigError, match=r"trial\.yaml:\d+:\d+ ") as raised:
        loading.load(str(file))
    assert str(raised.value).isprintable()


def test_a_task_folder_gives_its_tasks_printable_names(tmp_path: Path) -> None:
    from evomerge.checkpoints import Checkpoint

    tokenizer: Any = model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))
    few = {"search": sums(4), "validation": sums(3, 10), "test": sums(6, 20)}
    write_task(tmp_path, "trial", GENERATE | {"task": "x\x1b[31m"}, few)
    (tmp_path / "group.yaml").write_text(json.dumps({"group": "all", "task": ["x\x1b[31m"]}))
    with pytest.raises(TaskError) as raised:
        LmHarness([TaskSpec("all", splits="declared")], tokenizer, include=[tmp_path])
    assert str(raised.value).isprintable()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a search over models with hostile names shows and writes: name -> text."""
    root, zoo = tmp_path_factory.mktemp("searched"), zoo_folder()
    names = dict(zip(SIGNS.values(), ("math", "lang", "string"), strict=True))
    models = {"<b>base": str(zoo / "base")} | {name: str(zoo / own) for name, own in names.items()}
    file = changed(root, lambda document: document.update(models=models, base="<b>base"))
    with file.open("a") as opened:
        opened.write("\n# my password is correct horse\n")
    texts: dict[str, str] = {}
    for verb in (
        ("run", file),
        ("status", "trial"),
        ("show", "trial/best"),
        ("export", "trial/best", root / "out"),
    ):
        code, out, err = in_process(*verb, "--root", root)
        assert code == 0, err
        texts[str(verb[0])] = out + err
    texts["report"] = (root / "trial" / "report.md").read_text()
    texts["card"] = (root / "out" / "README.md").read_text()
    texts["lineage"] = (root / "out" / "lineage.json").read_text()
    texts["recipe"] = (root / "out" / "recipe.yaml").read_text()
    return texts


@pytest.mark.parametrize("document", ["report", "card"])
def test_a_models_name_is_shown_in_a_document_and_is_no_part_of_it(
    document: str, searched: dict[str, str]
) -> None:
    text = searched[document]
    body = text.partition("\n---\n")[2] if text.startswith("---") else text
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    inner = [child for token in tokens for child in token.children or ()]
    assert [t.content for t in (*tokens, *inner) if t.type.startswith("html")] == []
    assert [t for t in (*tokens, *inner) if t.type in ("link_open", "image", "hr")] == []
    shown = " ".join(t.content for t in inner if t.type in ("text", "code_inline"))
    assert shown.count("---") >= 1
    heads = [t for t in tokens if t.type == "tr_open"]
    assert heads, "tables are still tables"
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    for name in ("<img", "<script", "<b>", 'href="javascript'):
        assert name not in html


def test_a_cards_front_matter_and_a_recipe_are_what_they_were(searched: dict[str, str]) -> None:
    front = searched["card"].split("\n---\n")[0].removeprefix("---\n")
    assert yaml.safe_load(front)["tags"] == ["merge", "mergekit", "evomerge"]
    winners = ("task_arithmetic", "linear", "passthrough")  # of the search, a mean of parents, a parent
    assert yaml.safe_load(searched["recipe"])["merge_method"] in winners


def test_a_comment_of_the_search_file_stays_with_its_user(searched: dict[str, str]) -> None:
    assert "correct horse" not in "".join(searched.values())
    settings = json.loads(searched["lineage"])["config"]
    assert settings["base"] == "<b>base"
    assert set(SIGNS.values()) < set(settings["models"])


def test_what_a_models_config_says_does_not_steer_the_terminal(tmp_path: Path) -> None:
    import shutil

    models = {}
    for name in ("base", "math"):
        models[name] = str(shutil.copytree(zoo_folder() / name, tmp_path / name))
        file = tmp_path / name / "config.json"
        own = json.loads(file.read_text()) | {"architectures": ["Llama\x1b[31m\x1b]0;owned\x07"]}
        file.write_text(json.dumps(own))
    file = changed(tmp_path, lambda document: document.update(models=models))
    code, out, err = in_process("plan", file)
    assert "\x1b" not in out + err
    assert "\x07" not in out + err
    assert code in (0, 3)


# ---- the functions -----------------------------------------------------------------------------------------

EVIL = "a\x1b[31m|b`<i>\n---\n[x](y) *z* \\ ~~s~~ ``q`` \u202e\ud800"


def test_text_is_escaped_for_where_it_goes() -> None:
    assert printable("a\n\tb ü 漢") == "a\n\tb ü 漢"
    assert printable("a\x1b[31m\x9b\u202e\ud800") == "a\\x1b[31m\\x9b\\u202e\\ud800"
    assert one_line(" a\n  b\r\n\u2028c ") == "a b c"
    assert str(EvomergeError(f"{EVIL}\n\n{EVIL}")).isprintable()
    rendered = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render
    row = rendered(f"| {markdown(EVIL)} | x |\n| --- | --- |\n")
    assert row.count("<th>") == 2
    for tag in ("<i>", "<em>", "<a ", "<s>", "<code>", "<hr"):
        assert tag not in row
    code = rendered(f"- {markdown_code(EVIL)}")
    assert code.count("<code>") == 1
    assert "<i>" not in code
    assert markdown_data({"a|b": ["<x>", 1, None, ("y",)]}) == {"a\\|b": ["&lt;x&gt;", 1, None, ("y",)]}


def test_a_log_line_does_not_steer_the_terminal() -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "model %s", ("\x1b[2J",), None)
    assert ScrubbedFormatter("%(message)s").format(record) == "model \\x1b[2J"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_locale_without_our_characters_gets_others_in_their_place(encoding: str, tmp_path: Path) -> None:
    program = (
        "from evomerge.cli.output import print_in_any_locale, put, tell\n"
        "print_in_any_locale(); put('1 – 2 ± 3 … ▁█ 漢 \\udcff'); tell('±')"
    )
    own = environment() | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=own, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(encoding)
    wanted = {
        "ascii": "1 - 2 +- 3 ... .# \\u6f22 \\udcff",
        "latin-1": "1 - 2 ± 3 ... .# \\u6f22 \\udcff",
        "utf-8": "1 – 2 ± 3 … ▁█ 漢 \\udcff",
    }
    assert shown.rstrip("\n") == wanted[encoding].replace("\n", "")


def test_every_file_of_the_package_is_read_and_written_as_utf_8() -> None:
    """Whatever the locale: a report holds '±'."""
    import ast

    from tests.support.toy import REPO

    missing = [
        f"{file.relative_to(REPO)}:{node.lineno}"
        for file in sorted((REPO / "evomerge").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("read_text", "write_text")
        and not any(keyword.arg == "encoding" for keyword in node.keywords)
    ]
    assert missing == []
    assert os.linesep == "\n"
