"""Exports a study's best route with weights and checks it in a fresh process, against mergekit and against
lm-eval's command line.

usage: python scripts/validation/route_export.py STUDY [--candidate ID] [--root results] [--include
    evaluators]   (needs scripts/make_mergekit_env)

Prints a report in Markdown; the exit code is 1 if anything does not agree. The study's tasks must have
declared splits: lm-eval scores the test documents, and the items that the study tested are compared one by
one.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from evomerge.checkpoints import Checkpoint, stored_dtype
from evomerge.errors import EvomergeError
from evomerge.evaluation import Evaluation
from evomerge.export import reload_check, route_checkpoint, route_mergekit
from evomerge.merging import mergekit_check, model_loading
from evomerge.recipes import Recipe
from evomerge.store import Store, paths
from scripts.validation import lm_eval_command

REPOSITORY = Path(__file__).resolve().parents[2]
MERGEKIT = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV", REPOSITORY / ".venv-mergekit"))


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def reloading(ours: Path) -> list[str]:
    """What the export itself found: it loads the folder in a fresh process and leaves nothing if it
    disagrees.
    """
    said = re.search(r"Loaded in a process of its own.*", (ours / "README.md").read_text())
    if said is None:
        sys.exit(f"{ours} is no route; use scripts/validation/mergekit_export.py")
    return ["## In a fresh process", "", said[0]]


def mergekit(ours: Path, scratch: Path) -> tuple[list[str], bool]:
    """Tensors and logits of what mergekit makes of the YAML; whether they agree."""
    lines = ["## mergekit 0.1.5 on the exported recipe.yaml", ""]
    if not (ours / "recipe.yaml").is_file():
        said = re.search(r"No mergekit file.*", (ours / "README.md").read_text())
        return [*lines, said[0] if said else "No mergekit file."], True
    theirs = scratch / "mergekit"
    try:
        program = mergekit_check.find_program(ours / "recipe.yaml", MERGEKIT)
        mergekit_check.run_mergekit(program, ours / "recipe.yaml", theirs, in_own_folder=True)
    except EvomergeError as error:
        return [*lines, str(error)], False
    tensors = route_mergekit.compare_checkpoints(ours, theirs)
    if tensors.only:
        return [*lines, f"{tensors}."], False
    dtype = stored_dtype(Checkpoint(ours))
    one, other = (model_loading.load_model(path, dtype).model for path in (ours, theirs))
    asked = reload_check.check_inputs(one)
    apart = route_checkpoint.compare_outputs(
        reload_check.check_outputs(one, asked), reload_check.check_outputs(other, asked)
    )
    return [*lines, f"{tensors}.", "", f"{str(apart).capitalize()}."], max(apart.logits, apart.steps) <= (
        1e-4 if dtype == "float32" else 0.1
    )


def command_line(ours: Path, scratch: Path, stored: Evaluation, include: str) -> tuple[list[str], bool]:
    """lm-eval's value of every item that the live route was tested on, beside the stored one; whether all are
    equal.
    """
    tasks = sorted({item.task for item in stored.items})
    out = scratch / "lm_eval"
    lm_eval_command.run(ours, stored_dtype(Checkpoint(ours)), tasks, Path(include), out, batch_size=256)
    lines = [
        "## lm_eval on the checkpoint",
        "",
        "| task | items | stored test score | lm_eval on the same items | items that differ |",
        "| --- " * 5 + "|",
    ]
    differ = 0
    for task in tasks:
        own = {item.item: item.value for item in stored.items if item.task == task}
        found = lm_eval_command.values(out, task)
        if own.keys() - found.keys():
            sys.exit(
                f"lm_eval does not score {len(own.keys() - found.keys())} of the {len(own)} test items of "
                f"{task}"
            )
        wrong = sum(value != found[item] for item, value in own.items())
        means = [sum(values) / len(own) for values in (own.values(), [found[item] for item in own])]
        lines.append(f"| {task} | {len(own)} | {means[0]:.6f} | {means[1]:.6f} | {wrong} |")
        differ += wrong
    return lines, differ == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study")
    parser.add_argument("--candidate", default="best")
    parser.add_argument("--root", default="results")
    parser.add_argument("--include", default="evaluators")
    args = parser.parse_args()
    which = f"{args.study}/{args.candidate}"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        ours = scratch / "ours"
        run("evomerge", "export", which, str(ours), "--weights", "--root", args.root)
        recipe = Recipe.from_json((ours / "recipe.json").read_text())
        with Store.open(paths.store_path(args.study, Path(args.root))) as store:
            tested = next(
                (scored.evaluation for role, scored in store.evaluations(recipe.id) if role == "test"), None
            )
        if tested is None:
            sys.exit(f"{which} was not scored on test items; choose a finalist")
        scales = "with scales" if recipe.scales else "without scales"
        depth = (
            f"{len(recipe.layers)} layers of {', '.join(recipe.models)}, {scales}, {len(recipe.stages)} "
            "merges before it"
        )
        fresh = reloading(ours)
        made, same = mergekit(ours, scratch)
        scored, equal = command_line(ours, scratch, tested, args.include)
    print(
        "\n".join(
            [
                f"# Export of the route {which}, checked",
                "",
                f"Written by `python scripts/validation/route_export.py {args.study}`: {depth}.",
                "",
                *fresh,
                "",
                *made,
                "",
                *scored,
            ]
        )
    )
    if not (same and equal):
        sys.exit(1)


if __name__ == "__main__":
    main()
