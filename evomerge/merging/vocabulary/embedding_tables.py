"""The tensors of a parent that have one row a token, from names, shapes and config alone."""

from __future__ import annotations

from evomerge.checkpoints import Parent
from evomerge.errors import CheckpointError


def vocabulary_tensors(parent: Parent) -> tuple[str, ...]:
    """Finds the tensors with one row a token: input embedding, output head and the head's bias.

    Outside the layer stack, a table of `vocab_size` rows that is not one of positions.

    Args:
        parent: The parent.

    Returns:
        Their names on disk, sorted.

    Raises:
        CheckpointError: There is none.
    """
    size = embedding_rows(parent)
    outside = _shapes_outside(parent)
    tables = {
        name
        for name, shape in outside.items()
        if len(shape) == 2 and shape[0] == size and "pos" not in name and "wpe" not in name
    }
    biases = {
        name
        for name, shape in outside.items()
        if shape == (size,) and name.removesuffix("bias") + "weight" in tables
    }
    if not tables:
        raise CheckpointError(
            f"{parent.path} has no embedding of {size} rows, the vocab_size in its config.json; "
            "one of the two is wrong"
        )
    return tuple(sorted(tables | biases))


def embedding_rows(parent: Parent) -> int:
    """Number of rows of a parent's embedding, those of tokens and of padding.

    It is the config's vocab_size. Some configs leave it to their class; then it is the rows of the tallest
    table outside the layer stack.

    Args:
        parent: The parent.

    Returns:
        The number, at least 1.

    Raises:
        CheckpointError: The config's value is no such number.
    """
    text = parent.config.get("text_config") or parent.config
    size = text.get("vocab_size", parent.config.get("vocab_size"))
    if size is None:
        tables = [shape for shape in _shapes_outside(parent).values() if len(shape) == 2]
        size = max((shape[0] for shape in tables), default=None)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise CheckpointError(
            f"{parent.path / 'config.json'}: vocab_size must be a whole number of at least 1, got {size!r}"
        )
    return size


def _shapes_outside(parent: Parent) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors outside the layer stack."""
    return {
        name: info.shape for name, info in parent.tensors.items() if parent.layout.place(name).layer is None
    }
