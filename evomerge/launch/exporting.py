"""Candidates of a study -> exported folders: one, the leaders or the Pareto front, verified if asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from evomerge import reports
from evomerge._escaping import markdown
from evomerge.errors import ConfigError, NothingToExport, unwritable
from evomerge.export.candidate import export_candidate
from evomerge.export.stored_candidate import StoredCandidate
from evomerge.export.verification import Verification
from evomerge.launch.opening import Allowed, stored_parents
from evomerge.launch.verification import VerificationRequest, verify_export
from evomerge.merging import atomic_folder
from evomerge.merging.checkpoint_writer import Progress
from evomerge.store import Store, Trial

FRONT = "pareto"
"""Reference of a study's Pareto front."""


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What is exported of a candidate.

    Attributes:
        weights: Write the merged model too.
        environment: mergekit's virtual environment, to verify with; None verifies nothing.
        models: 'NAME=PATH' of models that have moved.
        allowed: What the tasks may do, where a folder is scored again.
    """

    weights: bool = False
    environment: Path | None = None
    models: Sequence[str] = ()
    allowed: Allowed | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """A candidate that was exported.

    Attributes:
        candidate: The candidate.
        directory: Its folder.
        warnings: What a publisher has to see to, each a sentence.
        verification: What was found as it was made again; None where nothing was verified.
    """

    candidate: StoredCandidate
    directory: Path
    warnings: tuple[str, ...]
    verification: Verification | None


def named_trials(store: Store, reference: str, top: int | None) -> tuple[list[Trial], bool]:
    """Looks up what is to be exported.

    Args:
        store: An open study.
        reference: As `reports.resolve` takes it, 'pareto', or '' with `top`.
        top: How many leaders; None for the one candidate that is named.

    Returns:
        (the candidates, whether they get folders of their own in the one that is made).

    Raises:
        ConfigError: Both or none of the two are given.
        StudyError: There is no such candidate.
        NothingToExport: There are none.
    """
    if top is not None:
        if reference:
            raise ConfigError(
                f"--top takes a study alone, got '{reference}' beside it; leave one of them out"
            )
        trials = reports.leaders(store, top)
    elif reference == FRONT:
        trials = [store.trial(int(row["id"])) for row in reports.front(store)["candidates"]]
    else:
        return [reports.resolve(store, reference)], False
    if not trials:
        raise NothingToExport("the study has no scored candidate yet; resume the search")
    return trials, True


def export_trials(
    store: Store,
    trials: Sequence[Trial],
    directory: Path,
    request: ExportRequest,
    *,
    several: bool = False,
    bar: Callable[[str], AbstractContextManager[Progress | None]] = lambda label: nullcontext(),
    note: Callable[[str], None] = lambda text: None,
) -> list[Exported]:
    """Exports candidates of a study.

    Args:
        store: The study's store.
        trials: The candidates.
        directory: Folder to make; of several, one that holds a folder for each, named by its number.
        request: What is written, and how it is verified.
        several: Whether each gets a folder of its own in it, with a table of all in its README.md.
        bar: Opens a progress bar with a label.
        note: Called with what is done next.

    Returns:
        What was written. Folders that were finished before an error stay.

    Raises:
        SetupError: If the folder exists.
        NothingToExport: If a candidate failed.
        StudyError: If a model is no longer what it was.
    """
    parents = stored_parents(store, request.models)
    atomic_folder.check_new(directory)
    found = []
    for trial in trials:
        target = directory / str(trial.id) if several else directory
        with bar("tensors") as progress:
            warnings = export_candidate(
                store, trial, parents, target, weights=request.weights, progress=progress
            )
        verification = None
        if request.environment is not None:
            verifying = VerificationRequest(request.environment, request.models, request.allowed)
            verification = verify_export(store, trial, parents, target, verifying, note)
        candidate = StoredCandidate.of(store, trial, parents)
        found.append(Exported(candidate, target, warnings, verification))
    if several:
        try:
            (directory / "README.md").write_text(_table(store, found), encoding="utf-8")
        except OSError as error:
            raise unwritable(directory, error) from None
    return found


def _table(store: Store, found: Sequence[Exported]) -> str:
    """The candidates beside one another, with what they scored on validation and test items."""
    study = found[0].candidate.study
    tasks = list(study.facts.tasks)
    lines = [f"# {study.name}: {len(found)} candidates", ""]
    lines.append(f"| folder | origin | items of | n | objective | {' | '.join(map(markdown, tasks))} |")
    lines.append("| --- " * (5 + len(tasks)) + "|")
    for one in found:
        trial = one.candidate.trial
        origin = f"{trial.origin} {trial.label}" if trial.label else trial.origin
        last = dict(store.evaluations(trial.recipe_id))
        for role in ("validation", "test"):
            if role not in last or last[role].score is None:
                continue
            evaluation = last[role].evaluation
            values = " | ".join(f"{evaluation.metrics.get(task, float('nan')):.4f}" for task in tasks)
            start = f"| [{trial.id}]({trial.id}/README.md) | {markdown(origin)} | {role}"
            lines.append(f"{start} | {len(evaluation.items)} | {last[role].score:.4f} | {values} |")
    lines += [
        "",
        "Whoever picks one by its test score has chosen on test items; validation items are for that.",
    ]
    return "\n".join(lines) + "\n"
