"""What is said where a task cannot be loaded."""

from __future__ import annotations

from importlib.metadata import requires

import pytest

from evomerge.evaluation.lm_harness.load_errors import explained, extra_of


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("langdetect", "ifeval"),
        ("immutabledict", "ifeval"),
        ("antlr4", "math"),
        ("math_verify", "math"),
        ("wonderwords", "ruler"),
        ("rouge_score", "japanese-leaderboard"),
        ("no_such_module", None),
    ],
)
def test_a_missing_package_names_the_extra_that_brings_it(module: str, extra: str | None) -> None:
    assert extra_of(module) == extra
    assert extra is None or any(f'extra == "{extra}"' in line for line in requires("lm_eval") or [])


def test_a_task_whose_package_is_missing_said_only_no_module() -> None:
    error = RuntimeError("lm-eval could not build it")
    error.__cause__ = ModuleNotFoundError("No module named 'langdetect'", name="langdetect")
    text = explained("ifeval", error)
    assert text.startswith("task 'ifeval' cannot be loaded: it needs the package 'langdetect'")
    assert text.endswith('pip install "lm-eval[ifeval]"')
    other = explained("mine", ModuleNotFoundError("No module named 'my_tools.deep'", name="my_tools.deep"))
    assert other.endswith("pip install my-tools")


def test_lm_evals_own_words_for_a_missing_package_name_the_extra_too() -> None:
    own = ModuleNotFoundError("`sympy` is required; install it via pip install lm-eval[math] or -e .[math]")
    assert explained("minerva", own).endswith('an extra of lm-eval: pip install "lm-eval[math]"')
    own.__context__ = ModuleNotFoundError("No module named 'sympy'", name="sympy")
    assert explained("minerva", own).endswith(
        "'sympy', of an extra of lm-eval: pip install \"lm-eval[math]\""
    )


@pytest.mark.parametrize("kind", ["ConnectionError", "OfflineModeIsEnabled", "ValueError"])
def test_data_that_are_not_here_name_the_cache(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", "/data/cache")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    error = type(kind, (Exception,), {})("Couldn't reach 'openai/gsm8k' on the Hub\nmore lines")
    text = explained("gsm8k", error)
    assert "its data are not on this machine: Couldn't reach 'openai/gsm8k' on the Hub;" in text
    assert "unset HF_DATASETS_OFFLINE" in text
    assert "HF_DATASETS_CACHE" in text
    assert "/data/cache" in text
    assert "\n" not in text


def test_another_error_stays_what_it_is() -> None:
    assert explained("t", KeyError("answer")) == "task 't' cannot be loaded: KeyError: 'answer'"
