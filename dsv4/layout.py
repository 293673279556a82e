# SPDX-License-Identifier: Apache-2.0
"""The tensors a config asks for, and the comparison with those a checkpoint has.

`expected` builds the whole table: name, allowed dtypes, shape.  `check` finds the storage formats
from the headers (the dtype of a tensor decides, never a word in the config), builds the table for
them and refuses everything that is missing, unexpected, of another dtype or of another shape.
Source: SPEC 6.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from dsv4.config import CSA_RATIO, Config
from dsv4.errors import FormatError, combined
from dsv4.shard import MAX_TENSORS

Shape = tuple[int, ...]
Dtypes = frozenset[str]
Table = dict[str, tuple[Dtypes, Shape]]

PLAIN = frozenset({"BF16", "F32", "F16"})
FP8 = frozenset({"F8_E4M3"})
FP4_CONTAINERS = frozenset({"I8", "U8"})  # two codes per byte: half the columns
FP4 = FP4_CONTAINERS | {"F4"}
E8M0 = frozenset({"F8_E8M0", "U8"})  # the same bytes
BLOCK_SCALES = E8M0 | {"F32", "BF16"}

MTP_MARKS = ("e_proj.", "h_proj.", "enorm.", "hnorm.")
DSPARK_MARKS = ("main_proj.", "main_norm.", "markov_head.", "confidence_head.")
DRAFT_NAME = re.compile(r"mtp\.(0|[1-9][0-9]{0,3})\.")


class Stored(Protocol):
    """What `check` needs to know of a tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...


class Formats(NamedTuple):
    """How the numbers of a checkpoint are stored: dtypes by class of tensor.

    A scale set that is empty means that the weights of that class carry no scales.
    """

    linear: Dtypes = FP8
    linear_scale: Dtypes = frozenset({"F8_E8M0"})
    expert: Dtypes = frozenset({"I8"})
    expert_scale: Dtypes = frozenset({"F8_E8M0"})
    plain: Dtypes = frozenset({"BF16"})
    norm: Dtypes = frozenset({"BF16"})
    exact: Dtypes = frozenset({"F32"})
    ids: Dtypes = frozenset({"I64"})

    @property
    def expert_format(self) -> str:
        """"fp4", "fp8" or "plain": what the routed experts are stored in."""
        return "fp4" if self.expert <= FP4 else "fp8" if self.expert == FP8 else "plain"


OFFICIAL = Formats()


def blocks(n: int) -> int:
    """Blocks of 128 that cover n."""
    return -(-n // 128)


class _Builder:
    """Collects the table; one method per part of the model."""

    def __init__(self, config: Config, formats: Formats) -> None:
        self.c = config
        self.f = formats
        self.table: Table = {}

    def put(self, name: str, dtypes: Dtypes, *shape: int) -> None:
        self.table[name] = (dtypes, shape)

    def linear(self, name: str, rows: int, columns: int) -> None:
        self.put(name + ".weight", self.f.linear, rows, columns)
        if self.f.linear_scale:
            self.put(name + ".scale", self.f.linear_scale, blocks(rows), blocks(columns))

    def hyper(self, name: str, rows: int, scales: int) -> None:
        c, exact = self.c, self.f.exact
        self.put(name + "_fn", exact, rows, c.hc_mult * c.hidden_size)
        self.put(name + "_base", exact, rows)
        self.put(name + "_scale", exact, scales)

    def compressor(self, p: str, ratio: int, head_dim: int) -> None:
        width = head_dim * (2 if ratio == CSA_RATIO else 1)
        self.put(p + "ape", self.f.exact, ratio, width)
        self.put(p + "norm.weight", self.f.norm, head_dim)
        self.put(p + "wkv.weight", self.f.plain, width, self.c.hidden_size)
        self.put(p + "wgate.weight", self.f.plain, width, self.c.hidden_size)

    def trunk(self) -> None:
        c = self.c
        self.put("embed.weight", self.f.plain, c.vocab_size, c.hidden_size)
        self.put("head.weight", self.f.plain, c.vocab_size, c.hidden_size)
        self.put("norm.weight", self.f.norm, c.hidden_size)
        self.hyper("hc_head", c.hc_mult, 1)

    def block(self, p: str, layer: int) -> None:
        c, mixes = self.c, (2 + self.c.hc_mult) * self.c.hc_mult
        for site in ("attn", "ffn"):
            self.put(f"{p}{site}_norm.weight", self.f.norm, c.hidden_size)
            self.hyper(f"{p}hc_{site}", mixes, 3)
        self.attention(p + "attn.", c.compress_ratios[layer])
        self.moe(p + "ffn.", layer)

    def attention(self, a: str, ratio: int) -> None:
        c = self.c
        heads = c.num_attention_heads
        self.put(a + "attn_sink", self.f.exact, heads)
        self.put(a + "q_norm.weight", self.f.norm, c.q_lora_rank)
        self.put(a + "kv_norm.weight", self.f.norm, c.head_dim)
        self.linear(a + "wq_a", c.q_lora_rank, c.hidden_size)
        self.linear(a + "wq_b", heads * c.head_dim, c.q_lora_rank)
        self.linear(a + "wkv", c.head_dim, c.hidden_size)
        self.linear(a + "wo_a", c.o_groups * c.o_lora_rank, heads * c.head_dim // c.o_groups)
        self.linear(a + "wo_b", c.hidden_size, c.o_groups * c.o_lora_rank)
        if ratio:
            self.compressor(a + "compressor.", ratio, c.head_dim)
        if ratio == CSA_RATIO:
            i = a + "indexer."
            self.linear(i + "wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
            self.put(i + "weights_proj.weight", self.f.plain, c.index_n_heads, c.hidden_size)
            self.compressor(i + "compressor.", CSA_RATIO, c.index_head_dim)

    def moe(self, p: str, layer: int) -> None:
        c = self.c
        d, width, n = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
        self.put(p + "gate.weight", self.f.plain, n, d)
        if layer < c.num_hash_layers:
            self.put(p + "gate.tid2eid", self.f.ids, c.vocab_size, c.num_experts_per_tok)
        else:
            self.put(p + "gate.bias", self.f.exact, n)
        for name, rows, columns in (("w1", width, d), ("w2", d, width), ("w3", width, d)):
            self.linear(f"{p}shared_experts.{name}", rows, columns)
            self.experts(p, name, rows, columns)

    def experts(self, p: str, name: str, rows: int, columns: int) -> None:
        """One matrix of every routed expert."""
        f = self.f
        if f.expert <= FP4:
            stored = columns // 2 if f.expert <= FP4_CONTAINERS else columns
            scale = (f.expert_scale, (rows, columns // 32))
        else:
            stored = columns
            scale = (f.expert_scale, (blocks(rows), blocks(columns)))
        weight = (f.expert, (rows, stored))
        table = self.table
        for e in range(self.c.n_routed_experts):
            table[f"{p}experts.{e}.{name}.weight"] = weight
            if f.expert_scale:
                table[f"{p}experts.{e}.{name}.scale"] = scale

    def draft(self, kind: str, j: int, count: int) -> None:
        """The tensors draft block j has beyond those of a layer."""
        c, p = self.c, f"mtp.{j}."
        d, last = c.hidden_size, j == count - 1
        if kind == "mtp":
            self.linear(p + "e_proj", d, d)
            self.linear(p + "h_proj", d, d)
            self.put(p + "enorm.weight", self.f.norm, d)
            self.put(p + "hnorm.weight", self.f.norm, d)
        elif j == 0:
            self.linear(p + "main_proj", d, d * len(c.dspark_target_layer_ids or ()))
            self.put(p + "main_norm.weight", self.f.norm, d)
        if kind == "mtp" or last:
            self.put(p + "norm.weight", self.f.norm, d)
            self.hyper(p + "hc_head", c.hc_mult, 1)
        if kind == "dspark" and last:
            rank = c.dspark_markov_rank or 0
            self.put(p + "markov_head.markov_w1.weight", self.f.plain, c.vocab_size, rank)
            self.put(p + "markov_head.markov_w2.weight", self.f.plain, c.vocab_size, rank)
            self.put(p + "confidence_head.proj.weight", self.f.plain, 1, d + rank)


def expected(
    config: Config, draft: str | None = None, draft_blocks: int = 0, formats: Formats = OFFICIAL
) -> Table:
    """Every tensor of a checkpoint.

    Parameters
    ----------
    config : Config
    draft : "mtp", "dspark" or None
        Kind of the draft blocks.
    draft_blocks : int
        How many there are.
    formats : Formats
        Storage dtypes; those of the official files by default.

    Returns
    -------
    dict of str to (frozenset of str, tuple of int)
        Name to allowed dtypes and shape.

    Examples
    --------
    >>> from dsv4 import nano
    >>> expected(Config.from_json(nano.CONFIG))["layers.3.attn.compressor.ape"][1]
    (4, 1024)
    """
    each = 40 + 6 * config.n_routed_experts
    if (config.num_hidden_layers + draft_blocks) * each > MAX_TENSORS:
        raise FormatError(
            file="config.json", rule="tensors",
            got=f"{config.num_hidden_layers} layers of {config.n_routed_experts} experts",
            wanted=f"at most {MAX_TENSORS} tensors",
        )
    builder = _Builder(config, formats)
    builder.trunk()
    for layer in range(config.num_hidden_layers):
        builder.block(f"layers.{layer}.", layer)
    for j in range(draft_blocks):
        builder.block(f"mtp.{j}.", config.num_hidden_layers + j)
        builder.draft(draft or "mtp", j, draft_blocks)
    return builder.table


class Layout(NamedTuple):
    """What `check` found out."""

    draft: str | None
    draft_blocks: int
    formats: Formats


def check(
    config: Config, tensors: Mapping[str, Stored], *,
    file_of: Callable[[str], str] = lambda name: "", renamed: bool = False,
) -> Layout:
    """Compare a tensor table with what the config asks for.

    Parameters
    ----------
    config : Config
    tensors : mapping of official name to an object with `dtype` and `shape`
    file_of : function of a tensor's name, optional
        The file it is in, for messages.
    renamed : bool
        The names were those of transformers, whose exports keep other dtypes.

    Raises
    ------
    FormatError
        Listing up to 20 offenders and their number.
    """
    draft, count = draft_kind(config, tensors)
    formats = find_formats(config, tensors, renamed)
    table = expected(config, draft, count, formats)
    errors = []
    for name in sorted(table.keys() - tensors.keys()):
        errors.append(FormatError(tensor=name, rule="name", got="no such tensor", wanted="one"))
    for name in sorted(tensors.keys() - table.keys()):
        wanted = "only tensors that config.json asks for"
        errors.append(FormatError(file=file_of(name), tensor=name, rule="name",
                                  got="an unknown tensor", wanted=wanted))
    for name, (dtypes, shape) in table.items():
        tensor = tensors.get(name)
        if tensor is None or (tensor.shape == shape and tensor.dtype in dtypes):
            continue
        got, wanted = tensor.dtype, _any_of(dtypes)
        if tensor.dtype in dtypes:
            got, wanted = f"{got} {list(tensor.shape)}", f"{got} {list(shape)}"
            rule = "shape"
        elif tensor.shape == shape:
            rule = "dtype"
        else:
            got, wanted = f"{got} {list(tensor.shape)}", f"{wanted} {list(shape)}"
            rule = "dtype and shape"
        errors.append(FormatError(file=file_of(name), tensor=name, rule=rule, got=got,
                                  wanted=wanted))
    if errors:
        raise combined(errors)
    return Layout(draft, count, formats)


def draft_kind(config: Config, names: Iterable[str]) -> tuple[str | None, int]:
    """Kind and number of the draft blocks, decided by tensor names alone."""
    found: set[int] = set()
    marks: dict[str, str] = {}
    for name in names:
        if not name.startswith("mtp."):
            continue
        match = DRAFT_NAME.match(name)
        if match is None:
            continue
        found.add(int(match[1]))
        rest = name[match.end() :]
        if rest.startswith(MTP_MARKS):
            marks.setdefault("mtp", name)
        elif rest.startswith(DSPARK_MARKS):
            marks.setdefault("dspark", name)
    if not found:
        return None, 0
    count = len(found)
    if found != set(range(count)):
        got = ", ".join(f"mtp.{j}" for j in sorted(found))
        raise FormatError(rule="draft blocks", got=got, wanted="numbers from 0 without a gap")
    if len(marks) != 1:
        got = " and ".join(marks.values()) or "neither e_proj (MTP) nor main_proj (DSpark)"
        raise FormatError(rule="draft kind", got=got, wanted="either MTP or DSpark blocks")
    kind = next(iter(marks))
    if (kind == "dspark") != (config.dspark_block_size is not None):
        says = "dspark_* keys" if kind == "mtp" else "no dspark_* keys"
        wanted = "none of them" if kind == "mtp" else "all four"
        raise FormatError(
            file="config.json", tensor=marks[kind], rule="draft kind", got=says,
            wanted=f"{wanted}: the tensors are those of {kind}",
        )
    ratios = config.compress_ratios[config.num_hidden_layers :]
    if len(ratios) < count or any(ratios[:count]):
        raise FormatError(
            file="config.json", rule="compress_ratios", got=list(ratios),
            wanted=f"a 0 for each of the {count} draft blocks after those of the layers",
        )
    return kind, count


def find_formats(config: Config, tensors: Mapping[str, Stored], renamed: bool) -> Formats:
    """Storage formats, from what most tensors of the first layer are stored in."""
    first = "layers.0."
    linears = [
        first + name
        for name in ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b")
    ] + [f"{first}ffn.shared_experts.{w}" for w in ("w1", "w2", "w3")]
    experts = [
        f"{first}ffn.experts.{e}.{w}"
        for e in range(min(config.n_routed_experts, 64))
        for w in ("w1", "w2", "w3")
    ]
    linear, expert = _most(tensors, linears, ".weight"), _most(tensors, experts, ".weight")
    if config.quantized and linear not in FP8:
        raise FormatError(
            tensor=linears[0] + ".weight", rule="dtype", got=linear or "none",
            wanted="F8_E4M3: config.json has a quantization_config with quant_method fp8",
        )
    formats = Formats(
        linear=FP8 if linear in FP8 else PLAIN,
        linear_scale=_scales(tensors, linears, BLOCK_SCALES) if linear in FP8 else frozenset(),
    )
    if not config.quantized or renamed:
        formats = formats._replace(
            plain=PLAIN, norm=PLAIN, exact=PLAIN, ids=frozenset({"I64", "I32"})
        )
    if expert in FP4 | FP8:
        allowed = E8M0 if expert in FP4 else BLOCK_SCALES
        formats = formats._replace(
            expert=frozenset({expert}), expert_scale=_scales(tensors, experts, allowed)
        )
    else:
        formats = formats._replace(expert=PLAIN, expert_scale=frozenset())
    allowed_formats = (config.expert_dtype,) if config.expert_dtype else ("fp4", "fp8")
    if config.quantized and formats.expert_format not in allowed_formats:
        raise FormatError(
            tensor=experts[0] + ".weight", rule="dtype", got=f"{expert} ({formats.expert_format})",
            wanted=f"{' or '.join(allowed_formats)}, as config.json says",
        )
    return formats


def _most(tensors: Mapping[str, Stored], names: Iterable[str], suffix: str) -> str:
    """The dtype most of these tensors have; "" if none of them exists."""
    found = Counter(tensors[n + suffix].dtype for n in names if n + suffix in tensors)
    return found.most_common(1)[0][0] if found else ""


def _scales(tensors: Mapping[str, Stored], names: Iterable[str], allowed: Dtypes) -> Dtypes:
    """The dtype of the scales, one for all; every allowed one where there are none to look at."""
    found = _most(tensors, names, ".scale")
    return frozenset({found}) if found in allowed else allowed


def _any_of(dtypes: Dtypes) -> str:
    return " or ".join(sorted(dtypes))
