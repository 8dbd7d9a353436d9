"""What plan and run say of memory: known models on cards that are not here, from headers alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.config import Config, loading
from evomerge.config.schema import StageConfig
from evomerge.errors import ConfigError, SetupError
from evomerge.launch import memory
from evomerge.launch.memory import Cards, check_memory, memory_request, named_cards, plan_data
from tests.support.toy import in_process

GB = 10**9
CONFIGS = {  # hidden, inner, heads, heads of keys, vocabulary, layers
    "7B": (3584, 18944, 28, 4, 152064, 28),  # Qwen2.5
    "13B": (5120, 13824, 40, 40, 32000, 40),  # Llama 2
    "32B": (5120, 27648, 40, 8, 152064, 64),  # Qwen2.5
    "70B": (8192, 28672, 64, 8, 128256, 80),  # Llama 3
}


def parent(name: str) -> Any:
    """A model as its headers and config show it, bfloat16."""
    hidden, inner, heads, kv_heads, vocabulary, layers = CONFIGS[name]
    kv = 128 * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        stem = f"model.layers.{i}"
        shapes |= {f"{stem}.self_attn.{p}_proj.weight": (128 * heads, hidden) for p in "qo"}
        shapes |= {f"{stem}.self_attn.{p}_proj.weight": (kv, hidden) for p in "kv"}
        shapes |= {f"{stem}.mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up", "down")}
        shapes |= {f"{stem}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    tensors = {name: TensorInfo(shape, "BF16", "model.safetensors") for name, shape in shapes.items()}
    config = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": vocabulary,
    }
    return SimpleNamespace(
        config=config, tensors=tensors, layout=layout_of(tensors, "model.layers", layers, (), name)
    )


def search(method: str = "task_arithmetic", **cluster: Any) -> Config:
    """A search over a base and three fine-tunes."""
    settings, _ = loading.load("qwen3-trio")
    models = {name: next(iter(settings.models.values())) for name in ("base", "math", "code", "chat")}
    return settings.model_copy(
        update={
            "models": models,
            "base": "base",
            "method": method,
            "cluster": settings.cluster.model_copy(update=cluster),
        }
    )


def parents(name: str) -> dict[str, Any]:
    """Four models of a size."""
    return dict.fromkeys(("base", "math", "code", "chat"), parent(name))


def planned(name: str, cards: str, settings: Config | None = None) -> dict[str, Any]:
    return plan_data(settings or search(), parents(name), named_cards(cards))


@pytest.mark.parametrize(
    ("name", "cards", "gpus", "workers", "streams"),
    [
        ("7B", "8x141GB", 1, 8, False),
        ("7B", "8x80GB", 2, 4, False),
        ("7B", "1x80GB", 1, 1, True),
        ("13B", "8x141GB", 1, 8, False),
        ("13B", "8x80GB", 2, 4, False),
        ("32B", "8x141GB", 3, 2, False),
        ("32B", "8x80GB", 5, 1, False),
        ("70B", "8x141GB", 6, 1, False),
        ("70B", "8x80GB", 8, 1, True),
    ],
)
def test_cards_that_the_table_of_the_design_says(
    name: str, cards: str, gpus: int, workers: int, streams: bool
) -> None:
    data = planned(name, cards)
    assert (data["gpus"], data["workers"], data["fits"]) == (gpus, workers, True)
    assert any("streamed from pinned memory" in line for line in data["lines"]) is streams


def test_the_lines_of_a_plan() -> None:
    assert planned("7B", "2x80GB")["lines"] == [
        "1 worker, 2 cards each",
        "card 0, layers 0 to 10: live 7.3, parents 29.2, scoring 6.7, reserve 2.0 of 85.0 GB, 39.8 GB left",
        "card 1, layers 11 to 27: live 7.9, parents 31.7, scoring 5.4, reserve 2.0 of 85.0 GB, 38.0 GB left",
        "a worker has one card unless the search file says cluster.gpus: 2",
    ]
    assert planned("7B", "80 gb")["lines"][-2:] == [
        "chat: 8 layers streamed from pinned memory, 3.7 GB for each candidate",
        "the host needs 3.7 GB for each worker that can be pinned",
    ]


def test_cards_of_a_worker_are_those_of_the_search_file() -> None:
    four = planned("7B", "8x80GB", search(gpus=4))
    assert (four["gpus"], four["workers"]) == (4, 2)
    shared = planned("7B", "2x141GB", search(gpus=0.5))
    assert (shared["gpus"], shared["workers"]) == (1, 4)
    assert shared["lines"][0] == "4 workers, 2 to a card"


def test_what_does_not_fit_is_said_and_refused_at_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    data = planned("70B", "2x80GB", search(gpus=2))
    assert not data["fits"]
    assert "take cluster.gpus: 10 of such cards" in data["lines"][0]
    two = Cards((85 * GB,) * 2, 1000 * GB, "2 x card")
    with pytest.raises(SetupError, match=r"take cluster\.gpus: 10"):
        check_memory(search(gpus=2), parents("70B"), two)
    assert check_memory(search(), parents("7B"), two).startswith("memory: card: live 15.2, ")
    assert check_memory(search(ray="10.0.0.1:6379"), parents("70B"), two) == ""
    assert check_memory(search(), parents("70B"), None) == ""


def test_rank_tables_of_della_are_planned() -> None:
    request = memory_request(search("della"), parents("7B"), 85 * GB)
    assert round(request.ranks / GB, 1) == 45.7
    assert memory_request(search("ties"), parents("7B"), 85 * GB).ranks == 0
    lines = planned("7B", "80GB", search("della"))["lines"]
    assert any(line.startswith("rank tables: 0.4 GB of 45.7 GB are kept") for line in lines)


def test_a_search_of_routes_has_its_parents_as_live_models_too() -> None:
    routes = search().model_copy(
        update={"stages": (StageConfig(stage="routes"), StageConfig(stage="weights"))}
    )
    assert memory_request(routes, parents("7B"), 85 * GB).live_models == 1 + 4
    assert memory_request(search(), parents("7B"), 85 * GB).live_models == 1


def test_on_a_cpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 10 * GB)
    assert plan_data(search(), parents("7B"), None)["lines"] == [
        "15.2 GB for each worker, 60.9 GB of parents stay in their files; 10.0 GB are available: too little"
    ]
    elsewhere = plan_data(search(ray="auto"), parents("7B"), None)["lines"]
    assert elsewhere == ["the cards of the cluster are not known here; --cards 4x80GB plans for such"]


@pytest.mark.parametrize(
    ("text", "count", "size"), [("4x80GB", 4, 85.0), ("141GB", 1, 149.9), ("2 x 24 gb", 2, 25.5)]
)
def test_cards_by_the_size_that_they_are_sold_with(text: str, count: int, size: float) -> None:
    cards = named_cards(text)
    assert len(cards.sizes) == count
    assert round(cards.sizes[0] / GB, 1) == size


@pytest.mark.parametrize(
    "text", ["", "4", "x80GB", "0x80GB", "4x0GB", "4x80", "9999x80GB", "4x80GB4x80GB", "-1GB"]
)
def test_other_words_for_cards_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a number and a size such as 4x80GB"):
        named_cards(text)


def test_plan_prints_it(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    code, out, err = in_process("plan", finished / "small.yaml", "--cards", "2x80GB")
    assert code == 0, err
    assert "memory of 2 x 80 GB: 2 workers, a card each\n  card: " in out
    code, out, err = in_process("plan", finished / "small.yaml")
    assert len([line for line in out.splitlines() if line.startswith("memory: ")]) == 1
    code, _, err = in_process("plan", finished / "small.yaml", "--cards", "two")
    assert code == 2
    assert "--cards is a number and a size" in err
