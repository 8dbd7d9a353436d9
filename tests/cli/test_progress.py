"""What signals do while a verb works."""

import signal
import time
import weakref

import pytest

from evomerge.cli.progress import stop_while_opening


class Watched:
    """An object with a weak reference."""


def test_a_signal_inside_a_callback_is_answered_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watched = Watched()
    reference = weakref.ref(watched, lambda _: signal.raise_signal(signal.SIGUSR1))
    held = [watched]
    del watched

    def wait() -> None:
        held.clear()  # Python loses what the handler raises in the callback
        assert reference() is None
        for _ in range(1000):
            time.sleep(0.01)

    with pytest.raises(SystemExit) as stop, stop_while_opening():
        wait()
    assert stop.value.code == 75
    assert capsys.readouterr().err == "stopped while opening; start it again\n"


def test_a_signal_that_a_library_makes_an_error_of_its_own_of_is_answered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:  # as safetensors does while it makes a tensor
            raise ValueError("could not determine the shape") from None

    with pytest.raises(SystemExit) as stop, stop_while_opening():
        read()
    assert stop.value.code == 75
    assert capsys.readouterr().err == "stopped while opening; start it again\n"
    with pytest.raises(ValueError, match="of its own"), stop_while_opening():
        raise ValueError("of its own")
