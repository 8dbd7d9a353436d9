"""Every exception evomerge raises on purpose.

EvomergeError                 E000  exit 1
├── ConfigError               E100  exit 2   something the user wrote: a search file, a flag, a reference
│   └── RecipeError           E110  exit 2   a merge recipe, ours or mergekit's
├── SetupError                E200  exit 3   something on the machine: a missing file, library or disk space
│   ├── CheckpointError       E210  exit 3   a parent model on disk
│   ├── TaskError             E220  exit 3   an lm-eval task
│   └── EngineSetupError      E230  exit 3   a text engine that is missing or cannot be trusted
├── StudyError                E300  exit 2   a stored study: unknown, changed, locked, damaged
├── NothingToExport           E310  exit 4   no candidate is worth exporting
├── FailureBudget             E320  exit 5   too many candidates failed
├── CandidateError            E400  exit 1   one candidate; the worker turns it into a value
│   ├── RouteError            E410  exit 1   layers that cannot be taken from their models and stacked
│   └── FoldError             E420  exit 1   a layer whose weights cannot take up a gain
└── Paused                    E500  exit 75  a signal asked the search to stop; start it again to go on
    ├── Stopped               E510  exit 0   `evomerge stop` asked for it; resume goes on
    ├── NoRoom                E520  exit 75  a disk that is full, or became read-only; make room
    ├── StoreLost             E530  exit 75  the study's file was removed, replaced or moved under its driver
    └── MachineFault          E540  exit 75  the machine fails whatever it is given; mend it
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches

from evomerge._escaping import one_line

_LONGEST = 1000  # characters of a message
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class EvomergeError(Exception):
    """Base of all errors; ``str(error)`` says what was seen, what was expected and what to do."""

    code = "E000"
    exit_code = 1

    def __str__(self) -> str:
        """The message as one printable line of at most 1000 characters: it may quote anybody's files."""
        text = one_line(super().__str__())
        return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"


class ConfigError(EvomergeError):
    """A search file, flag or reference that cannot be used as written."""

    code = "E100"
    exit_code = 2


class RecipeError(ConfigError):
    """A merge recipe that names something unknown or a value out of range."""

    code = "E110"


class SetupError(EvomergeError):
    """The machine lacks something that the search needs."""

    code = "E200"
    exit_code = 3


class CheckpointError(SetupError):
    """A parent model that cannot be read or does not fit the others."""

    code = "E210"


class TaskError(SetupError):
    """An lm-eval task that cannot be loaded, split or scored."""

    code = "E220"


class EngineSetupError(SetupError):
    """A text engine that is not installed, cannot be opened, or computes something else than the model."""

    code = "E230"


class StudyError(EvomergeError):
    """A stored study that is unknown, differs from what was asked, or is being written by another process."""

    code = "E300"
    exit_code = 2


class NothingToExport(EvomergeError):
    """The study holds no candidate that could be exported, or a check found what was made to be another."""

    code = "E310"
    exit_code = 4


class FailureBudget(EvomergeError):
    """More than half of a generation failed; the first cause is in the message."""

    code = "E320"
    exit_code = 5


class CandidateError(EvomergeError):
    """One candidate cannot be built or scored; never ends a search."""

    code = "E400"


class RouteError(CandidateError):
    """Layers that cannot be taken from their models and stacked."""

    code = "E410"


class FoldError(CandidateError):
    """A layer whose weights cannot take up the gain of its contributions."""

    code = "E420"


class Paused(EvomergeError):
    """A signal asked for a stop between evaluations; nothing is lost."""

    code = "E500"
    exit_code = 75


class Stopped(Paused):
    """`evomerge stop` asked for the end; nothing is lost, and nothing is to be started again by itself."""

    code = "E510"
    exit_code = 0


class NoRoom(Paused):
    """A study's file cannot be written: its disk is full, over quota, read-only or failing.

    What was stored before is still there.
    """

    code = "E520"


class StoreLost(Paused):
    """A study's file is no longer where its driver opened it: removed, replaced, or its folder moved."""

    code = "E530"


class MachineFault(Paused):
    """The machine fails at whatever candidate it is given: a full disk, no memory, a lost device.

    The attempts are stored, and no candidate is blamed.
    """

    code = "E540"


def unwritable(path: object, error: OSError) -> EvomergeError:
    """Makes the error for a file or folder that cannot be made or written.

    Args:
        path: What was to be made or written.
        error: Why it cannot.

    Returns:
        `NoRoom` for a full disk, where starting again may help; `SetupError` for all else.
    """
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoRoom(f"{path} cannot be written: {reason}; make room and start again")
    if error.errno in _NO_FOLDER:
        reason = f"{error.filename or path} is no folder" if error.errno != errno.EISDIR else "it is a folder"
        return SetupError(f"{path} cannot be written: {reason}; remove it, or choose another place")
    return SetupError(f"{path} cannot be written: {reason}; make it writable, or choose another place")


def suggest(word: str, allowed: Iterable[str]) -> str:
    """A sentence for an error message about a word that is none of those allowed.

    Args:
        word: What was written.
        allowed: The words that may stand there.

    Returns:
        The nearest allowed word as a question, or all of them if none is near.
    """
    words = sorted(allowed)
    near = get_close_matches(word, words, n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(words) or 'none'}."
