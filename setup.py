# SPDX-License-Identifier: Apache-2.0
"""Build logic only: one extension, `dsv4._core`; every instruction-set folder has its own flags.

Environment: DSV4_DEBUG=1 (-O1, asserts on), DSV4_WERROR=1, DSV4_SANITIZE=address,undefined.
"""

import os
import platform
import subprocess
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
    "kernels/cpu/avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
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


class BuildExt(build_ext):
    """Compiles every source with the flags of its folder, in parallel, and links one module."""

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
