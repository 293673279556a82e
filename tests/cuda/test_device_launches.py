# SPDX-License-Identifier: Apache-2.0
"""How many kernels a layer of a decode step is."""

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

import dsv4
from dsv4 import nano

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
MOST = 12


def launches(host: ctypes.CDLL, folder: Path, tokens: int, position: int) -> list[int]:
    """Those of a step of some single tokens: launched, captured and launched, replayed."""
    counts = []
    with dsv4.load(folder, device="cuda", threads=1) as model:
        for _ in range(3):
            sessions = [model.session() for _ in range(tokens)]
            for session in sessions:
                session._core.fill(position, 1)
            before = host.host_launches()
            model.step([(session, np.zeros(1, np.int32)) for session in sessions])
            counts.append(host.host_launches() - before)
    return counts


@pytest.mark.parametrize(("ratio", "tokens", "position", "wanted"), [
    (0, 1, 5, 11), (128, 1, 255, 11), (4, 1, 20, 12), (4, 1, 100, 12), (4, 8, 100, 12),
], ids=["SWA", "HCA", "CSA", "CSA-scored", "CSA-scored-8"])
def test_a_layer_of_a_decode_step(
    tmp_path: Path, host_device: None, host_plugin: Path, ratio: int, tokens: int, position: int,
    wanted: int,
) -> None:
    """What a second layer of the same kind adds."""
    host, counts = ctypes.CDLL(str(host_plugin)), []
    for n in (1, 2):
        folder = nano.make(f"layers-{n}", 3, tmp_path, num_hidden_layers=n, num_hash_layers=0,
                           compress_ratios=[ratio] * n + [0], mtp=1, vocab_size=128)
        counts.append(launches(host, folder, tokens, position))
    layer = [two - one for one, two in zip(*counts, strict=True)]
    assert layer == [wanted] * 3 and wanted <= MOST
