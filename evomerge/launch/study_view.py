"""A stored study, read-only: candidates, winner and recipes for a program or a notebook."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evomerge import reports
from evomerge.errors import StudyError
from evomerge.recipes import Recipe
from evomerge.store import Store, Trial, paths

_COLUMNS = ("search", "validation", "test")


class StudyView:
    """A study as its file holds it; reading needs no GPU, no Ray and no torch, also while the search runs.

        study = open_study("demo")
        print(study.status, study.best()["test"])
        study.candidates().plot.scatter("generation", "score")
        study.export("best", "out", weights=True)

    Each call opens the file and closes it again, so that it gives the newest rows and keeps no search out.
    """

    def __init__(self, path: Path) -> None:
        """A view of a file that exists.

        Args:
            path: The study's store, such as results/demo/study.db.
        """
        self.path = path

    @property
    def name(self) -> str:
        """The name of the study."""
        return str(self.summary()["study"])

    @property
    def status(self) -> str:
        """'running', 'interrupted' (running, but its process is gone), 'paused', 'failed' or 'done'."""
        return str(self.summary()["state"])

    def summary(self) -> dict[str, Any]:
        """State, counts, the best, parents and hand recipes, as `evomerge status --json` prints them."""
        with Store.open(self.path) as store:
            return reports.study_summary(store, check=False)

    def candidates(self) -> Any:
        """Every candidate in the order of ids: its origin, its scores, and a column for each task's metric.

        Returns:
            A pandas DataFrame with the ids as index where pandas is installed, else a list of dicts.
        """
        with Store.open(self.path) as store:
            rows = [_candidate_row(trial) for trial in store.trials()]
        return _table(rows)

    def best(self) -> dict[str, Any]:
        """The winner, or while the search runs the best candidate so far.

        Returns:
            Its id, origin, label and recipe id; 'search', 'validation' and 'test' scores as far as there are
            any.

        Raises:
            StudyError: If nothing is scored yet.
        """
        best = self.summary()["best"]
        if best is None:
            raise StudyError(f"{self.path} has no scored candidate yet")
        return dict(best)

    def pareto(self) -> Any:
        """The candidates that no other equals or betters in every task, on validation where there is any.

        Returns:
            A pandas DataFrame with the ids as index where pandas is installed, else a list of dicts.
        """
        with Store.open(self.path) as store:
            front = reports.front(store)["candidates"]
        return _table(
            [{**{k: v for k, v in row.items() if k != "metrics"}, **row["metrics"]} for row in front]
        )

    def recipe(self, candidate: int | str = "best") -> Recipe:
        """The recipe of a candidate.

        Args:
            candidate: Its number, 'best', or the label of a parent or hand recipe.

        Returns:
            The recipe, to merge with `evomerge.merge` or to write as JSON with `canonical()`.

        Raises:
            StudyError: If there is no such candidate.
        """
        with Store.open(self.path) as store:
            return store.recipe(reports.resolve(store, str(candidate)).recipe_id)

    def export(self, candidate: int | str, out: str | Path, *, weights: bool = False) -> Path:
        """Writes a candidate's mergekit recipe, model card and lineage, and its weights if asked.

        Args:
            candidate: Its number, 'best', or the label of a parent or hand recipe.
            out: Folder to make; it appears whole or not at all.
            weights: Write the merged model too.

        Returns:
            The folder.

        Raises:
            StudyError: If a parent is not the model that was searched with.
            NothingToExport: If the candidate failed.
            SetupError: If the folder exists.
        """
        from evomerge.export.candidate import export_candidate
        from evomerge.launch.opening import stored_parents

        with Store.open(self.path) as store:
            trial = reports.resolve(store, str(candidate))
            export_candidate(store, trial, stored_parents(store), Path(out), weights=weights)
        return Path(out)

    def __repr__(self) -> str:
        data = self.summary()
        return f"<study {data['study']}: {data['state']}, {data['evaluations']} evaluations, {self.path}>"

    def _repr_html_(self) -> str:
        """The table of the best, parents and hand recipes, for a notebook."""
        data = self.summary()
        rows = list(data["references"])
        if data["best"]:
            kind = "no winner" if data["alike"] else "best"
            rows.insert(0, data["best"] | {"label": f"{kind}: {data['best']['id']}"})
        head = "".join(f"<th>{text}</th>" for text in ("", *_COLUMNS))
        body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
        counts = f"{data['evaluations']} evaluations in {data['generations']} generations"
        title = html.escape(f"{data['study']}: {data['state']}, {counts}")
        return f"<p>{title}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def open_study(study: str | Path, *, root: str | Path | None = None) -> StudyView:
    """Opens a stored study to read.

    Args:
        study: Its name, or the path of its folder or file.
        root: Folder of the studies; None for $EVOMERGE_ROOT, else results.

    Returns:
        A view of it.

    Raises:
        StudyError: If there is no such study.
    """
    path = Path(study)
    if path.is_dir() and (path / paths.STORE).is_file():
        path = path / paths.STORE
    elif not path.is_file():
        path = paths.store_path(str(study), paths.root(None if root is None else Path(root)))
    return StudyView(path)


def _candidate_row(trial: Trial) -> dict[str, Any]:
    return {
        "id": trial.id,
        "generation": trial.generation,
        "slot": trial.slot,
        "stage": trial.stage,
        "island": trial.island,
        "origin": trial.origin,
        "label": trial.label,
        "recipe": trial.recipe_id,
        "score": trial.score,
        "reported": trial.reported,
        "error": trial.error,
        "dropped": trial.dropped,
        **trial.metrics,
    }


def _table(rows: list[dict[str, Any]]) -> Any:
    try:
        from pandas import DataFrame
    except ImportError:
        return rows
    make: Callable[..., Any] = DataFrame
    return make(rows).set_index("id") if rows else make(rows)


def _cells(row: Mapping[str, Any]) -> str:
    label = html.escape(str(row.get("label") or row["id"]))
    numbers = []
    for column in _COLUMNS:
        value = row.get(column)
        numbers.append("<td>–</td>" if value is None else f"<td>{value:.3f}</td>")
    return f"<td>{label}</td>" + "".join(numbers)
