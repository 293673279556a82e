# SPDX-License-Identifier: Apache-2.0
"""Traces: internals of a model, copied out while it runs, as NumPy arrays.

A `Trace` says what to copy, and holds it.  `Model.trace` runs a prompt with one; `Session.append`,
`Model.step`, `Model.generate`, `Model.stream` and `Model.batch` take one for each session, beside
others without.  It grows with every step it is given to, a row for each token.  What a model
computes does not change by a bit, and what was not asked for is neither computed nor copied.

What hooks of TransformerLens are called here, for a layer ``i`` (also as `HOOKS`):

===================================  ==========================================================
``hook_embed``                       ``streams_in[0]``: the embedding, once in each stream
``blocks.i.hook_resid_pre``          ``streams_in[i]``: there are hc_mult residual streams
``blocks.i.ln1.hook_normalized``     ``sublayers[i].attention_in``
``blocks.i.attn.hook_k``             ``kv[i].window``: one row is key and value of all heads
``blocks.i.attn.hook_v``             ``kv[i].window``
``blocks.i.attn.hook_pattern``       ``attention[i].window``, ``.compressed`` and ``.sink``
``blocks.i.attn.hook_z``             ``heads[i]``
``blocks.i.hook_attn_out``           ``sublayers[i].attention_out``
``blocks.i.hook_resid_mid``          ``streams_mid[i]``
``blocks.i.ln2.hook_normalized``     ``sublayers[i].ffn_in``
``blocks.i.mlp.hook_expert_indices`` ``router[i].experts``
``blocks.i.mlp.hook_expert_weights`` ``router[i].weights``
``blocks.i.hook_mlp_out``            ``sublayers[i].ffn_out``
``blocks.i.hook_resid_post``         ``streams[i]``
===================================  ==========================================================
"""

import json
import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsv4.arrays import WANT, Float32, Int32, Logits, to_bf16
from dsv4.memory import available_memory, size
from dsv4.trace_parts import (
    HOOKS,
    PARTS,
    Select,
    chosen_layers,
    nearest,
    new_folder,
    on_device,
)
from dsv4.trace_recording import NAN, Recording
from dsv4.trace_views import (
    AttentionTrace,
    HyperTrace,
    IndexerTrace,
    KVTrace,
    Layers,
    MixTrace,
    RouterTrace,
    SublayerTrace,
    View,
    indexer_table,
    plain,
    router_table,
)

if TYPE_CHECKING:
    from dsv4.model import Model
    from dsv4.session import Session

__all__ = ["HOOKS", "PARTS", "Trace", "checked", "requested"]


class Trace(Recording):
    """What to copy out of a model, and what was copied; see `Model.trace`.

    Give it to `Session.append` (or `Model.step`, `generate`, `stream`, `batch`) as ``trace=``: it
    grows by a row for each token.  One trace belongs to one timeline: each step continues where the
    one before ended.

    Parameters
    ----------
    model : Model
    router, indexer, streams, streams_in, streams_mid, kv, attention, heads, hyper, sublayers
        Layers to copy that part of: True for all that have it, or a list of layers.
    logits : "all", "last" or "none"
        Rows to keep.
    nll : bool
        Keep -log p of each token given those before it.
    out : path, optional
        A folder, empty or new: everything goes to `.npy` files there, which are mapped, instead of
        memory.  `close` (or the end of a ``with`` block) cuts them to what there is.
    device : bool
        What is copied of layers stays on the GPU, and is a `dsv4.DeviceArray` in place of an array;
        tokens, logits and nll are on the host.  Not for `attention`, nor with `out`, nor in steps
        with edits: these are computed on the CPU.

    Attributes
    ----------
    model : Model
    position : int
        Of the first token in its session.
    session : Session or None
        With `Model.trace`: where the prompt is; closed with the trace.
    parts : dict
        The layers of each part that was asked for.
    device : bool
        Whether layers are traced on the GPU.

    Raises
    ------
    ValueError, TypeError
        No such part or layer, or the layer has nothing of the kind: names the nearest.

    Notes
    -----
    A step that would need more memory (or space on disk) than there is, is refused before it
    begins: MemoryError, or OSError with `out`, with the bytes.  A step that fails adds nothing.

    Examples
    --------
    >>> import dsv4
    >>> with dsv4.load() as model, dsv4.Trace(model, router=[0], nll=True) as t:
    ...     session = model.session()
    ...     _ = session.append([0, 7, 8], trace=t)
    ...     _ = session.append([9], trace=t)
    ...     t.router[0].experts.shape[0], t.tokens.tolist(), t.nll.shape
    (4, [0, 7, 8, 9], (3,))
    """

    def __init__(
        self, model: "Model", *, router: Select = None, indexer: Select = None,
        streams: Select = None, streams_in: Select = None, streams_mid: Select = None,
        kv: Select = None, attention: Select = None, heads: Select = None, hyper: Select = None,
        sublayers: Select = None, logits: Logits = "none", nll: bool = False,
        out: str | os.PathLike[str] | None = None, device: bool = False, **unknown: Any,
    ) -> None:
        for name in unknown:
            raise ValueError(f"trace: there is no {name!r}{nearest(name)}")
        if not isinstance(logits, str) or logits not in WANT:
            raise ValueError(f"logits: got {logits!r}, wanted 'all', 'last' or 'none'")
        if not isinstance(nll, bool):
            raise TypeError(f"nll: got {nll!r}, wanted True or False")
        asked = dict(
            router=router, indexer=indexer, streams=streams, streams_in=streams_in,
            streams_mid=streams_mid, kv=kv, attention=attention, heads=heads, hyper=hyper,
            sublayers=sublayers)
        parts = {part: chosen_layers(model, part, which) for part, which in asked.items()
                 if which is not None and which is not False}
        device = on_device(model, device, attention, out)
        folder = None if out is None else new_folder(out)
        super().__init__(model, parts, logits, nll, folder, device)
        self.session: Session | None = None
        self.one_answer = False  # made for an answer, closed with it

    # ---- what there is ----

    @property
    def layers(self) -> list[int]:
        """The layers of which anything is traced, ascending."""
        return sorted({layer for layers in self.parts.values() for layer in layers})

    @property
    def tokens(self) -> Int32:
        """The tokens traced: int32 [n]."""
        return self._tokens.values[:, 0]

    @property
    def texts(self) -> list[str]:
        """Each token as text; bytes that are not whole characters are U+FFFD.

        Raises
        ------
        ValueError
            The checkpoint has no tokenizer.
        """
        tokenizer = self.model.text_tokenizer("texts")
        return [tokenizer.decode([token]) for token in self.tokens.tolist()]

    @property
    def router(self) -> "Layers[RouterTrace]":
        """By layer: experts, weights and scores (`dsv4.trace_views.RouterTrace`)."""
        return self._of("router", lambda i: RouterTrace(
            *(self._value(name, i) for name in PARTS["router"])))

    @property
    def indexer(self) -> "Layers[IndexerTrace]":
        """By CSA layer: entries selected and their scores (`dsv4.trace_views.IndexerTrace`)."""
        ratios = self.model.config.compress_ratios
        return self._of("indexer", lambda i: IndexerTrace(
            self._value("index_selected", i), self._value("index_scores", i), ratios[i]))

    @property
    def attention(self) -> "Layers[AttentionTrace]":
        """By layer: the weights of every key (`dsv4.trace_views.AttentionTrace`)."""
        return self._of("attention", self._attention)

    @property
    def heads(self) -> "Layers[Float32]":
        """By layer: what each head gives, float32 [n, heads, head_dim], before the output
        projection, the rotary part turned back; holds bf16 values."""
        return self._of("heads", lambda i: self._value("heads", i))

    @property
    def streams(self) -> "Layers[Float32]":
        """By layer: the residual streams after it, float32 [n, hc_mult, hidden_size]; holds bf16
        values."""
        return self._of("streams", lambda i: self._value("streams", i))

    @property
    def streams_in(self) -> "Layers[Float32]":
        """By layer: the residual streams before it, as `streams`."""
        return self._of("streams_in", lambda i: self._value("streams_in", i))

    @property
    def streams_mid(self) -> "Layers[Float32]":
        """By layer: the residual streams between attention and experts, as `streams`."""
        return self._of("streams_mid", lambda i: self._value("streams_mid", i))

    @property
    def hyper(self) -> "Layers[HyperTrace]":
        """By layer: pre, post and comb of both sublayers (`dsv4.trace_views.HyperTrace`)."""
        def mix(site: str, i: int) -> MixTrace:
            return MixTrace(*(self._value(f"{site}_{part}", i) for part in ("pre", "post", "comb")))

        return self._of("hyper", lambda i: HyperTrace(mix("attention", i), mix("ffn", i)))

    @property
    def sublayers(self) -> "Layers[SublayerTrace]":
        """By layer: what both sublayers read and give (`dsv4.trace_views.SublayerTrace`)."""
        return self._of("sublayers", lambda i: SublayerTrace(
            *(self._value(name, i) for name in PARTS["sublayers"])))

    @property
    def kv(self) -> "Layers[KVTrace]":
        """By layer: the rows it keeps (`dsv4.trace_views.KVTrace`)."""
        return self._of("kv", self._kv)

    @property
    def logits(self) -> Float32 | None:
        """Float32 [n, vocab] ("all"), [1, vocab] ("last") or None: row i is what follows token
        i."""
        if self._logits is not None:
            return self._logits.values
        return self._last[None] if self._last is not None and self._keeps == "last" else None

    @property
    def nll(self) -> Float32 | None:
        """-log p of each token but the first, in nats: float32 [n - 1], entry i of token i + 1; or
        None.
        """
        return None if self._nll is None else self._nll.values[:, 0]

    def lens(self, layer: int, rows: Any = None) -> Float32:
        """What the model would say if it ended after a layer: its own head on the traced streams.

        Parameters
        ----------
        layer : int
            One of `streams`.
        rows : slice, int or sequence of int, optional
            Which tokens; all by default.  Each costs 4 bytes times the vocabulary.

        Returns
        -------
        float32 [rows, vocab]
            Logits; after the last layer the bits of the model's own.

        Raises
        ------
        KeyError
            The streams of this layer were not traced.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     last = len(model.layers) - 1
        ...     with model.trace("To be, or not", streams=[last], logits="all") as t:
        ...         (t.lens(last) == t.logits).all()
        np.True_
        """
        streams = np.asarray(self.streams[layer])
        if rows is not None:
            streams = streams[np.atleast_1d(np.arange(len(streams))[rows])]
        if not len(streams):
            raise ValueError("rows: got none, wanted at least one")
        need = len(streams) * self.model.config.vocab_size * 4
        if need > available_memory():
            raise MemoryError(
                f"lens: {len(streams)} rows of logits need {size(need)}, "
                f"{size(available_memory())} are free; wanted fewer rows")
        return self.model._core.head(to_bf16(streams))

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, without copies: position, tokens, and for each part a dict by layer.

        Returns
        -------
        dict
            ``d["router"][7]["experts"]`` is ``t.router[7].experts``.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model, model.trace([0, 7, 8], router=[0]) as t:
        ...     sorted(t.to_dict()), sorted(t.to_dict()["router"][0])
        (['position', 'router', 'tokens'], ['experts', 'scores', 'weights'])
        """
        found: dict[str, Any] = {"position": self.position, "tokens": self.tokens}
        for name in ("logits", "nll"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        for part in self.parts:
            found[part] = {i: plain(view) for i, view in getattr(self, part).items()}
        return found

    def to_pandas(self, what: Literal["tokens", "router", "indexer"] = "tokens") -> Any:
        """A pandas DataFrame.

        Parameters
        ----------
        what : "tokens", "router" or "indexer"
            A row for each token (position, token, text, nll); for each layer, token and choice of
            the router (and expert, weight); for each layer, token and entry selected (and entry,
            score, first and end of its tokens).

        Raises
        ------
        ImportError
            pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError(
                "to_pandas needs pandas, which is not installed: pip install pandas") from None
        if what == "tokens":
            return pandas.DataFrame(self._token_table())
        if what == "router":
            return pandas.DataFrame(router_table(self.router, len(self), self.position))
        if what == "indexer":
            return pandas.DataFrame(indexer_table(self.indexer, self.position))
        raise ValueError(f"what: got {what!r}, wanted 'tokens', 'router' or 'indexer'")

    def _token_table(self) -> dict[str, Any]:
        table: dict[str, Any] = {
            "position": np.arange(self.position, self.position + len(self)), "token": self.tokens}
        if self.model.tokenizer is not None:
            table["text"] = self.texts
        if self.nll is not None:
            table["nll"] = np.concatenate([[NAN], self.nll])[: len(self)]
        return table

    def close(self) -> None:
        """End it: `session` is closed, files are cut to what there is.  What was traced can still
        be read.  Twice is no error."""
        if self._closed:
            return
        self._closed = True
        if self.session is not None:
            self.session.close()
        for column in self._all:
            column.close()
        if self._folder is not None:
            about = {"model": self.model.kind, "position": self.position, "tokens": len(self),
                     "parts": self.parts}
            (self._folder / "trace.json").write_text(json.dumps(about, indent=1) + "\n")

    def __enter__(self) -> "Trace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        parts = ", ".join(f"{part} of {len(layers)}" for part, layers in self.parts.items())
        where = "on the GPU" if self.device else "in memory"
        where = where if self._folder is None else f"in {self._folder}"
        return (f"<dsv4.Trace of {len(self)} tokens from position {self.position}: "
                f"{parts or 'no'} layers, {size(self.nbytes)} {where}>")

    # ---- views ----

    def _of(self, part: str, view: Callable[[int], View]) -> "Layers[View]":
        return Layers(part, self.parts.get(part, []), view)

    def _value(self, name: str, layer: int) -> Any:
        return self._columns[name, layer].values

    def _attention(self, i: int) -> AttentionTrace:
        weights, ratio = self._value("attention_weights", i), self.model.config.compress_ratios[i]
        end = 1 + self.model.config.sliding_window
        csa = ("index_selected", i) in self._columns
        if csa:
            entries = self._value("index_selected", i)
        else:
            ranks = np.arange(weights.shape[2] - end)
            seen = (np.arange(self.position, self.position + len(self)) + 1) // max(ratio, 1)
            entries = np.where(ranks < seen[:, None], ranks, -1).astype(np.int32)
        return AttentionTrace(
            weights[:, :, 1:end], weights[:, :, end:], weights[:, :, 0], entries, self.position,
            ratio, csa)

    def _kv(self, i: int) -> KVTrace:
        c = self.model.config
        ratio = c.compress_ratios[i]

        def entries(name: str, dim: int) -> Float32:
            column = self._columns.get((name, i))
            return np.empty((0, dim), np.float32) if column is None else column.values

        return KVTrace(
            self._value("kv", i), entries("kv_compressed", c.head_dim),
            entries("kv_index", c.index_head_dim), self.position // ratio if ratio else 0, ratio,
            ("kv_index", i) in self._columns)


def checked(trace: object, model: "Model", name: str = "trace") -> Trace:
    """A trace of this model; TypeError or ValueError for anything else."""
    if not isinstance(trace, Trace):
        raise TypeError(f"{name}: got {type(trace).__name__}, wanted a dsv4.Trace or None")
    if trace.model is not model:
        raise ValueError(f"{name}: got one of another model, wanted one of this model")
    return trace


def requested(trace: object, model: "Model") -> Trace:
    """A trace, or a new one from a dict of the arguments of `Trace`."""
    if isinstance(trace, Mapping):
        made = Trace(model, **{str(name): value for name, value in trace.items()})
        made.one_answer = True
        return made
    if not isinstance(trace, Trace):
        raise TypeError(f"trace: got {type(trace).__name__}, wanted a dsv4.Trace, a dict of its "
                        "arguments, or None")
    return checked(trace, model)
