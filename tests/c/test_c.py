# SPDX-License-Identifier: Apache-2.0
"""The C checks under AddressSanitizer and UBSan; other builds are run by `build.py --run`."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import build  # noqa: E402


@pytest.mark.slow
def test_c_sanitized(tmp_path: Path) -> None:
    mode = build.MODES["asan"]
    if reason := build.missing(mode):
        pytest.skip(reason)
    program = build.build(mode, tmp_path)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(build.families())
