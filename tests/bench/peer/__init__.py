# SPDX-License-Identifier: Apache-2.0
"""Other engines timed beside dsv4: one module for each, run by tests/bench/peers.py."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
# dsv4 of this checkout, and the tests that know how to load its weights into transformers
sys.path[:0] = [str(_ROOT), *(str(_ROOT / "tests" / name) for name in ("oracle", "vectors"))]
