# SPDX-License-Identifier: Apache-2.0
"""What is not asked for costs nothing: instructions of a step, with sites and compiled without."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench" / "traces.py"


@pytest.mark.long
def test_everything_off_costs_no_instructions() -> None:
    """At most 0.1 %; compiles the package and runs it under valgrind, some three minutes."""
    assert shutil.which("valgrind"), "this test needs valgrind"
    done = subprocess.run(
        [sys.executable, str(BENCH), "--off"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
