"""Static batching of greedy decoding.

Every row of a batch takes one token at each forward, over the model's own cache.

Two ways to batch prompts of different lengths. Padded, as transformers' `generate` does it: padding on the
left, masked. Unpadded: as many tokens as the shortest row has are prefilled, then the longer prompts are fed
token by token while the shorter ones already generate. Nothing is masked and no position differs between
rows, so that it is right for whatever can decode one row. Finished rows are dropped by forking the cache. For
recurrent and hybrid models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evomerge.evaluation.inference import kv_cache
from evomerge.evaluation.inference.forward import Forward
from evomerge.evaluation.inference.generation_plan import Chunk, GenerationPlan, Texts, shared_cache

_SHRINK_BELOW = 0.75  # a batch is cut to its running rows when they are fewer than this part of it


def decode(plan: GenerationPlan, forward: Forward, texts: Texts) -> None:
    """Decodes every chunk of a plan.

    Args:
        plan: The plan.
        forward: The model.
        texts: Where tokens are added.
    """
    number, prefix = None, None
    for chunk in plan.chunks:
        if chunk.prefix != number:
            number = chunk.prefix
            prefix = None if number is None else forward.prefill(plan.prefixes[number], windowed=True)
        if chunk.mask is not None:
            _padded(chunk, forward, texts)
        else:
            _unpadded(plan, chunk, forward, texts, prefix)


def _padded(chunk: Chunk, forward: Forward, texts: Texts) -> None:
    """One left-padded batch."""
    assert chunk.mask is not None
    past = kv_cache.new_cache(forward.model)
    mask = chunk.mask
    requests = list(chunk.requests)
    rows = torch.arange(len(requests), device=forward.device)
    new, going = texts.add(
        requests, forward(chunk.rows, chunk.ids, past, positions=chunk.positions, mask=mask)
    )
    positions = mask.sum(1, keepdim=True)  # [n, 1]
    places = going  # rows of the batch that run; of each, `requests` holds the prompt
    while places:
        if len(places) < _SHRINK_BELOW * len(rows):
            index = torch.tensor(places, device=forward.device)
            past, mask, positions = kv_cache.fork(past, index=index), mask[index], positions[index]
            requests, new = [requests[p] for p in places], [new[p] for p in places]
            rows, places = rows[: len(places)], list(range(len(places)))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        ids = torch.tensor(new, device=forward.device)[:, None]
        read = torch.tensor(places, device=forward.device)
        # purely recurrent models take no mask here: a generated token is no padding
        seen = None if forward.argument == "cache_params" else mask
        logits = forward(read, ids, past, positions=positions, mask=seen)
        positions = positions + 1
        places, new = _add(texts, requests, places, new, logits)


def _unpadded(plan: GenerationPlan, chunk: Chunk, forward: Forward, texts: Texts, prefix: Any) -> None:
    """One batch without padding: chunk.ids ends where the shortest prompt does."""
    requests, lengths = list(chunk.requests), list(chunk.lengths)
    ids, seen = chunk.ids, min(chunk.lengths)
    past = None if forward.argument is None else shared_cache(forward, chunk, prefix, windowed=True)
    whole = ids  # all tokens of each row, for models without a cache that can be forked
    new = [0] * len(requests)
    places = list(range(len(requests)))
    while places:
        read = [p for p in places if lengths[p] <= seen]  # the others still have prompt to be fed
        width = ids.shape[1]
        rows = torch.tensor([p * width + width - 1 for p in read or places[:1]], device=forward.device)
        positions = torch.arange(seen - width, seen, device=forward.device).expand(len(requests), -1)
        logits = forward(rows, ids, past, positions=positions)
        going = set(places)
        if read:
            left, new = _add(texts, requests, read, new, logits)
            going -= set(read) - set(left)
        for p in places:
            if lengths[p] > seen:
                new[p] = plan.prompts[requests[p]][seen]
        places = [p for p in places if p in going]
        if len(places) < _SHRINK_BELOW * len(requests):
            index = torch.tensor(places, dtype=torch.long, device=forward.device)
            past = kv_cache.fork(past, index=index) if past is not None and places else past
            requests, lengths, new = ([column[p] for p in places] for column in (requests, lengths, new))
            whole, places = whole[index], list(range(len(places)))
        ids = torch.tensor(new, device=forward.device)[:, None]
        if past is None:
            ids = whole = torch.cat([whole, ids], 1)
        seen += 1


def _add(
    texts: Texts, requests: list[int], places: list[int], new: list[int], logits: Tensor
) -> tuple[list[int], list[int]]:
    """Adds a token to the requests at places from logits [len(places), V].

    (places that go on, last token of every row).
    """
    tokens, going = texts.add([requests[p] for p in places], logits)
    new = list(new)
    for p, token in zip(places, tokens, strict=True):
        new[p] = token
    return [places[k] for k in going], new
