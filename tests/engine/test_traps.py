# SPDX-License-Identifier: Apache-2.0
"""Mistakes that shipped in other engines, where no other test would see them.

The table in tests/README.md says which test stands for which mistake.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import (
    TINY,
    changed,
    fed,
    layer_with,
    load,
    make_tiny,
    pieces,
    prompt,
    same,
    step_with,
)

# 0 CSA, 1 and 3 HCA, 2 SWA
RATIOS = TINY["compress_ratios"]


def with_config(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other config values and the same weights."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            value = config[key] | value
        config[key] = value
    (to / "config.json").write_text(json.dumps(config))
    return to


def layer_outputs(folder: Path) -> list[Any]:
    """Every layer alone on the same random streams of 140 tokens."""
    with load(folder) as model:
        c = model.config
        values = np.random.default_rng(4).standard_normal((140, c.hc_mult, c.hidden_size))
        codes = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return [layer_with(model, i, codes, prompt(model, 140))[0]
                for i in range(c.num_hidden_layers)]


# ---- config ----

@pytest.mark.parametrize(
    ("changes", "which"),
    [(dict(rope_theta=5000), {2}), (dict(compress_rope_theta=40000), {0, 1, 3}),
     (dict(rope_scaling=dict(factor=8)), {0, 1, 3}),
     (dict(rope_scaling=dict(original_max_position_embeddings=2048)), {0, 1, 3}),
     (dict(rope_scaling=dict(beta_fast=16)), {0, 1, 3})],
)
def test_each_rope_parameter_reaches_its_layers(tiny_folder, tmp_path, changes, which) -> None:
    """SWA layers have a base of their own and no YaRN; all others the other base and YaRN."""
    before = layer_outputs(tiny_folder)
    after = layer_outputs(with_config(tiny_folder, tmp_path / "m", **changes))
    assert {i for i in range(4) if (before[i] != after[i]).any()} == which


def test_routed_scaling_factor(models, expected) -> None:
    """The weights of a token add up to the factor of its config, 2.5 for Pro."""
    for name, factor in (("nano-flash", 1.5), ("nano-pro", 2.5), ("nano-odd", 1.75)):
        model = models(name)
        for layer in range(model.config.num_hidden_layers):
            with model.session() as session:
                _, found = step_with(model, [(session, prompt(model, 40))], layer)
            total = found["expert_weights"].sum(1)
            assert np.abs(total / factor - 1).max() < 1e-6, (name, layer)


# ---- routers ----

def test_hash_layers_follow_their_table(models) -> None:
    """For every id; layers after them do not."""
    model = models("nano-flash")
    c = model.config
    ids = np.arange(c.vocab_size, dtype=np.int32)
    for layer in range(c.num_hash_layers):
        raw = model._core.tensor(f"layers.{layer}.ffn.gate.tid2eid")
        table = raw.view(np.int64).reshape(c.vocab_size, -1)
        with model.session() as session:
            _, found = step_with(model, [(session, ids)], layer)
        assert (found["experts"] == table).all()
    with model.session() as session:
        _, found = step_with(model, [(session, np.zeros(300, np.int32))], c.num_hash_layers)
    assert len({tuple(row) for row in found["experts"]}) > 1  # one id, several choices


def test_router_bias_chooses_but_does_not_weigh(tiny_folder, tmp_path) -> None:
    def shift(data: Any) -> None:
        data.view(np.float32)[0] += 0.1

    folder = changed(tiny_folder, tmp_path / "m", "layers.1.ffn.gate.bias", shift)
    found = []
    for each in (tiny_folder, folder):
        with load(each) as model, model.session() as session:
            found.append(step_with(model, [(session, prompt(model, 100))], 1)[1])
    equal = (found[0]["experts"] == found[1]["experts"]).all(1)
    assert 0.05 < equal.mean() < 0.95
    same(found[0]["expert_weights"][equal], found[1]["expert_weights"][equal])


# ---- what a token sees ----

@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 6, 7, 63, 124, 125, 126, 127, 128, 129, 130, 131])
def test_a_needle_at_any_residue(tiny, at: int) -> None:
    """One other token: nothing before it changes, and it is seen after it left the window."""
    ids = prompt(tiny, 300)
    other = ids.copy()
    other[at] = (ids[at] + 1) % tiny.config.vocab_size
    a, b = (fed(tiny, [each]) for each in (ids, other))
    differ = (a != b).any(1)
    assert not differ[:at].any() and differ[at]
    # 32 tokens a layer can carry it at most 128 further; beyond that only compressed rows do
    far = differ[at + 32 * 4 + 16 :]
    assert far.mean() > 0.9


@pytest.mark.parametrize("name", ["nano-flash", "nano-pro", "nano-odd"])
def test_prompts_without_compressed_rows(models, name: str) -> None:
    """No entry yet, the first one, one less than a window of the longest ratio."""
    model = models(name)
    ids = prompt(model, 129)
    want = fed(model, pieces(ids, 1))
    for n in (1, 2, 3, 4, 5, 31, 32, 127, 128, 129):
        got = fed(model, [ids[:n]])
        assert np.isfinite(got).all()
        same(got, want[:n], f"{n} tokens")


@pytest.mark.parametrize(
    "length", [32_900, 40_000, pytest.param(131_072, marks=pytest.mark.long)])
def test_more_than_8192_compressed_rows(tmp_path, length: int) -> None:
    """Selections from all of them, the same for two ways of cutting the prompt."""
    folder = make_tiny(
        tmp_path, compress_ratios=[4, 0], num_hidden_layers=2, index_topk=64,
        n_routed_experts=2, num_experts_per_tok=1, max_position_embeddings=length)
    found = []
    with load(folder) as model:
        ids = prompt(model, length)
        for cuts in ([length - 9], [length // 3, length - 40, length - 9]):
            session = model.session()
            for piece in np.split(ids[: length - 9], cuts[:-1]):
                session.append(piece, logits="none")
            (rows,), each = step_with(model, [(session, ids[length - 9 :])], 0)
            found.append((rows, each["index_selected"]))
    for a, b in zip(*found, strict=True):
        same(a, b)
    for t, chosen in enumerate(found[0][1]):
        assert (np.diff(chosen) > 0).all() and chosen[0] >= 0
        assert chosen[-1] < (length - 9 + t + 1) // 4
    assert found[0][1].max() >= 8192


def test_what_ran_before_leaves_nothing(tiny, tiny_folder) -> None:
    """Work space of other shapes and of other sessions does not show."""
    ids = prompt(tiny, 150)
    want = fed(tiny, pieces(ids, 50))
    with load(tiny_folder) as model:
        with model.session() as long:
            long.append(prompt(model, 3000, seed=2), logits="all")
        same(fed(model, pieces(ids, 50)), want)
        sessions = [model.session() for _ in range(9)]
        model.step([(s, prompt(model, 7 * i + 1, seed=i)) for i, s in enumerate(sessions)], "all")
        same(fed(model, [ids[:1], ids[1:2], ids[2:]]), want)


def test_the_table_names_tests_that_exist() -> None:
    home = Path(__file__).parents[1]
    for line in (home / "README.md").read_text().splitlines():
        if not re.match(r"\| \d+ \|", line):
            continue
        source = ""
        for name in re.findall(r"`([\w/.:\[\]]+)`", line.split("|")[3]):
            file, _, function = name.rpartition("::") if "::" in name else ("", "", name)
            if file or name.endswith(".py"):
                source = (home / (file or name)).read_text()
            if not name.endswith(".py"):
                assert f"def {function.split('[')[0]}(" in source, name
