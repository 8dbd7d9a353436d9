"""The process of a text engine: opens it, and does what is sent until the connection is closed.

python -m evomerge.evaluation.engines.child_process DESCRIPTOR PARENT
"""

from __future__ import annotations

import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from evomerge.evaluation.engines.engine import TextEngine, find_factory
from evomerge.evaluation.engines.shared_weights import SharedWeights

_LOOK = 1.0  # seconds between two looks at whether the parent lives


def serve(connection: Connection) -> None:
    """Opens the engine that the first message names, and answers the others.

    Args:
        connection: Brings (factory, model, settings), then (name of a method, arguments); every answer is
            ('done', result) or ('failed', kind of the error, text).
    """
    factory, model, settings = connection.recv()
    answer = _attempt(lambda: find_factory(factory)(model, settings))
    if answer[0] == "failed":
        connection.send(answer)
        return
    engine: TextEngine = answer[1]
    connection.send(("done", dict(engine.facts())))
    weights: SharedWeights | None = None
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        if name == "attach":
            weights = SharedWeights.attached(*arguments)
            connection.send(("done", None))
        elif name == "push":
            assert weights is not None
            tensors = weights.views(arguments[0])
            connection.send(_attempt(lambda given=tensors: engine.push(given)))
        else:
            connection.send(_attempt(lambda n=name, a=arguments: getattr(engine, n)(*a)))


def _attempt(call: Any) -> tuple[Any, ...]:
    try:
        return ("done", call())
    except Exception as error:
        return ("failed", type(error).__name__, str(error))


def _end_with(parent: int) -> None:
    """Ends this process once its parent is gone, also while the engine computes."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)


def main() -> None:
    """Serves the connection of the command line."""
    descriptor, parent = map(int, sys.argv[1:3])
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with Connection(descriptor) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
