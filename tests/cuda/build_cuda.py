# SPDX-License-Identifier: Apache-2.0
"""Runs every CUDA kernel on the CPU against `ref`, and compiles all of them for devices.

    python tests/cuda/build_cuda.py --run [-- arguments]      kernels/cuda/*.cu by g++ over host.h
    python tests/cuda/build_cuda.py --compile [sm_90a ...]    by nvcc; registers against budgets
    python tests/cuda/build_cuda.py --device [-- arguments]   the built plugin's kernels on a GPU

Without architectures --compile takes those that setup.py builds for; flags and nvcc are setup.py's,
warnings are errors.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "cuda"
sys.path.insert(0, str(ROOT / "tests" / "c"))

from build import setup_constants  # noqa: E402

INCLUDE = [f"-I{ROOT / folder}" for folder in (
    ".", "kernels", "kernels/cuda", "kernels/cpu/ref", "csrc", "tests/cuda", "tests/c")]
C_FLAGS = ["-D_GNU_SOURCE", "-O2", "-fno-math-errno", "-ffp-contract=off", "-fPIC",
           "-fvisibility=hidden"]
C_WARN = ["-Wall", "-Wextra", "-Wshadow", "-Wundef", "-Werror"]
# most registers a thread and bytes of shared memory a block of any kernel in a file may use, on
# every architecture; spills are never allowed
BUDGETS = {
    "attention": (112, 24000),
    "beside": (40, 0),
    "attention_mma": (168, 42500),
    "ends": (40, 2100),
    "gather": (40, 0),
    "hyper": (64, 9000),
    "indexer": (168, 34500),
    "linear": (168, 44000),
    "linear_many": (255, 26000),
    "linear_mma": (255, 49152),
    "moe": (48, 17000),
    "rows": (64, 9000),
    "sampler": (64, 19000),
    "state": (64, 16000),
    "tap": (40, 0),
}
DEVICE = HERE / "on_device.c"  # in place of the kernels and of tests/c/memory.c
# files without kernels
OTHER = {"plugin"}


def families() -> list[str]:
    """The names <family> of the files check_<family>.c."""
    return sorted(p.stem.removeprefix("check_") for p in HERE.glob("check_*.c")
                  if p.stem != "check_cuda")


def parallel(commands: list[list[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Runs all commands; the output of one that fails is shown and ends the program."""
    def one(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = list(pool.map(one, commands))
    for done in results:
        if done.returncode:
            sys.exit(f"{' '.join(done.args)}\n{done.stdout}{done.stderr}")
    return results


def objects_of(sources: list[Path], folder: Path, *flags: str) -> list[Path]:
    """Compiles them; what is no .c is C++."""
    commands, objects = [], [folder / f"{source.name}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        kind = (["gcc", "-std=c11"] if source.suffix == ".c" else
                ["g++", "-std=c++17", "-Wno-unknown-pragmas", "-x", "c++"])
        commands.append([*kind, *C_FLAGS, *C_WARN, *flags, *INCLUDE, "-c", str(source),
                         "-o", str(target)])
    parallel(commands)
    return objects


def host_kernels(folder: Path) -> list[Path]:
    """Compiles every kernel for the CPU, for the checks and the plugin of the tests alike."""
    kernels = [p for p in (ROOT / "kernels" / "cuda").glob("*.cu") if p.stem in BUDGETS]
    return objects_of([*sorted(kernels), HERE / "host.cpp"], folder)


def build_plugin(folder: Path, kernels: list[Path]) -> Path:
    """The plugin with its real kernels, executed on the CPU: host_plugin.cpp."""
    files = [HERE / f"host_{name}.cpp" for name in ("plugin", "devices", "nccl")]
    rest = objects_of(files, folder, "-Wno-shadow")  # the plugin's symbol is named as its struct
    target = folder / "host_plugin.so"
    parallel([["g++", "-shared", *map(str, kernels), *map(str, rest), "-o", str(target)]])
    return target


def check_objects(folder: Path) -> list[Path]:
    """Compiles the checks, but for what executes the launches."""
    table = folder / "families.c"
    names = families()
    table.write_text("\n".join([
        '#include "check.h"', *(f"void check_{name}(void);" for name in names),
        "struct check_family { const char *name; void (*run)(void); };",
        "extern const struct check_family check_families[];",
        "const struct check_family check_families[] = {",
        *(f'    {{"{name}", check_{name}}},' for name in names), "    {0, 0}};", ""]))
    return objects_of(sorted([
        *(ROOT / "kernels" / "cpu").glob("*.c"), *(ROOT / "kernels/cpu/ref").glob("*.c"),
        ROOT / "tests" / "c" / "check.c", *HERE.glob("check_*.c"), table,
        ROOT / "csrc" / "core" / "status.c", ROOT / "csrc" / "gen" / "sampler.c"]), folder)


def build(folder: Path, checks: list[Path], kernels: list[Path] | None) -> Path:
    """The program of the checks: with the kernels for the CPU, or, to be run on a device, without
    any (on_device.c)."""
    memory = DEVICE if kernels is None else ROOT / "tests" / "c" / "memory.c"
    objects = [*checks, *objects_of([memory], folder), *(kernels or [])]
    program = folder / "checks"
    parallel([["g++", *map(str, objects), "-pthread", "-ldl", "-lm", "-o", str(program)]])
    return program


def usage(report: str) -> list[tuple[str, int, int, int]]:
    """(kernel, registers, bytes of shared memory, bytes spilled) from `ptxas -v`."""
    out = []
    for part in report.split("Compiling entry function '")[1:]:
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert used and spilled, part
        out.append((part.partition("'")[0], int(used[1]), int(shared[1]) if shared else 0,
                    int(spilled[1]) + int(spilled[2])))
    return out


def compile_all(architectures: list[str], verbose: bool) -> None:
    """Compiles every kernel for these architectures and checks what each uses."""
    constants = setup_constants()
    nvcc = constants["find_nvcc"]()
    if not nvcc:
        sys.exit("found no nvcc on PATH, in CUDA_HOME, in /usr/local/cuda or in Python's packages")
    flags = [*constants["CUDA_FLAGS"], *constants["CUDA_WERROR"], f"-I{ROOT}",
             f"-I{ROOT / 'kernels'}"]
    architectures = architectures or [f"sm_{arch}" for arch in constants["cuda_archs"](nvcc)]
    files = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
    jobs = [(source, arch) for source in files if source.stem in BUDGETS for arch in architectures]
    with tempfile.TemporaryDirectory() as folder:
        results = parallel([
            [str(nvcc), *flags, f"-arch={arch}", "-Xptxas", "-v", "-c", str(source),
             "-o", f"{folder}/{source.stem}.{arch}.o"] for source, arch in jobs])
    broken = []
    for (source, arch), done in zip(jobs, results, strict=True):
        kernels = usage(done.stdout + done.stderr)
        registers, shared = BUDGETS[source.stem]
        for name, used, held, spilled in kernels:
            if verbose:
                print(f"{arch:7} {source.stem:11} {used:4} registers {held:6} bytes shared  {name}")
            if used > registers or held > shared or spilled:
                broken.append(
                    f"{arch} {source.name} {name}: {used} registers (at most {registers}), {held} "
                    f"bytes of shared memory (at most {shared}), {spilled} spilled")
        print(f"{arch} {source.name}: {len(kernels)} kernels, at most "
              f"{max((k[1] for k in kernels), default=0)} registers, "
              f"{max((k[2] for k in kernels), default=0)} bytes of shared memory")
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="check and compile the CUDA kernels")
    parser.add_argument("--run", action="store_true", help="on the CPU against ref")
    parser.add_argument("--compile", nargs="*", metavar="ARCH", help="with nvcc")
    parser.add_argument("--device", action="store_true", help="on a GPU against ref")
    parser.add_argument("--verbose", action="store_true", help="a line for each kernel")
    parser.add_argument("arguments", nargs="*", help="for the checks: --only, --seed, --list")
    options = parser.parse_args()
    if options.compile is not None:
        compile_all(options.compile, options.verbose)
    if options.run or options.device:
        environment = dict(os.environ)
        if options.device:
            sys.path.append(str(ROOT))
            from dsv4.devices import PLUGIN

            environment.setdefault("CHECK_PLUGIN", str(PLUGIN))
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            kernels = None if options.device else host_kernels(folder)
            checks = build(folder, check_objects(folder), kernels)
            sys.exit(subprocess.run([str(checks), *options.arguments], env=environment).returncode)
