"""A command that cannot be understood is one line, in our words, that says where the help is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.toy import environment, in_process

LINES = {
    ("run", "x", "--grace", "q"): "--grace should be a number; see evomerge run --help",
    ("run", "x", "--evaluations", "²"): "--evaluations should be a whole number; see evomerge run --help",
    ("run", "x", "--evaluations", "1" * 5000): "--evaluations should be a whole number",
    ("run", "x", "--workers", "0"): "--workers (or $EVOMERGE_WORKERS) should be at least 1; see evomerge run",
    ("run", "x", "--gpus", "65"): "--gpus should be at most 64; see evomerge run --help",
    ("run",): "Missing argument 'config'; see evomerge run --help",
    ("run", "x", "--evalutions", "5"): "No such option: --evalutions",
    ("runn",): "No such command 'runn'",
    ("\x1b[2J",): "No such command",
    ("show", "a", "b", "c"): "unexpected extra argument(s) (b c); see evomerge show --help",
    ("show", "a\nb", "\nc"): "see evomerge show --help",
}


@pytest.mark.parametrize("words", LINES, ids=str)
def test_wrong_usage_is_one_line_in_our_words(words: tuple[str, ...]) -> None:
    code, out, err = in_process(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error[E100] ")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert LINES[words] in err
    for word in ("Input should", "valid", "parse", "pydantic"):
        assert word not in err


def test_without_a_verb_the_help_is_shown() -> None:
    code, out, err = in_process()
    assert code == 2
    assert "Usage" in out + err


def test_output_that_nobody_reads_is_no_error() -> None:
    program = [sys.executable, "-c", "from evomerge.cli import main; main()", "doctor"]
    with subprocess.Popen(
        program, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
    assert "E000" not in said
    assert "Traceback" not in said
