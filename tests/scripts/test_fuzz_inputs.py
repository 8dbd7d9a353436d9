"""A short run of scripts/validation/fuzz_inputs.py, in a process of its own: it must find nothing, and be
fast enough for long runs.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def test_random_and_damaged_input_ends_in_a_checkpoint_or_in_one_error(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.md"
    program = [
        sys.executable,
        str(REPO / "scripts" / "validation/fuzz_inputs.py"),
        "--recipes",
        "15",
        "--documents",
        "25",
        "--folders",
        "20",
        "--out",
        str(out),
    ]
    limits = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        program, env=os.environ | limits, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = re.findall(
        r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| \d+ \|$", out.read_text(), re.MULTILINE
    )
    assert [(kind, int(cases)) for kind, cases, *_ in rows] == [
        ("recipes", 15),
        ("documents", 25),
        ("folders", 20),
    ]
    assert all(int(merged) + int(refused) == int(cases) for _, cases, merged, refused, _ in rows)
    assert int(rows[0][2]) >= 10, "most recipes within their methods' bounds are merged"
    assert int(rows[1][3]) >= 10, "damage is found"
    assert int(rows[2][2]) > 0
    assert int(rows[2][3]) > 0
