"""A pytest plugin for scripts/benchmarks/gpu.py: tests in the order of the command line.

tests/conftest.py puts slow files first, which a run that may be cut must not do.
"""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: position(item.nodeid, config.args))


def position(nodeid: str, arguments: list[str]) -> int:
    """Index of the first argument that selects a test; of tests that none selects, behind all."""
    for index, argument in enumerate(arguments):
        if nodeid == argument or nodeid.startswith((f"{argument}::", f"{argument}[")):
            return index
    return len(arguments)
