# SPDX-License-Identifier: Apache-2.0
"""Build logic only: one extension, `dsv4._core`; every instruction-set folder has its own flags.
Where nvcc is found also the CUDA plugin, a shared library beside it that nothing is linked to.

Environment: DSV4_DEBUG=1 (-O1, asserts on), DSV4_WERROR=1, DSV4_SANITIZE=address,undefined.
DSV4_CUDA=1 requires the plugin, 0 leaves it out; DSV4_CUDA_ARCH="90a 120" builds it for these
architectures alone, with PTX of plain numbers for what is between and after them and has no code.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BASE = [
    "-std=c11", "-D_GNU_SOURCE", "-O2", "-fvisibility=hidden", "-fno-math-errno",
    "-ffp-contract=off", "-pthread",
]
WARN = [
    "-Wall", "-Wextra", "-Wshadow", "-Wvla", "-Wundef", "-Wpointer-arith", "-Wstrict-prototypes",
    "-Wmissing-prototypes",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]

# folder -> flags beyond the base; the x86 folders are left out on other processors and by
# compilers that do not know their flags (the run-time dispatch then never offers them)
FOLDERS: dict[str, list[str]] = {
    "csrc": ["-Wconversion"],
    "kernels/cpu": [],
    "kernels/cpu/ref": [],
}
X86_FOLDERS = {
    "kernels/cpu/avx2": AVX2,
    "kernels/cpu/avx512": AVX512,
    "kernels/cpu/avx512vnni": [*AVX512, "-mavx512vnni"],
    "kernels/cpu/avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi"],
}


def extra_flags() -> list[str]:
    flags = ["-O1", "-g", "-UNDEBUG"] if os.environ.get("DSV4_DEBUG") == "1" else []
    if os.environ.get("DSV4_WERROR") == "1":
        flags.append("-Werror")
    if sanitize := os.environ.get("DSV4_SANITIZE"):
        flags += [
            f"-fsanitize={sanitize}", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover",
            "-fno-var-tracking",  # gcc would take minutes for it on inlined kernels
        ]
    return flags


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("int probe(void);\nint probe(void) { return 0; }\n")
        command = [*compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


# ---- CUDA ----

PLUGIN = "lib/libdsv4_cuda.so"  # beside the module; in a folder, or it would look like one
# least CUDA architectures; code of one runs on later ones with the same first digits, but for "a"
CUDA_ARCHS = ("80", "90a", "100", "120")
# no multiply-adds but those that are written; division, square root and subnormals as in IEEE 754
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_WERROR = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]


def find_nvcc() -> Path | None:
    """In CUDA_HOME, on PATH, where toolkits are installed, or among NVIDIA's Python packages."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [Path(home, "bin", "nvcc") for home in homes if home]
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path))
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    # an isolated build does not see the packages of the environment it is for
    for folder in [*sys.path, sysconfig.get_path("platlib")]:
        found += sorted(Path(folder or ".", "nvidia").glob("cu*/bin/nvcc"), reverse=True)
    return next((nvcc for nvcc in found if os.access(nvcc, os.X_OK)), None)


def cuda_archs(nvcc: Path) -> list[str]:
    """The architectures to build for: those asked for, or those of ours that nvcc knows."""
    if asked := re.findall(r"[^\s,;]+", os.environ.get("DSV4_CUDA_ARCH", "")):
        if bad := [arch for arch in asked if not re.fullmatch(r"\d{2,3}[af]?", arch)]:
            raise SystemExit(f"DSV4_CUDA_ARCH: got {bad[0]!r}, wanted numbers as in '90a 120'")
        return asked
    command = [str(nvcc), "--list-gpu-code"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in CUDA_ARCHS if f"sm_{arch.rstrip('a')}" in listed]


def cuda_targets(archs: list[str]) -> tuple[list[str], str]:
    """Flags of nvcc, and the same in words."""
    flags, words = [], " ".join(f"sm_{arch}" for arch in archs)
    covered = {int(arch.rstrip("af")) // 10 for arch in archs}
    plain = sorted({int(arch) // 10 for arch in archs if arch.isdecimal()})
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        if not arch.isdecimal():
            continue
        # devices from this one up to the next plain one, of which no other has code
        first = int(arch) // 10 + 1
        end = next((major for major in plain if major >= first), None)
        if end is None or not covered.issuperset(range(first, end)):
            flags += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    return flags, words + (" and later" if plain else "")


def build_plugin(nvcc: Path, temp: Path, target: Path) -> None:
    """Compiles kernels/cuda, one file per processor, and links the plugin."""
    archs, words = cuda_targets(cuda_archs(nvcc))
    flags = [*CUDA_FLAGS, *archs, f'-DDSV4_CUDA_BUILT_FOR="{words}"', "-I.", "-Ikernels"]
    if os.environ.get("DSV4_WERROR") == "1":
        flags += CUDA_WERROR
    temp.mkdir(parents=True, exist_ok=True)
    stamp = temp / "flags.txt"  # objects of other flags are of no use
    if not stamp.exists() or stamp.read_text() != repr([str(nvcc), *flags]):
        for old in temp.glob("*.o"):
            old.unlink()
        stamp.write_text(repr([str(nvcc), *flags]))
    headers = [*Path("kernels").glob("*.h"), *Path("kernels/cuda").glob("*.*h")]
    newest = max(p.stat().st_mtime for p in headers)

    def compile_one(source: Path) -> Path:
        made = temp / f"{source.stem}.o"
        if not made.exists() or made.stat().st_mtime < max(newest, source.stat().st_mtime):
            subprocess.run([nvcc, *flags, "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, sorted(Path("kernels/cuda").glob("*.cu"))))
    # NVIDIA's Python packages have no lib64, where nvcc looks; the runtime is linked statically
    library = ["-L", nvcc.resolve().parents[1] / "lib"]
    target.parent.mkdir(exist_ok=True)
    link = [nvcc, "-shared", "--cudart", "static", *library, *objects, "-o", target]
    subprocess.run(link, check=True)


class BuildExt(build_ext):
    """Compiles every source with the flags of its folder, in parallel, and links one module."""

    def run(self) -> None:
        super().run()
        wanted = os.environ.get("DSV4_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"DSV4_CUDA: got {wanted!r}, wanted 0 or 1")
        self.plugin_path().unlink(missing_ok=True)  # of an earlier build
        nvcc = None if wanted == "0" else find_nvcc()
        if nvcc is None and wanted == "1":
            raise SystemExit(
                "DSV4_CUDA=1: found no nvcc on PATH, in CUDA_HOME, in /usr/local/cuda or among "
                "NVIDIA's Python packages; install a CUDA toolkit, or the extra `cuda` of dsv4")
        if nvcc is None:
            return
        try:
            build_plugin(nvcc, Path(self.build_temp, "cuda"), self.plugin_path())
        except subprocess.CalledProcessError as error:
            if wanted == "1":
                raise SystemExit(f"DSV4_CUDA=1: {error}") from None
            self.warn(f"the CUDA plugin is left out, dsv4 will run on CPUs: {error}")

    def plugin_path(self) -> Path:
        return Path(self.get_ext_fullpath("dsv4._core")).parent / PLUGIN

    def get_outputs(self) -> list[str]:
        made = super().get_outputs()
        return [*made, str(self.plugin_path())] if self.plugin_path().exists() else made

    def build_extension(self, ext: Extension) -> None:
        import numpy

        folders, macros = dict(FOLDERS), []
        if platform.machine() in ("x86_64", "AMD64"):
            for folder, flags in X86_FOLDERS.items():
                if any(Path(folder).glob("*.c")) and accepts(self.compiler.compiler_so[:1], flags):
                    folders[folder] = flags
                    macros.append((f"DSV4_HAVE_{Path(folder).name.upper()}", "1"))
        headers = [p for top in ("kernels", "csrc") for p in Path(top).rglob("*.h")]
        newest = max(p.stat().st_mtime for p in [*headers, Path(__file__)])
        include = [".", "kernels", "csrc"]
        system = ["-isystem", numpy.get_include()]  # its headers are not -Wundef clean

        def compile_one(job: tuple[Path, list[str]]) -> str:
            source, flags = job
            target = Path(self.build_temp, source.with_suffix(".o"))
            if target.exists() and target.stat().st_mtime > max(newest, source.stat().st_mtime):
                return str(target)
            return self.compiler.compile(
                [str(source)], output_dir=self.build_temp, macros=macros, include_dirs=include,
                extra_postargs=[*BASE, *WARN, *flags, *system, *extra_flags()],
            )[0]

        jobs = []
        for folder, flags in folders.items():
            sources = Path(folder).rglob("*.c") if folder == "csrc" else Path(folder).glob("*.c")
            jobs += [(source, flags) for source in sorted(sources)]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, jobs))
        link = [flag for flag in extra_flags() if flag.startswith("-fsanitize")]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=[*link, "-pthread"],
            libraries=["m"], build_temp=self.build_temp, target_lang="c",
        )


setup(ext_modules=[Extension("dsv4._core", sources=[])], cmdclass={"build_ext": BuildExt})
