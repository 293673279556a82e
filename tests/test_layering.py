# SPDX-License-Identifier: Apache-2.0
"""Who may know whom: `#include` lines, imports, and what the compiled module shows to others.

csrc/python -> csrc/dsv4.h -> csrc/{gen,model,io,backend,core} -> kernels.  Kernels know nothing of
the engine, the engine nothing of Python, the bindings nothing of math.
"""

import ast
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from dsv4 import _core

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "c"))

import build  # noqa: E402

C_FILES = sorted(p for top in ("kernels", "csrc") for p in (ROOT / top).rglob("*.[ch]"))
HEADERS = [p for p in C_FILES if p.suffix == ".h"]
MODULES = sorted((ROOT / "dsv4").rglob("*.py"))
INSTRUCTION_SETS = {"avx2", "avx512", "avx512vnni", "avx512bf16"}

# what the engine may use of the kernels, wherever it lies in the engine
TABLE = {"kernels/kernels.h", "kernels/types.h", "kernels/functions.h", "kernels/sampling.h",
         "kernels/cpu/dispatch.h", "kernels/machine_limits.h"}
# folder, or file -> folders and files it may include; files have the first word.  Values of model/
# live in gen/ (a layer reads and writes KV rows), and sessions in gen/ are made for a model.
MAY_INCLUDE = {
    "csrc/core": {"csrc/core"},
    "csrc/backend": {"csrc/core", "csrc/backend"},
    "csrc/backend/cuda.h": {"csrc/core", "kernels/cuda/plugin.h"},
    "csrc/io": {"csrc/core", "csrc/io", "csrc/dsv4.h"},
    "csrc/model": {"csrc/core", "csrc/backend", "csrc/io", "csrc/model", "csrc/gen/kvcache.h",
                   "csrc/dsv4.h", *TABLE},
    "csrc/gen": {"csrc/core", "csrc/backend", "csrc/io", "csrc/model", "csrc/gen", "csrc/dsv4.h",
                 *TABLE},
    "csrc/gen/sampler.h": {"csrc/core"},
    "csrc/gen/sampler.c": {"csrc/core", "csrc/gen/sampler.h", *TABLE},
    "csrc/dsv4.h": {"csrc/core/status.h", "csrc/gen/sampler.h"},
    "csrc/python": {"csrc/python", "csrc/dsv4.h"},
    # the test door: calls single entries of the kernel table
    "csrc/python/py_kernels.c": {"csrc/python", *TABLE},
    # the measuring door: times them on a team of its own
    "csrc/python/py_limits.c": {"csrc/python", "csrc/backend", *TABLE},
    "kernels": {"kernels/types.h", "kernels/kernels.h", "kernels/functions.h"},
    "kernels/cuda": {*TABLE, "kernels/cuda"},
    "kernels/cpu": {*TABLE, "kernels/cpu/"},
    "kernels/cpu/ref": {*TABLE, "kernels/cpu/ref"},
    "kernels/cpu/ref/limits.c": {*TABLE, "kernels/cpu/limits_read.h"},
    # an overlay may share templates of kernels/cpu, helpers of ref, and weaker sets it builds on
    "kernels/cpu/avx2": {*TABLE, "kernels/cpu/", "kernels/cpu/ref", "kernels/cpu/avx2"},
    "kernels/cpu/avx512": {*TABLE, "kernels/cpu/", "kernels/cpu/ref", "kernels/cpu/avx2",
                           "kernels/cpu/avx512"},
}
for _set in ("avx512vnni", "avx512bf16"):
    MAY_INCLUDE[f"kernels/cpu/{_set}"] = {
        *MAY_INCLUDE["kernels/cpu/avx512"], f"kernels/cpu/{_set}"}


def name(path):
    return path.relative_to(ROOT).as_posix()


def includes(path):
    """(quoted, name) of each #include line."""
    lines = re.findall(r'^\s*#\s*include\s+(["<])([^">]+)[">]', path.read_text(), re.M)
    return [(quote == '"', target) for quote, target in lines]


def resolve(path, target):
    """The one file that `#include "target"` in `path` means."""
    folders = [path.parent, ROOT, ROOT / "kernels", ROOT / "csrc"]
    found = {(f / target).resolve() for f in folders if (f / target).is_file()}
    assert len(found) == 1, f"{name(path)}: \"{target}\" is {len(found)} files"
    return found.pop()


def code(path):
    """The text without comments and without string literals."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", path.read_text(), flags=re.S)
    return re.sub(r'"(\\.|[^"\\\n])*"', '""', text)


@pytest.mark.parametrize("path", C_FILES, ids=name)
def test_includes_point_one_way(path):
    where = name(path)
    rules = MAY_INCLUDE.get(where) or MAY_INCLUDE[path.parent.relative_to(ROOT).as_posix()]
    for quoted, target in includes(path):
        if not quoted:
            continue
        file = name(resolve(path, target))
        folder = file.rpartition("/")[0]
        # "folder/" means the files in it, whatever it is called otherwise: not its folders
        assert {file, folder, f"{folder}/"} & rules, f"{where} includes {file}"


@pytest.mark.parametrize("path", C_FILES, ids=name)
def test_system_headers(path):
    where = name(path)
    for quoted, target in includes(path):
        if quoted:
            continue
        if target == "Python.h" or target.startswith(("numpy/", "pythread")):
            assert where.startswith("csrc/python/"), f"{where} includes {target}"
        if target.startswith("numpy/"):
            assert where == "csrc/python/convert.c", "NumPy's C API is used in convert.c alone"
        if re.fullmatch(r"\w*intrin\.h", target):
            assert path.parent.name in INSTRUCTION_SETS or where == "kernels/cpu/trial.c", (
                f"{where} includes {target}: intrinsics belong to a folder with flags of its own")
        assert not re.match(r"omp|cuda|cublas|nccl", target), f"{where} includes {target}"


@pytest.mark.parametrize("path", C_FILES, ids=name)
def test_native_code_is_silent(path):
    """It never prints, exits or starts threads behind our back."""
    found = re.findall(
        r"\b(?:v?f?printf|puts|putchar|fputs|fwrite|perror|exit|_exit|quick_exit|abort)\s*\(|"
        r"\bstd(?:err|out)\b|#\s*pragma\s+omp", code(path))
    assert not found, f"{name(path)}: {found}"


def test_file_names_are_unique():
    """A header's name means one file anywhere, a source's one file within kernels and csrc each."""
    for files in (HEADERS, *([p for p in C_FILES if name(p).startswith(top)]
                             for top in ("kernels/", "csrc/"))):
        names = [path.name for path in files]
        assert sorted(set(names)) == sorted(names)


def flags_of(path):
    """Compiler flags of the folder a header lies in, as in setup.py; None if not for this CPU."""
    constants = build.setup_constants()
    folder = path.parent.relative_to(ROOT).as_posix()
    if folder in constants["X86_FOLDERS"]:
        flags = constants["X86_FOLDERS"][folder]
        usable = platform.machine() == "x86_64" and constants["accepts"](["gcc"], flags)
        if not usable:
            return None
    else:
        flags = []
    return [*constants["BASE"], *constants["WARN"], *flags]


def is_template(path):
    """Whether the header says in its first comment what the including file has to define."""
    head = path.read_text().partition("#ifndef")[0]
    return re.search(r"\bincluding[\s*]+file\b|\bBefore including:", head) is not None


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
def test_each_header_compiles_alone():
    include = [f"-I{ROOT}", f"-I{ROOT / 'kernels'}", f"-I{ROOT / 'csrc'}"]
    for folder in (sysconfig.get_paths()["include"], np.get_include()):
        include += ["-isystem", folder]
    for path in HEADERS:
        flags = flags_of(path)
        if flags is None or is_template(path):
            continue
        # twice: it guards itself
        done = subprocess.run(
            ["gcc", "-x", "c", "-fsyntax-only", "-Werror", *flags, *include, "-"],
            input=f'#include "{path}"\n#include "{path}"\n', capture_output=True, text=True)
        assert done.returncode == 0, f"{name(path)}\n{done.stderr}"


@pytest.mark.skipif(not shutil.which("nm"), reason="nm is not installed")
def test_the_module_exports_one_symbol():
    listed = subprocess.run(
        ["nm", "--dynamic", "--defined-only", _core.__file__], capture_output=True, text=True,
        check=True)
    assert [line.split()[-1] for line in listed.stdout.splitlines()] == ["PyInit__core"]


def imports(tree):
    """(first word, module) of the imports in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are by full name"
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_python_needs_numpy_and_tokenizers_alone(path):
    """huggingface_hub and tqdm come with tokenizers and are imported only when they are used; so is
    pandas, where it is installed, and matplotlib, an extra, by the one file that draws."""
    tree = ast.parse(path.read_text())
    lazy = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lazy |= set(imports(node))
    known = {"dsv4", "numpy", *sys.stdlib_module_names}
    for module in imports(tree):
        first = module.partition(".")[0]
        allowed = first in known or (first == "tokenizers" and path.name == "tokenizer.py")
        allowed |= first in {"huggingface_hub", "tqdm"} and module in lazy
        allowed |= first == "pandas" and module in lazy
        allowed |= first == "matplotlib" and module in lazy and path.name == "plot.py"
        assert allowed, f"{name(path)} imports {module}"
