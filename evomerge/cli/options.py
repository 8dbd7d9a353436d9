"""What the verbs share: options, references to candidates, and the store of a study."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from evomerge.errors import ConfigError

if TYPE_CHECKING:
    from evomerge.config import Config
    from evomerge.launch.opening import Allowed
    from evomerge.store import Store


Root = Annotated[
    Path | None,
    typer.Option("--root", help="Folder of the studies.", show_default="$EVOMERGE_ROOT or results"),
]
AllowPython = Annotated[
    bool,
    typer.Option(
        "--allow-python",
        help="Run the Python functions that the search names as tasks, with all your rights.",
    ),
]
AllowTasks = Annotated[
    bool,
    typer.Option(
        "--allow-tasks",
        help="Load the task folders that the search includes; "
        "a task file is code and runs with all your rights.",
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution",
        help="Run the programs that models write, where a task scores them so, in child processes "
        "with limits; they read what you read.",
    ),
]
AllowNotify = Annotated[
    bool,
    typer.Option(
        "--allow-notify",
        help="Run the commands and call the addresses that the search names under notify.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=100_000,
        envvar="EVOMERGE_WORKERS",
        help="Processes that evaluate candidates, each with a model.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="local|auto|ADDRESS",
        help="Evaluate on a Ray cluster: one started here, this one, or that one.",
    ),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus",
        min=0,
        max=64,
        help="GPUs of each Ray worker: 1 if there are any; a fraction lets several use one, "
        "2, 4, ... spread the models over so many.",
    ),
]
Grace = Annotated[
    float | None,
    typer.Option(
        "--grace",
        min=0,
        help="Seconds that evaluations in flight have to end after a signal.",
        show_default="600",
    ),
]
Reuse = Annotated[
    list[str] | None,
    typer.Option(
        "--reuse",
        metavar="STUDY",
        help="An earlier study whose evaluations are read where they are the same.",
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--models",
        metavar="NAME=PATH",
        help="Where a model is now; it is known by its content.",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress; print the verdict, warnings and errors.")
]
JsonLines = Annotated[
    bool, typer.Option("--json", help="Print a line of JSON for each event and, at the end, the summary.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where a search runs and what its tasks may do: the options that `run` and `resume` share.

    Attributes:
        allow_python: Run the Python functions that the search names as tasks.
        allow_tasks: Load task folders that are not evomerge's own.
        allow_code: Run the programs that models write, in child processes.
        allow_notify: Run the commands and call the addresses under notify.
        workers: Processes of this machine, or of the Ray cluster, that evaluate candidates.
        ray: 'local', 'auto' or the address of a Ray cluster.
        gpus: GPUs of each Ray worker: 0 to 1, or a whole number.
        grace: Seconds that evaluations in flight have to end after a signal.
        reuse: Names or paths of earlier studies whose evaluations are read.
        models: 'NAME=PATH' of models that are elsewhere than the search file says.
        root: Folder of the studies.
        quiet: Show no progress.
        as_json: Print a line of JSON for each event.
    """

    allow_python: AllowPython = False
    allow_tasks: AllowTasks = False
    allow_code: AllowCode = False
    allow_notify: AllowNotify = False
    workers: Workers = None
    ray: Ray = None
    gpus: Gpus = None
    grace: Grace = None
    reuse: Reuse = None
    models: Models = None
    root: Root = None
    quiet: Quiet = False
    as_json: JsonLines = False

    @property
    def allowed(self) -> Allowed:
        """What the tasks may do."""
        return allowed(self.allow_python, self.allow_tasks, self.allow_code, self.allow_notify)

    def apply_to(self, settings: Config) -> Config:
        """The settings with what these options say of where the search runs.

        Args:
            settings: The settings of the search file.

        Returns:
            The same search, to be run elsewhere.

        Raises:
            ConfigError: For GPUs of Ray workers without Ray.
        """
        from evomerge.config import loading, locations

        places = locations.given_models(self.models or (), settings.models)
        placed = loading.placed(
            locations.with_models(settings, places),
            ray=self.ray,
            workers=self.workers,
            gpus=self.gpus,
            grace=self.grace,
            reuse=self.reuse,
        )
        if self.gpus is not None and self.gpus <= 1 and placed.cluster.ray is None:
            raise ConfigError(
                "--gpus shares the GPUs of a Ray cluster among its workers; add --ray, or leave it out"
            )
        return placed


def takes_run_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Spells the fields of the verb's parameter `options: RunOptions` out as options of the command line.

    Args:
        verb: A function with a parameter `options`.

    Returns:
        A function of the same name and help whose signature has one parameter for each field instead.
    """
    hints = get_type_hints(RunOptions, include_extras=True)
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(RunOptions)
    ]
    parameters = inspect.signature(verb, eval_str=True).parameters.values()
    signature = inspect.Signature([*(p for p in parameters if p.name != "options"), *shared])

    @functools.wraps(verb)
    def command(**values: Any) -> None:
        options = RunOptions(**{f.name: values.pop(f.name) for f in fields(RunOptions)})
        verb(**values, options=options)

    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command


def open_store(study: str, root: Path | None, *, write: bool = False) -> Store:
    """Opens the store of a study.

    Args:
        study: The name of the study.
        root: Folder of the studies; None for the default.
        write: Whether to open it for writing.

    Returns:
        The open store, a context manager.

    Raises:
        StudyError: If there is no study of that name, or, to write, if another process writes it.
    """
    from evomerge.store import Store
    from evomerge.store.paths import root as studies_root
    from evomerge.store.paths import store_path

    return Store.open(store_path(study, studies_root(root)), write=write)


@contextmanager
def reading_store(study: str, root: Path | None) -> Iterator[Store]:
    """Opens the store of a study to read, and to say what was read.

    Args:
        study: The name of the study.
        root: Folder of the studies; None for the default.

    Yields:
        The open store; values in it that cannot be said, such as a text in the place of a number, are damage.

    Raises:
        StudyError: If there is no study of that name, or it is damaged.
    """
    with open_store(study, root) as store, store.reading():
        yield store


def allowed(python: bool, tasks: bool, code: bool, notify: bool = False) -> Allowed:
    """What the options let the tasks do.

    Args:
        python: --allow-python.
        tasks: --allow-tasks.
        code: --allow-code-execution.
        notify: --allow-notify.

    Returns:
        The permissions as `evomerge.launch` takes them.
    """
    from evomerge.launch.opening import Allowed

    return Allowed(python, tasks, code, notify)
