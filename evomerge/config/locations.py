"""Where the models and files of a search are: relative to its search file, moved since, or given by a flag.

A model is known by the hash of its content, which is compared when it is opened; here is only where to look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from evomerge.config.schema import Config, ModelConfig
from evomerge.errors import CheckpointError, ConfigError, suggest

Place = tuple[str, str | None]
"""(folder or repository, revision) of a model."""
_ANCESTORS = 3  # folders above a study in which models that moved with it are looked for


def located(settings: Config, folder: Path) -> Config:
    """Makes the local paths of a search absolute.

    Args:
        settings: Settings as a search file has them.
        folder: Folder of the file.

    Returns:
        The settings; a path that is there neither from the folder nor from the working directory stays.
    """

    def place(path: str) -> str:
        return _absolute(path, folder)

    models = {
        name: model.model_copy(update={"path": _by_part(model.path, place)})
        for name, model in settings.models.items()
    }
    return with_files(
        settings.model_copy(update={"models": models}),
        {key: tuple(map(place, paths)) for key, paths in files(settings).items()},
    )


def files(settings: Config) -> dict[str, tuple[str, ...]]:
    """Lists the files and folders that settings name, models left out.

    Args:
        settings: The settings.

    Returns:
        Key -> paths.
    """
    evaluation = settings.evaluation
    return {
        "include": evaluation.include,
        "training_texts": evaluation.training_texts,
        "reuse": settings.reuse,
        "hand_recipes": tuple(settings.hand_recipes.values()),
        "retain": tuple(stage.retain for stage in settings.stages if stage.retain is not None),
    }


def with_files(settings: Config, paths: Mapping[str, Sequence[str]]) -> Config:
    """Replaces the files and folders that settings name.

    Args:
        settings: The settings.
        paths: Key -> paths, as `files` gives them; a key that is left out stays.

    Returns:
        The settings with these paths.
    """
    given = {key: tuple(value) for key, value in paths.items()}
    reuse = given.pop("reuse", settings.reuse)
    recipes = given.pop("hand_recipes", tuple(settings.hand_recipes.values()))
    hand_recipes = dict(zip(settings.hand_recipes, recipes, strict=True))
    retained = iter(given.pop("retain", ()))
    stages = tuple(
        stage if stage.retain is None else stage.model_copy(update={"retain": next(retained, stage.retain)})
        for stage in settings.stages
    )
    evaluation = settings.evaluation.model_copy(update=given)
    changes = {"evaluation": evaluation, "reuse": reuse, "stages": stages, "hand_recipes": hand_recipes}
    return settings.model_copy(update=changes)


def given_models(given: Iterable[str], names: Iterable[str]) -> dict[str, Place]:
    """Reads the values of --models.

    Args:
        given: 'NAME=PATH' of each.
        names: Names of the search's models.

    Returns:
        Name -> where it is.

    Raises:
        ConfigError: One has another form, or there is no such model.
    """
    places: dict[str, Place] = {}
    known = tuple(names)
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"--models takes NAME=PATH, got '{text}'")
        if name not in known:
            raise ConfigError(
                f"--models names '{name}', which is no model of the search. {suggest(name, known)}"
            )
        places[name] = (_by_part(path, lambda part: _absolute(part, Path())), None)
    return places


def with_models(settings: Config, places: Mapping[str, Place]) -> Config:
    """Replaces where models are.

    Args:
        settings: The settings.
        places: Name -> where it is; a model that is left out stays.

    Returns:
        The settings with these models.
    """
    models = {
        name: ModelConfig(path=places[name][0], revision=places[name][1]) if name in places else model
        for name, model in settings.models.items()
    }
    return settings.model_copy(update={"models": models})


def found_models(known: Mapping[str, Place], given: Mapping[str, Place], study: Path) -> dict[str, Place]:
    """Finds the models of a stored study, which may have moved since.

    Looked for is a folder of the same name, and of the same two last names, beside the models that are there
    and in the folders above the study.

    Args:
        known: Name -> where the model was.
        given: Name -> where the user says that it is.
        study: Folder of the study.

    Returns:
        Name -> where it is; repositories stay as they are.

    Raises:
        CheckpointError: One is nowhere.
    """
    places = {**known, **given}
    there = [Path(path) for path, _ in places.values() if _is_there(path)]
    near = [parent for path in there for parent in (path.absolute().parent, path.absolute().parent.parent)]
    near += list(study.absolute().parents)[:_ANCESTORS]

    def find(path: str) -> str | None:
        return path if not _is_local(path) or _is_there(path) else beside(path, near)

    def place(path: str, name: str) -> str:
        missing = [path]
        cuts = [at for at, character in enumerate(path) if character == "+"]
        if _is_there(path) or not any(_is_local(path[cut + 1 :]) for cut in cuts):  # a '+' of a folder's name
            whole = find(path)
            if whole is not None and (whole != path or not cuts or _is_there(path)):
                return whole
        for cut in cuts:  # a model and its adapter
            parts = [path[:cut], path[cut + 1 :]]
            found = [find(part) for part in parts]
            if None not in found:
                return "+".join(folder for folder in found if folder is not None)
            if path.count("+") == 1:
                missing = [part for part, folder in zip(parts, found, strict=True) if folder is None]
        raise CheckpointError(
            f"model '{name}' is not at {' and '.join(missing)} any more, and not beside the study or its "
            f"other models; give --models {name}=PATH"
        )

    return {name: (place(path, name), revision) for name, (path, revision) in places.items()}


def found_files(paths: Sequence[str], study: Path) -> tuple[str, ...]:
    """Finds files and folders of a stored study, which may have moved with it.

    Args:
        paths: Where they were.
        study: Folder of the study.

    Returns:
        Where they are; one that is nowhere stays.
    """
    near = list(study.absolute().parents)[:_ANCESTORS]
    return tuple(path if Path(path).exists() else beside(path, near) or path for path in paths)


def beside(path: str, folders: Iterable[Path]) -> str | None:
    """Looks for what was at a path in other folders, by its last two names and by its last.

    Args:
        path: Where it was.
        folders: Where to look, in this order.

    Returns:
        Where it is, None where it is in none of them.
    """
    names = Path(path).expanduser().parts
    for folder in folders:
        for count in (2, 1):
            found = folder.joinpath(*names[-count:])
            if len(names) > count and found.exists():
                return str(found)
    return None


def _absolute(path: str, folder: Path) -> str:
    """A path from a folder, else from the working directory; as it is where nothing is there."""
    try:
        for start in (folder, Path()):
            found = start / Path(path).expanduser()
            if found.exists():
                return str(Path(*found.absolute().parts)) if ".." not in found.parts else str(found.resolve())
    except (OSError, RuntimeError, ValueError):  # no name of a file, no such user
        return path
    return path


def _by_part(reference: str, place: Callable[[str], str]) -> str:
    """A reference with a function applied to the model and to its adapter, which a '+' joins."""
    if "+" not in reference or _is_there(reference):
        return place(reference)
    whole = place(reference)
    return whole if whole != reference else "+".join(map(place, reference.split("+")))


def _is_local(path: str) -> bool:
    """Whether a path is said to be on this machine, and cannot be a repository."""
    return path.startswith(("/", ".", "~"))


def _is_there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
