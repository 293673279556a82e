# SPDX-License-Identifier: Apache-2.0
"""The house: what lies at the top, what a file begins with, and facts written in two places."""

import json
import os
import re
import stat
import tomllib
from pathlib import Path

import pytest

import dsv4

ROOT = Path(__file__).resolve().parents[1]
TOP = {
    "CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py", "csrc",
    "dsv4", "kernels", "notebooks", "tests",
}
# what building and testing leave there; .gitignore names the same
MADE = re.compile(r"build|dist|runs|__pycache__|.*\.egg-info|\..*")
SOURCES = {".c", ".h", ".py", ".pyi"}
TEXTS = {*SOURCES, ".md", ".toml", ".json", ".in", ".txt", ".cu", ".cuh", ".ipynb"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def files():
    """Every file of the repository that is text, without what is made."""
    found = [ROOT / ".ci" / "run", ROOT / "LICENSE", *(p for p in ROOT.iterdir() if p.is_file())]
    for top in ("csrc", "dsv4", "kernels", "notebooks", "tests"):
        for folder, folders, names in os.walk(ROOT / top):
            folders[:] = [f for f in folders if not MADE.fullmatch(f)]
            found += [Path(folder, name) for name in names]
    return sorted({p for p in found if p.suffix in TEXTS or p.name in ("run", "LICENSE")})


def name(path):
    return path.relative_to(ROOT).as_posix()


def test_the_top_is_fixed():
    there = {p.name for p in ROOT.iterdir() if not MADE.fullmatch(p.name)}
    assert there == TOP


def test_every_source_names_its_licence():
    for path in files():
        if path.suffix in SOURCES:
            first = path.read_text().partition("\n")[0]
            assert "SPDX-License-Identifier: Apache-2.0" in first, name(path)


def test_no_paths_of_a_machine():
    machine = re.compile(r"(?<![\w.~}])/(?:work|home|root|Users|opt|mnt)/\w+")
    for path in files():
        if path != Path(__file__):
            found = machine.findall(path.read_text())
            assert not found, f"{name(path)}: {found}"


def test_versions_agree():
    version = PROJECT["project"]["version"]
    assert dsv4.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_run_time_dependencies():
    needs = PROJECT["project"]["dependencies"]
    assert [re.match(r"\w+", need).group() for need in needs] == ["numpy", "tokenizers"]


@pytest.mark.parametrize("command", ["first-text", "tests"])
def test_readme_commands(command):
    """Each is one line that creates what it needs; `.ci/run` takes them from there."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(rf"^<!-- command: {command} -->\n```sh\n([^\n]+)\n```$", text, re.M)
    assert len(found) == 1
    assert found[0].startswith("python3 -m venv .venv && .venv/bin/pip install ")


def test_ci_can_be_started():
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR


def test_notebooks_are_numbered_and_stripped():
    """Outputs come from running them (`tests/notebooks.py`); README shows some of the plots."""
    names = sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
    assert names
    for notebook in names:
        assert re.fullmatch(r"\d\d_[a-z_]+\.ipynb", notebook)
        told = json.loads((ROOT / "notebooks" / notebook).read_text())
        assert told["nbformat"] == 4 and set(told["metadata"]) == {"kernelspec", "language_info"}
        assert told["cells"][0]["source"][0].startswith(f"# {notebook[:2]} ")
        for cell in told["cells"]:
            if cell["cell_type"] == "code":
                assert not cell["outputs"] and cell["execution_count"] is None, notebook


def test_no_unfinished_merge():
    for path in files():
        marks = re.findall(r"(?m)^(?:<{7}|>{7}) .*", path.read_text())
        assert not marks, f"{name(path)}: {marks}"
