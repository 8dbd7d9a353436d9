"""The licenses that a search file allows for its models, compared with those that the models name."""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.checkpoints import Parent
from evomerge.checkpoints.licenses import PERMISSIVE, cards_of
from evomerge.config import Config
from evomerge.errors import ConfigError


def check_licenses(settings: Config, parents: Mapping[str, Parent]) -> None:
    """Refuses models whose license the search file does not allow; reads cards and license files alone.

    Args:
        settings: Of the search.
        parents: Its models, open.

    Raises:
        ConfigError: A model or adapter has another license, or none is known; names the first.
    """
    policy = settings.license
    if policy == "any":
        return
    is_permissive = isinstance(policy, str)
    allowed = sorted(PERMISSIVE) if is_permissive else list(policy)
    named = "license: permissive" if is_permissive else f"license: [{', '.join(allowed)}]"
    for name, parent in parents.items():
        for card in cards_of(parent):
            if card.license is None:
                raise ConfigError(
                    f"the license of model '{name}' is {card.shown}, and {named} needs one that is known; "
                    f"state it in {card.folder / 'README.md'}, or leave the constraint out"
                )
            if not card.license.is_among(allowed):
                shown = ", ".join(allowed)
                raise ConfigError(
                    f"the license of model '{name}' is {card.shown}, and {named} allows {shown}; "
                    "choose another model, or allow its license"
                )
