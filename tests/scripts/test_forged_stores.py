"""A short run of scripts/validation/forged_stores.py, in a process of its own: it must find nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.toy import REPO, environment


def test_forged_stores_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "edges.md"
    program = [sys.executable, str(REPO / "scripts" / "validation" / "forged_stores.py")]
    done = subprocess.run(
        [*program, "--cases", "28", "--seed", "3", "--out", str(out)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| 0 \|$", out.read_text(), re.MULTILINE)
    assert [kind for kind, *_ in rows] == ["bytes", "objects", "scores", "values", "json", "names", "files"]
    assert all(int(cases) == 4 for _, cases, *_ in rows)
    assert int(rows[1][3]) == 4, "objects that a store does not have are refused"
