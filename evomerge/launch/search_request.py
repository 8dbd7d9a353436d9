"""What a user asks to be searched: a search file, read and checked, and what replaces or continues it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evomerge import _yaml
from evomerge.config import Config, loading, locations


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """A search to begin, or to go on with.

        settings, text = loading.load("demo")
        study = prepare_study(SearchRequest(settings, text), Path("results"))

    Attributes:
        settings: The checked search file, with flags of where it runs applied.
        text: Its YAML verbatim, which is stored.
        overrides: 'evaluations' of the last stage and 'seed', where they replace the file's; stored beside
            the text.
        resume: Go on with the study if it exists; otherwise one that exists is an error.
        retry_failed: Score anew what failed by its machine, and search anew from there.
        mix_engines: Go on with a study although another engine generates texts now.
    """

    settings: Config
    text: str
    overrides: Mapping[str, int] = field(default_factory=dict)
    resume: bool = False
    retry_failed: bool = False
    mix_engines: bool = False

    @property
    def effective_settings(self) -> Config:
        """The settings with the overrides applied."""
        return loading.override(self.settings, self.overrides)


def load(
    search: SearchRequest | Mapping[str, Any] | str | Path,
    *,
    study: str | None = None,
    evaluations: int | None = None,
    seed: int | None = None,
) -> SearchRequest:
    """Reads and checks a search file; opens no model.

        search = load("demo", evaluations=200)

    Args:
        search: A path, the name of a shipped search space, the content of a search file as a mapping, or what
            `load` gave.
        study: Name of the study, instead of the file's.
        evaluations: Budget of the search, or of its last stage, instead of the file's; at least 1.
        seed: Seed of the search, instead of the file's; at least 0.

    Returns:
        The search, with its checked settings and its YAML.

    Raises:
        ConfigError: For the first thing that is wrong, with file, line and column and the nearest right key.
    """
    request = _read(search)
    settings, text = request.settings, request.text
    if study is not None:
        text = loading.rename(text, study)[1]
        settings = settings.model_copy(update={"study": study})
    given = {"evaluations": evaluations, "seed": seed}
    overrides = dict(request.overrides) | {key: value for key, value in given.items() if value is not None}
    loading.override(settings, overrides)  # raises for a budget or seed that is out of range
    return SearchRequest(settings, text, overrides, request.resume, request.retry_failed, request.mix_engines)


def _read(search: SearchRequest | Mapping[str, Any] | str | Path) -> SearchRequest:
    if isinstance(search, SearchRequest):
        return search
    if isinstance(search, Mapping):
        text = yaml.safe_dump(dict(search), sort_keys=False)
        settings = loading.check(_yaml.parse(text, "the mapping"))
        return SearchRequest(locations.located(settings, Path.cwd()), text)
    settings, text = loading.load(str(search))
    return SearchRequest(settings, text)
