"""Runs a program that a model wrote, in a process of its own with limits: a program, not a module.

Reads a line of JSON from standard input: the program, a token, and limits. Writes the token to standard
output where the program ends without an exception; what it prints itself is dropped. The limits keep it from
filling memory or the disk and from running for ever. They are no sandbox: it reads what its user reads.
"""

import contextlib
import ctypes
import json
import os
import resource
import sys

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # of Linux's unshare


def _bounded(limits: dict[str, int]) -> None:
    """Bounds this process and those that it starts; without a network where the system allows that."""
    for name, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # a lower limit is there already
            resource.setrlimit(getattr(resource, name), (most, most))
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK)


def main() -> None:
    """Runs the program of standard input."""
    request = json.loads(sys.stdin.readline())
    answer = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    _bounded(request["limits"])
    exec(compile(request["program"], "answer", "exec"), {"__name__": "__main__"})
    os.write(answer, request["token"].encode())


if __name__ == "__main__":
    main()
