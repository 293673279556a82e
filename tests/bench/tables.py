# SPDX-License-Identifier: Apache-2.0
"""The README's figures from a result of `dsv4 bench`.

    dsv4 bench --plot tests/bench/results/NAME.png --json > tests/bench/results/NAME.json
    python tests/bench/tables.py tests/bench/results/NAME.json

Rewrites the part of README.md between its two marks: machine, model, a table of the main rows, and
the picture that has the same name as the file.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dsv4.bench.report import number  # noqa: E402
from dsv4.memory import size  # noqa: E402

MARKS = "<!-- bench -->\n", "<!-- end of bench -->\n"
SHOWN = {
    "linear_fp8_1tok_1t": "FP8 linears, one token, 1 thread",
    "linear_fp8_1tok_all": "FP8 linears, one token, all threads",
    "linear_fp4_1tok_1t": "FP4 linears, one token, 1 thread",
    "linear_fp4_1tok_all": "FP4 linears, one token, all threads",
    "linear_bf16_1tok_1t": "BF16 linears, one token, 1 thread",
    "linear_bf16_1tok_all": "BF16 linears, one token, all threads",
    "decode_4k": "a token at a context of 4K",
    "decode_128k": "a token at a context of 128K",
    "decode_1m": "a token at a context of 1M",
    "decode_1m_added": "what 1M of context adds, over what it costs at the limits",
    "decode_batch16": "16 sequences in one step",
    "step_4tok": "4 tokens in one step, over one token",
    "outside": "a token's time that no limit counts",
    "prefill_linear_384": "linears, 384 tokens",
    "prefill_experts_48": "FP4 experts, 48 tokens",
    "prefill_2k": "a prompt of 2K, a layer of each kind",
    "prefill_8k": "a prompt of 8K, a layer of each kind",
}


def block(path: Path) -> str:
    """The text between the marks."""
    told: dict[str, Any] = json.loads(path.read_text())
    m, model = told["machine"], told["machine"]["model"]
    rows = {row["name"]: row for row in told["rows"]}
    lines = [
        MARKS[0],
        f"{m['cpu']}, {m['threads']} threads, {size(m['memory_bytes'])} of memory, {m['date'][:10]}"
        f"{', commit ' + m['commit'] if m['commit'] else ''}: {model['dimensions']}, "
        f"{model['layers']} of {model['full_layers']} layers, {model['experts']} of "
        f"{model['full_experts']} experts each, {size(model['bytes'])}.", "",
        "| | measured | limit | ratio |", "|---|---|---|---|"]
    for name, what in SHOWN.items():
        if name in rows:
            row = rows[name]
            limit, ratio = ("-" if row[key] is None else number(row[key])
                            for key in ("limit", "ratio"))
            lines.append(f"| {what} | {number(row['value'])} {row['unit']} | {limit} | {ratio} |")
    picture = path.with_suffix(".png").resolve().relative_to(ROOT)
    lines += ["", f"![each row beside its limit, and the roofline]({picture})", "", MARKS[1]]
    return "\n".join(line.rstrip("\n") for line in lines) + "\n"


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} RESULT.json")
    readme = ROOT / "README.md"
    text = readme.read_text()
    pattern = re.compile(f"{MARKS[0]}.*{MARKS[1]}", re.S)
    if len(pattern.findall(text)) != 1:
        sys.exit("README.md: wanted the two marks once")
    new = block(Path(sys.argv[1]))
    readme.write_text(pattern.sub(lambda _: new, text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
