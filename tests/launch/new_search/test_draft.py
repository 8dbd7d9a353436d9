"""A draft as text: what is read back is what was written, each comment above its key."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import _yaml
from evomerge.launch.new_search.draft import Draft

NAMES = st.text(st.sampled_from("abzAZ019._- :#'\"é{}[],&*!|>%@`"), min_size=1, max_size=12).filter(
    lambda text: text == text.strip()
)
LEAVES = st.one_of(
    st.integers(-(10**6), 10**6),
    st.floats(-1e6, 1e6).map(lambda x: round(x, 5)),
    st.booleans(),
    NAMES,
    st.sampled_from(["no", "yes", "1e5", "null", "~", "0100", "2020-01-01", "on", "1_000", "0x10"]),
)
ENTRIES = st.dictionaries(NAMES, st.one_of(LEAVES, st.lists(LEAVES, max_size=3)), max_size=3)
BLOCKS = st.dictionaries(NAMES, st.one_of(LEAVES, ENTRIES), max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    document=st.dictionaries(NAMES, st.one_of(LEAVES, BLOCKS), min_size=1, max_size=5),
    tasks=st.lists(ENTRIES, max_size=3),
    sentence=st.text(st.sampled_from("ab .,:#-"), max_size=300),
)
def test_a_draft_reads_back_as_its_document(
    document: dict[str, object], tasks: list[dict[str, object]], sentence: str
) -> None:
    whole = {**document, "tasks": tasks}
    comments = {(key,): sentence for key in whole} | {("tasks", 0): sentence}
    text = Draft(whole, comments, head=[sentence], foot=[sentence]).text()
    assert _yaml.parse(text, "draft").data == whole


def test_a_comment_stands_above_its_key_and_is_wrapped() -> None:
    draft = Draft(
        {"space": {"groups": 3, "parameters": {"weight": {"low": 0, "high": 1}}}},
        {("space", "groups"): "many words " * 20, ("space", "parameters", "weight"): "bounds"},
    )
    lines = draft.text().splitlines()
    at = lines.index("  groups: 3")
    assert lines[at - 1].startswith("  # many words")
    assert max(map(len, lines)) <= 100
    assert lines[lines.index("    weight: {low: 0, high: 1}") - 1] == "    # bounds"
