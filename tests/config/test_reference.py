"""The reference of the search file has every key of the schema, each with type, default and a description."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel

from evomerge import _yaml
from evomerge.config import Config, checks, messages, reference, schema
from evomerge.config.messages import block_of
from evomerge.config.reference import KeyRow
from evomerge.config.renamed_keys import RENAMED

ROWS = {row.path: row for row in reference.rows()}


def keys_of(block: type[BaseModel]) -> int:
    """Number of keys in a block and in all blocks that it holds."""
    inner = [block_of(field.annotation) for field in block.model_fields.values()]
    return len(block.model_fields) + sum(keys_of(one) for one in inner if one is not None)


def test_no_key_is_missing() -> None:
    assert len(reference.rows()) == len(ROWS) == keys_of(Config)
    blocks = {
        value
        for value in vars(schema).values()
        if isinstance(value, type) and issubclass(value, schema.Strict) and value is not schema.Strict
    }
    names = {row.path.rpartition(".")[2] for row in ROWS.values()}
    for block in blocks:
        assert set(block.model_fields) <= names, block


@pytest.mark.parametrize("path", ROWS)
def test_a_key_has_a_type_a_default_and_a_description_of_one_sentence(path: str) -> None:
    row = ROWS[path]
    assert row.type
    assert "class" not in row.type
    assert row.default
    assert re.fullmatch(r"[^\n]{5,120}\.", row.description), row.description


def test_types_and_defaults_are_in_words() -> None:
    assert ROWS["search.race.error"] == KeyRow(
        "search.race.error",
        "number above 0 and below 1",
        "0.05",
        "How often, at most, a generation may lose one of its best candidates.",
    )
    assert ROWS["search.population"].type == "whole number from 4, auto or null"
    assert ROWS["search.tie_break"].type == "probability, logprob, none or null"
    assert ROWS["stages"].default == '[{"stage": "weights"}]'
    assert (ROWS["method"].default, ROWS["space"].default) == ("required", "its defaults")
    assert ROWS["space.parameters.NAME.low"].type == "number"
    assert ROWS["tasks[].weight"].type == "number above 0"
    assert ROWS["routes.layers"].type == "[whole number, whole number] or null"


def test_renamed_keys_name_what_they_were() -> None:
    assert {row.renamed_from: row.path for row in ROWS.values() if row.renamed_from} == RENAMED


def test_every_block_is_described() -> None:
    blocks = reference.block_descriptions()
    assert {"", "search", "search.race", "models.NAME", "tasks[]", "stages[]", "cluster.limits"} <= set(
        blocks
    )
    assert all(len(text) > 10 for text in blocks.values())


@pytest.mark.parametrize(
    ("kind", "context"),
    [("greater_than", {"gt": 0}), ("literal_error", {"expected": "'a' or 'b'"}), ("no_such_kind", {})],
)
def test_no_message_of_pydantic_reaches_a_user(kind: str, context: dict[str, object]) -> None:
    error = {"type": kind, "msg": "Input should be something", "ctx": context, "input": 7}
    sentence = messages.sentence(error, ("search", "sigma"))
    assert sentence.startswith("search.sigma should be ")
    assert sentence.endswith(", got 7")
    assert "nput" not in sentence


def test_what_is_wrong_is_found_in_every_block_at_once() -> None:
    text = "study: a\nmodels: {a: a, b: b}\nbase: c\nmethod: linear\n"
    text += "tasks: [{task: x}, {task: x}]\nkeep: {y: 0.1}\n"
    settings = Config.model_validate(_yaml.parse(text, "text").data)
    paths = [path for path, _ in checks.problems(settings)]
    assert paths == [("base",), ("tasks", 1, "task"), ("keep", "y")]
