"""Command lines with odd values, and hostile model folders: a case is a function of its number and seed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ODD = (
    *(
        "",
        " ",
        "\t",
        "a\nb",
        "\x1b[2J\x1b]0;x\x07",
        "\udcff",
        "\u202ex",
        "💥",
        "–±…",
        "ü",
        "a b",
        "'; ls",
        "$(x)",
    ),
    *(
        "²",
        "+²",
        "٣",
        "-1",
        "0",
        "1",
        "007",
        "1e400",
        "1e-400",
        "nan",
        "inf",
        "-inf",
        "9" * 30,
        "+" + "1" * 24,
    ),
    *("0x10", "1,5", "true", "None", "[]", "{}", "%s", "{0}", "[red]x", "--", "-", "--help", "-v", "@", "@f"),
    *(
        "x" * 300,
        "y" * 5000,
        "é" * 200,
        "..",
        ".",
        "/",
        "../../x",
        "~",
        "~nobody/x",
        "//",
        "a/b/c",
        "con.yaml",
    ),
    *(
        "/dev/null",
        "/dev/null/x",
        "/dev/full",
        "/proc",
        "/proc/x",
        "/proc/self/mem",
        "/dev/zero/x",
        "/nowhere/x",
    ),
    *(
        "https://host/x",
        "http://u:p@h/x",
        "owner/repo",
        "owner/repo@main",
        "a+b",
        "a+b+c",
        "+",
        "ray://x:1",
        "x:²",
    ),
    *(
        "127.0.0.1:1",
        "auto",
        "local",
        "localhost:0",
        "done",
        "done/best",
        "done/²",
        "done/0",
        "done/-1",
        "done/x",
    ),
    *(
        "done/99999999999999999999",
        "/best",
        "best",
        "done/",
        "done/best/x",
        "done/pareto",
        "DONE",
        "done\x1b",
    ),
    *("LINK", "DANGLING", "FOLDER", "FILE", "BINARY", "HUGE", "LOOP", "SOCKET", "SEARCH", "RECIPE", "OUT"),
)
"""Odd values; those in capitals at the end stand for what `Place` makes."""
_WITHOUT_WORK = tuple(value for value in ODD if value not in ("local", "007", "٣"))  # they start processes
VERBS: dict[str, tuple[int, tuple[str, ...]]] = {
    "plan": (1, ("--json", "--probe", "--allow-tasks")),
    "doctor": (0, ("--json", "--root")),
    "run": (1, ("--resume", "--evaluations", "--seed", "--study", "--workers", "--ray", "--gpus", "--grace",
                "--reuse", "--root")),
    "resume": (1, ("--evaluations", "--workers", "--ray", "--gpus", "--grace", "--reuse", "--root")),
    "stop": (1, ("--root",)),
    "status": (1, ("--json", "--root")),
    "show": (1, ("--json", "--root", "--task", "--items")),
    "compare": (2, ("--role", "--task", "--json", "--root")),
    "sensitivity": (1, ("--step", "--span", "--axes", "--role", "--items", "--root")),
    "export": (2, ("--weights", "--root", "--verify")),
    "merge": (2, ("--policy", "--memory", "--verify")),
    "": (0, ("--version", "--help", "-v", "--install-completion-x")),
}  # fmt: skip
"""Verb -> (arguments, options)."""
FLAGS = ("--json", "--probe", "--allow-tasks", "--resume", "--weights", "--version", "--help", "-v")
VARIABLES = (
    *("HOME", "TMPDIR", "XDG_CACHE_HOME", "EVOMERGE_ROOT", "EVOMERGE_DEVICE", "EVOMERGE_THREADS"),
    *(
        "EVOMERGE_WORKERS",
        "EVOMERGE_NATIVE",
        "CC",
        "TERM",
        "COLUMNS",
        "RAY_ADDRESS",
        "HF_HOME",
        "OMP_NUM_THREADS",
    ),
)
LOCALES: dict[str, dict[str, str]] = {
    "UTF-8": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8"},
    "latin-1": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
}


@dataclass(frozen=True)
class Case:
    """One command line. kind: 'words', 'search', 'model'; change: of a search file or a model folder."""

    number: int
    kind: str
    words: tuple[str, ...]
    variables: Mapping[str, str | None] = field(default_factory=dict)
    change: str = ""

    def to_json(self) -> str:
        """A line."""
        return json.dumps(asdict(self))


def case(number: int, seed: int) -> Case:
    """A case of words or of a search file.

    Args:
        number: Which one.
        seed: Of all of them.

    Returns:
        The case.
    """
    draw = random.Random(f"{seed}/{number}")
    if number % 16 == 7:
        return Case(number, "search", ("plan", "SEARCH"), change=_search_change(draw))
    verb = draw.choice(tuple(VERBS))
    count, options = VERBS[verb]
    words = [verb] if verb else []
    usual = {"run": "SEARCH", "plan": "SEARCH", "merge": "RECIPE"}.get(verb, "done/best" if count else "")
    for position in range(count if draw.random() < 0.9 else draw.randrange(4)):
        plain = "OUT" if position and verb in ("export", "merge") else usual
        words.append(plain if draw.random() < 0.4 else draw.choice(ODD))
    for option in draw.sample(options, draw.randrange(min(3, len(options)) + 1)):
        values = _WITHOUT_WORK if option in ("--workers", "--ray") else ODD
        words += [option] if option in FLAGS else [option, draw.choice(values)]
    if verb == "run":
        words += ["--evaluations", draw.choice(ODD)]  # never a whole search
    variables: dict[str, str | None] = {}
    for name in draw.sample(VARIABLES, draw.choice((0, 0, 0, 1, 2))):
        value = draw.choice((*ODD, None))
        variables[name] = value if value is None else value.replace("\0", "")
    return Case(number, "words", tuple(words), variables)


def model_case(number: int, seed: int) -> Case:
    """A case of a hostile model folder, merged with itself or planned a search of.

    Args:
        number: Which one.
        seed: Of all of them.

    Returns:
        The case.
    """
    draw = random.Random(f"model/{seed}/{number}")
    changes = tuple(MODEL_CHANGES)
    words = (("merge", "RECIPE", "OUT"), ("plan", "SEARCH"))[number % 2]
    return Case(
        number, "model", words, change=f"{changes[number // 2 % len(changes)]}/{draw.randrange(10**6)}"
    )


def _search_change(draw: random.Random) -> str:
    """JSON of [path of a key, odd value]."""
    value = draw.choice(
        (
            *ODD,
            None,
            True,
            -1,
            0,
            10**9,
            10**30,
            1e308,
            -1e308,
            0.5,
            [],
            {},
            [[]],
            {"x": 1},
            ["x"] * 50,
            [1, "²"],
        )
    )
    return json.dumps([draw.random(), value])


def changed_search(document: dict[str, Any], change: str) -> dict[str, Any]:
    """A search file with one of its values replaced.

    Args:
        document: The search file, which is changed.
        change: As `Case.change` has it.

    Returns:
        The document.
    """
    where, value = json.loads(change)
    places = list(_places(document))
    holder, key = places[int(where * len(places))]
    holder[key] = value
    return document


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(inner, dict | list):
            found += _places(inner)
    return found


# ---- hostile model folders ---------------------------------------------------------------------------------

_CODE = "open({mark!r}, 'w').close()\n"
_NUMBERS = (0, -1, 10**9, 10**30, 1e308, "x", None, [], {}, True, 0.5, 3)


_SLOW = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


def _config(folder: Path, draw: random.Random, mark: Path) -> None:
    file = folder / "config.json"
    data = json.loads(file.read_text())
    for key in draw.sample(sorted(data), 2):
        data[key] = draw.choice(_NUMBERS)
    file.write_text(json.dumps(data))


def _entry(folder: Path, draw: random.Random, mark: Path) -> None:
    file = folder / "config.json"
    key = draw.choice(
        (
            *("_attn_implementation", "attn_implementation", "auto_map", "quantization_config", "backbone"),
            *("transformers_weights", "use_kernels", "text_config", "model_type", "dtype"),
        )
    )
    value = draw.choice(
        ("owner/repo", {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}, "../x", 7)
    )
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    (folder / "theirs.py").write_text(_CODE.format(mark=str(mark)))
    (folder / "config.py").write_text(_CODE.format(mark=str(mark)))


def _tokenizer(folder: Path, draw: random.Random, mark: Path) -> None:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 6
    part, value = draw.choice(
        (
            ("normalizer", {"type": "Sequence", "normalizers": steps}),
            (
                "pre_tokenizer",
                {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
            ),
            ("model", draw.choice(_NUMBERS)),
            ("added_tokens", [{"id": -5, "content": "\x1b[2J"}]),
            ("decoder", {"type": "no such"}),
        )
    )
    file.write_text(json.dumps(data | {part: value}))


def _header(folder: Path, draw: random.Random, mark: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 8, 200))):
        data[draw.randrange(min(len(data), 4000))] = draw.randrange(256)
    file.write_bytes(data)


def _cut(folder: Path, draw: random.Random, mark: Path) -> None:
    file = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    file.write_bytes(file.read_bytes()[: draw.choice((0, 1, 7, 8, 100))])


def _kind(folder: Path, draw: random.Random, mark: Path) -> None:
    file = draw.choice(("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"))
    (folder / file).unlink(missing_ok=True)
    how = draw.randrange(6)
    if how == 0:
        os.mkfifo(folder / file)
    elif how == 1:
        (folder / file).mkdir()
    elif how == 2:
        (folder / file).symlink_to("/dev/zero")
    elif how == 3:
        (folder / file).symlink_to(folder / file)
    elif how == 4:
        with (folder / file).open("wb") as opened:
            opened.truncate(1 << 42)
    else:
        (folder / file).symlink_to("/etc/passwd")


def _pickle(folder: Path, draw: random.Random, mark: Path) -> None:
    import pickle

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(mark),)

    (folder / "model.safetensors").rename(
        folder / draw.choice(("model.safetensors", "x.safetensors", "y.bin"))
    )
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Payload()))


def _index(folder: Path, draw: random.Random, mark: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    target = draw.choice(("../../x.safetensors", "/etc/passwd", "a.safetensors", "b.safetensors", 7, "a.bin"))
    names = {"model.norm.weight": target, "\x1b[2J": "a.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _adapter(folder: Path, draw: random.Random, mark: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "base_model_name_or_path": "owner/repo", "rank_pattern": {"(a+)+$": 4}}
        )
    )


def _template(folder: Path, draw: random.Random, mark: Path) -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x{% endfor %}"
    (folder / "chat_template.jinja").write_text(loops + "{% endfor %}{% endfor %}")


MODEL_CHANGES: dict[str, Callable[[Path, random.Random, Path], None]] = {
    "config": _config,
    "entry": _entry,
    "tokenizer": _tokenizer,
    "header": _header,
    "cut": _cut,
    "kind": _kind,
    "pickle": _pickle,
    "index": _index,
    "adapter": _adapter,
    "template": _template,
}
"""What is changed in a copy of a model -> how; a mark is left by code that runs."""


def hostile_model(source: Path, folder: Path, change: str, mark: Path) -> None:
    """Makes a hostile copy of a model.

    Args:
        source: The model.
        folder: To make.
        change: As `Case.change` has it.
        mark: A file that code of the folder would make.
    """
    shutil.copytree(source, folder)
    name, _, number = change.partition("/")
    MODEL_CHANGES[name](folder, random.Random(number), mark)
