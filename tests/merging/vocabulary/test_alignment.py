"""Vocabularies joined as mergekit 0.1.5 joins them, row by row; what it leaves to chance or gets wrong is a
law here.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from evomerge.checkpoints import Checkpoint
from evomerge.errors import CheckpointError, RecipeError
from evomerge.merging.vocabulary.alignment import Vocabulary, check_rows
from evomerge.merging.vocabulary.embedding_tables import vocabulary_tensors
from evomerge.recipes import TokenDonor, TokenizerSpec

REPO = Path(__file__).resolve().parents[3]
ENVIRONMENT = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV") or REPO / ".venv-mergekit")
DRIVER = """
import json, sys
import torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

torch.set_num_threads(1)
errors = {}
for file, folder in json.load(sys.stdin):
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(open(file, encoding="utf-8")))
        run_merge(config, folder, MergeOptions(lazy_unpickle=True, quiet=True, write_model_card=False))
    except Exception as error:
        errors[folder] = f"{type(error).__name__}: {error}"
print("ERRORS" + json.dumps(errors))
"""
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WIDTH = 8


# ---- parents


@dataclass(frozen=True)
class Kind:
    """A tiny model. letters, words: its BPE; added: ((text, settings), ...); rows: of the embedding, more or
    fewer than tokens by `spare`.
    """

    letters: str
    words: tuple[str, ...]
    added: tuple[tuple[str, dict[str, bool]], ...] = ()
    spare: int = 0
    dtype: torch.dtype = torch.float32
    tied: bool = False
    pad: str = "<pad>"


SPECIAL = {"special": True}
KINDS = {
    "root": Kind("abcdefgh", ("ab", "abc", "de"), (("<call>", SPECIAL),), spare=3, dtype=torch.bfloat16),
    "math": Kind(
        "hgfedcba",
        ("ab", "fg", "fgh"),
        (("<think>", SPECIAL | {"lstrip": True}), ("<call>", {"rstrip": True}), ("<sum>", {})),
    ),
    "code": Kind(
        "abcdefgh", ("de", "fg", "gh", "ghab"), (("<tool>", {"single_word": True}), ("ab", {})), spare=5
    ),
    "chat": Kind("bahgfedc", ("ab", "gh", "ghab", "fg"), spare=1),
    "few": Kind(
        "abcdefgh", ("ab", "abc", "de"), (("<call>", SPECIAL), ("<x>", {}), ("<y>", SPECIAL)), spare=1
    ),
    "same": Kind("abcdefgh", ("ab", "abc", "de"), (("<call>", SPECIAL),), spare=3),
    "swapped": Kind("abcdefgh", ("ab", "abc", "fg"), (("<call>", SPECIAL),), spare=3),
    "wide": Kind("abcdefgh", ("ab", "abc", "de"), (("<call>", SPECIAL), ("<x>", {})), spare=-2),
    "wider": Kind("abcdefgh", ("ab", "abc", "de"), (("<call>", SPECIAL), ("<x>", {})), spare=-3),
    "padless": Kind("abcdefgh", ("ab", "abc"), (("<late>", SPECIAL),), spare=-1, pad="<late>"),
    "tied-root": Kind("abcdefgh", ("ab", "abc", "de"), (("<call>", SPECIAL),), spare=3, tied=True),
    "tied-math": Kind("hgfedcba", ("ab", "fg"), (("<think>", SPECIAL),), tied=True),
}


def bpe(kind: Kind) -> Any:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *kind.letters, *kind.words])
    }
    merges = [
        (word[:n], word[n:])
        for word in kind.words
        for n in range(len(word))
        if word[:n] in vocabulary and word[n:] in vocabulary
    ]
    inner = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>"))
    roles = {"pad_token": kind.pad} if kind.pad in vocabulary else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **roles
    )
    tokenizer.add_tokens([AddedToken(text, **settings) for text, settings in kind.added])
    tokenizer.pad_token = kind.pad
    return tokenizer


def make(folder: Path, kind: Kind, seed: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = bpe(kind)
    rows = len(tokenizer.get_vocab()) + kind.spare
    config = LlamaConfig(
        vocab_size=rows, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16, tie_word_embeddings=kind.tied, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(kind.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("vocabularies")
    return {
        name: Checkpoint(make(folder / name, kind, seed)) for seed, (name, kind) in enumerate(KINDS.items())
    }


# ---- against mergekit


@dataclass(frozen=True)
class Case:
    """A merge by `linear` of one slice. weights: model → weight, in order; exact: whether mergekit's
    numbering is not up to chance.
    """

    spec: TokenizerSpec
    weights: dict[str, float]
    base: str = "root"
    exact: bool = True
    source: str = ""  # how mergekit is told the source, where its word for it is broken

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([self.base, *self.spec.models, *self.weights]))


THREE = {"root": 0.5, "math": 0.3, "code": -0.2}
TOKENS = (
    ("<new>", TokenDonor(("math", "fgh"))),
    ("abc", TokenDonor("zero")),
    ("<s>", TokenDonor(("code", 17), force=True)),
    ("de", TokenDonor("code", force=True)),
    ("<other>", TokenDonor("zero", force=True)),
    ("a", TokenDonor("math")),
    ("ab", TokenDonor("math")),
    ("c", TokenDonor(None)),
)
CASES = {
    "base": Case(TokenizerSpec("base"), THREE),
    "base-alone": Case(TokenizerSpec("base"), {"root": 1.0}),
    "base-for-one": Case(TokenizerSpec("base"), {"root": 0.0, "math": 1.0}),
    "base-padded": Case(TokenizerSpec("base", (), 8), THREE),
    "other-base": Case(TokenizerSpec("base"), {"root": 0.4, "math": 0.6}, base="math"),
    "model": Case(TokenizerSpec("code"), THREE),
    "model-padded": Case(TokenizerSpec("math", (), 7), THREE),
    "union": Case(TokenizerSpec("union"), THREE, exact=False),
    "union-for-one": Case(TokenizerSpec("union"), {"math": 1.0, "root": 0.0}, exact=False),
    "union-averages": Case(
        TokenizerSpec("union", (("<call>", TokenDonor("zero")),)), THREE | {"chat": 0.7}, exact=False
    ),
    "union-padded": Case(TokenizerSpec("union", (), 16), {"root": 0.25, "few": 0.6}),
    "union-no-padding-needed": Case(TokenizerSpec("union", (), 1), {"few": 0.25, "root": 0.6}),
    "union-base-not-mixed": Case(
        TokenizerSpec("union", (("abc", TokenDonor("zero")), ("<call>", TokenDonor("math")))),
        {"code": 0.5, "math": 0.3},
        exact=False,
    ),
    "tokens-union": Case(TokenizerSpec("union", TOKENS), THREE, exact=False),
    "tokens-model": Case(TokenizerSpec("math", TOKENS, 4), THREE),
    "tokens-base": Case(TokenizerSpec("base", TOKENS, 4), THREE, source="root"),
    "tokens-few": Case(
        TokenizerSpec("base", (("<new>", TokenDonor(("few", "<x>"))),)),
        {"few": 0.5, "root": 0.5},
        base="few",
        source="few",
    ),
    "cut": Case(TokenizerSpec("base"), {"wide": 0.5, "code": 0.5}, base="wide"),
    "cut-union": Case(TokenizerSpec("union", (), 4), {"wide": 0.5, "few": 0.5}, base="wide", exact=False),
    "tied": Case(
        TokenizerSpec("union", (), 8), {"tied-root": 0.5, "tied-math": 0.5}, base="tied-root", exact=False
    ),
}


def as_file(case: Case, zoo: dict[str, Checkpoint]) -> dict[str, Any]:
    """The case as mergekit reads it."""

    def donor(given: TokenDonor) -> dict[str, Any]:
        match given.source:
            case None:
                return {}
            case "zero":
                source: Any = {"kind": "zero"}
            case (model, what):
                source = {
                    "kind": "model_token",
                    "model": str(zoo[model].path),
                    "token" if isinstance(what, str) else "token_id": what,
                }
            case model:
                source = str(zoo[model].path)
        return {"source": source, "force": given.force}

    source = case.source or case.spec.source
    source = str(zoo[source].path) if case.source or source in zoo else source
    rest: dict[str, Any] = {"tokenizer_source": source}
    if case.spec.tokens or case.spec.pad_to_multiple_of:
        rest = {
            "tokenizer": {
                "source": source,
                "tokens": {t: donor(d) for t, d in case.spec.tokens},
                "pad_to_multiple_of": case.spec.pad_to_multiple_of,
            }
        }
    sources = [
        {"model": str(zoo[m].path), "layer_range": [0, 1], "parameters": {"weight": w}}
        for m, w in case.weights.items()
    ]
    return {
        "merge_method": "linear",
        "base_model": str(zoo[case.base].path),
        "slices": [{"sources": sources}],
        "parameters": {"normalize": False},
        "dtype": "float32",
        **rest,
    }


@pytest.fixture(scope="module")
def theirs(zoo: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.skip(
            f"there is no mergekit in {ENVIRONMENT}; run scripts/make_mergekit_env (or point "
            "EVOMERGE_MERGEKIT_ENV to where it made one)"
        )
    folder = tmp_path_factory.mktemp("mergekit")
    for name, case in CASES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(as_file(case, zoo), sort_keys=False))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    jobs = json.dumps([(str(folder / f"{name}.yaml"), str(folder / name)) for name in CASES])
    done = subprocess.run(
        [python, "-c", DRIVER],
        input=jobs,
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )
    found = [line.removeprefix("ERRORS") for line in done.stdout.splitlines() if line.startswith("ERRORS")]
    assert found, done.stderr[-2000:]
    assert json.loads(found[0]) == {}
    return {name: folder / name for name in CASES}


def linear(tables: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    out = torch.zeros_like(next(iter(tables.values())))
    for model, weight in weights.items():
        out.addcmul_(tables[model], torch.tensor(weight))
    return out


def tokenizer_in(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("name", CASES)
def test_rows_tokenizer_and_config_are_mergekits(
    zoo: dict[str, Checkpoint], theirs: dict[str, Path], name: str, tmp_path: Path
):
    case = CASES[name]
    vocabulary = Vocabulary(case.spec, case.base, {m: zoo[m] for m in case.models})
    other, merged = tokenizer_in(theirs[name]), load_file(theirs[name] / "model.safetensors")
    vocabulary.save(tmp_path)
    saved = tokenizer_in(tmp_path)
    assert saved.get_vocab() == vocabulary.tokens
    if case.exact:
        assert saved.get_vocab() == other.get_vocab()
    first = set(
        bpe(KINDS[case.base if case.spec.source in ("base", "union") else case.spec.source]).get_vocab()
    )
    assert sorted(saved.get_vocab()) == sorted(other.get_vocab())
    assert {t: i for t, i in saved.get_vocab().items() if t in first} == {
        t: i for t, i in other.get_vocab().items() if t in first
    }
    assert {str(t): repr(t) for t in saved.added_tokens_decoder.values()} == {
        str(t): repr(t) for t in other.added_tokens_decoder.values()
    }
    assert saved.special_tokens_map == other.special_tokens_map
    number = [other.get_vocab()[token] for token in vocabulary.tokens]
    own = list(vocabulary.tokens.values())
    for tensor in (EMBED,) if zoo[case.base].config["tie_word_embeddings"] else (EMBED, HEAD):
        ours = linear(
            vocabulary.align({m: zoo[m].tensor(tensor).float() for m in case.weights}), case.weights
        )
        assert ours.shape == merged[tensor].shape
        assert torch.equal(ours[own], merged[tensor][number])
        if case.exact:
            assert torch.equal(ours, merged[tensor])
        torch.testing.assert_close(
            ours[len(own) :], merged[tensor][len(own) :]
        )  # the padding: a mean over rows in some order
    written = json.loads((theirs[name] / "config.json").read_text())
    mine = vocabulary.config(zoo[case.base].config)
    assert mine["vocab_size"] == vocabulary.size == written["vocab_size"]
    if case.spec.source in ("base", "union") and case.base != "wide":
        assert {k: v for k, v in mine.items() if k.endswith("_id")} == {
            k: v for k, v in written.items() if k.endswith("_id")
        }


# ---- against a loop


def by_loop(
    vocabulary: Vocabulary, zoo: dict[str, Checkpoint], tables: dict[str, torch.Tensor], base: str
) -> dict[str, torch.Tensor]:
    """The rules of `aligned`, a row at a time."""
    listed = dict(vocabulary.spec.tokens)
    dtype = torch.stack([t.reshape(-1)[0].double() for t in tables.values()]).dtype
    vocabs = {
        m: {t: i for t, i in tokenizer_in(zoo[m].path).get_vocab().items() if i < zoo[m].config["vocab_size"]}
        for m in tables
    }
    out = {}
    for model in tables:
        rows: dict[int, torch.Tensor] = {}
        for token, number in vocabulary.tokens.items():
            donor = listed.get(token, TokenDonor(None))
            having = [m for m in tables if token in vocabs[m]]
            if model in having and not donor.force:
                row = tables[model][vocabs[model][token]]
            elif donor.source == "zero":
                row = torch.zeros_like(tables[model][0])
            elif isinstance(donor.source, tuple):
                whose, what = donor.source
                row = tables[whose][what if isinstance(what, int) else vocabs[whose][what]]
            elif donor.source is not None:
                row = tables[donor.source][vocabs[donor.source][token]]
            elif base in having:
                row = tables[base][vocabs[base][token]]
            else:
                row = torch.stack([tables[m][vocabs[m][token]].to(dtype) for m in having]).mean(0)
            rows[number] = row.to(dtype)
        mean = torch.stack(list(rows.values())).mean(0)
        out[model] = torch.stack([rows.get(i, mean) for i in range(vocabulary.size)])
    return out


@pytest.mark.parametrize("name", CASES)
def test_aligned_is_the_rules_a_row_at_a_time(zoo: dict[str, Checkpoint], name: str):
    case = CASES[name]
    vocabulary = Vocabulary(case.spec, case.base, {m: zoo[m] for m in case.models})
    tables = {m: zoo[m].tensor(EMBED) for m in case.weights}
    for base in (None, next(reversed(case.weights))):
        expected = by_loop(vocabulary, zoo, {m: t.double() for m, t in tables.items()}, base or case.base)
        found = vocabulary.align(tables, base=base)
        wide = torch.bfloat16 if set(case.weights) == {"root"} else torch.float32
        assert list(found) == list(tables)
        for model in tables:
            assert found[model].dtype == wide
            torch.testing.assert_close(
                found[model].double(),
                expected[model],
                rtol=1e-6 if wide == torch.float32 else 1e-2,
                atol=1e-6,
            )


def test_rows_along_another_axis_and_a_bias(zoo: dict[str, Checkpoint]):
    vocabulary = Vocabulary(TokenizerSpec("union", (), 8), "root", {m: zoo[m] for m in THREE})
    tables = {m: zoo[m].tensor(EMBED) for m in THREE}
    plain = vocabulary.align(tables)
    across = vocabulary.align({m: t.T.contiguous() for m, t in tables.items()}, axis=1)
    biases = vocabulary.align({m: t[:, 3] for m, t in tables.items()})
    for model in THREE:
        assert torch.equal(across[model].T, plain[model])
        torch.testing.assert_close(biases[model], plain[model][:, 3])


# ---- laws


@pytest.mark.parametrize("source", ["base", "union", "same"])
def test_equal_vocabularies_keep_their_rows_unchanged(zoo: dict[str, Checkpoint], source: str):
    vocabulary = Vocabulary(TokenizerSpec(source), "root", {m: zoo[m] for m in ("root", "same")})
    tables = {m: zoo[m].tensor(EMBED) for m in ("root", "same")}
    tokens = len(bpe(KINDS["root"]).get_vocab())
    for model, table in vocabulary.align(tables).items():
        assert torch.equal(table, tables[model][:tokens].float())
    exact = Vocabulary(
        TokenizerSpec("base"), "math", {"math": zoo["math"]}
    )  # a row for each token: nothing is even copied
    table = zoo["math"].tensor(EMBED)
    assert exact.align({"math": table})["math"].data_ptr() == table.data_ptr()


@pytest.mark.parametrize("source", ["base", "union", "math"])
def test_every_token_of_a_parent_has_the_parents_own_row(zoo: dict[str, Checkpoint], source: str):
    vocabulary = Vocabulary(TokenizerSpec(source, (), 32), "root", {m: zoo[m] for m in THREE})
    tables = {m: zoo[m].tensor(EMBED) for m in THREE}
    found = vocabulary.align(tables)
    for model, table in found.items():
        own = bpe(KINDS[model]).get_vocab()
        shared = [token for token in own if token in vocabulary.tokens]
        assert len(shared) >= 12
        assert torch.equal(
            table[[vocabulary.tokens[t] for t in shared]], tables[model][[own[t] for t in shared]].float()
        )
    assert vocabulary.size % 32 == 0


def test_a_union_is_numbered_alike_every_time_with_the_parents_in_order(zoo: dict[str, Checkpoint]):
    vocabulary = Vocabulary(TokenizerSpec("union"), "root", {m: zoo[m] for m in ("math", "code", "root")})
    new = sorted(
        set(vocabulary.tokens) - set(bpe(KINDS["root"]).get_vocab()), key=vocabulary.tokens.__getitem__
    )
    assert new == ["fg", "fgh", "gh", "ghab", "<think>", "<sum>", "<tool>"]


# ---- where mergekit crashes or gives rows of zeros


def test_listed_tokens_are_new_rows_of_the_base_too(zoo: dict[str, Checkpoint]):
    """mergekit gives the base, which has rows to spare, its padding row for the token."""
    spec = TokenizerSpec("base", (("<new>", TokenDonor(("math", "<think>"))),))
    vocabulary = Vocabulary(spec, "root", {m: zoo[m] for m in ("root", "math")})
    tables = {m: zoo[m].tensor(EMBED) for m in ("root", "math")}
    think = tables["math"][bpe(KINDS["math"]).get_vocab()["<think>"]]
    for table in vocabulary.align(tables).values():
        assert torch.equal(table[vocabulary.tokens["<new>"]], think)


def test_a_token_without_a_row_counts_as_lacking(zoo: dict[str, Checkpoint]):
    """mergekit crashes if the model without that row is not the base, or if the token is one that BPE merges
    to.
    """
    parents = {m: zoo[m] for m in ("root", "wider")}
    vocabulary = Vocabulary(TokenizerSpec("base"), "root", parents)
    found = vocabulary.align({m: zoo[m].tensor(EMBED) for m in parents})
    for token in ("de", "<call>"):
        row = vocabulary.tokens[token]
        assert torch.equal(found["wider"][row], found["root"][row])
    for of_wider in (
        Vocabulary(TokenizerSpec("wider"), "root", parents),
        Vocabulary(TokenizerSpec("base"), "wider", parents),
    ):
        assert {"<call>", "<x>", "de"}.isdisjoint(of_wider.tokens)
        assert of_wider.size == zoo["wider"].config["vocab_size"]
        assert of_wider.tokenizer.tokenize("abcde") == ["abc", "d", "e"]


def test_a_role_goes_with_its_token_and_comes_back_with_it(zoo: dict[str, Checkpoint], tmp_path: Path):
    alone = Vocabulary(TokenizerSpec("base"), "padless", {m: zoo[m] for m in ("padless", "root")})
    alone.save(tmp_path)
    saved = tokenizer_in(tmp_path)
    assert saved.pad_token is None
    assert max(saved.get_vocab().values()) < alone.size
    spec = TokenizerSpec("base", (("<late>", TokenDonor("zero")),))
    back = Vocabulary(spec, "padless", {m: zoo[m] for m in ("padless", "root")})
    assert back.tokenizer.pad_token == "<late>"
    assert back.tokenizer.pad_token_id == back.size - 1


@pytest.mark.parametrize("model", ["WordLevel", "Unigram"])
def test_other_tokenizers_than_bpe_are_cut_too(zoo: dict[str, Checkpoint], tmp_path: Path, model: str):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    rows = zoo["math"].config["vocab_size"]
    words = ["<unk>", *(f"w{i}" for i in range(rows))]
    inner = (
        models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
        if model == "WordLevel"
        else models.Unigram([(w, -1.0) for w in words], 0)
    )
    copied(zoo["math"], tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(inner), unk_token="<unk>").save_pretrained(tmp_path)
    assert sorted(Vocabulary(TokenizerSpec("base"), "m", {"m": Checkpoint(tmp_path)}).tokens) == sorted(
        words[:rows]
    )


def test_numbers_without_a_token_get_the_mean_row(zoo: dict[str, Checkpoint], tmp_path: Path):
    copied(zoo["chat"], tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    number = data["model"]["vocab"].pop("gh")
    data["model"]["merges"] = []
    file.write_text(json.dumps(data))
    gap = Checkpoint(tmp_path)
    vocabulary = Vocabulary(TokenizerSpec("base"), "gap", {"gap": gap})
    table = gap.tensor(EMBED)
    found = vocabulary.align({"gap": table})["gap"]
    others = [i for i in range(vocabulary.size) if i != number]
    assert vocabulary.size == len(bpe(KINDS["chat"]).get_vocab()) == len(vocabulary.tokens) + 1
    assert torch.equal(found[others], table[others])
    torch.testing.assert_close(found[number], table[others].mean(0))


def test_special_numbers_follow_their_tokens(zoo: dict[str, Checkpoint]):
    base, code = dict(zoo["root"].config), zoo["math"]
    vocabulary = Vocabulary(TokenizerSpec("math"), "root", {"root": zoo["root"], "math": code})
    call = bpe(KINDS["root"]).get_vocab()["<call>"]
    base |= {
        "eos_token_id": [2, call, 5000],
        "pad_token_id": call - 2,
        "text_config": {"vocab_size": 3, "bos_token_id": 1},
    }
    found = vocabulary.config(base)
    assert found["eos_token_id"] == [2, vocabulary.tokens["<call>"]]
    assert found["pad_token_id"] == 0, "math lacks 'abc': its own padding token"
    assert found["text_config"] == {"vocab_size": vocabulary.size, "bos_token_id": 1}
    assert found["vocab_size"] == vocabulary.size
    assert base["vocab_size"] != vocabulary.size
    assert vocabulary.config({"eos_token_id": call}) == {"eos_token_id": vocabulary.tokens["<call>"]}


def test_a_parent_without_tokenizer_files_has_the_bases(zoo: dict[str, Checkpoint], tmp_path: Path):
    copied(zoo["same"], tmp_path, tokenizer=False)
    bare = Checkpoint(tmp_path)
    vocabulary = Vocabulary(TokenizerSpec("union"), "root", {"root": zoo["root"], "bare": bare})
    assert vocabulary.tokens == bpe(KINDS["root"]).get_vocab()
    assert check_rows({"root": zoo["root"], "bare": bare}, "root") is None
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        Vocabulary(TokenizerSpec("union"), "math", {"math": zoo["math"], "bare": bare})
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        Vocabulary(TokenizerSpec("base"), "bare", {"root": zoo["root"], "bare": bare})


def copied(parent: Checkpoint, folder: Path, tokenizer: bool = True) -> None:
    for file in parent.path.iterdir():
        if tokenizer or not file.name.startswith("tokenizer"):
            (folder / file.name).write_bytes(file.read_bytes())


# ---- errors


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TokenizerSpec("mth"), "needs model 'mth'.*Did you mean 'math'"),
        (TokenizerSpec("union", (("<n>", TokenDonor("chat")),)), "needs model 'chat'"),
        (
            TokenizerSpec("union", (("<n>", TokenDonor(("math", "<tool>"))),)),
            "'<n>' is to come from '<tool>' of model 'math', which has no such",
        ),
        (
            TokenizerSpec("union", (("<n>", TokenDonor(("math", 18))),)),
            "row 18 of model 'math', which has 18 rows",
        ),
        (
            TokenizerSpec("union", (("<n>", TokenDonor("math")),)),
            "'<n>' is to come from model 'math', which lacks it",
        ),
        (
            TokenizerSpec("union", (("<n>", TokenDonor(None)),)),
            "no row for token '<n>' .*none of root, math, code has it; list it",
        ),
        (
            TokenizerSpec("union", (("a", TokenDonor("few", force=True)),)),
            "from model 'few', which is not mixed here",
        ),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_sentence(
    zoo: dict[str, Checkpoint], spec: TokenizerSpec, message: str
):
    extra = ("few",) if "few" in spec.models else ()
    with pytest.raises(RecipeError, match=message):
        Vocabulary(spec, "root", {m: zoo[m] for m in (*THREE, *extra)}).align(
            {m: zoo[m].tensor(EMBED) for m in THREE}
        )


def test_tokens_that_none_of_the_mixed_models_has_are_refused(zoo: dict[str, Checkpoint]):
    vocabulary = Vocabulary(TokenizerSpec("base"), "root", {m: zoo[m] for m in THREE})
    with pytest.raises(RecipeError, match=r"no row for token 'abc' \(and \d more\).*none of code has it"):
        vocabulary.align({"code": zoo["code"].tensor(EMBED)})
    assert vocabulary.align({}) == {}


def test_a_table_that_does_not_fit_is_named(zoo: dict[str, Checkpoint]):
    vocabulary = Vocabulary(TokenizerSpec("base"), "root", {m: zoo[m] for m in THREE})
    with pytest.raises(CheckpointError, match=r"of 'math' is \[8, 18\]; 18 rows were expected along axis 0"):
        vocabulary.align({"math": zoo["math"].tensor(EMBED).T})
    with pytest.raises(
        CheckpointError, match=r"\[18, 4\] in 'math' and \[19, 8\] in 'root'; only the rows may differ"
    ):
        vocabulary.align({"root": zoo["root"].tensor(EMBED), "math": zoo["math"].tensor(EMBED)[:, :4]})
    with pytest.raises(RecipeError, match="'chat' is not among"):
        vocabulary.align({"chat": zoo["chat"].tensor(EMBED)})


def test_a_broken_tokenizer_and_a_doubtful_name_are_said(zoo: dict[str, Checkpoint], tmp_path: Path):
    copied(zoo["root"], tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "none"}}')
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read"):
        Vocabulary(TokenizerSpec("base"), "m", {"m": Checkpoint(tmp_path)})
    with pytest.raises(RecipeError, match="'union' is also the name of a model"):
        Vocabulary(TokenizerSpec("union"), "root", {"root": zoo["root"], "union": zoo["math"]})


# ---- without a spec


def test_vocabularies_that_differ_in_equal_shapes_are_told(zoo: dict[str, Checkpoint]):
    assert check_rows({m: zoo[m] for m in ("root", "same")}, "root") is None
    warning = check_rows({m: zoo[m] for m in ("root", "same", "swapped", "few")}, "same")
    expected = (
        "the vocabularies of 'swapped', 'few' and base 'same' differ though all have 19 rows: "
        "row 14 is 'de' in 'same' and 'fg' in 'swapped'"
    )
    assert warning is not None
    assert warning.startswith(expected)
    extra = check_rows({m: zoo[m] for m in ("root", "few")}, "root")
    assert extra is not None
    assert "row 16 is no token in 'root' and '<x>' in 'few'" in extra
    with pytest.raises(
        CheckpointError,
        match="model 'math' has 18 embedding rows and base 'root' 19; add 'tokenizer_source: union'",
    ):
        check_rows({m: zoo[m] for m in ("root", "math")}, "root")


def test_vocabulary_tensors_are_embedding_and_head(zoo: dict[str, Checkpoint], tiny: dict[str, Path]):
    assert vocabulary_tensors(zoo["root"]) == (HEAD, EMBED)
    assert vocabulary_tensors(zoo["tied-root"]) == (EMBED,)
    assert vocabulary_tensors(Checkpoint(tiny["base"])) == (HEAD, EMBED)


def test_a_table_of_positions_is_none_and_a_heads_bias_is_one(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

    GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path / "gpt2")
    assert vocabulary_tensors(Checkpoint(tmp_path / "gpt2")) == ("transformer.wte.weight",)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    PhiForCausalLM(PhiConfig(vocab_size=16, bos_token_id=1, eos_token_id=1, **sizes)).save_pretrained(
        tmp_path / "phi"
    )
    assert vocabulary_tensors(Checkpoint(tmp_path / "phi")) == ("lm_head.bias", HEAD, EMBED)


@pytest.mark.parametrize(("size", "rows"), [(20, None), (-1, None), ("x", None), (None, 19)])
def test_rows_that_the_config_denies_or_leaves_out(
    zoo: dict[str, Checkpoint], tmp_path: Path, size: Any, rows: int | None
):
    copied(zoo["root"], tmp_path)
    config = {k: v for k, v in zoo["root"].config.items() if k != "vocab_size"} | (
        {} if size is None else {"vocab_size": size}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    parent = Checkpoint(tmp_path)
    if rows is None:
        with pytest.raises(CheckpointError, match="vocab_size"):
            vocabulary_tensors(parent)
    else:
        assert vocabulary_tensors(parent) == (HEAD, EMBED)
        vocabulary = Vocabulary(TokenizerSpec("base"), "m", {"m": parent})
        assert vocabulary.config(parent.config)["vocab_size"] == vocabulary.size


# ---- the wish itself


@pytest.mark.parametrize("spec", [case.spec for case in CASES.values()])
def test_a_spec_comes_back_from_json_and_hashes(spec: TokenizerSpec):
    assert TokenizerSpec.from_plain(json.loads(json.dumps(spec.to_plain()))) == spec
    assert hash(TokenizerSpec.from_plain(spec.to_plain())) == hash(spec)


def test_a_spec_names_its_models():
    spec = TokenizerSpec("code", TOKENS)
    assert spec.models == ("code", "math")
    assert TokenizerSpec("union").models == TokenizerSpec("base", (("x", TokenDonor("zero")),)).models == ()


PLAIN = {"source": "union", "tokens": [], "pad_to_multiple_of": None}


@pytest.mark.parametrize(
    "data",
    [
        None, [], {}, PLAIN | {"more": 1}, PLAIN | {"source": None}, PLAIN | {"source": ""},
        PLAIN | {"pad_to_multiple_of": 0},
        PLAIN | {"pad_to_multiple_of": True}, PLAIN | {"pad_to_multiple_of": 1.5},
        PLAIN | {"tokens": {"a": {}}}, PLAIN | {"tokens": ["ab"]},
        PLAIN | {"tokens": [["a", {"source": "zero"}]]},
        PLAIN | {"tokens": [["a", {"source": 3, "force": False}]]},
        PLAIN | {"tokens": [["a", {"source": ["m", -1], "force": False}]]},
        PLAIN | {"tokens": [["a", {"source": ["m", True], "force": False}]]},
        PLAIN | {"tokens": [["a", {"source": ["m"], "force": False}]]},
        PLAIN | {"tokens": [["a", {"source": "zero", "force": 1}]]},
        PLAIN | {"tokens": [["a", {"source": None, "force": True}]]},
        PLAIN | {"tokens": [["", {"source": "zero", "force": False}]]},
        PLAIN | {"tokens": [[3, {"source": "zero", "force": False}]]},
        PLAIN | {"tokens": [["a", {"source": "m", "force": False}]] * 2},
    ],
)  # fmt: skip
def test_any_other_text_is_refused(data: Any):
    with pytest.raises(RecipeError):
        TokenizerSpec.from_plain(data)


def test_the_wish_needs_neither_torch_nor_transformers():
    code = (
        "import sys, evomerge.recipes.tokenizer_spec; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([os.sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0  # type: ignore[attr-defined]
