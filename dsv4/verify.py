# SPDX-License-Identifier: Apache-2.0
"""`dsv4 verify`: does this machine compute what the published code does; is a folder sound.

Without a folder, a tiny checkpoint is made on the spot and run against values stored in the
package, with every set of kernels this machine has; and every variant of every operation is
compared with the portable one, bit for bit.  With a folder: structure, scales, checksums.
NumPy and dsv4 only.  Source: DESIGN 4, TRUST 2.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4 import _core, checksums, hub, nano
from dsv4 import kernel_calls as kc
from dsv4.checkpoint import Checkpoint
from dsv4.errors import FormatError
from dsv4.expected import Expected, stream_report
from dsv4.files import Folder
from dsv4.loading import NUMERICS, _options, _Progress, engine
from dsv4.memory import size

Array = npt.NDArray[Any]

VALUES = Path(__file__).parent / "nano_odd"
FAILED = "FAILED"
WIDTHS = {"operation": 20, "layer": 20, "run": 22, "folder": 20}
TITLES = {
    "operation": "operations: every variant against the portable one, bit for bit",
    "layer": "layers, each alone on its stored input",
    "run": "whole runs against the stored logits",
    "folder": "checks",
}


@dataclass(frozen=True)
class Check:
    """One line of a report.

    Attributes
    ----------
    part : "operation", "layer", "run" or "folder"
    name : str
    result : "equal", "within limit", "ok", "not checked" or "FAILED"
    detail : str
        What was compared, in words.
    facts : dict
        The same for machines.
    """

    part: str
    name: str
    result: str
    detail: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes
    ----------
    subject : str
        "this machine", or the folder.
    checks : tuple of Check
    """

    subject: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(check.result != FAILED for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"subject": self.subject, "ok": self.ok,
                "checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        lines, part = [], ""
        for check in self.checks:
            if check.part != part:
                part = check.part
                lines.append(TITLES[part])
            lines.append(
                f"  {check.name:<{WIDTHS[part]}} {check.result:<12} {check.detail}".rstrip())
        failed = sum(check.result == FAILED for check in self.checks)
        verdict = f"{failed} of {len(self.checks)} checks FAILED" if failed else "all is well"
        return "\n".join([*lines, f"{self.subject}: {verdict}"])


def verify(folder: str | os.PathLike[str] | None = None) -> Report:
    """Check this machine, or a model folder.

    Parameters
    ----------
    folder : path or hub id, optional
        Without it, the kernels of this machine are checked; DSV4_CPU_DISABLE has no effect.

    Returns
    -------
    Report
        `ok` says it all, `str()` is a table.

    Raises
    ------
    FileNotFoundError
        There is no such folder.

    Notes
    -----
    On a terminal a progress bar is shown.  A folder is read once if it has checksums
    (dsv4-manifest.json, or what huggingface_hub noted); else only its headers and scales.

    Examples
    --------
    >>> from dsv4.loading import DEFAULT_MODEL
    >>> verify(DEFAULT_MODEL).ok
    True
    """
    if folder is None:
        return Report("this machine", (*_operations(), *_tiny_model()))
    path = hub.resolve(folder, None, False)
    return Report(str(path), tuple(_folder(path)))


# ---- operations ----

def _operations() -> Iterator[Check]:
    """Every variant of every operation on the same random operands."""
    for op in dict.fromkeys(name for name, *_ in _core.kernel_variants(None)):
        ref, *others = kc.variants(op)
        draw = np.random.default_rng(len(op))
        runs = list(_operands(op, draw))
        want = [_bits(run(ref)) for run in runs]
        equal = {v.name: [_bits(run(v)) for run in runs] == want for v in others}
        wrong = [name for name, same in equal.items() if not same]
        detail = ", ".join(equal) or "portable only"
        if wrong:
            detail = f"other bits than the portable one: {', '.join(wrong)}"
        yield Check("operation", op, FAILED if wrong else "equal", detail, {"variants": equal})


def _bits(result: Any) -> list[bytes]:
    """The bytes of one array, number or tuple of arrays."""
    return [np.ascontiguousarray(part).tobytes()
            for part in (result if isinstance(result, tuple) else (result,))]


def _bf16(draw: np.random.Generator, *shape: int, octaves: float = 8) -> Array:
    """bf16 codes of random values with magnitudes 2^-octaves to 2^octaves."""
    x = draw.standard_normal(shape) * 2.0 ** draw.uniform(-octaves, octaves, shape)
    return nano.bf16_bits(x.astype(np.float32))


def _f32(draw: np.random.Generator, *shape: int, scale: float = 1) -> Array:
    return (draw.standard_normal(shape) * scale).astype(np.float32)


Run = Callable[[kc.Variant], Any]


def _operands(op: str, draw: np.random.Generator) -> Iterator[Run]:
    """Calls of one operation, each with operands of its own."""
    if op.startswith("linear_"):
        _, many, fmt = op.split("_")
        for weight in _weights(fmt, draw):
            for n in (1, 3, 8) if many == "few" else (9, 40):
                yield _call(kc.linear, _bf16(draw, n, weight.cols, octaves=3), weight)
        return
    yield from _OPERANDS[op](draw)


def _call(function: Callable[..., Any], *arguments: Any) -> Run:
    return lambda v: function(v, *arguments)


def _weights(fmt: str, draw: np.random.Generator) -> Iterator[kc.Weight]:
    """Weights [136, 320] of a format under every scale rule it knows."""
    rows, cols = 136, 320
    if fmt in ("bf16", "f32"):
        data = _bf16(draw, rows, cols) if fmt == "bf16" else _f32(draw, rows, cols)
        yield _weight(data, None, kc.W_BF16 if fmt == "bf16" else kc.W_F32, cols)
        return
    if fmt == "fp4":
        data = draw.integers(0, 256, (rows, cols // 2), np.uint8)
        for rule, low, high in ((kc.SCALE_FOLD, 110, 140), (kc.SCALE_BLOCK, 60, 190)):
            scale = draw.integers(low, high, (rows, cols // 32), np.uint8)
            yield _weight(data, scale, kc.W_FP4, cols, rule)
        return
    data = draw.integers(0, 256, (rows, cols), np.uint8)
    data[(data & 0x7F) == 0x7F] = 0  # not NaN
    for rule, low, high in ((kc.SCALE_FOLD, 110, 140), (kc.SCALE_BLOCK, 60, 190)):
        yield _weight(data, draw.integers(low, high, (2, 3), np.uint8), kc.W_FP8, cols, rule)
    for rule in (kc.SCALE_BLOCK, kc.SCALE_ROUND):
        yield _weight(data, np.abs(_f32(draw, 2, 3)) + 2**-9, kc.W_FP8, cols, rule)


def _weight(
    data: Array, scale: Array | None, fmt: int, cols: int, rule: int = kc.SCALE_NONE
) -> kc.Weight:
    """A weight over arrays that it keeps alive."""
    kind = kc.SCALE_F32 if scale is not None and scale.dtype == np.float32 else kc.SCALE_E8M0
    weight = kc.Weight(kc.pointer(data), kc.pointer(scale), len(data), cols, fmt, kind, rule)
    weight.keep = (data, scale)
    return weight


def _hc(draw: np.random.Generator) -> Iterator[Run]:
    for hc, d in ((2, 128), (4, 200)):
        streams, mixes = _bf16(draw, hc, d, octaves=2), (2 + hc) * hc
        dots, base, scale = _f32(draw, mixes), _f32(draw, mixes), _f32(draw, 3)
        yield _call(kc.hc_pre, streams, dots, scale, base)


def _hc_post(draw: np.random.Generator) -> Iterator[Run]:
    for hc, d in ((2, 128), (4, 200)):
        a = (_bf16(draw, d), _bf16(draw, hc, d), _f32(draw, hc), _f32(draw, hc, hc))
        yield _call(kc.hc_post, *a)


def _attention(draw: np.random.Generator) -> Iterator[Run]:
    """Both formats of KV rows; few and many keys, some of them masked."""
    store = kc.variants("kv_store")[0]
    for fmt, heads, n in ((0, 2, 5), (0, 20, 200), (1, 5, 130)):
        keys: list[Array | None] = [
            None if draw.random() < 0.1 else kc.kv_store(store, row, fmt)
            for row in _bf16(draw, n, 192, octaves=2)]
        a = (_bf16(draw, heads, 192, octaves=2), keys, _f32(draw, heads), 192**-0.5, fmt)
        yield _call(kc.attention, *a)


def _pool(draw: np.random.Generator) -> Iterator[Run]:
    for n_row, n in ((8, 96), (128, 64)):
        k, gate, ape = (list(_f32(draw, n_row, n, scale=3)) for _ in range(3))
        gates: list[Array | None] = [None if i < n_row // 8 else g for i, g in enumerate(gate)]
        yield _call(kc.pool, k, gates, ape)


def _index_rows(draw: np.random.Generator, n: int, d: int) -> Array:
    store = kc.variants("index_store")[0]
    return np.stack([kc.index_store(store, row) for row in _bf16(draw, n, d, octaves=3)])


def _index_scores(draw: np.random.Generator) -> Iterator[Run]:
    for heads, n, d in ((5, 64, 64), (8, 61, 128)):
        a = (_index_rows(draw, heads, d), _index_rows(draw, n, d), _bf16(draw, heads), 0.03, d)
        yield _call(kc.index_scores, *a)


def _top_k(draw: np.random.Generator) -> Iterator[Run]:
    for n, k in ((10, 10), (40, 9), (3000, 512)):
        scores = np.round(_f32(draw, n, scale=20))  # with ties
        yield _call(kc.top_k, scores, k)


def _router(draw: np.random.Generator) -> Iterator[Run]:
    for n, k in ((5, 2), (256, 8)):
        logits, bias = _f32(draw, n, scale=6), _f32(draw, n)
        forced = draw.permutation(n)[:k].astype(np.int32)
        yield _call(kc.router, logits, k, 2.5, bias)
        yield _call(kc.router, logits, k, 1.5, None, forced)


def _rows(call: Callable[..., Any], *sizes: int) -> Callable[[np.random.Generator], Iterator[Run]]:
    """Calls on one bf16 row of each size."""

    def make(draw: np.random.Generator) -> Iterator[Run]:
        for n in sizes:
            x = _bf16(draw, n)
            yield _call(call, x)

    return make


def _kv_load(draw: np.random.Generator) -> Iterator[Run]:
    store = kc.variants("kv_store")[0]
    for fmt in (0, 1):
        row = kc.kv_store(store, _bf16(draw, 192), fmt)
        yield _call(kc.kv_load, row, fmt, 192)


def _kv_store(draw: np.random.Generator) -> Iterator[Run]:
    for fmt in (0, 1):
        yield _call(kc.kv_store, _bf16(draw, 512), fmt)


def _index_load(draw: np.random.Generator) -> Iterator[Run]:
    yield _call(kc.index_load, _index_rows(draw, 1, 128)[0], 128)


def _rmsnorm(draw: np.random.Generator) -> Iterator[Run]:
    for n in (100, 512):
        yield _call(kc.rmsnorm, _bf16(draw, n), _f32(draw, n), 1e-6)


def _rope_table(draw: np.random.Generator) -> Iterator[Run]:
    frequencies = np.exp2(-draw.uniform(0, 20, 32)).astype(np.float32)
    for position in (0, 1, 127, 65536, 1048575):
        yield _call(kc.rope_table, frequencies, position)


def _rope(draw: np.random.Generator) -> Iterator[Run]:
    angle = draw.uniform(0, 7, 32)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    for inverse in (False, True):
        yield _call(kc.rope, _bf16(draw, 64), cos, sin, inverse)


def _swiglu(draw: np.random.Generator) -> Iterator[Run]:
    for limit in (7.0, float("inf")):
        a = (_bf16(draw, 200, octaves=4), _bf16(draw, 200, octaves=4), limit, 0.7)
        yield _call(kc.swiglu, *a)


def _expert_sum(draw: np.random.Generator) -> Iterator[Run]:
    for n_row in (1, 7):
        yield _call(kc.expert_sum, list(_bf16(draw, n_row, 200)))


_OPERANDS: dict[str, Callable[[np.random.Generator], Iterator[Run]]] = {
    "act_quant": _rows(kc.act_quant, 128, 320), "act_flush": _rows(kc.act_flush, 77, 256),
    "kv_store": _kv_store, "kv_load": _kv_load, "hadamard": _rows(kc.hadamard, 32, 64, 128),
    "index_store": _rows(kc.index_store, 64, 128), "index_load": _index_load,
    "mean_square": _rows(kc.mean_square, 100, 512), "rmsnorm": _rmsnorm,
    "headnorm": _rows(lambda v, x: kc.headnorm(v, x, 1e-6), 192, 512),
    "rope_table": _rope_table, "rope": _rope, "hc_pre": _hc, "hc_post": _hc_post,
    "attention": _attention, "pool": _pool, "index_scores": _index_scores, "top_k": _top_k,
    "router": _router, "swiglu": _swiglu, "expert_sum": _expert_sum,
}


# ---- the tiny model ----

def _tiny_model() -> Iterator[Check]:
    """nano-odd, layer by layer and whole, with each set of kernels."""
    e = Expected(VALUES)
    with tempfile.TemporaryDirectory(prefix="dsv4-verify-") as there:
        folder = nano.make_stored("nano-odd", there)
        # weakest first: the others are compared with the portable kernels
        results = {disable: _everything(folder, e, disable)
                   for disable in reversed(kc.masks())}
    portable, *_ = results.values()
    others = {d or "all sets": r for d, r in results.items() if r is not portable}
    config = {**nano.CONFIG, **nano.CHECKPOINTS["nano-odd"][1]}
    for (kind, name), got in portable.items():
        wrong = [f"without {d}" if d != "all sets" else d
                 for d, r in others.items() if r[kind, name].tobytes() != got.tobytes()]
        if kind == "layer":
            check = _layer_check(e, int(name), got, config["compress_ratios"][int(name)])
        else:
            check = _run_check(e, name, got)
        if wrong:
            check = Check(check.part, check.name, FAILED,
                          f"other bits than portable kernels give: {', '.join(wrong)}")
        check.facts["kernel_sets"] = {d: r[kind, name].tobytes() == got.tobytes()
                                      for d, r in others.items()}
        yield check


def _layer_check(e: Expected, layer: int, got: Array, ratio: int) -> Check:
    report = stream_report(got, e[f"prompt130/L{layer}/stream"])
    share, median = e.layer_limits(layer)
    equal, rel = report["positions_bit_equal"], report["rel_median"]
    result = "equal" if equal == 1 else "within limit"
    if equal < share or rel > median:
        result = FAILED
    kind = "SWA" if ratio == 0 else "CSA" if ratio == 4 else "HCA"
    return Check(
        "layer", f"{layer} {kind}", result,
        f"{equal:.3f} of the positions equal in every bit, wanted {share:.3f}",
        {"equal": equal, "wanted": share, "rel_median": rel, "rel_median_limit": median})


def _run_check(e: Expected, name: str, got: Array) -> Check:
    numerics, what = name.split(" ")
    ok, report, limits = e.check_logits(what, got, numerics)
    result = "equal" if report["max_abs"] == 0 else "within limit"
    key = "trim_mean_abs"
    return Check(
        "run", f"{what}, {numerics}", result if ok else FAILED,
        f"mean difference {report[key]:.4f}, limit {limits[key]:.4f}; "
        f"argmax equal in {report['argmax_agree']:.2f}, wanted {limits['argmax_agree']:.2f}",
        {"report": report, "limits": limits})


def _everything(folder: Path, e: Expected, disable: str) -> dict[tuple[str, str], Array]:
    """Streams of every layer alone and logits of every run, without some instruction sets."""
    found: dict[tuple[str, str], Array] = {}
    ids = e["prompt130/ids"]
    for numerics in NUMERICS:
        with _opened(folder, numerics, disable) as (model, checkpoint):
            c = checkpoint.config
            if numerics == "official":
                table = model.tensor("embed.weight").view(np.uint16).reshape(c.vocab_size, -1)
                streams = np.repeat(table[ids][:, None], c.hc_mult, axis=1)
                for i in range(c.num_hidden_layers):
                    found["layer", str(i)] = model.layer(i, streams, ids, None)
                    streams = e[f"prompt130/L{i}/stream"]
            for what in e.prompts():
                session = _core.Session(model, 0)
                logits = _logits(model, session, e[f"{what}/ids"])
                found["run", f"{numerics} {what}"] = logits[e[f"{what}/positions"]]
                if what == "prompt130":
                    found["run", f"{numerics} decode"] = np.concatenate(
                        [_logits(model, session, [token]) for token in e["decode/ids"][:40]])
    return found


def _logits(model: _core.Model, session: _core.Session, ids: Any) -> Array:
    ((rows, _),) = model.step([(session, ids, 2, None)], None)
    assert rows is not None
    return rows


@contextmanager
def _opened(
    folder: Path, numerics: str = "official", disable: str = "",
    progress: Callable[[int, int], object] | None = None,
) -> Iterator[tuple[_core.Model, Checkpoint]]:
    """A folder in the engine, without its text files and whatever memory there is."""
    options = _options("cpu", None, numerics, True, False, False) | {"disable": disable or None}
    with Checkpoint.open(folder) as checkpoint:
        yield engine(checkpoint, options, progress), checkpoint


# ---- folders ----

def _folder(path: Path) -> Iterator[Check]:
    """Structure, then scales, then checksums; what rests on a failed check is left out."""
    try:
        with Checkpoint.open(path) as checkpoint:
            facts: dict[str, Any] = {
                "shards": len(checkpoint.shards), "tensors": len(checkpoint.tensors),
                "nbytes": checkpoint.nbytes, "warnings": list(checkpoint.warnings)}
            total = checkpoint.nbytes
            detail = f"{checkpoint.kind}: {facts['tensors']:,} tensors in {facts['shards']} " \
                     f"shard{'s' * (facts['shards'] != 1)}, {size(total)}"
        yield Check("folder", "structure", "ok", "; ".join([detail, *facts["warnings"]]), facts)
    except FormatError as error:
        yield Check("folder", "structure", FAILED, str(error))
        return
    try:
        with _Progress(str(path), "scales of") as progress, _opened(path, progress=progress):
            yield Check("folder", "scales", "ok", "all scales, norms and other small tensors")
    except FormatError as error:
        yield Check("folder", "scales", FAILED, str(error))
    yield _checksums(path, total)


def _checksums(path: Path, total: int) -> Check:
    mode = "crc"
    try:
        with Folder(path) as files:
            if files.has(checksums.MANIFEST):
                noted = files.read_json(checksums.MANIFEST, checksums.MAX_BYTES)
                mode = noted.get("mode", mode) if isinstance(noted, dict) else mode
            else:
                mode = "sha256"  # huggingface_hub may have noted some
        done = 0
        with _Progress(str(path), "checksums of") as show:

            def count(n: int) -> None:
                nonlocal done
                done += n
                if show is not None:
                    show(done, max(total, done))

            found = checksums.verify(path, mode, progress=count)
    except FileNotFoundError:
        return Check("folder", "checksums", "not checked",
                     f"there is no {checksums.MANIFEST} and no note of the hub")
    except ValueError as error:  # FormatError, or a mode that does not exist
        return Check("folder", "checksums", FAILED, str(error))
    what = "tensors" if mode == "crc" else "shards"
    return Check("folder", "checksums", "ok",
                 f"{mode} of {found.checked:,} {what}, {size(found.nbytes)}",
                 {"mode": mode, "checked": found.checked, "nbytes": found.nbytes})
