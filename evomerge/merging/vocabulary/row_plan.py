"""Where each row of an output table comes from, for one tuple of models. Row numbers are int64 tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.merging.vocabulary.tokenizer_files import ParentTokens
from evomerge.recipes import ZERO, TokenizerSpec


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The output's tokens, and the row of each in every model.

    Attributes:
        names: The output's tokens, sorted by output row.
        numbers: Their output rows [tokens].
        rows: Model -> its row of each token [tokens], -1 for a token that it lacks.
        tokens: Model -> its tokens.
        spec: The tokenizer of the recipe.
    """

    names: Sequence[str]
    numbers: Tensor
    rows: Mapping[str, Tensor]
    tokens: Mapping[str, ParentTokens]
    spec: TokenizerSpec


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The rows of an output table for every model.

    A row is lent where a model lacks the token or has to take another's row: all models that need it take the
    same one.

    Attributes:
        own: Model -> (output rows, its rows) of the tokens for which it has a row of its own.
        lent: Model -> (output rows, positions among the lent rows) of the others.
        single: Model -> (positions, its rows) of the lent rows that it alone gives.
        shared: (model, index into `averaged`, its rows) of lent rows that are an average.
        averaged: Positions of the lent rows that are an average.
        counts: How many models give each of them.
        lent_rows: Number of lent rows.
    """

    own: dict[str, tuple[Tensor, Tensor]]
    lent: dict[str, tuple[Tensor, Tensor]]
    single: dict[str, tuple[Tensor, Tensor]]
    shared: list[tuple[str, Tensor, Tensor]]
    averaged: Tensor
    counts: Tensor
    lent_rows: int


@dataclass(frozen=True, slots=True)
class _Donors:
    """For each token [tokens] the row that models without one get.

    giver: index of the model that gives it, -1 for an average or zeros; given: the giver's row; is_zero:
    zeros; is_forced: also for models that have a row of their own.
    """

    giver: Tensor
    given: Tensor
    is_zero: Tensor
    is_forced: Tensor


def plan_rows(table: TokenTable, models: tuple[str, ...], base: str) -> RowPlan:
    """Plans the output tables of a tuple of models.

    Args:
        table: The output's tokens.
        models: The models whose tables are there.
        base: The model that is preferred as a donor.

    Returns:
        The plan.

    Raises:
        RecipeError: A token is to come from a model that is not there, or none of the models can give it a
            row.
    """
    rows = torch.stack([table.rows[model] for model in models])  # [models, tokens]
    has = rows >= 0
    needed = ~has.all(0)
    donors = _donors(table, models, base, rows)
    _check_orphans(table, models, donors, has)
    borrowed = (needed | donors.is_forced).nonzero()[:, 0]  # places in names
    giver, given = donors.giver[borrowed], donors.given[borrowed]
    is_zero = donors.is_zero[borrowed]
    position = torch.zeros(len(table.names), dtype=torch.long)
    position.index_copy_(0, borrowed, torch.arange(len(borrowed)))
    averaged = ((giver < 0) & ~is_zero).nonzero()[:, 0]
    own, lent, single, shared = {}, {}, {}, []
    for i, model in enumerate(models):
        rows_of_own = (has[i] & ~donors.is_forced).nonzero()[:, 0]
        replaced = (~has[i] | donors.is_forced).nonzero()[:, 0]
        own[model] = table.numbers[rows_of_own], rows[i, rows_of_own]
        lent[model] = table.numbers[replaced], position[replaced]
        from_it = ((giver == i) & ~is_zero).nonzero()[:, 0]
        single[model] = from_it, given[from_it]
        in_average = has[i, borrowed[averaged]].nonzero()[:, 0]
        shared.append((model, in_average, rows[i, borrowed[averaged[in_average]]]))
    counts = has[:, borrowed[averaged]].sum(0)
    return RowPlan(own, lent, single, shared, averaged, counts, len(borrowed))


def _donors(table: TokenTable, models: tuple[str, ...], base: str, rows: Tensor) -> _Donors:
    """The donor of every token: listed, else the only model that has it, else the base, else the average."""
    has = rows >= 0
    giver = torch.where(has.sum(0) == 1, has.int().argmax(0), -1)
    if base in models:
        giver[has[models.index(base)] & (giver < 0)] = models.index(base)
    given = rows.gather(0, giver.clamp(min=0)[None])[0]
    is_zero = torch.zeros(len(table.names), dtype=torch.bool)
    is_forced = torch.zeros_like(is_zero)
    place = {token: i for i, token in enumerate(table.names)}
    needed = ~has.all(0)
    for token, donor in table.spec.tokens:
        i = place[token]
        if donor.source is None or not (donor.force or needed[i]):
            continue
        is_forced[i] = donor.force
        if donor.source == ZERO:
            is_zero[i] = True
            continue
        giver[i], given[i] = _listed_donor(table, token, models)
    return _Donors(giver, given, is_zero, is_forced)


def _listed_donor(table: TokenTable, token: str, models: tuple[str, ...]) -> tuple[int, int]:
    """(index of the model, its row) that a listed token is given."""
    source = dict(table.spec.tokens)[token].source
    model, what = source if isinstance(source, tuple) else (str(source), token)
    if model not in models:
        raise RecipeError(
            f"token '{token}' is to come from model '{model}', which is not mixed here (only "
            f"{', '.join(models)}); mix it too"
        )
    row = what if isinstance(what, int) else table.tokens[model].rows.get(what, -1)
    if row < 0:
        raise RecipeError(
            f"token '{token}' is to come from model '{model}', which lacks it; name one of its tokens or "
            "another source"
        )
    return models.index(model), row


def _check_orphans(table: TokenTable, models: tuple[str, ...], donors: _Donors, has: Tensor) -> None:
    """Raises RecipeError for a token that no model has and nothing gives."""
    orphans = (~has.any(0) & ~donors.is_zero & (donors.given < 0)).nonzero()[:, 0].tolist()
    if orphans:
        more = f" (and {len(orphans) - 1} more)" if len(orphans) > 1 else ""
        raise RecipeError(
            f"no row for token '{table.names[orphans[0]]}'{more} of the output's tokenizer: none of "
            f"{', '.join(models)} has it; list it under the tokenizer's tokens with a source ({{kind: zero}} "
            "gives zeros)"
        )
