# SPDX-License-Identifier: Apache-2.0
"""Draws the loss curve: python curve.py --run RUN [--out FOLDER] writes loss.json, loss.png."""
from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--run", required=True)
    p.add_argument("--out", default=str(Path(__file__).parent))
    a = p.parse_args()
    rows = json.loads((Path(a.run) / "loss.json").read_text())
    (Path(a.out) / "loss.json").write_text(
        "[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    main_rows = [r for r in rows if r["phase"] == "main"]
    held = [r for r in main_rows if "held" in r]
    figure, left = plt.subplots(figsize=(7, 4))
    left.plot([r["step"] for r in main_rows], [r["loss"] / math.log(2) for r in main_rows],
              color="tab:gray", label="training, bits per id (with dropout)")
    left.set_xlabel("step (2,048 ids each)")
    left.set_ylabel("bits per id")
    right = left.twinx()
    right.plot([r["step"] for r in held], [r["held"] for r in held], "o-", color="tab:blue",
               label="held out, bits per byte (averaged weights)")
    right.set_ylabel("bits per byte")
    lines = [*left.get_lines(), *right.get_lines()]
    left.legend(lines, [x.get_label() for x in lines], loc="upper right")
    figure.tight_layout()
    figure.savefig(Path(a.out) / "loss.png", dpi=110)


if __name__ == "__main__":
    main()
