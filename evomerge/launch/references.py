"""How a user names a candidate of a study: STUDY/ID, STUDY/best or STUDY/LABEL."""

from __future__ import annotations

from evomerge.errors import ConfigError


def split_reference(candidate: str) -> tuple[str, str]:
    """Splits STUDY/REFERENCE.

    Args:
        candidate: Such as 'demo/best' or 'demo/17'.

    Returns:
        (study, reference).

    Raises:
        ConfigError: If one of the two is missing.
    """
    study, _, reference = candidate.partition("/")
    if not study or not reference:
        raise ConfigError(f"'{candidate}' names no candidate; write STUDY/ID or STUDY/best")
    return study, reference
