"""Parents with different tokenizers: the output's tokenizer, and every parent's rows in its numbering. Knows no merge method.

The rules are mergekit 0.1.5's, with these differences where it crashes, leaves rows of zeros or depends on chance:

* Further ordinary tokens of a union come in the order of parents and rows; mergekit's order is that of a hash table.
* A token without a row (beyond the embedding's end) counts as lacking in every model; in a model other than the base it makes mergekit crash.
  The tokenizer that the output starts from is cut to its rows whatever its kind and whichever model's, and its roles (padding, ...) go with
  their tokens; mergekit cuts the base's alone, if it is BPE and merges to none of the tokens.
* Explicit tokens that 'base' lacks are new rows; mergekit takes a padding row of the base for them, or crashes if it has none.
* A token in none of the models that are mixed is an error that asks for a source; mergekit gives it zeros and a warning.
* Numbers without a token below the last one get the mean of the tokens' rows, as padding does; mergekit fails or leaves zeros.
* Special token numbers in the output's config follow their tokens; mergekit leaves the base's numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints import Parent
from evomerge.errors import CheckpointError, RecipeError, suggest
from evomerge.merging.vocabulary.tokenizer_files import filled, output, read, rows_of
from evomerge.recipes import WHOLE, ZERO, TokenizerSpec

_ROLES = ("bos_token", "eos_token", "pad_token")


def vocabulary_tensors(parent: Parent) -> tuple[str, ...]:
    """Names of the tensors with one row a token, sorted: input embedding, output head, and the head's bias if it has one.

    Outside the layer stack, a table of `vocab_size` rows that is not one of positions. Raises CheckpointError if there is none.
    """
    size = rows_of(parent)
    outside = {
        name: info.shape for name, info in parent.tensors.items() if parent.layout.place(name).layer is None
    }
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
            f"{parent.path} has no embedding of {size} rows, the vocab_size in its config.json; one of the two is wrong"
        )
    return tuple(sorted(tables | biases))


def check_rows(parents: Mapping[str, Parent], base: str) -> str | None:
    """For a merge without a tokenizer spec, before any weights are read: a warning if rows of one number are other tokens, else None.

    Parents without tokenizer files are passed over. Raises CheckpointError if the numbers of rows differ.
    """
    expected = rows_of(parents[base])
    for name, parent in parents.items():
        if (rows := rows_of(parent)) != expected:
            raise CheckpointError(
                f"model '{name}' has {rows} embedding rows and base '{base}' {expected}; "
                "add 'tokenizer_source: union' (or base) to the recipe, so that rows are matched by token"
            )
    own = read(parents)
    if (ours := own[base]) is None:
        return None
    first, differing = "", []
    for name, tokens in own.items():
        if tokens is None or tokens.rows == ours.rows:
            continue
        differing.append(f"'{name}'")
        if not first:
            row = min(row for _, row in ours.rows.items() ^ tokens.rows.items())
            first = f"row {row} is {ours.at(row)} in '{base}' and {tokens.at(row)} in '{name}'"
    if not differing:
        return None
    return (
        f"the vocabularies of {', '.join(differing)} and base '{base}' differ though all have {expected} rows: {first}; "
        "rows are mixed by number unless the recipe says 'tokenizer_source: union' (or base)"
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the rows of an output table come from, for one tuple of models. Row numbers are int64 tensors.

    own: model → (output rows, its rows); lent: model → (output rows, positions among the lent rows).
    single: model → (positions, its rows) of lent rows that one model gives.
    shared: (model, index into `averaged`, its rows) of lent rows that are an average; averaged: their positions;
    counts: how many models give each.
    lent_rows: their number.
    """

    own: dict[str, tuple[Tensor, Tensor]]
    lent: dict[str, tuple[Tensor, Tensor]]
    single: dict[str, tuple[Tensor, Tensor]]
    shared: list[tuple[str, Tensor, Tensor]]
    averaged: Tensor
    counts: Tensor
    lent_rows: int


class Vocabulary:
    """The output's tokenizer and rows. tokens: token → output row; size: output rows, padding included."""

    def __init__(self, spec: TokenizerSpec, base: str, parents: Mapping[str, Parent]) -> None:
        """Reads configs and tokenizer files of the parents, no weights; nothing is fetched and no code of theirs is run.

        A parent without tokenizer files is taken to have the base's tokenizer. Raises RecipeError if the spec asks for what
        no parent has, and CheckpointError naming the folder whose tokenizer cannot be read.
        """
        for name in (base, *spec.models):
            if name not in parents:
                raise RecipeError(
                    f"the tokenizer needs model '{name}', which is not among the models merged. {suggest(name, parents)}"
                )
        sources = {spec.source} & set(WHOLE) | {
            donor.source for _, donor in spec.tokens if donor.source == ZERO
        }
        for word in sorted(sources & set(parents)):
            if (word, base) != ("base", "base"):
                raise RecipeError(
                    f"the tokenizer's source '{word}' is also the name of a model that is not meant; give it another name"
                )
        self.spec, self.base = spec, base
        self._sizes = {name: rows_of(parent) for name, parent in parents.items()}
        self._own = filled(read(parents), base, parents)
        self.tokenizer: Any = output(spec, base, parents, self._own)
        self.tokens: dict[str, int] = self.tokenizer.get_vocab()
        used = max(len(self.tokens), 1 + max(self.tokens.values()))
        multiple = spec.pad_to_multiple_of or 1
        self.size = -(-used // multiple) * multiple
        self._names = sorted(self.tokens, key=lambda token: (self.tokens[token], token))
        self._numbers = torch.tensor([self.tokens[token] for token in self._names])
        self._free = torch.ones(self.size, dtype=torch.bool)  # output rows that are no token's
        self._free[self._numbers] = False
        self._rows = {
            m: torch.tensor([own.rows.get(t, -1) for t in self._names]) for m, own in self._own.items()
        }  # by place in _names
        self._plans: dict[tuple[tuple[str, ...], str], _Plan] = {}
        self._check_donors()

    def aligned(
        self, tensors: Mapping[str, Tensor], axis: int = 0, base: str | None = None
    ) -> dict[str, Tensor]:
        """Every model's table with the output's rows along `axis`, all in the type that holds each of them; never written to.

        A token gets the model's own row. If the model lacks it, or it is listed with `force`: the row of its listed donor,
        else of the only model that has it, else of `base` (None: the output's), else the mean over the models that have it.
        Rows without a token get the mean of the table's other rows. Models that are not in `tensors` give no rows.
        Raises RecipeError naming a token that none of the models can give, CheckpointError if shapes do not fit.
        """
        if not tensors:
            return {}
        views = self._views(tensors, axis)
        key = (tuple(tensors), base or self.base)
        if key not in self._plans:
            self._plans[key] = self._plan(*key)
        plan = self._plans[key]
        dtype = reduce(torch.promote_types, (t.dtype for t in tensors.values()))
        lent = _lent(plan, views, dtype)
        return {
            model: self._table(plan, model, view, lent, dtype).movedim(0, axis)
            for model, view in views.items()
        }

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Copy of the base's config.json or generation_config.json for the output: vocab_size and the numbers of special tokens.

        A number follows its token; if the output lacks the token, it becomes the output tokenizer's of that role, or None.
        """
        out = copy.deepcopy(dict(config))
        tokens = {row: token for token, row in self._own[self.base].rows.items()}
        nested = out.get("text_config")
        for text in [out, nested] if isinstance(nested, dict) else [out]:
            if "vocab_size" in text or (
                text is (nested or out) and "model_type" in out
            ):  # a generation config has neither
                text["vocab_size"] = self.size
            for key, value in text.items():
                if not key.endswith("_token_id") or value is None:
                    continue
                found = [
                    self.tokens.get(tokens.get(number, ""))
                    for number in (value if isinstance(value, list) else [value])
                ]
                kept = [number for number in found if number is not None]
                if not kept and key.removesuffix("_id") in _ROLES:
                    kept = [
                        number
                        for number in [getattr(self.tokenizer, key)]
                        if number is not None and number < self.size
                    ]
                text[key] = (kept if isinstance(value, list) else kept[0]) if kept else None
        return out

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's files into a folder that exists."""
        self.tokenizer.save_pretrained(directory)

    def _check_donors(self) -> None:
        for token, donor in self.spec.tokens:
            if token not in self.tokens:
                raise RecipeError(f"token {token!r} cannot be added to the tokenizer of '{self.spec.source}'")
            match donor.source:
                case (model, str(other)) if other not in self._own[model].rows:
                    raise RecipeError(
                        f"token '{token}' is to come from '{other}' of model '{model}', which has no such token"
                    )
                case (model, int(row)) if row >= self._sizes[model]:
                    raise RecipeError(
                        f"token '{token}' is to come from row {row} of model '{model}', which has {self._sizes[model]} rows"
                    )

    def _views(self, tensors: Mapping[str, Tensor], axis: int) -> dict[str, Tensor]:
        """The tensors with their rows first, borrowed."""
        views: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name not in self._rows:
                raise RecipeError(
                    f"model '{name}' is not among those the vocabulary was built from. {suggest(name, self._rows)}"
                )
            if not 0 <= axis < tensor.ndim or tensor.shape[axis] != self._sizes[name]:
                raise CheckpointError(
                    f"a table of '{name}' is {list(tensor.shape)}; {self._sizes[name]} rows were expected along axis {axis}"
                )
            views[name] = tensor.movedim(axis, 0)
            first = next(iter(views))
            if views[name].shape[1:] != views[first].shape[1:]:
                raise CheckpointError(
                    f"a table is {list(tensor.shape)} in '{name}' and {list(tensors[first].shape)} in '{first}'; only the rows may differ"
                )
        return views

    def _plan(self, models: tuple[str, ...], base: str) -> _Plan:
        rows = torch.stack([self._rows[m] for m in models])  # [models, tokens]
        has = rows >= 0
        forced = torch.zeros(len(self._names), dtype=torch.bool)
        giver = torch.where(
            has.sum(0) == 1, has.int().argmax(0), -1
        )  # index of the model whose row is lent; -1: average
        if base in models:
            giver[has[models.index(base)] & (giver < 0)] = models.index(base)
        given = rows.gather(0, giver.clamp(min=0)[None])[0]
        zero = torch.zeros_like(forced)
        place = {token: i for i, token in enumerate(self._names)}
        needed = ~has.all(0)
        for token, donor in self.spec.tokens:
            i = place[token]
            if donor.source is None or not (donor.force or needed[i]):
                continue
            forced[i] = donor.force
            if donor.source == ZERO:
                zero[i] = True
                continue
            giver[i], given[i] = self._donated(token, models)
        orphans = (~has.any(0) & ~zero & (given < 0)).nonzero()[:, 0].tolist()
        if orphans:
            token = self._names[orphans[0]]
            more = f" (and {len(orphans) - 1} more)" if len(orphans) > 1 else ""
            raise RecipeError(
                f"no row for token '{token}'{more} of the output's tokenizer: none of {', '.join(models)} has it; "
                f"list it under the tokenizer's tokens with a source ({{kind: zero}} gives zeros)"
            )
        borrowed = (needed | forced).nonzero()[:, 0]  # places in _names
        giver, given, zero = giver[borrowed], given[borrowed], zero[borrowed]
        position = torch.zeros(len(self._names), dtype=torch.long).index_copy_(
            0, borrowed, torch.arange(len(borrowed))
        )
        averaged = ((giver < 0) & ~zero).nonzero()[:, 0]
        own, lent, single, shared = {}, {}, {}, []
        for i, model in enumerate(models):
            mine = (has[i] & ~forced).nonzero()[:, 0]
            theirs = (~has[i] | forced).nonzero()[:, 0]
            own[model] = self._numbers[mine], rows[i, mine]
            lent[model] = self._numbers[theirs], position[theirs]
            from_it = ((giver == i) & ~zero).nonzero()[:, 0]
            single[model] = from_it, given[from_it]
            there = has[i, borrowed[averaged]].nonzero()[:, 0]
            shared.append((model, there, rows[i, borrowed[averaged[there]]]))
        return _Plan(own, lent, single, shared, averaged, has[:, borrowed[averaged]].sum(0), len(borrowed))

    def _donated(self, token: str, models: tuple[str, ...]) -> tuple[int, int]:
        """(index of the model, its row) that a listed token is given."""
        source = dict(self.spec.tokens)[token].source
        model, what = source if isinstance(source, tuple) else (str(source), token)
        if model not in models:
            raise RecipeError(
                f"token '{token}' is to come from model '{model}', which is not mixed here (only {', '.join(models)}); mix it too"
            )
        row = what if isinstance(what, int) else self._own[model].rows.get(what, -1)
        if row < 0:
            raise RecipeError(
                f"token '{token}' is to come from model '{model}', which lacks it; name one of its tokens or another source"
            )
        return models.index(model), row

    def _table(self, plan: _Plan, model: str, view: Tensor, lent: Tensor, dtype: torch.dtype) -> Tensor:
        """One model's table [size, ...] in the output's rows."""
        (to, at), (lent_to, lent_at) = plan.own[model], plan.lent[model]
        if (
            len(at) == self.size and not self._free.any() and torch.equal(at, to)
        ):  # to is 0, 1, ...: the rows are in place already
            return view[: self.size].to(dtype)
        out = torch.zeros((self.size, *view.shape[1:]), dtype=dtype, device=view.device)
        out[to.to(view.device)] = view.index_select(0, at.to(view.device)).to(dtype)
        out[lent_to.to(view.device)] = lent.index_select(0, lent_at.to(view.device))
        if self._free.any():
            end = self.size - int(self._free.sum())
            tokens = out[:end] if not self._free[:end].any() else out[~self._free.to(view.device)]
            out[self._free.to(view.device)] = tokens.mean(
                0
            )  # https://nlp.stanford.edu/~johnhew/vocab-expansion.html
        return out


def _lent(plan: _Plan, views: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """[lent rows, ...]: the rows that models get for tokens they lack."""
    first = next(iter(views.values()))
    out = torch.zeros((plan.lent_rows, *first.shape[1:]), dtype=dtype, device=first.device)
    for model, (positions, rows) in plan.single.items():
        out[positions.to(first.device)] = views[model].index_select(0, rows.to(first.device)).to(dtype)
    if len(plan.averaged):
        total = torch.zeros((len(plan.averaged), *first.shape[1:]), dtype=dtype, device=first.device)
        for model, index, rows in plan.shared:
            total.index_add_(
                0, index.to(first.device), views[model].index_select(0, rows.to(first.device)).to(dtype)
            )
        counts = plan.counts.to(first.device, dtype).reshape(-1, *[1] * (first.ndim - 1))
        out[plan.averaged.to(first.device)] = total / counts
    return out
