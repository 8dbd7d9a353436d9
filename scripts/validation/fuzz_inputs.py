"""Random recipes, damaged recipe files and damaged model folders through merge_file; writes
results/fuzz_inputs.md.

Each case must end in a folder that opens as a whole checkpoint, or in one EvomergeError of one line that
names the file or the model and leaves nothing behind. A case is a function of its name, such as
0/document/17: --case runs it alone.

usage: python scripts/validation/fuzz_inputs.py [--recipes 300] [--documents 1000] [--folders 500] [--seed 0]
    [--out results/fuzz_inputs.md]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a damaged reference may look like a repository

import torch
import yaml
from safetensors.torch import save_file

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint, locate, open_parent
from evomerge.errors import EvomergeError
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.methods import METHODS, Method, Param
from tests.support.tiny_models import LAYERS, build

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 20  # a case that takes longer hangs
FILTERS = ("self_attn", "mlp", "norm", "q_proj", "embed_tokens", "lm_head", "layers.1.", "*", "nothing")
ODD: tuple[Any, ...] = (  # values that a reader may not expect
    *(None, True, False, 0, 1, -1, 7, 10**18, 10**400, 0.5, -0.5, 1e308, 1e-320, float("inf"), float("nan")),
    *(
        "",
        " ",
        "no",
        "1e-5",
        "4",
        "a\nb",
        "\u2028",
        "\x00",
        "é",
        "²",
        "*",
        "+",
        "@",
        "..",
        "/",
        "~",
        "~nobody/x",
        "base",
        "a" * 3000,
    ),
    *([], {}, [[]], [{}], [None], [[4]], {"": 1}, {"filter": "mlp"}, {"value": 1}, [1, {"value": 2}]),
    *([{"filter": 3, "value": 1}], [{"value": [0.1, "x"]}], [{"filter": "mlp", "value": 0.5}]),
)
TEXTS = (  # what YAML and JSON give a meaning to
    *(
        "*a ",
        "&a ",
        "<<: ",
        "!!python/object:os.system ",
        "!!binary ",
        "- ",
        ": ",
        "{",
        "}",
        "[",
        "]",
        "#",
        "'",
        '"',
        "|\n",
        "\t",
        "\n",
        "\0",
    ),
    *(
        "---\n",
        "%TAG ! x\n",
        "\ufeff",
        "\x85",
        "\U0001f600",
        "0x1F",
        "1_0",
        "0100",
        "2026-01-01",
        ".nan",
        ".inf",
        "9" * 5000,
        "[" * 40,
        "? ",
    ),
    "merge_method: ties\n",
)


class Hang(BaseException):
    """A case took too long; no handler of the library's may take it for its own."""


@dataclass(frozen=True)
class Case:
    """A recipe file and the models that it names. open: a reference that is opened and read whole as well."""

    file: Path
    models: list[Path]
    open: str | None = None


# ---- recipes


def number(rng: random.Random, param: Param) -> Any:
    if param.flag:
        return rng.random() < 0.5
    return (
        rng.choice([param.low, param.high, param.default])
        if rng.random() < 0.2
        else round(rng.uniform(param.low, param.high), 3)
    )


def value(rng: random.Random, param: Param) -> Any:
    """A number, a gradient, or a filter list with a catch-all."""
    kind = rng.random()
    if kind < 0.5:
        return number(rng, param)
    if kind < 0.7:
        return [number(rng, param) for _ in range(rng.randint(1, 5))]
    cases = [{"filter": f, "value": number(rng, param)} for f in rng.sample(FILTERS, rng.randint(0, 3))]
    return [*cases, {"value": number(rng, param)}]


def parameters(
    rng: random.Random, rule: Method, per: tuple[str, ...], *, required: bool = False
) -> dict[str, Any]:
    chosen = [p for p in rule.params if p.per in per and (rng.random() < 0.6 or (required and p.required))]
    return {"parameters": {p.name: value(rng, p) for p in chosen}} if chosen else {}


def recipe(rng: random.Random, models: list[str]) -> dict[str, Any]:
    """What a user may write: a random method, models or slices, numbers within the method's useful bounds."""
    rule = METHODS[rng.choice(sorted(METHODS))]
    base, *others = rng.sample(models, len(models))
    least, most = rule.models
    count = rng.randint(least, min(most, len(others)))
    data: dict[str, Any] = {"merge_method": rule.name}
    sources = others[:count]
    if rule.needs_base or rng.random() < 0.7:
        base = (
            base if rule.needs_base or rule.takes_base else rng.choice(sources)
        )  # mergekit takes any other base for one more model
        data["base_model"] = base
    if rng.random() < 0.5:
        data["models"] = [{"model": m} | parameters(rng, rule, ("model",)) for m in sources]
    else:
        data["slices"] = []
        for _ in range(rng.randint(1, 3)):
            first = rng.randrange(LAYERS)
            span = [first, rng.randint(first + 1, LAYERS)]
            names = [*sources, base] if base in data.values() and base not in sources else sources
            part = [
                {"model": m, "layer_range": span}
                | ({} if m not in sources else parameters(rng, rule, ("model",)))
                for m in names
            ]
            data["slices"].append({"sources": part} | parameters(rng, rule, ("model", "merge")))
    data |= parameters(rng, rule, ("model", "merge"), required=True)
    for key, words in (("dtype", ("float32", "bfloat16", "float16")), ("out_dtype", ("float32", "bfloat16"))):
        if rng.random() < 0.6:
            data[key] = rng.choice(words)
    return data


def written(rng: random.Random, data: Any) -> bytes:
    """YAML in one of its layouts, without anchors."""
    return yaml.dump(
        data,
        Dumper=_Plain,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=rng.choice([None, False, True]),
    ).encode()


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


# ---- damage


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Key path of every value in nested mappings and lists."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, child in list(entries):
        yield (*path, key)
        yield from places(child, (*path, key))


def twisted(rng: random.Random, data: Any) -> Any:
    """A copy with one or two values or keys replaced, removed, moved or repeated."""
    data = copy.deepcopy(data)
    for _ in range(rng.randint(1, 2)):
        found = list(places(data))
        if not found:
            return rng.choice(ODD)
        *path, last = rng.choice(found)
        owner = data
        for key in path:
            owner = owner[key]
        action = rng.random()
        if type(owner[last]) in (int, float) and action < 0.6:
            owner[last] = rng.choice([0, 1, -1, 2, 4, 0.25, 1.5, 100, 1e-5, True])
        elif action < 0.5:
            owner[last] = copy.deepcopy(rng.choice(ODD))
        elif action < 0.65:
            del owner[last]
        elif action < 0.75 and isinstance(owner, dict):
            owner[rng.choice(["x", "weight", "model", "", "dtype", 3])] = owner.pop(last)
        elif action < 0.85 and isinstance(owner, list):
            owner.extend([copy.deepcopy(owner[last])] * rng.choice([1, 2, 50]))
        else:
            *other, _ = rng.choice(found)
            owner[last] = [owner[last]] if not other else {"value": owner[last]}
    return data


def scrambled(rng: random.Random, text: bytes) -> bytes:
    """A copy with one or two bytes, stretches or lines changed."""
    out = bytearray(text)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice([1, 1, 3, 20, 200]))
        action = rng.randrange(6)
        if action == 0:
            out[at:end] = b""
        elif action == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif action == 2:
            out[at:at] = rng.choice(TEXTS).encode()
        elif action == 3:
            out[at:at] = out[at:end] * rng.choice([1, 1, 30])
        elif action == 4:
            del out[at:]
        else:
            out[at:end] = rng.choice(TEXTS).encode()
    return bytes(out)


def damage_weights(rng: random.Random, file: Path) -> None:
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    action = rng.randrange(4)
    if action == 0:
        text = dump(twisted(rng, json.loads(raw[8:end])))
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[end:])
    elif action == 1:
        text = scrambled(rng, raw[8:end])
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[end:])
    elif action == 2:
        length = rng.choice([0, 1, end - 9, end - 7, len(raw), 2**31, 2**63, 2**64 - 1])
        file.write_bytes(struct.pack("<Q", length) + raw[8:])
    else:  # weights that are not numbers, files that end early or late
        at = rng.randrange(end, len(raw) - 8)
        file.write_bytes(
            rng.choice(
                [raw[: rng.randrange(len(raw))], raw + b"\0" * 8, raw[:at] + b"\xff" * 8 + raw[at + 8 :]]
            )
        )


def dump(data: Any) -> bytes:
    return json.dumps(data).encode()


def damage_json(rng: random.Random, file: Path) -> None:
    text = file.read_bytes()
    try:
        file.write_bytes(dump(twisted(rng, json.loads(text))) if rng.random() < 0.7 else scrambled(rng, text))
    except RecursionError:
        file.write_bytes(b"[" * 5000)


def shard(folder: Path) -> None:
    tensors = {
        name: tensor.clone()
        for name, tensor in ((n, Checkpoint(folder).tensor(n)) for n in Checkpoint(folder).tensors)
    }
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(where.values())):
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_bytes(dump({"weight_map": where}))


def make_adapter(folder: Path) -> None:
    folder.mkdir()
    tensors = {}
    for module, rows, columns in (
        ("model.layers.1.self_attn.q_proj", 32, 32),
        ("model.layers.2.mlp.up_proj", 48, 32),
    ):
        tensors |= {f"base_model.model.{module}.lora_A.weight": torch.full((2, columns), 0.01)}
        tensors |= {f"base_model.model.{module}.lora_B.weight": torch.full((rows, 2), 0.02)}
    tensors |= {"base_model.model.lm_head.weight": torch.zeros(64, 32)}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": ["lm_head"],
    }
    (folder / "adapter_config.json").write_bytes(
        dump(settings | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}})
    )


# ---- cases


def make(kind: str, rng: random.Random, folder: Path, models: list[Path]) -> Case:
    """The case of that kind, written under an empty folder."""
    file = folder / "recipe.yaml"
    data = recipe(rng, [str(m) for m in models])
    if kind == "recipe":
        file.write_bytes(written(rng, data))
    elif kind == "document":
        file.write_bytes(
            written(rng, twisted(rng, data)) if rng.random() < 0.5 else scrambled(rng, written(rng, data))
        )
    else:
        broken = folder / "broken"
        reference = str(broken)
        if rng.random() < 0.25:
            make_adapter(broken)
            reference = f"{models[0]}+{broken}"
        else:
            shutil.copytree(models[1], broken)
            if rng.random() < 0.3:
                shard(broken)
        chosen = rng.choice(
            [
                f
                for f in sorted(broken.iterdir())
                if f.suffix == ".safetensors" or f.name.endswith(("config.json", "index.json"))
            ]
        )
        damage_json(rng, chosen) if chosen.suffix == ".json" else damage_weights(rng, chosen)
        entry = [
            {"model": reference, "parameters": {"weight": 0.5}},
            {"model": str(models[2]), "parameters": {"weight": 0.5}},
        ]
        base = rng.choice([str(models[0]), reference])
        given = {
            "merge_method": "task_arithmetic" if base == str(models[0]) else "linear",
            "base_model": base,
            "models": entry,
        }
        file.write_bytes(written(rng, given))
        return Case(file, [*models, broken], reference)
    return Case(file, models)


def quoted(file: Path) -> list[str]:
    """The model references of a recipe file, as far as it can be read."""
    try:
        data = _yaml.read(file).data
    except EvomergeError:
        return []
    found = []
    for path in places(data):
        here = data
        for key in path:
            here = here[key]
        if path[-1] in ("model", "base_model") and isinstance(here, str):
            found.append(here)
    return found


def folder_of(reference: str) -> str:
    """What locate makes of a reference, as far as there is such a folder."""
    try:
        return str(locate(reference))
    except EvomergeError:
        return ascii(reference)


def verdict(case: Case, folder: Path) -> tuple[str, str]:
    """('merged' | 'refused' | 'wrong', what happened)."""
    out = folder / "out" / "merged"
    out.parent.mkdir()
    ended, said = attempt(lambda: merge_recipe_file(case.file, out))
    left = sorted(path.name for path in out.parent.iterdir())
    if ended == "refused":
        named = quoted(case.file)
        names = [
            str(case.file),
            *(str(m) for m in case.models),
            *(f"'{r[:60]}" for r in named),
            *(folder_of(r) for r in named),
        ]
        if not said or "\n" in said or "\r" in said:
            return "wrong", f"an error of more than one line: {said!r}"
        if not any(name in said for name in names):
            return "wrong", f"an error that names neither file nor model: {said}"
        if left:
            return "wrong", f"refused, and left {left} behind: {said}"
    elif ended == "merged":
        whole, why = attempt(lambda: read(Checkpoint(out)))
        if left != ["merged"] or whole != "merged":
            return "wrong", f"merged, but left {left}: {why}"
    if case.open and ended != "wrong":
        opened, why = attempt(lambda: read(open_parent(str(case.open))))
        if opened == "wrong" or "\n" in why:
            return "wrong", why
    return ended, said


def read(parent: Any) -> None:
    parent.content_hash()
    for name in parent.tensors:
        parent.tensor(name)
        parent.layout.place(name)


def attempt(call: Callable[[], None]) -> tuple[str, str]:
    try:
        signal.alarm(SECONDS)
        call()
        return "merged", ""
    except EvomergeError as error:
        return "refused", str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # anything else is what this program looks for
        last = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in last if "evomerge" in Path(frame.filename).parts] or last
        return (
            "wrong",
            f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].name}): "
            f"{str(error)[:200]}",
        )
    finally:
        signal.alarm(0)


def run(name: str, models: list[Path], scratch: Path, *, show: bool = False) -> tuple[str, str]:
    """One case by its name, seed/kind/number."""
    folder = scratch / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    case = make(name.split("/")[1], random.Random(name), folder, models)
    if show:
        print(case.file.read_bytes().decode(errors="replace"))
    return verdict(case, folder)


def hang(*_: object) -> None:
    raise Hang(f"no end after {SECONDS} seconds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    counts = {"recipe": 300, "document": 1000, "folder": 500}
    for kind, count in counts.items():
        parser.add_argument(f"--{kind}s", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(REPOSITORY / "results" / "fuzz_inputs.md"))
    parser.add_argument("--case", help="one case by its name, shown whole")
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, hang)
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.chdir(scratch)
    try:
        models = list(build(scratch / "models", torch.bfloat16).values())
        if args.case:
            print(*run(args.case, models, scratch, show=True), sep=": ")
            return
        ends: Counter[tuple[str, str]] = Counter()
        wrong: list[tuple[str, str]] = []
        rows = []
        for kind in counts:
            total, start = getattr(args, f"{kind}s"), time.process_time()
            for number in range(total):
                name = f"{args.seed}/{kind}/{number}"
                ended, said = run(name, models, scratch)
                ends[kind, ended] += 1
                if ended == "wrong":
                    wrong.append((name, said.replace(str(scratch), "…")))
                    print(*wrong[-1], sep=": ", flush=True)
            rate = total / max(time.process_time() - start, 1e-9)
            rows.append(
                f"| {kind}s | {total} | {ends[kind, 'merged']} | {ends[kind, 'refused']} | "
                f"{ends[kind, 'wrong']} | {rate:.0f} |"
            )
    finally:
        os.chdir(REPOSITORY)
        shutil.rmtree(scratch, ignore_errors=True)
    lines = [
        "# Random and damaged input",
        "",
        f"Written by `python scripts/validation/fuzz_inputs.py --seed {args.seed}`: recipes in the bounds "
        "of their methods, recipe files with",
        "values or bytes changed, and model or adapter folders with a damaged file. Refused: one "
        "EvomergeError of one line that names",
        "the file or the model, nothing left behind. Wrong: anything else that is not a whole checkpoint.",
        "",
        "| | cases | merged | refused | wrong | per CPU second |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        *(["", *(f"- `{name}` {said}" for name, said in wrong)] if wrong else []),
    ]
    Path(args.out).write_text("\n".join(lines) + "\n")
    print("\n".join(lines[6:9] + rows))
    if wrong:
        sys.exit(f"{len(wrong)} cases went wrong; run one again with --case NAME --seed {args.seed}")


if __name__ == "__main__":
    main()
