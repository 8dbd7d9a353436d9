"""The models of files that a search file names -> the search's own names of them."""

from __future__ import annotations

from collections.abc import Callable

from evomerge.checkpoints import locate
from evomerge.checkpoints.reference import split_reference
from evomerge.config import Config
from evomerge.errors import ConfigError


def search_names(settings: Config, refusal: Callable[[str], str]) -> Callable[[str], str]:
    """Makes the function that gives the search's name of a model, by that name or by where it is.

    Args:
        settings: The settings of the search.
        refusal: A reference to no model of the search -> the message of the error.

    Returns:
        Reference to a model -> its name; raises ConfigError for one that is not the search's.
    """
    names: dict[tuple[str, ...], str] = {}

    def name_of(reference: str) -> str:
        if reference in settings.models:
            return reference
        if not names:
            names.update({_places(model.reference): name for name, model in settings.models.items()})
        found = names.get(_places(reference))
        if found is None:
            raise ConfigError(refusal(reference))
        return found

    return name_of


def _places(reference: str) -> tuple[str, ...]:
    """Folders of a model and of its adapter, where it has one."""
    parts = split_reference(reference)
    model = str(locate(parts.model, parts.revision))
    return (model, str(locate(parts.adapter, parts.adapter_revision))) if parts.adapter else (model,)
