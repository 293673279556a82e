# SPDX-License-Identifier: Apache-2.0
"""The README is right: its example runs as printed, its memory table is what plan() gives."""

import re
import runpy
from pathlib import Path

import pytest

import dsv4
from dsv4.config import Config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONFIGS = ROOT / "tests" / "vectors" / "configs"


def test_the_example_works_as_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.search(r"<!-- example -->\n```python\n(.*?)```", README, re.S)
    assert code
    exec(compile(code.group(1), "README.md", "exec"), {})
    lines = capsys.readouterr().out
    assert "dsv4.Model" in lines and "<think>" in lines and "False" not in lines


def test_the_batch_example_works_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"<!-- batch example -->\n```python\n(.*?)```", README, re.S)
    assert code
    exec(compile(code.group(1), "README.md", "exec"), {})
    lines = capsys.readouterr().out
    assert "2 length" in lines and "'completion_tokens': 20" in lines


def test_the_open_box_example_works_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"<!-- open box example -->\n```python\n(.*?)```", README, re.S)
    assert code
    exec(compile(code.group(1), "README.md", "exec"), {})
    lines = capsys.readouterr().out
    assert lines.count("as in the step: True") == 3 and lines.count("dsv4.Evaluation") == 2


def test_every_notebook_and_its_pictures_are_shown() -> None:
    told = re.findall(r"^\| `(\d\d_\w+)` \|", README, re.M)
    assert told == sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))
    shown = re.findall(r"\]\(notebooks/pictures/([\w-]+)\.png\)", README)
    tags = re.findall(r'"picture:([\w-]+)"', "".join(
        p.read_text() for p in (ROOT / "notebooks").glob("*.ipynb")))
    made = {p.stem: p.stat().st_size for p in (ROOT / "notebooks" / "pictures").iterdir()}
    assert sorted(shown) == sorted(tags) == sorted(made) and max(made.values()) <= 150_000


@pytest.mark.parametrize(("name", "file"), [("V4-Flash", "flash"), ("V4-Pro", "pro")])
def test_the_memory_table_is_the_plan(name: str, file: str) -> None:
    row = re.search(rf"^\| {name} \|(.*)\|$", README, re.M)
    assert row
    config = Config.from_json(CONFIGS / f"{file}.json")
    units = {"MiB": 2**20, "GiB": 2**30}
    told = [float(n) * units[u] for n, u in re.findall(r"([\d.]+) (MiB|GiB)", row.group(1))]
    plans = [dsv4.plan(config, context=n) for n in (4096, 131072, 1048576)]
    assert told[0] == pytest.approx(plans[0].weight_bytes, rel=0.01)
    for got, plan in zip(told[1:], plans, strict=True):
        assert got == pytest.approx(plan.state_bytes, rel=0.02)


def test_the_figures_are_those_of_a_result() -> None:
    """The table of `dsv4 bench` is what tables.py makes of the result whose picture is shown."""
    picture = re.search(r"\]\((tests/bench/results/[\w-]+)\.png\)", README)
    assert picture
    tables = runpy.run_path(str(ROOT / "tests" / "bench" / "tables.py"))
    assert tables["block"](ROOT / f"{picture.group(1)}.json") in README
    assert (ROOT / f"{picture.group(1)}.png").is_file()
