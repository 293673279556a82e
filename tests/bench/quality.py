# SPDX-License-Identifier: Apache-2.0
"""Bits per byte of the model inside the package on the last tenth of its corpus.

    python tests/bench/quality.py [--numerics official|weights] [--limit TOKENS] [--json]

`dsv4.evaluate` with windows of 1,024 tokens, one every 512: each token is scored once, with at
least 512 tokens of context except in the first window.  Limit: 2.1.
"""

import argparse
import json
from pathlib import Path

import dsv4

CORPUS = Path(__file__).parents[2] / "notebooks/default_model/corpus/tinyshakespeare.txt"
LENGTH, STRIDE, LIMIT = 1024, 512, 2.1


def held_out() -> str:
    """The last tenth of the corpus, by bytes."""
    data = CORPUS.read_bytes()
    return data[len(data) * 9 // 10 :].decode()


def measure(model: dsv4.Model, limit: int | None = None) -> dsv4.Evaluation:
    """The held-out text, or its first `limit` tokens."""
    return dsv4.evaluate(model, held_out(), max_length=LENGTH, stride=STRIDE, limit=limit)


def main() -> None:
    parser = argparse.ArgumentParser(description="bits per byte of the model inside the package")
    parser.add_argument("--numerics", choices=["official", "weights"], default="official")
    parser.add_argument("--limit", type=int, metavar="TOKENS")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with dsv4.load(numerics=options.numerics) as model:
        found = measure(model, options.limit)
    if options.json:
        print(json.dumps({**found.to_dict(), "most_bits_per_byte": LIMIT}))
    else:
        print(f"{found.bits_per_byte:.4f} bits per byte over {found.tokens} tokens, accuracy "
              f"{found.accuracy:.3f} (limit {LIMIT} bits per byte)")


if __name__ == "__main__":
    main()
