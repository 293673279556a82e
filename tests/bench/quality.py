# SPDX-License-Identifier: Apache-2.0
"""Bits per byte of the model inside the package on the last tenth of its corpus.

    python tests/bench/quality.py [--numerics official|weights] [--windows N] [--json]

Windows of 1,024 tokens, BOS first, starting every 512; each token is scored once, with at least 512
tokens of context except in the first window.  The sum of -log2 p over all tokens of the held-out
text, divided by its bytes.  Limit: 2.1.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import dsv4

CORPUS = Path(__file__).parents[2] / "notebooks/default_model/corpus/tinyshakespeare.txt"
LENGTH, STRIDE, LIMIT = 1024, 512, 2.1


def held_out() -> str:
    """The last tenth of the corpus, by bytes."""
    data = CORPUS.read_bytes()
    return data[len(data) * 9 // 10 :].decode()


def nll_bits(logits: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """-log2 softmax(logits)[target] per row, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    picked = np.take_along_axis(wide, targets[:, None].astype(np.int64), -1)[:, 0]
    return np.asarray((np.log(np.exp(wide).sum(-1)) - picked) / np.log(2))


def bits_per_byte(model: dsv4.Model, windows: int | None = None) -> tuple[float, int]:
    """Bits per byte over the first `windows` windows (None: all), and the tokens scored."""
    text = held_out()
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = np.asarray(tokenizer.encode(text), np.int32)
    bos = model.config.bos_token_id
    bits, scored = 0.0, 0
    for number, at in enumerate(range(0, len(ids), STRIDE)):
        first = 0 if at == 0 else LENGTH - STRIDE
        target = ids[at : at + LENGTH]
        if len(target) <= first or number == windows:
            break
        session = model.session()
        logits = session.append(np.concatenate([[bos], target[:-1]]), logits="all")
        bits += float(nll_bits(logits[first:], target[first:]).sum())
        scored += len(target) - first
    size = len(tokenizer.decode(ids[:scored]).encode())
    return bits / size, scored


def main() -> None:
    parser = argparse.ArgumentParser(description="bits per byte of the model inside the package")
    parser.add_argument("--numerics", choices=["official", "weights"], default="official")
    parser.add_argument("--windows", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with dsv4.load(numerics=options.numerics) as model:
        value, scored = bits_per_byte(model, options.windows)
    if options.json:
        print(json.dumps({"bits_per_byte": value, "tokens": scored, "limit": LIMIT}))
    else:
        print(f"{value:.4f} bits per byte over {scored} tokens (limit {LIMIT})")


if __name__ == "__main__":
    main()
