"""Verbs that begin a search file: init, schema."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.cli.output import note, put, write_text
from evomerge.errors import ConfigError

if TYPE_CHECKING:
    from evomerge.launch.new_search.job_files import JobFile
    from evomerge.launch.new_search.requested import Requested
    from evomerge.launch.new_search.write import NewSearch

Model = Annotated[
    list[str] | None,
    typer.Option(
        "--model", "-m", metavar="[NAME=]PATH", help="A parent: folder, GGUF file or Hub repository."
    ),
]
Base = Annotated[
    str | None, typer.Option("--base", metavar="NAME|PATH", help="The base; found unless given.")
]
Task = Annotated[
    list[str] | None,
    typer.Option("--task", "-t", metavar="TASK[:METRIC][=WEIGHT]", help="A task, group or tag of lm-eval."),
]
Include = Annotated[
    list[str] | None, typer.Option("--include", metavar="FOLDER", help="Folder of your own task files.")
]
MergeMethod = Annotated[str | None, typer.Option("--method", help="Merge method; proposed unless given.")]
Evaluations = Annotated[
    int | None,
    typer.Option("--evaluations", min=1, max=10**9, help="Budget of candidates.", show_default="500"),
]
GpuHours = Annotated[
    float | None,
    typer.Option("--gpu-hours", min=0.001, help="Hours of GPUs after which the search ends early."),
]
StudyName = Annotated[
    str | None, typer.Option("--study", help="Name of the study; made of the models' unless given.")
]
FromEvolve = Annotated[
    Path | None,
    typer.Option("--from-mergekit-evolve", metavar="FILE", help="Begin with a file of mergekit-evolve."),
]
FromRecipe = Annotated[
    Path | None,
    typer.Option(
        "--from-mergekit", metavar="RECIPE", help="Begin with a recipe, which is also to be beaten."
    ),
]
Slurm = Annotated[bool, typer.Option("--slurm", help="Write the job for SLURM too.")]
RayJob = Annotated[bool, typer.Option("--ray", help="Write the job for a Ray cluster that runs too.")]
KubeRay = Annotated[bool, typer.Option("--kuberay", help="Write the job for Kubernetes with KubeRay too.")]
Nodes = Annotated[int, typer.Option("--nodes", min=1, max=10_000, help="Nodes of the cluster's job.")]
GpusPerNode = Annotated[int, typer.Option("--gpus-per-node", min=1, max=64, help="GPUs of each node.")]
Gpus = Annotated[
    float | None, typer.Option("--gpus", min=0, max=64, help="GPUs of each worker: 1 unless given.")
]
Workers = Annotated[int | None, typer.Option("--workers", min=1, max=100_000, help="Number of workers.")]
JobRoot = Annotated[str | None, typer.Option("--root", help="Folder of the studies, for the cluster's job.")]
Unread = Annotated[bool, typer.Option("--unread", help="Write the file though the models are not here yet.")]
Force = Annotated[bool, typer.Option("--force", help="Write over files of these names.")]


def init(
    file: Annotated[Path, typer.Argument(help="Search file to write.")] = Path("search.yaml"),
    model: Model = None,
    base: Base = None,
    task: Task = None,
    include: Include = None,
    method: MergeMethod = None,
    evaluations: Evaluations = None,
    gpu_hours: GpuHours = None,
    study: StudyName = None,
    from_evolve: FromEvolve = None,
    from_recipe: FromRecipe = None,
    slurm: Slurm = False,
    ray: RayJob = False,
    kuberay: KubeRay = False,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 8,
    gpus: Gpus = None,
    workers: Workers = None,
    root: JobRoot = None,
    unread: Unread = False,
    force: Force = False,
) -> None:
    """Write a search file with a reason at every choice.

    Asks for what is not given, on a terminal. Reads the models' headers and a sample of their weights, and
    proposes base, method, layer groups, bounds and items.
    """
    from evomerge.launch.new_search.requested import Requested, wishes_of
    from evomerge.launch.new_search.write import write_search

    given = (method, evaluations, gpu_hours, study, gpus, workers, from_evolve, from_recipe)
    requested = Requested(tuple(model or ()), base, tuple(task or ()), tuple(include or ()), *given)
    requested, kinds = _asked(requested, _kinds(slurm, ray, kuberay))
    jobs = _jobs(kinds, nodes, gpus_per_node, root)
    wishes = wishes_of(requested)
    search, files = write_search(wishes, file, jobs=jobs, unread=unread, overwrite=force, show=note)
    put("\n".join(_summary(search, jobs, files)))


def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it here instead.")
    ] = None,
) -> None:
    """Print the JSON Schema of the search file, for editors."""
    from evomerge.config import json_schema

    text = json.dumps(json_schema.schema(), indent=1, ensure_ascii=False)
    if output is None:
        put(text)
        return
    write_text(output, text + "\n")
    put(f"{output}: the JSON Schema of the search file")
    put(f"for editors, the first line of a search file: # yaml-language-server: $schema={output.name}")


def _asked(requested: Requested, kinds: tuple[str, ...]) -> tuple[Requested, tuple[str, ...]]:
    """The flags with answers where something is missing. Raises ConfigError where nobody can be asked."""
    missing = requested.missing
    if not missing:
        return requested, kinds
    if not _is_terminal():
        raise ConfigError(
            f"init needs {' and '.join(missing)}, and asks for them on a terminal only; see "
            "evomerge init --help"
        )
    from evomerge.cli import init_questions

    return init_questions.ask(requested, kinds)


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _kinds(slurm: bool, ray: bool, kuberay: bool) -> tuple[str, ...]:
    return tuple(kind for kind, asked in (("slurm", slurm), ("ray", ray), ("kuberay", kuberay)) if asked)


def _jobs(kinds: Sequence[str], nodes: int, gpus: int, root: str | None) -> list[JobFile]:
    from evomerge.launch.new_search.job_files import JobFile

    return [JobFile(kind, nodes, gpus, root) for kind in kinds]  # type: ignore[arg-type]


def _summary(search: NewSearch, jobs: Sequence[JobFile], files: Sequence[Path]) -> list[str]:
    """What was found, what was written, what to do next."""
    from evomerge.launch.new_search.proposal import describe

    lines: list[str] = []
    survey = search.survey
    if survey is not None:
        for name, model in survey.models.items():
            mark = " (base)" if name == survey.base else ""
            lines.append(f"  {name}{mark}: {describe(model, survey.distances.get(name))}")
        lines += [f"warning: {warning}" for warning in survey.warnings]
    lines += [f"not carried over: {note}" for note in search.notes]
    document = search.draft.document
    groups = document["space"]["groups"]
    count = len(groups) if isinstance(groups, list) else groups
    lines += [
        "",
        f"{search.file}: {document['method']}, {count} layer group{'s' if count > 1 else ''}, "
        f"{document['search']['evaluations']} evaluations of {document['evaluation']['items']} items a task",
        *(f"{path}: written" for path in files[1:]),
        "",
        f"check it:  evomerge plan {search.file}",
        f"start it:  evomerge run {search.file} --resume",
        *(f"   or as a job: {job.command(search.file)}" for job in jobs),
    ]
    return lines
