# SPDX-License-Identifier: Apache-2.0
"""The same logits, bit for bit, on other CPUs: instruction sets masked, and whole CPUs emulated.

    python tests/emulated.py            # digest of logits on this CPU, and the kernels that ran
    python tests/emulated.py --compare  # masks and qemu-user; status 1 if they differ

The digest covers nano-odd (prompt of 130, then single tokens; both numerics) and the model inside
the package, each also continued from a session that was saved after the prompt: in the comparison
by the native run, so saved sessions move between CPUs.  An emulated run fails if its kernels are
not those of the instruction set it is meant to try.  Emulated numbers are slow: this is not part of
the test run.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# name of the run -> CPU, its best instruction set.  The features taken away are those that
# qemu-user warns about.  NumPy's OpenBLAS would use AVX on an emulated Nehalem, so it is told.
EMULATED = {
    "qemu Haswell": ("Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm", "avx2", {}),
    "qemu Nehalem": ("Nehalem", "ref", {"OPENBLAS_CORETYPE": "Nehalem"}),
}
SETS = ["ref", "avx2", "avx512", "avx512vnni", "avx512bf16"]  # weakest first
TEXT = "ROMEO:\nBut soft, what light through yonder window breaks?"


def digest(states: Path) -> dict[str, str]:
    """SHA-256 of logits per model and numerics, and the instruction sets of the kernels used.

    `states` has the sessions that another CPU has saved, or gets those of this one.
    """
    import numpy as np

    import dsv4
    from dsv4 import nano

    found = {}

    def run(name: str, model: dsv4.Model, first: object, rest: list[int]) -> None:
        session = model.session()
        prompt = session.append(first, logits="all")
        state = states / name
        if not state.exists():
            session.save(state)
        for what, other in ((name, session), (f"{name}, saved", model.load_session(state))):
            parts = [prompt, *(other.append([token]) for token in rest)]
            found[what] = hashlib.sha256(np.concatenate(parts).tobytes()).hexdigest()

    with tempfile.TemporaryDirectory() as folder:
        path = nano.make_stored("nano-odd", folder)
        ids = [0, *np.random.default_rng(130).integers(3, 331, 129).tolist()]
        for numerics in ("official", "weights"):
            with dsv4.load(path, numerics=numerics) as model:
                run(f"nano-odd {numerics}", model, ids, [7, 8, 9])
    with dsv4.load() as model:
        run("default model", model, TEXT, [17, 18])
        # "set/way": one of several ways the kernels of a set may walk
        sets = {variant.partition("/")[0] for variant in model.kernel_info.values()}
        found["sets"] = " ".join(sorted(sets, key=SETS.index))
    return found


def start(prefix: list[str], states: str, **env: str) -> dict[str, str]:
    """`digest` in a process of its own: this interpreter behind `prefix`, with `env`."""
    # an emulator takes the interpreter itself, not the link in a virtual environment
    program = [*prefix, os.path.realpath(sys.executable), __file__, "--states", states]
    path = os.pathsep.join(p for p in sys.path[1:] if p)
    done = subprocess.run(
        program, env={**os.environ, "PYTHONPATH": path, **env}, stdout=subprocess.PIPE, text=True,
        check=True)
    values: dict[str, str] = json.loads(done.stdout)
    return values


def compare(states: str) -> int:
    from dsv4 import _core

    runs: list[tuple[str, list[str], dict[str, str], str | None]] = [("native", [], {}, None)]
    for name, has in _core.cpu_sets():
        if has:
            runs.append((f"without {name}", [], {"DSV4_CPU_DISABLE": name}, None))
    for name, (cpu, top, env) in EMULATED.items():
        runs.append((name, ["qemu-x86_64", "-cpu", cpu], env, top))
    first: dict[str, str] = {}
    failed = 0
    for name, prefix, env, top in runs:
        began = time.perf_counter()
        values = start(prefix, states, **env)
        seconds = time.perf_counter() - began
        sets = values.pop("sets")
        first = first or values
        different = [key for key in values if values[key] != first[key.removesuffix(", saved")]]
        verdict = "equal" if not different else "DIFFERENT: " + ", ".join(different)
        best = sets.split()[-1]
        if top is not None and best != top:
            verdict += f"; its best kernels are {best}, wanted {top}"
        failed |= verdict != "equal"
        print(f"{name:20} {seconds:6.1f} s  {verdict:10}  kernels: {sets}", flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="logits on other CPUs")
    parser.add_argument("--compare", action="store_true", help="masks and emulated CPUs")
    parser.add_argument("--states", metavar="FOLDER", help="of saved sessions, made where missing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if options.compare:
            sys.exit(compare(temporary))
        print(json.dumps(digest(Path(options.states or temporary))))
