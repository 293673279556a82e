# SPDX-License-Identifier: Apache-2.0
"""The wheel, and how long a user waits: size, contents, `import dsv4`, the first text.

    python tests/bench/startup.py [WHEEL]     # without one, builds it first

The wheel is unpacked into a temporary folder and used from there, with numpy and tokenizers of
this interpreter.  Each round is a process of its own; the best of five is printed, so files are in
the page cache.  Import: the statement alone.  First text: from starting `dsv4 generate "ROMEO:"`
to its first byte of output.  Ends with status 1 if a limit is missed.
"""

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
ROUNDS = 5
MAX_WHEEL_MB, MAX_IMPORT_S, MAX_TEXT_S = 20, 0.3, 2.0
CONTENTS = ["dsv4/_core.", "dsv4/py.typed", "dsv4/_core.pyi", "dsv4/default_model/config.json",
            "dsv4/default_model/tokenizer.json", "dsv4/nano_odd/expected.npz"]
IMPORT = "import time; t = time.perf_counter(); import dsv4; print(time.perf_counter() - t)"


def build(folder: str) -> Path:
    """`pip wheel` of this repository."""
    began = time.perf_counter()
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(REPO)]
    subprocess.run([sys.executable, *command], check=True)
    print(f"pip wheel: {time.perf_counter() - began:.1f} s")
    return next(Path(folder).glob("*.whl"))


def first_byte(command: list[str], env: dict[str, str]) -> float:
    """Seconds from starting a process to its first byte of output; the process is then ended."""
    began = time.perf_counter()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, cwd="/") as process:
        assert process.stdout is not None
        byte = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.kill()
    if not byte:
        sys.exit("dsv4 generate: no text came out")
    return seconds


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(sys.argv[1]) if len(sys.argv) > 1 else build(folder)
        megabytes = wheel.stat().st_size / 1e6
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(folder)
        missing = [part for part in CONTENTS if not any(n.startswith(part) for n in names)]
        extra = sorted({n.split("/")[0] for n in names if not n.startswith("dsv4")})
        print(f"wheel: {megabytes:.1f} MB (limit {MAX_WHEEL_MB} MB), {len(names)} files")
        if missing or extra:
            print(f"wheel: lacks {missing}, has beside the package {extra}")

        env = {**os.environ, "PYTHONPATH": folder, "PYTHONSAFEPATH": "1"}
        imports, texts = [], []
        for _ in range(ROUNDS):
            done = subprocess.run([sys.executable, "-c", IMPORT], env=env, check=True, text=True,
                                  stdout=subprocess.PIPE)
            imports.append(float(done.stdout))
            texts.append(first_byte([sys.executable, "-m", "dsv4", "generate", "ROMEO:"], env))
    print(f"import dsv4: {min(imports):.3f} s (limit {MAX_IMPORT_S} s; best of {ROUNDS})")
    print(f"first text: {min(texts):.2f} s (limit {MAX_TEXT_S} s; best of {ROUNDS})")
    return int(megabytes > MAX_WHEEL_MB or bool(missing or extra) or min(imports) > MAX_IMPORT_S
               or min(texts) > MAX_TEXT_S)


if __name__ == "__main__":
    sys.exit(main())
