# SPDX-License-Identifier: Apache-2.0
"""Index, headers and config must agree: every tensor dropped, added, doubled, retyped, reshaped."""

import json

import pytest
from sparse import write_shard

from dsv4 import layout
from dsv4.checkpoint import INDEX, Checkpoint
from dsv4.config import Config
from dsv4.errors import FormatError, combined
from dsv4.nano import CHECKPOINTS, CONFIG
from dsv4.shard import DTYPE_BITS

TINY = dict(CONFIG, num_hidden_layers=1, num_hash_layers=1, n_routed_experts=2,
            num_experts_per_tok=2, compress_ratios=[4, 0])
TABLE = layout.expected(Config.from_json(TINY), "mtp", 1)
NAMES = list(TABLE)


class Shards:
    """Two shards, whose tables and index are changed and written again."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "config.json").write_text(json.dumps(TINY))
        half = len(NAMES) // 2
        self.tables = {
            "a.safetensors": {name: TABLE[name] for name in NAMES[:half]},
            "b.safetensors": {name: TABLE[name] for name in NAMES[half:]},
        }
        self.index = {name: file for file, table in self.tables.items() for name in table}
        for file in self.tables:
            self.write(file)

    def write(self, file):
        write_shard(self.folder / file, self.tables[file])

    def other(self, name):
        return {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[
            self.index[name]]

    def verdict(self, index):
        (self.folder / INDEX).write_text(json.dumps({"weight_map": index}))
        try:
            Checkpoint.open(self.folder).close()
        except FormatError as error:
            return error
        return None


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    shards = Shards(tmp_path_factory.mktemp("index"))
    assert shards.verdict(shards.index) is None
    return shards


def without(table, name):
    return {key: value for key, value in table.items() if key != name}


@pytest.mark.parametrize("name", NAMES)
def test_one_tensor_in_index_and_shards(shards, name):
    """Each tensor dropped, added, doubled or moved, in the index, the shards, and both."""
    home, other = shards.index[name], shards.other(name)
    added = f"{name}.copy"

    def wrong(index):
        error = shards.verdict(index)
        return error is not None and name in str(error) and error.tensor in (name, added)

    assert wrong(without(shards.index, name))
    assert wrong({**shards.index, added: home})
    assert wrong({**shards.index, name: other})
    table = shards.tables[home]
    try:
        shards.tables[home] = without(table, name)
        shards.write(home)
        assert wrong(shards.index)
        assert wrong(without(shards.index, name))  # both agree, the config does not
        shards.tables[home] = {**table, added: table[name]}
        shards.write(home)
        assert wrong(shards.index)
        assert wrong({**shards.index, added: home})
    finally:
        shards.tables[home] = table
        shards.write(home)
    beside = shards.tables[other]
    try:
        shards.tables[other] = {**beside, name: table[name]}
        shards.write(other)
        assert wrong(shards.index)
        assert wrong({**shards.index, name: other})
    finally:
        shards.tables[other] = beside
        shards.write(other)


def test_all_offenders_are_listed(shards):
    gone = NAMES[5:35]
    error = shards.verdict({name: file for name, file in shards.index.items() if name not in gone})
    assert str(error).startswith("30 faults: ") and str(error).endswith("; and 10 more")
    assert all(name in str(error) for name in gone[:20])
    assert error.tensor == gone[0] and error.file == INDEX and error.rule == "weight_map"


def test_every_bad_shard_is_listed_before_any_is_parsed(shards):
    """Cut shards are reported together, with the bytes they have and should have."""
    sizes = {file: (shards.folder / file).stat().st_size for file in shards.tables}
    try:
        for file, size in sizes.items():
            with open(shards.folder / file, "r+b") as handle:
                handle.truncate(size - 1)
        text = str(shards.verdict(shards.index))
        for file, size in sizes.items():
            assert f"{file}: file size: got {size - 1} bytes, wanted {size}: " in text
        assert "download it again" in text
        for file in sizes:
            with open(shards.folder / file, "r+b") as handle:
                handle.truncate(100)
        text = str(shards.verdict(shards.index))
        assert text.startswith("2 faults") and text.count("for the header alone") == 2
    finally:
        for file in sizes:
            shards.write(file)


# ---- dtype and shape ----

def kinds(table):
    """One tensor of every kind: its numbers apart, a name is a kind."""
    found = {}
    for name in table:
        found.setdefault("".join(c for c in name if not c.isdigit()), name)
    return list(found.values())


def changed_shapes(shape):
    yield shape
    yield (*shape, 1)
    yield (1, *shape)
    yield shape[:-1]
    yield shape[1:]
    for i in range(len(shape)):
        for n in (shape[i] - 1, shape[i] + 1, 0, 1 << 31, 1 << 63, (1 << 64) - 1):
            yield (*shape[:i], n, *shape[i + 1 :])


class Stored:
    def __init__(self, dtype, shape):
        self.dtype = dtype
        self.shape = shape


def matrix(name, draft, count, thin):
    """How many of the changes of each kind of tensor are accepted."""
    _, changes = CHECKPOINTS[name]
    options = ("mtp", "fp8_experts", "f32_scales")
    config = Config.from_json(
        {**CONFIG, **{k: v for k, v in changes.items() if k not in options},
         **(dict(expert_dtype=None) if "fp8_experts" in changes else {})})
    formats = layout.OFFICIAL
    if "fp8_experts" in changes:
        f32 = frozenset({"F32"})
        formats = formats._replace(expert=layout.FP8, expert_scale=f32, linear_scale=f32)
    table = layout.expected(config, draft, count, formats)
    tensors = {key: Stored(min(dtypes), shape) for key, (dtypes, shape) in table.items()}
    assert layout.check(config, tensors).formats == formats
    cases = 0
    for key in kinds(table):
        right = tensors[key]
        shapes = set(changed_shapes(right.shape))
        accepted = []
        for i, dtype in enumerate(DTYPE_BITS):
            for j, shape in enumerate(sorted(shapes, key=str)):
                if thin and dtype != right.dtype and shape != right.shape and (i + j) % 16:
                    continue
                cases += 1
                tensors[key] = Stored(dtype, shape)
                try:
                    layout.check(config, tensors)
                    accepted.append((dtype, shape))
                except FormatError as error:
                    assert error.tensor == key and error.got and error.wanted
                    assert key in str(error) and error.got in str(error)
        tensors[key] = right
        assert accepted == [(right.dtype, right.shape)], key
    return cases


def test_dtypes_and_shapes_of_every_kind_of_tensor():
    """A sixteenth of the combinations of the long test, and every dtype and every shape alone."""
    assert matrix("nano-odd", "mtp", 1, thin=True) > 2000


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "draft", "count"),
    [("nano-flash", "mtp", 1), ("nano-pro", "mtp", 1), ("nano-base", None, 0),
     ("nano-0731", "dspark", 3), ("nano-odd", "mtp", 1)],
)
def test_every_dtype_with_every_shape(name, draft, count):
    print(name, matrix(name, draft, count, thin=False), "cases")


@pytest.mark.parametrize(
    ("name", "draft", "blocks", "count", "nbytes", "draft_bytes", "layers"),
    [
        ("flash", "mtp", 1, 69187, 159609485896, 3593787756,
         {0: 3566148952, 2: 3596055640, 3: 3568596312, 4: 3589851224}),
        ("flash-0731", "dspark", 3, 72317, 166878536440, None, {}),
        ("pro", "mtp", 1, 145116, 864704792696, None,
         {0: 13874466328, 2: 13909746200, 3: 13868262424, 4: 13903542296}),
    ],
)
def test_published_tables(vectors, name, draft, blocks, count, nbytes, draft_bytes, layers):
    """Counts and bytes of the published files."""
    config = Config.from_json(vectors / "configs" / f"{name}.json")
    sizes = {}
    for key, (dtypes, shape) in layout.expected(config, draft, blocks).items():
        bits = DTYPE_BITS[min(dtypes)]
        for n in shape:
            bits *= n
        sizes[key] = bits // 8
    assert len(sizes) == count and sum(sizes.values()) == nbytes
    if draft_bytes:
        assert sum(n for key, n in sizes.items() if key.startswith("mtp.")) == draft_bytes
    for layer, want in layers.items():
        assert sum(n for k, n in sizes.items() if k.startswith(f"layers.{layer}.")) == want


def test_a_config_that_asks_for_too_many_tensors():
    config = Config.from_json(dict(CONFIG, n_routed_experts=60_000))
    with pytest.raises(FormatError, match="1000000 tensors"):
        layout.expected(config)


# ---- the error itself ----

def test_format_errors_say_everything():
    error = FormatError(file="f", tensor="t\n", rule="shape", got=[1], wanted="[2]")
    assert str(error) == "f: t\\n: shape: got [1], wanted [2]"
    assert (error.file, error.tensor, error.rule, error.got, error.wanted) == (
        "f", "t\n", "shape", "[1]", "[2]")
    assert isinstance(error, ValueError)
    assert len(str(FormatError(file="f" * 10_000, rule="r", got="g" * 10_000))) < 600
    both = combined([error, FormatError(file="g", rule="dtype", got="x", wanted="y")])
    assert str(both) == f"2 faults: {error}; g: dtype: got x, wanted y" and both.file == "f"
    assert combined([error]) is error
