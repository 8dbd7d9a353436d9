"""Before a search of routes: whether layers can be routed, and the perplexity screen of routes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from evomerge.checkpoints import Parent
from evomerge.config import Config
from evomerge.errors import ConfigError
from evomerge.evaluation import TaskSet, perplexity_screen
from evomerge.evaluation.perplexity_screen import PerplexityScreen
from evomerge.merging.model_loading import load_tokenizer
from evomerge.workers.worker import Worker

_SHARE = 0.01  # of the tokens that a candidate is scored on, which the screen looks at
_LEAST_TOKENS, _MOST_TOKENS = 64, 2000
_TOKENS_A_PROMPT = 8  # prompts are at least about so long: it says how many are needed

TokenIds = list[int]


def check_routes(
    settings: Config, scorer: Worker, tasks: TaskSet, max_nats_per_token: float | None
) -> float | None:
    """Checks that the parents' layers can be routed, and gives the worker its perplexity screen.

    Args:
        settings: The settings of the search.
        scorer: The worker of this process.
        tasks: The tasks, whose prompts are screened on.
        max_nats_per_token: The limit of a study that is resumed, None for a new one.

    Returns:
        The limit, None without a screen.

    Raises:
        RouteError: If a route would be wrong.
        FoldError: If the scale of a hidden state cannot be folded into a layer's weights.
    """
    if "routes" not in settings.kinds:
        return None
    names = settings.routes.models or tuple(settings.models)
    scorer.builder.check_routable(names, settings.routes.scales != "none")
    scorer.screen = open_screen(settings, tasks, scorer, max_nats_per_token)
    return scorer.screen.max_nats_per_token if scorer.screen else None


def open_screen(
    settings: Config, tasks: TaskSet, scorer: Worker, max_nats_per_token: float | None
) -> PerplexityScreen | None:
    """The perplexity screen that a route has to pass before it is scored in full.

    Args:
        settings: The settings of the search.
        tasks: The tasks, whose prompts are screened on.
        scorer: A worker, whose parents give the limit of a new study.
        max_nats_per_token: The limit of a study that is resumed, None for a new one.

    Returns:
        The screen; None where the settings ask for none, or the tasks have no prompts.

    Raises:
        ConfigError: If no parent gives finite logits.
    """
    given = settings.routes.perplexity_screen
    if given is None or "routes" not in settings.kinds:
        return None
    most = given.tokens or _MOST_TOKENS
    texts = _tokenized(tasks.examples(most // _TOKENS_A_PROMPT), scorer.parents[settings.base])
    if given.tokens is None and texts:
        most = _default_tokens(settings, tasks, texts)
    rows = perplexity_screen.screen_texts(texts, most)
    if not rows:
        return None
    if max_nats_per_token is None:
        measured = [
            perplexity_screen.nats_per_token(scorer.builder.model(name), rows) for name in settings.models
        ]
        max_nats_per_token = round(min(measured) + math.log(given.factor), 4)
        if not math.isfinite(max_nats_per_token):
            raise ConfigError("no parent gives finite logits on the prompts of the search; check the models")
    return PerplexityScreen(rows, max_nats_per_token)


def _tokenized(examples: Sequence[tuple[str, str]], base: Parent) -> list[tuple[TokenIds, TokenIds]]:
    """(prompt, prompt and right answer) of each example as token ids."""
    tokenizer = load_tokenizer(base)
    encode: Callable[[str], Mapping[str, Sequence[int]]] = tokenizer  # type: ignore[assignment]

    def ids(text: str) -> TokenIds:
        return list(encode(text)["input_ids"])

    return [(ids(prompt), ids(prompt + answer)) for prompt, answer in examples]


def _default_tokens(settings: Config, tasks: TaskSet, texts: Sequence[tuple[TokenIds, TokenIds]]) -> int:
    """A hundredth of what a candidate is scored on, as far as one prompt for each item tells."""
    per_generation = {
        subtask: settings.evaluation.items_of(t.task)
        for t in settings.tasks
        for subtask, _ in tasks.subtasks(t.task)
    }
    search = tasks.items("search")
    num_items = sum(min(len(ids), per_generation.get(task, 0)) for task, ids in search.items())
    mean_length = sum(len(whole) for _, whole in texts) / len(texts)
    return max(_LEAST_TOKENS, min(_MOST_TOKENS, int(_SHARE * num_items * mean_length)))
