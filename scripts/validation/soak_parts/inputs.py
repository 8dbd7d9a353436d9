"""Mutated search files, mergekit files, recipe JSON and safetensors headers: read, or refused by one line of
ours.

A case is a function of its name, such as 0/search/17. Run as a program it takes KIND FIRST COUNT SEED and
prints what it found; the soak starts it so, a few thousand cases at a time, and watches which case it is at.
"""

from __future__ import annotations

import json
import mmap
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.validation.soak_parts import pieces

KINDS = ("search", "mergekit", "recipe", "header")
SECONDS = 2.0  # of processor time; a case that takes longer hangs
WAIT = 60.0  # seconds that a case may take whatever it waits for
PIECE = 2500  # cases of one process
MEMORY = 12 << 30  # bytes of address space that a process may take
LONGEST = 2000  # characters of an error


# ---- the cases


_EVERY_KEY: dict[str, Any] = {  # a search file that uses every key
    "study": "all",
    "models": {"base": {"path": "m/base", "revision": "main"}, "a": "m/a", "b": "m/b"},
    "base": "base",
    "method": "dare_ties",
    "out_dtype": "float32",
    "objective": "geometric",
    "keep": {"x": 0.01},
    "space": {
        "groups": [2, 1, 1],
        "components": ["attention", "mlp", "other"],
        "embeddings": False,
        "head": True,
        "parameters": {
            "weight": {"low": -0.5, "high": 2, "start": 0.5},
            "density": 0.5,
            "normalize": True,
        },
    },
    "tasks": [
        {
            "task": "x",
            "metric": "acc",
            "weight": 2,
            "search": {"metric": 1, "probability": 0.5},
            "num_fewshot": 2,
        },
        {"task": "y", "items": {"search": [1, 2, "id"], "validation": [3], "test": "file.txt"}},
        {"python": "tasks:mine", "name": "z", "higher_is_better": False},
    ],
    "evaluation": {
        "splits": "hash",
        "items": {"x": 8, "y": 4},
        "validation": None,
        "test": 20,
        "search": 100,
        "batch_size": 8,
    },
    "search": {
        "evaluations": 96,
        "population": 8,
        "sigma": 0.1,
        "seed": 3,
        "start": "best",
        "finalists": 3,
        "tie_break": "none",
        "race": {"rungs": [4, 8], "error": 0.1},
    },
    "stages": [
        "weights",
        {"stage": "routes", "evaluations": 32, "population": 6, "sigma": 0.2},
        "weights",
    ],
    "routes": {
        "genome": "conditional",
        "start": "a",
        "models": ["a", "b"],
        "layers": [2, 6],
        "spans": [1, 2, 3],
        "scales": "hop",
        "scale_range": [0.5, 1.4],
        "penalty": 0.0,
        "perplexity_screen": {"tokens": 300, "factor": 20},
    },
}


def _bases() -> dict[str, list[Any]]:
    """Kind -> what is mutated: texts, and data that is written out as text."""
    from evomerge import _yaml
    from evomerge.spaces import baselines
    from tests.support.toy import weight_space

    shipped = [_yaml.read(file).data for file in sorted((pieces.REPOSITORY / "search_spaces").glob("*.yaml"))]
    space = weight_space("dare_ties")
    recipes = [json.loads(b.recipe.canonical()) for b in baselines(space)][::3]
    recipes.append(
        recipes[1]
        | {"scales": [1.0, 0.9, 1.1], "stages": [["one", recipes[2]]], "chat_template": "chatml", "seed": 7}
    )
    recipes.append(
        recipes[0]
        | {
            "tokenizer": {
                "source": "union",
                "pad_to_multiple_of": 8,
                "tokens": [["<x>", {"source": ["a", 3], "force": True}]],
            }
        }
    )
    return {"search": [*shipped, _EVERY_KEY], "recipe": recipes, "mergekit": [], "header": _headers()}


def _headers() -> list[Any]:
    """(header, bytes of data) of files that a folder of a toy Llama may have."""
    from tests.support.toy import llama_shapes

    found = []
    for layers, kind, size in ((1, "F32", 4), (2, "BF16", 2), (3, "F16", 2)):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape in llama_shapes(layers).items():
            end = at + size * (shape[0] * (shape[1] if len(shape) > 1 else 1))
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        found.append((header, at, layers))
    return found


def _nested(rng: random.Random) -> bytes:
    depth = rng.choice([8, 31, 33, 200, 3000, 100_000])
    one, other = rng.choice(
        [("[", "]"), ("{a: ", "}"), ("- ", ""), ('{"a":', "}"), ("? ", ""), ("!!map {", "}")]
    )
    return (one * depth + "1" + other * depth * (rng.random() < 0.7)).encode()


def _aliases(rng: random.Random) -> bytes:
    lines = ["a: &a [x, x, x, x]"] + [
        f"{c}: &{c} [{', '.join(['*' + p] * 9)}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    return rng.choice(
        ["\n".join(lines), "a: &a {x: *a}", "a: &a [*a]", "<<: {x: 1}\n<<: [{y: 1}]", "a: &a 1\n<<: *a"]
    ).encode()


def _huge(rng: random.Random) -> bytes:
    digits = rng.choice([20, 400, 4300, 4301, 100_000])
    return rng.choice(
        [
            "9" * digits,
            "-" + "9" * digits,
            "1e" + "9" * min(digits, 4300),
            "0." + "0" * digits + "1",
            "9" * digits + ".5",
        ]
    ).encode()


def _large(rng: random.Random, text: bytes) -> bytes:
    """A stretch of the text, or of a separator, over and over."""
    at = rng.randrange(len(text))
    part = (
        rng.choice(
            [
                text[at : at + rng.choice([1, 5, 60])],
                b"- 1\n",
                b"1,",
                b"\n",
                b"#",
                b"---\n",
                b" ",
                b'"',
                b"?",
                b":",
            ]
        )
        or b"x"
    )
    return text[:at] + part * (rng.choice([3_000, 30_000, 300_000]) // len(part)) + text[at:]


def _text(rng: random.Random, data: Any, other: bytes) -> bytes:
    """The data as text with its structure or its bytes changed, or both."""
    from scripts.validation.fuzz_inputs import scrambled, twisted, written

    as_json = rng.random() < (1.0 if "embeddings" in data else 0.3)  # a recipe of ours is JSON
    if rng.random() < 0.6:
        data = twisted(rng, data)
    try:
        text: bytes = json.dumps(data).encode() if as_json else written(rng, data)
    except (RecursionError, ValueError):  # what was twisted holds itself, or a number that has no text
        text = b"x: " + _huge(rng)
    action = rng.random()
    if action < 0.35:
        text = scrambled(rng, text)
    elif action < 0.45:  # a stretch of another file
        at, start = rng.randrange(len(text) + 1), rng.randrange(len(other))
        text = text[:at] + other[start : start + rng.choice([3, 30, 300])] + text[at + rng.choice([0, 30]) :]
    elif action < 0.55:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice([_nested, _aliases, _huge])(rng) + text[at:]
    elif action < 0.56 and text:
        text = _large(rng, text)
    elif action < 0.60:
        text = rng.choice([_nested, _aliases, _huge])(rng)
    elif action < 0.63:
        text = text + b"\n---\n" + other
    return text


def _header(rng: random.Random, base: tuple[dict[str, Any], int, int]) -> tuple[bytes, int]:
    """(a whole safetensors file, depth that its config says)."""
    from scripts.validation.fuzz_inputs import scrambled, twisted

    header, size, layers = base
    data = header
    if rng.random() < 0.55:
        data = twisted(rng, data)
    if rng.random() < 0.15 and isinstance(data, dict) and data:
        name = rng.choice(list(data))
        new = rng.choice(
            ["../x", "/etc/x", "a\0b", "", "\u202e", "x" * 2000, "model.layers.99.x", "model.layers.0.", "²"]
        )
        data = {new if key == name else key: value for key, value in data.items()}
    try:
        text = json.dumps(data).encode()
    except (RecursionError, ValueError):
        text = b"{}"
    action = rng.random()
    if action < 0.35:
        text = scrambled(rng, text)
    elif action < 0.42:
        text = rng.choice(
            [
                _nested(rng),
                b'{"a":' + _huge(rng) + b"}",
                text[:-1] + b"," + text[1:],
                text + b" " * rng.choice([1, 8, 5000]),
            ]
        )
    elif action < 0.425:
        text = json.dumps(
            {
                f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
                for i in range(rng.choice([1_000, 30_000]))
            }
        ).encode()
    length = (
        len(text)
        if rng.random() < 0.9
        else rng.choice([0, 1, 7, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1])
    )
    stored = size if rng.random() < 0.9 else rng.choice([0, 1, size - 1, size + 1, size + 4096])
    return struct.pack("<Q", length) + text + bytes(stored), layers


# ---- what is done with one


def _parents(folder: Path) -> tuple[Any, Any]:
    """(base, another model) that the spaces of search files are made over."""
    from evomerge.checkpoints import Checkpoint
    from tests.support.toy import llama

    return Checkpoint(llama(folder / "base", 0, layers=4)), Checkpoint(llama(folder / "other", 1, layers=4))


def _search(text: bytes, parents: tuple[Any, Any]) -> bool:
    from evomerge import _yaml
    from evomerge.config import loading
    from evomerge.launch import weight_space as weight_space_module

    document = _yaml.parse(_decoded(text), "search.yaml")
    settings = loading.check(document)
    settings.model_dump(mode="json")
    loading.override(settings, {"evaluations": 5, "seed": 1})
    if "\nstudy:" in "\n" + document.text:
        loading.rename(document.text, "other")
    weight_space_module.make_space(
        settings, {name: parents[name != settings.base] for name in settings.models}
    )
    return True


def _mergekit(text: bytes, parent: Any) -> bool:
    from evomerge import _yaml
    from evomerge.errors import RecipeError
    from evomerge.recipes import mergekit_yaml

    policy = "mergekit" if len(text) % 2 else "float32"
    recipe = mergekit_yaml.load(
        _yaml.parse_all(_decoded(text), "recipe.yaml"), lambda reference: 4, policy=policy
    )
    _same(recipe)
    try:
        again = mergekit_yaml.dump(recipe, {name: name for name in recipe.models})
    except RecipeError:
        return True  # not every recipe has a mergekit file
    _yaml.parse_all(again, "again.yaml")
    return True


def _recipe(text: bytes, parent: Any) -> bool:
    from evomerge.recipes import Recipe

    _same(Recipe.from_json(_decoded(text)))
    return True


def _same(recipe: Any) -> None:
    from evomerge.recipes import Recipe

    again = Recipe.from_json(recipe.canonical())
    if again != recipe or again.id != recipe.id:
        raise AssertionError("a recipe that was read is not the one that it writes")


def _folder(folder: Path) -> bool:
    from evomerge.checkpoints import Checkpoint

    opened = Checkpoint(folder)
    for name in opened.tensors:
        if tuple(opened.tensor(name).shape) != opened.tensors[name].shape:
            raise AssertionError(f"{name!r} has another shape than its header says")
        opened.layout.place(name)
    return True


def _decoded(text: bytes) -> str:
    """As a file is read: what is no UTF-8 is refused there."""
    from evomerge.errors import ConfigError

    try:
        return text.decode()
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8") from None


READS: dict[str, Callable[[bytes, Any], bool]] = {"search": _search, "mergekit": _mergekit, "recipe": _recipe}


def case(name: str, bases: dict[str, list[Any]], folder: Path, parent: Any) -> Callable[[], bool]:
    """Makes a case by its name, seed/kind/number; the call reads it."""
    from scripts.validation.fuzz_inputs import recipe, written

    kind, rng = name.split("/")[1], random.Random(name)
    if kind == "header":
        content, layers = _header(rng, rng.choice(bases["header"]))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))
        (folder / "model.safetensors").write_bytes(content)
        return lambda: _folder(folder)
    drawn = (
        [recipe(rng, ["base", "a", "b", "c"]) for _ in range(2)]
        if kind == "mergekit"
        else [rng.choice(bases[kind]) for _ in range(2)]
    )
    text = _text(rng, drawn[0], written(rng, drawn[1]))
    return lambda: READS[kind](text, parent)


def verdict(read: Callable[[], bool]) -> tuple[str, str]:
    """('read' | 'refused' | 'wrong', what happened)."""

    def work() -> tuple[str, str]:
        read()
        return "read", ""

    return pieces.judged(work, SECONDS, LONGEST)


def slice_(kind: str, first: int, count: int, seed: int, at: mmap.mmap | bytearray) -> dict[str, Any]:
    """Runs cases one after the other; at: is told the number of the one that runs."""
    pieces.watch()
    bases = _bases()
    ends = {"read": 0, "refused": 0, "wrong": 0}
    wrong, slowest = [], (0.0, "")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        parent = _parents(Path(scratch))
        for number in range(first, first + count):
            name = f"{seed}/{kind}/{number}"
            at[:8] = struct.pack("<Q", number + 1)
            read = case(name, bases, folder, parent)
            started = time.process_time()
            ended, said = verdict(read)
            slowest = max(slowest, (time.process_time() - started, name))
            ends[ended] += 1
            if ended == "wrong":
                wrong.append([name, said])
    return {"kind": kind, "first": first, "cases": count, **ends, "found": wrong, "slowest": slowest}


# ---- many of them


def run(folder: Path, counts: dict[str, int], seed: int, processes: int) -> dict[str, Any]:
    """Runs all cases that were not run yet, some thousands to a process; what each process found is kept in
    the folder.
    """
    every = []
    for kind, count in counts.items():
        for first in range(0, count, PIECE):
            size = min(PIECE, count - first)
            every.append((folder / f"{seed}-{kind}-{first}-{size}.json", kind, first, size))
    todo = [one for one in every if not one[0].is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(processes) as threads:
        for file, found in threads.map(lambda one: (one[0], _process(*one, seed)), todo):
            pieces.write(file, found)
            for name, said in found["found"]:
                print(f"{name}: {said}", flush=True)
    parts = [pieces.read(file) for file, *_ in every]
    return summed(parts) | {"code": sorted({part["code"] for part in parts})}


def _process(file: Path, kind: str, first: int, count: int, seed: int) -> dict[str, Any]:
    """A piece in a process of its own; a case that ends or stops the process is found wrong, and the rest
    goes on after it.
    """
    total: list[dict[str, Any]] = []
    end = first + count
    while first < end:
        with tempfile.NamedTemporaryFile() as place:
            place.write(bytes(8))
            place.flush()
            words = [
                sys.executable,
                "-m",
                "scripts.validation.soak_parts.inputs",
                kind,
                str(first),
                str(end - first),
                str(seed),
                place.name,
            ]
            process = subprocess.Popen(
                words, env=pieces.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            said, error, ended = _watched(process, Path(place.name))
            at = struct.unpack("<Q", Path(place.name).read_bytes()[:8])[0] - 1
        if process.returncode == 0:
            total.append(json.loads(said))
            break
        if at < first:
            raise SystemExit(f"the process for {kind} cases does not start:\n{error}")
        why = ended or f"the process ended with {process.returncode}: {error.strip().splitlines()[-1:]}"
        total.append(
            {
                "kind": kind,
                "first": first,
                "cases": at + 1 - first,
                "wrong": 1,
                "found": [[f"{seed}/{kind}/{at}", why]],
                "slowest": [0, ""],
            }
        )
        first = at + 1
    return summed(total) | {"kind": kind, "code": pieces.code()}


def _watched(process: subprocess.Popen[str], place: Path) -> tuple[str, str, str]:
    """(stdout, stderr, why it was killed) of a process that is killed where it stays at one case."""
    at, since = b"", time.monotonic()
    while True:
        try:
            said, error = process.communicate(timeout=2)
            return said, error, ""
        except subprocess.TimeoutExpired:
            now = place.read_bytes()[:8]
            if now != at:
                at, since = now, time.monotonic()
            elif time.monotonic() - since > WAIT:
                process.kill()
                said, error = process.communicate()
                return said, error, f"no end after {WAIT:g} seconds"


def summed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by kind of several processes."""
    kinds: dict[str, Any] = {}
    for part in parts:
        inner = part["kinds"].values() if "kinds" in part else [part]
        for one in inner:
            own = kinds.setdefault(
                one["kind"],
                {
                    "kind": one["kind"],
                    "cases": 0,
                    "read": 0,
                    "refused": 0,
                    "wrong": 0,
                    "found": [],
                    "slowest": [0.0, ""],
                },
            )
            for key in ("cases", "read", "refused", "wrong"):
                own[key] += one.get(key, 0)
            own["found"] += one["found"]
            own["slowest"] = max(own["slowest"], list(one["slowest"]))
    return {"kinds": kinds, "found": [f for k in kinds.values() for f in k["found"]]}


def lines(data: dict[str, Any]) -> Iterator[str]:
    """A table by kind."""
    yield "| input | cases | read | refused | wrong | slowest, CPU s |"
    yield "| --- | --- | --- | --- | --- | --- |"
    names = {
        "search": "search YAML",
        "mergekit": "mergekit YAML",
        "recipe": "recipe JSON",
        "header": "safetensors header",
    }
    for kind in KINDS:
        if own := data["kinds"].get(kind):
            yield (
                f"| {names[kind]} | {own['cases']:,} | {own['read']:,} | {own['refused']:,} | "
                f"{own['wrong']} | {own['slowest'][0]:.2f} |"
            )


def show(name: str) -> None:
    """One case by its name, with what it ends in."""
    pieces.watch()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        read = case(name, _bases(), folder, _parents(Path(scratch)))
        text = (read.__closure__ or ())[-1].cell_contents
        shown = text if isinstance(text, bytes) else (folder / "model.safetensors").read_bytes()[:4000]
        print(shown.decode(errors="replace"))
        try:
            read()
        except BaseException:
            traceback.print_exc()


if __name__ == "__main__":
    kind, first, count, seed, place = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(place, "r+b") as file:
        print(json.dumps(slice_(kind, int(first), int(count), int(seed), mmap.mmap(file.fileno(), 8))))
