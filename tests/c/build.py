# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels, the engine and their C checks with a given compiler, and runs them.

    python tests/c/build.py --run native|asan|tsan|clang|haswell|nehalem|aarch64[,...] [-- ARGS]

Flags per folder are those of setup.py; families are the files check_<family>.c beside this one.
Of several, those that differ only in what runs them are compiled once, and they run side by side.
"""

import argparse
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "c"


@dataclass(frozen=True)
class Mode:
    """How to compile and how to start the program."""

    compiler: str = "gcc"
    flags: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()
    machine: str = "x86_64"
    arguments: tuple[str, ...] = ()  # of the program


# Families without vector code: one and the same machine code on every x86 processor.  Whole models
# run on these processors in tests/emulated.py.
PLAIN = tuple(
    word for name in ("draws", "engine", "parallel", "reader", "rows", "sampler", "topology")
    for word in ("--skip", name))
SANITIZE = (
    "-fsanitize=address,undefined", "-fno-sanitize-recover", "-fno-omit-frame-pointer",
    "-fno-var-tracking",  # gcc would take minutes for it on inlined kernels
)
THREADS = ("-fsanitize=thread", "-fno-var-tracking")
MODES = {
    "native": Mode(flags=("-Werror",), machine=platform.machine()),
    "asan": Mode(flags=("-O1", "-g", *SANITIZE), link=SANITIZE, machine=platform.machine()),
    "tsan": Mode(flags=("-O1", "-g", *THREADS), link=THREADS, machine=platform.machine()),
    "clang": Mode("clang", ("-Werror",), machine=platform.machine()),
    "haswell": Mode(runner=("qemu-x86_64", "-cpu", "Haswell"), arguments=PLAIN),
    "nehalem": Mode(runner=("qemu-x86_64", "-cpu", "Nehalem"), arguments=PLAIN),
    "aarch64": Mode(
        "aarch64-linux-gnu-gcc",
        link=("-static",),
        runner=("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
        machine="aarch64",
    ),
}


def missing(mode: Mode) -> str | None:
    """Why this mode cannot run here, or None."""
    for tool in [mode.compiler, *mode.runner[:1]]:
        if not shutil.which(tool):
            return f"{tool} is not installed"
    if not mode.runner and mode.machine != platform.machine():
        return f"needs a machine of type {mode.machine}"
    if mode.machine == "x86_64" and mode.compiler == "gcc" and platform.machine() != "x86_64":
        return "needs a machine of type x86_64"
    return None


def setup_constants() -> dict[str, Any]:
    """The constants of setup.py, without building anything."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def families() -> list[str]:
    """The names <family> of the files check_<family>.c."""
    return sorted(path.stem.removeprefix("check_") for path in HERE.glob("check_*.c"))


def write_table(path: Path) -> None:
    """The C table of all families."""
    names = families()
    lines = ['#include "check.h"']
    lines += [f"void check_{name}(void);" for name in names]
    lines += [
        "struct check_family {", "    const char *name;", "    void (*run)(void);", "};",
        "extern const struct check_family check_families[];",
        "const struct check_family check_families[] = {",
        *(f'    {{"{name}", check_{name}}},' for name in names),
        "    {0, 0},", "};", "",
    ]
    path.write_text("\n".join(lines))


def build(mode: Mode, folder: Path) -> Path:
    """Compiles everything into `folder` and returns the program."""
    constants = setup_constants()
    sources: list[tuple[Path, list[str]]] = []
    defines = []
    for name, flags in constants["FOLDERS"].items():
        if name.startswith("kernels"):
            sources += [(path, flags) for path in sorted((ROOT / name).glob("*.c"))]
    if mode.machine == "x86_64":
        for name, flags in constants["X86_FOLDERS"].items():
            files = sorted((ROOT / name).glob("*.c"))
            if files and constants["accepts"]([mode.compiler], flags):
                sources += [(path, flags) for path in files]
                defines.append(f"-DDSV4_HAVE_{Path(name).name.upper()}=1")
    engine = [path for path in (ROOT / "csrc").rglob("*.c") if path.parent.name != "python"]
    sources += [(path, constants["FOLDERS"]["csrc"]) for path in sorted(engine)]
    table = folder / "families.c"
    write_table(table)
    sources += [(path, []) for path in [HERE / "check.c", HERE / "memory.c", table]]
    sources += [(HERE / f"check_{name}.c", []) for name in families()]
    common = [*constants["BASE"], *constants["WARN"], *defines]
    common += [f"-I{ROOT}", f"-I{ROOT / 'kernels'}", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]

    def compile_one(source: Path, flags: list[str]) -> Path:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        command = [mode.compiler, *common, *flags, *mode.flags, "-c", str(source)]
        subprocess.run([*command, "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(lambda job: compile_one(*job), sources))
    program = folder / "checks"
    command = [mode.compiler, *map(str, objects), *mode.link, "-pthread", "-lm", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def run(names: Sequence[str], arguments: list[str]) -> int:
    """Builds in temporary folders and runs; 0, or the status of one that failed."""
    for name in names:
        if reason := missing(MODES[name]):
            print(f"{name}: {reason}", file=sys.stderr)
            return 2
    programs: dict[Mode, Path] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        runs = []
        for name in names:
            mode = MODES[name]
            built = replace(mode, runner=(), arguments=())
            if built not in programs:
                place = Path(folder, name)
                place.mkdir()
                try:
                    programs[built] = build(built, place)
                except subprocess.CalledProcessError as error:
                    return error.returncode  # the compiler has said why
            command = [*mode.runner, str(programs[built]), *mode.arguments, *arguments]
            if len(names) == 1:
                return subprocess.run(command).returncode
            runs.append((name, pool.submit(
                subprocess.run, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True)))
        failed = 0
        for name, future in runs:
            done = future.result()
            print(f"-- {name}\n{done.stdout}", end="", flush=True)
            failed = failed or done.returncode
        return failed


def modes(text: str) -> list[str]:
    """The modes of `--run`."""
    names = text.split(",")
    for name in names:
        if name not in MODES:
            raise argparse.ArgumentTypeError(f"got {name!r}, wanted some of {', '.join(MODES)}")
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="build and run the C checks")
    parser.add_argument("--run", type=modes, default=["native"], metavar="MODE[,MODE...]")
    parser.add_argument(
        "arguments", nargs="*", help="for the program: --only, --skip, --seed, --list")
    options = parser.parse_args()
    sys.exit(run(options.run, options.arguments))
