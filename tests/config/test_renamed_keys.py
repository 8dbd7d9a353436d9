"""A key with another name now is read under both, with a warning; studies stored under the old one open."""

from __future__ import annotations

import logging

import pytest

from evomerge import _yaml
from evomerge.config import loading
from evomerge.config.renamed_keys import RENAMED
from evomerge.errors import ConfigError

NEW = """\
study: trial
models: {base: a, other: b}
base: base
method: linear
tasks:
  - task: first
stages: [routes]
routes:
  perplexity_screen: {tokens: 32, factor: 3}
  expected_mutations: 4
"""
OLD = NEW.replace("perplexity_screen", "gate").replace("expected_mutations", "changes")


def test_a_search_file_with_old_keys_means_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        old = loading.check(_yaml.parse(OLD, "old.yaml"))
    assert old == loading.check(_yaml.parse(NEW, "new.yaml"))
    assert old.routes.expected_mutations == 4
    assert old.routes.perplexity_screen is not None
    assert old.routes.perplexity_screen.factor == 3
    assert [record.getMessage() for record in caplog.records] == [
        "old.yaml:9:3 'routes.gate' is called 'routes.perplexity_screen' now; "
        "the old name is read for one version more",
        "old.yaml:10:3 'routes.changes' is called 'routes.expected_mutations' now; "
        "the old name is read for one version more",
    ]


def test_a_stored_study_with_old_keys_opens_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert loading.stored("trial", OLD, {})[0] == loading.stored("trial", NEW, {})[0]
    assert caplog.records == []


def test_a_key_under_both_names_is_refused_at_the_old_one() -> None:
    text = NEW.replace("  expected_mutations: 4", "  expected_mutations: 4\n  changes: 3")
    with pytest.raises(
        ConfigError, match=r"^text:11:3 'routes\.changes' is the old name of 'routes\.expected"
    ):
        loading.check(_yaml.parse(text, "text"))


def test_a_mistake_below_an_old_key_is_answered_at_its_place() -> None:
    with pytest.raises(
        ConfigError, match=r"^text:9:22 routes\.perplexity_screen\.factor should be above 1, got 0"
    ):
        loading.check(_yaml.parse(OLD.replace("factor: 3", "factor: 0"), "text"))


@pytest.mark.parametrize("routes", ["null", "[]", "7"])
def test_whatever_stands_in_place_of_a_block_is_answered_with_a_sentence(routes: str) -> None:
    text = OLD.partition("routes:\n")[0] + f"routes: {routes}\n"
    with pytest.raises(ConfigError, match=r"^text:8:1 routes should be a mapping"):
        loading.check(_yaml.parse(text, "text"))


def test_a_new_name_is_in_the_block_of_the_old_one() -> None:
    assert all(old.rpartition(".")[0] == new.rpartition(".")[0] for old, new in RENAMED.items())
