"""Reads a search file: one YAML document, checked key by key.

An error names file, line, column and the nearest right key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from evomerge import _resources, _yaml
from evomerge.config import checks, messages
from evomerge.config.locations import located
from evomerge.config.renamed_keys import lift_license, rename_keys
from evomerge.config.schema import STUDY_NAME, ClusterConfig, Config, SearchConfig
from evomerge.config.stage_schema import StageConfig
from evomerge.errors import ConfigError, suggest
from evomerge.evaluation.lm_harness import task_names
from evomerge.evaluation.lm_harness.backends import find_backend
from evomerge.recipes.file_kinds import other_file


def load(reference: str) -> tuple[Config, str]:
    """Reads a search file.

    Args:
        reference: Path of the file, or the name of a shipped search space.

    Returns:
        (settings, with local paths that are absolute; the file's YAML verbatim).

    Raises:
        ConfigError: There is no such file, or something is wrong in it.
    """
    shipped = _resources.search_spaces()
    path = Path(reference)
    if not path.is_file() and reference in shipped:
        path = shipped[reference]
    if not path.exists():
        raise ConfigError(
            f"there is no search file '{reference}'. {suggest(reference, shipped)} "
            "These are shipped; or give a path."
        )
    document = _yaml.read(path)
    return located(check(document), path.parent), document.text


def check_tasks(settings: Config, text: str, name: str) -> None:
    """Checks that every task of lm-eval's is spelt as some task file spells it; loads no task.

    Args:
        settings: The settings of a search file.
        text: Its YAML.
        name: What messages call it, such as its path.

    Raises:
        ConfigError: A name stands in no task file, or a folder of task files is missing; says where.
    """
    document = _yaml.parse(text, name)
    for position, folder in enumerate(settings.evaluation.include):
        if not Path(folder).is_dir():
            path: _yaml.Key = ("evaluation", "include", position)
            raise _error(document, path, f"there is no task folder '{folder}' (looked from {Path.cwd()})")
    tasks = [(i, task.task) for i, task in enumerate(settings.tasks) if task.python is None]
    include = [Path(folder) for folder in settings.evaluation.include]
    found = task_names.unknown_name([name for _, name in tasks], include)
    if found is not None:
        raise _error(document, ("tasks", tasks[found[0]][0], "task"), found[1])


def stored(study: str, text: str, overrides: Mapping[str, int]) -> tuple[Config, str]:
    """Reads the search file of a stored study.

    Args:
        study: Name of the study.
        text: The YAML as stored.
        overrides: Key -> the number that a flag replaces it by, see `override`.

    Returns:
        (settings of that name with the flags applied, the YAML verbatim).

    Raises:
        ConfigError: Something is wrong in it.
    """
    document = _yaml.parse(text, f"{study} (stored)")
    settings = check(document, warn=False).model_copy(update={"study": study})
    return override(settings, overrides), text


def rename(text: str, study: str) -> tuple[Config, str]:
    """Gives a search file another study name.

    Args:
        text: The YAML of the file.
        study: The new name.

    Returns:
        (settings, YAML), both with the new name.

    Raises:
        ConfigError: The file's `study:` is not on one line, or the name is not one.
    """
    document = _yaml.parse(text, "the search file")
    lines = text.splitlines(keepends=True)
    line = document.marks.get(("study",), (0, 0))[0] - 1
    if line < 0 or not re.match(r"""["']?study["']?\s*:\s*[^\s#]""", lines[line]):
        raise ConfigError("--study needs a search file with its `study:` name on one line")
    lines[line] = f"study: {json.dumps(study)}\n"
    renamed = "".join(lines)
    return check(_yaml.parse(renamed, f"--study {study}"), warn=False), renamed


def renamed(text: str, study: str) -> str:
    """Lets the name in a stored search file follow the name of the study's folder.

    Args:
        text: The YAML as stored.
        study: Name of the folder.

    Returns:
        The YAML with the new name, or as it is where its `study:` is not on one line.

    Raises:
        ConfigError: The folder's name cannot be one of a study.
    """
    if not re.fullmatch(STUDY_NAME, study):
        raise ConfigError(
            f"'{study}' cannot be the name of a study: letters, digits, '.', '_' and '-', at most 64; "
            "rename the folder"
        )
    if check(_yaml.parse(text, f"{study} (stored)"), warn=False).study == study:
        return text
    try:
        return rename(text, study)[1]
    except ConfigError:
        return text


def override(settings: Config, overrides: Mapping[str, int]) -> Config:
    """Replaces numbers of the settings by those of flags.

    Args:
        settings: Settings of a search file.
        overrides: `evaluations`, of the last stage, or `seed` -> number.

    Returns:
        The settings with these numbers.

    Raises:
        ConfigError: A number is out of its bounds.
    """
    changes = dict(overrides)
    try:
        stages = settings.stages
        if len(stages) > 1 and "evaluations" in changes:
            last = stages[-1].model_dump() | {"evaluations": changes.pop("evaluations")}
            stages = (*stages[:-1], StageConfig.model_validate(last))
        elif "evaluations" in changes:
            stages = (stages[0].model_copy(update={"evaluations": None}),)
        search = SearchConfig.model_validate(settings.search.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{messages.sentence(first, first['loc'])}") from None
    return settings.model_copy(update={"stages": stages, "search": search})


def with_backend(settings: Config, backend: str) -> Config:
    """Replaces what answers the tasks.

    Args:
        settings: Settings of a search file.
        backend: A key of `evomerge.evaluation.lm_harness.backends.BACKENDS`.

    Returns:
        The settings with it.

    Raises:
        ConfigError: There is no such backend.
    """
    find_backend(backend)
    evaluation = settings.evaluation.model_copy(update={"backend": backend})
    return settings.model_copy(update={"evaluation": evaluation})


def placed(
    settings: Config,
    *,
    ray: str | None,
    workers: int | None,
    gpus: float | None,
    grace: float | None,
    reuse: Sequence[str] | None,
) -> Config:
    """Replaces settings of the cluster by flags, and adds studies to reuse.

    Args:
        settings: Settings of a search file.
        ray: Replaces `cluster.ray`, unless None.
        workers: Replaces `cluster.workers`, unless None.
        gpus: Replaces `cluster.gpus`, unless None.
        grace: Replaces `cluster.grace`, in seconds, unless None.
        reuse: Names or paths of studies that are reused too.

    Returns:
        The settings with these values.

    Raises:
        ConfigError: A value is out of its bounds.
    """
    flags = {"ray": ray, "workers": workers, "gpus": gpus, "grace": grace}
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        cluster = ClusterConfig.model_validate(settings.cluster.model_dump() | given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{messages.sentence(first, first['loc'])}") from None
    return settings.model_copy(update={"cluster": cluster, "reuse": (*settings.reuse, *(reuse or ()))})


def check(document: _yaml.Document, *, warn: bool = True) -> Config:
    """Makes settings of a document.

    Args:
        document: A search file as read.
        warn: Log a warning for each key that has another name now.

    Returns:
        The settings.

    Raises:
        ConfigError: The first thing that is wrong in it, with file, line and column.
    """
    if not isinstance(document.data, dict):
        raise ConfigError(
            f"{document.where()} must be a mapping with keys such as study, models, base, method, tasks"
        )
    other = other_file(document.data, "search file")
    if other is not None:
        raise _error(document, (), other)
    document = lift_license(rename_keys(document, warn=warn))
    try:
        config = Config.model_validate(document.data)
    except ValidationError as error:
        first, path = messages.most_telling(error.errors(), document.data)
        raise _error(document, path, messages.sentence(first, path)) from None
    for path, sentence in checks.problems(config):
        raise _error(document, path, sentence)
    return config


def _error(document: _yaml.Document, path: _yaml.Key, sentence: str) -> ConfigError:
    """An error of one line, whatever names the file gives."""
    return ConfigError(f"{document.where(path)} {' '.join(sentence.split())}")
