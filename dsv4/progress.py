# SPDX-License-Identifier: Apache-2.0
"""When a progress bar is shown: on a terminal, in the main thread, unless DSV4_DISABLE_PROGRESS
is set; with tqdm, which comes with tokenizers."""

import os
import sys
import threading
from typing import Any


def bar(**options: Any) -> Any:
    """A tqdm bar on standard error, or None where none is to be shown."""
    shown = sys.stderr is not None and sys.stderr.isatty()
    off = os.environ.get("DSV4_DISABLE_PROGRESS", "") not in ("", "0")
    if off or not shown or threading.current_thread() is not threading.main_thread():
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(**options)
