"""The output's vocabulary, and the tables of parents aligned to it by token. Knows no merge method.

The rules are mergekit 0.1.5's, with these differences where it crashes, leaves rows of zeros or depends on
chance:

* Further ordinary tokens of a union come in the order of parents and rows; mergekit's order is that of a hash
  table.
* A token without a row (beyond the embedding's end) counts as lacking in every model; in a model other than
  the base it makes mergekit crash. The tokenizer that the output starts from is cut to its rows whatever its
  kind and whichever model's, and its roles (padding, ...) go with their tokens; mergekit cuts the base's
  alone, if it is BPE and merges to none of the tokens.
* Explicit tokens that 'base' lacks are new rows; mergekit takes a padding row of the base for them, or
  crashes if it has none.
* A token in none of the models that are mixed is an error that asks for a source; mergekit gives it zeros and
  a warning.
* Numbers without a token below the last one get the mean of the tokens' rows, as padding does; mergekit fails
  or leaves zeros.
* Special token numbers in the output's config follow their tokens; mergekit leaves the base's numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints import Parent
from evomerge.errors import CheckpointError, RecipeError, suggest
from evomerge.merging.vocabulary.embedding_tables import embedding_rows
from evomerge.merging.vocabulary.row_plan import RowPlan, TokenTable, plan_rows
from evomerge.merging.vocabulary.tokenizer_files import (
    fill_missing,
    output_tokenizer,
    read_tokens,
    tokenizer_digests,
)
from evomerge.recipes import WHOLE, ZERO, TokenizerSpec

_ROLES = ("bos_token", "eos_token", "pad_token")


def check_rows(parents: Mapping[str, Parent], base: str) -> str | None:
    """Checks that a merge without a tokenizer spec can mix rows by number; reads no weights.

    Args:
        parents: Name -> parent, the base among them. Those without tokenizer files are passed over.
        base: Name of the base.

    Returns:
        A warning if rows of one number are other tokens in two parents, else None.

    Raises:
        CheckpointError: The numbers of rows differ.
    """
    expected = embedding_rows(parents[base])
    for name, parent in parents.items():
        rows = embedding_rows(parent)
        if rows != expected:
            raise CheckpointError(
                f"model '{name}' has {rows} embedding rows and base '{base}' {expected}; "
                "add 'tokenizer_source: union' (or base) to the recipe, so that rows are matched by token"
            )
    digests = tokenizer_digests(parents)
    if digests[base] is None or {*digests.values(), None} == {digests[base], None}:
        return None
    tokens_of = read_tokens(parents)
    base_tokens = tokens_of[base]
    assert base_tokens is not None
    example, differing = "", []
    for name, tokens in tokens_of.items():
        if tokens is None or tokens.rows == base_tokens.rows:
            continue
        differing.append(f"'{name}'")
        if not example:
            row = min(row for _, row in base_tokens.rows.items() ^ tokens.rows.items())
            example = f"row {row} is {base_tokens.at(row)} in '{base}' and {tokens.at(row)} in '{name}'"
    if not differing:
        return None
    return (
        f"the vocabularies of {', '.join(differing)} and base '{base}' differ though all have {expected} "
        f"rows: {example}; rows are mixed by number unless the recipe says 'tokenizer_source: union' (or "
        "base)"
    )


class Vocabulary:
    """The output's tokenizer and rows.

        vocabulary = Vocabulary(TokenizerSpec("union"), "base", parents)
        tables = vocabulary.align({name: parent.tensor(embedding) for name, parent in parents.items()})

    Attributes:
        spec: The tokenizer of the recipe.
        base: Name of the base.
        source: Name of the model whose tokenizer the output's began as.
        tokenizer: The output's tokenizer, one of transformers.
        is_as_in_source: Whether nothing was taken from it or added to it.
        tokens: Token -> output row.
        size: Number of output rows, those of padding included.
    """

    def __init__(self, spec: TokenizerSpec, base: str, parents: Mapping[str, Parent]) -> None:
        """Reads configs and tokenizer files of the parents, no weights; runs no code of theirs.

        Args:
            spec: The tokenizer of the recipe.
            base: Name of the base.
            parents: Name -> parent; one without tokenizer files is taken to have the base's tokenizer.

        Raises:
            RecipeError: The spec asks for what no parent has.
            CheckpointError: A tokenizer cannot be read; names the folder.
        """
        _check_names(spec, base, parents)
        self.spec, self.base = spec, base
        self._sizes = {name: embedding_rows(parent) for name, parent in parents.items()}
        self._tokens_of = fill_missing(read_tokens(parents), base, parents)
        self.source = base if spec.source in WHOLE else spec.source
        made = output_tokenizer(spec, parents[self.source], base, self._tokens_of)
        self.tokenizer: Any = made.tokenizer
        self.is_as_in_source = made.is_as_in_source
        self.tokens: dict[str, int] = self.tokenizer.get_vocab()
        used = max(len(self.tokens), 1 + max(self.tokens.values()))
        multiple = spec.pad_to_multiple_of or 1
        self.size = -(-used // multiple) * multiple
        names = sorted(self.tokens, key=lambda token: (self.tokens[token], token))
        numbers = torch.tensor([self.tokens[token] for token in names])
        rows = {
            model: torch.tensor([tokens.rows.get(token, -1) for token in names])
            for model, tokens in self._tokens_of.items()
        }
        self._table = TokenTable(names, numbers, rows, self._tokens_of, spec)
        self._free = torch.ones(self.size, dtype=torch.bool)  # output rows that are no token's
        self._free[numbers] = False
        self._plans: dict[tuple[tuple[str, ...], str], RowPlan] = {}
        self._check_donors()

    def align(
        self, tensors: Mapping[str, Tensor], axis: int = 0, base: str | None = None
    ) -> dict[str, Tensor]:
        """Gives every model's table the output's rows.

        A token gets the model's own row. If the model lacks it, or it is listed with `force`: the row of its
        listed donor, else of the only model that has it, else of `base`, else the mean over the models that
        have it. Rows without a token get the mean of the table's other rows.

        Args:
            tensors: Model -> table with one row a token along `axis`. Models that are not in it give no rows.
            axis: The axis of the rows.
            base: The model that is preferred as a donor, None for the output's base.

        Returns:
            Model -> table with `size` rows along `axis`, all in the type that holds each of them; never
            written to.

        Raises:
            RecipeError: A token that none of the models can give; names it.
            CheckpointError: The shapes of the tables do not fit.
        """
        if not tensors:
            return {}
        views = self._rows_first(tensors, axis)
        key = (tuple(tensors), base or self.base)
        if key not in self._plans:
            self._plans[key] = plan_rows(self._table, *key)
        plan = self._plans[key]
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
        lent = _lent_rows(plan, views, dtype)
        return {
            model: self._output_table(plan, model, view, lent, dtype).movedim(0, axis)
            for model, view in views.items()
        }

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config of the base for the output: vocab_size and the numbers of special tokens.

        A number follows its token; if the output lacks the token, it becomes the output tokenizer's of that
        role, or None.

        Args:
            config: The base's config.json or generation_config.json.

        Returns:
            A new config.
        """
        out = copy.deepcopy(dict(config))
        nested = out.get("text_config")
        for text in [out, nested] if isinstance(nested, dict) else [out]:
            is_model = (
                text is (nested or out) and "model_type" in out
            )  # a generation config has no model_type
            if "vocab_size" in text or is_model:
                text["vocab_size"] = self.size
            for key, value in text.items():
                if key.endswith("_token_id") and value is not None:
                    text[key] = self._token_id(key, value)
        return out

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's files.

        Args:
            directory: A folder that exists.
        """
        self.tokenizer.save_pretrained(directory)

    def _token_id(self, key: str, value: Any) -> Any:
        """The numbers of a special token (one, or a list of several) in the output, None if it has none."""
        base_tokens = {row: token for token, row in self._tokens_of[self.base].rows.items()}
        numbers = value if isinstance(value, list) else [value]
        moved = [self.tokens.get(base_tokens.get(number, "")) for number in numbers]
        present = [number for number in moved if number is not None]
        if not present and key.removesuffix("_id") in _ROLES:
            number = getattr(self.tokenizer, key)
            present = [number] if number is not None and number < self.size else []
        if not present:
            return None
        return present if isinstance(value, list) else present[0]

    def _check_donors(self) -> None:
        for token, donor in self.spec.tokens:
            if token not in self.tokens:
                raise RecipeError(f"token {token!r} cannot be added to the tokenizer of '{self.spec.source}'")
            match donor.source:
                case (model, str(other)) if other not in self._tokens_of[model].rows:
                    raise RecipeError(
                        f"token '{token}' is to come from '{other}' of model '{model}', which has no such "
                        "token"
                    )
                case (model, int(row)) if row >= self._sizes[model]:
                    raise RecipeError(
                        f"token '{token}' is to come from row {row} of model '{model}', which has "
                        f"{self._sizes[model]} rows"
                    )

    def _rows_first(self, tensors: Mapping[str, Tensor], axis: int) -> dict[str, Tensor]:
        """Views of the tensors with their rows first. Raises RecipeError or CheckpointError."""
        views: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name not in self._sizes:
                raise RecipeError(
                    f"model '{name}' is not among those the vocabulary was built from. "
                    f"{suggest(name, self._sizes)}"
                )
            if not 0 <= axis < tensor.ndim or tensor.shape[axis] != self._sizes[name]:
                raise CheckpointError(
                    f"a table of '{name}' is {list(tensor.shape)}; {self._sizes[name]} rows were expected "
                    f"along axis {axis}"
                )
            views[name] = tensor.movedim(axis, 0)
            first = next(iter(views))
            if views[name].shape[1:] != views[first].shape[1:]:
                raise CheckpointError(
                    f"a table is {list(tensor.shape)} in '{name}' and {list(tensors[first].shape)} in "
                    f"'{first}'; only the rows may differ"
                )
        return views

    def _output_table(
        self, plan: RowPlan, model: str, view: Tensor, lent: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """One model's table [size, ...] in the output's rows.

        Rows without a token are the mean of the others:
        https://nlp.stanford.edu/~johnhew/vocab-expansion.html
        """
        device = view.device
        own_to, own_from = plan.own[model]
        lent_to, lent_from = plan.lent[model]
        # own_to is 0, 1, ...: the rows are in place already
        if len(own_from) == self.size and not self._free.any() and torch.equal(own_from, own_to):
            return view[: self.size].to(dtype)
        out = torch.zeros((self.size, *view.shape[1:]), dtype=dtype, device=device)
        out[own_to.to(device)] = view.index_select(0, own_from.to(device)).to(dtype)
        out[lent_to.to(device)] = lent.index_select(0, lent_from.to(device))
        if self._free.any():
            end = self.size - int(self._free.sum())
            tokens = out[~self._free.to(device)] if self._free[:end].any() else out[:end]
            out[self._free.to(device)] = tokens.mean(0)
        return out


def _check_names(spec: TokenizerSpec, base: str, parents: Mapping[str, Parent]) -> None:
    """Raises RecipeError unless a spec's models are there and no name is also a word of the spec."""
    for name in (base, *spec.models):
        if name not in parents:
            raise RecipeError(
                f"the tokenizer needs model '{name}', which is not among the models merged. "
                f"{suggest(name, parents)}"
            )
    words = {spec.source} & set(WHOLE)
    words |= {donor.source for _, donor in spec.tokens if donor.source == ZERO}
    for word in sorted(words & set(parents)):
        if (word, base) != ("base", "base"):
            raise RecipeError(
                f"the tokenizer's source '{word}' is also the name of a model that is not meant; give it "
                "another name"
            )


def _lent_rows(plan: RowPlan, views: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """[lent rows, ...]: the rows that models get for tokens they lack."""
    first = next(iter(views.values()))
    device = first.device
    out = torch.zeros((plan.lent_rows, *first.shape[1:]), dtype=dtype, device=device)
    for model, (positions, rows) in plan.single.items():
        out[positions.to(device)] = views[model].index_select(0, rows.to(device)).to(dtype)
    if len(plan.averaged):
        total = torch.zeros((len(plan.averaged), *first.shape[1:]), dtype=dtype, device=device)
        for model, index, rows in plan.shared:
            total.index_add_(0, index.to(device), views[model].index_select(0, rows.to(device)).to(dtype))
        counts = plan.counts.to(device, dtype).reshape(-1, *[1] * (first.ndim - 1))
        out[plan.averaged.to(device)] = total / counts
    return out
