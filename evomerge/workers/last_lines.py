"""The last lines that a process logged, to go with a failure that it reports."""

from __future__ import annotations

import logging
from collections import deque

from evomerge._redaction import ScrubbedFormatter

LOG_LINES = 20
"""Lines that go with a failure."""


class LastLines(logging.Handler):
    """Keeps the last lines that were logged, without secrets.

    Attributes:
        lines: the lines, the oldest first.
    """

    def __init__(self) -> None:
        """Keeps nothing yet."""
        super().__init__(logging.INFO)
        self.lines: deque[str] = deque(maxlen=LOG_LINES)
        self.setFormatter(ScrubbedFormatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a record as a line.

        Args:
            record: what was logged.
        """
        self.lines.append(self.format(record))

    @classmethod
    def installed(cls) -> LastLines:
        """Makes one that gets what this process logs from now on.

        Returns:
            The handler.
        """
        handler = cls()
        logging.getLogger().addHandler(handler)
        logging.getLogger("evomerge").setLevel(logging.INFO)
        return handler
