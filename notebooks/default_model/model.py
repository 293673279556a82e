# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4 in torch, written for training a small one on a CPU: whole sequences, no KV cache.

The model is a function of a flat dict of tensors that carry the checkpoint's names (params.py).
`Numerics` says what is rounded:

    FLOAT     nothing (plain float32)
    QAT       weights FP8/FP4, activations FP8 per 128, KV and index rows, with straight-through
              gradients; no bf16 roundings in between
    OFFICIAL  every rounding point of the reference (SPEC A.2); for evaluation only

It refuses nothing and keeps no state: it is the training twin of the engine, not a second engine.
Source: SPEC 2 to 5 and Appendix A.
"""
from __future__ import annotations

import functools
import math
from typing import Any

import quant
import torch
import torch.nn.functional as F
from params import Numerics, Params
from torch import Tensor

BLOCK = 64  # queries per tile of the window attention


# ------------------------------------------------------------------ fused element-wise pieces

_act = quant.fused(quant.act_values)
_act64 = quant.fused(lambda x: quant.act_values(x, 64))
_fp4 = quant.fused(quant.fp4_values)


def low(x: Tensor, num: Numerics) -> Tensor:
    """A bf16 rounding point of the reference."""
    return quant.bf16(x) if num.rounded else x


@quant.fused
def _rmsnorm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def rmsnorm(x: Tensor, w: Tensor, cfg: dict[str, Any], num: Numerics) -> Tensor:
    return low(_rmsnorm(x, w, cfg["rms_norm_eps"]), num)


@quant.fused
def _hc_split(m: Tensor, r: Tensor, scale: Tensor, base: Tensor, n: int, iters: int, eps: float):
    # type: ignore[no-untyped-def]
    """m [n*(2+n), T] (one row per output, so every step below runs along T) -> pre, post, comb."""
    m = m * r
    pre = torch.sigmoid(m[:n] * scale[0] + base[:n, None]) + eps
    post = 2 * torch.sigmoid(m[n:2 * n] * scale[1] + base[n:2 * n, None])
    c = (m[2 * n:] * scale[2] + base[2 * n:, None]).view(n, n, -1)
    c = torch.exp(c - c.amax(1, keepdim=True))
    c = c / c.sum(1, keepdim=True) + eps
    c = c / (c.sum(0, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(1, keepdim=True) + eps)
        c = c / (c.sum(0, keepdim=True) + eps)
    return pre, post, c


@quant.fused
def _hc_collapse(pre: Tensor, x: Tensor) -> Tensor:
    """pre [n, T], x [T, n, d] -> [T, d]."""
    out = pre[0, :, None] * x[:, 0]
    for j in range(1, x.shape[1]):
        out = out + pre[j, :, None] * x[:, j]
    return out


@quant.fused
def _hc_spread(y: Tensor, x: Tensor, post: Tensor, c: Tensor) -> Tensor:
    """X_out[k] = post[k] y + sum_j C[j, k] X[j]."""
    n = x.shape[1]
    rows = []
    for k in range(n):
        row = post[k, :, None] * y
        for j in range(n):
            row = row + c[j, k, :, None] * x[:, j]
        rows.append(row)
    return torch.stack(rows, 1)


@quant.fused
def _rms_scale(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.flatten(1).square().mean(-1) + eps)


@quant.fused
def _swiglu(h: Tensor, weight: Tensor, limit: float) -> Tensor:
    """h [n, 2, I] -> weight * silu(min(gate, limit)) * clamp(up)."""
    gate, up = h[:, 0].clamp_max(limit), h[:, 1].clamp(-limit, limit)
    return weight[:, None] * (F.silu(gate) * up)


@quant.fused
def _swiglu_shared(h: Tensor, limit: float) -> Tensor:
    gate, up = h[:, 0].clamp_max(limit), h[:, 1].clamp(-limit, limit)
    return F.silu(gate) * up


@quant.fused
def _softmax_two(s1: Tensor, s2: Tensor, m1: Tensor, m2: Tensor, sink: Tensor, scale: float):
    # type: ignore[no-untyped-def]
    """Softmax over window and entry scores [B, L, H, *] with a sink per head; masks are boolean."""
    s1 = torch.where(m1, s1 * scale, -1e30)
    s2 = torch.where(m2, s2 * scale, -1e30)
    sink = sink[:, None]
    top = torch.maximum(torch.maximum(s1.amax(-1, True), s2.amax(-1, True)), sink).detach()
    e1, e2 = torch.exp(s1 - top), torch.exp(s2 - top)
    inv = 1 / (e1.sum(-1, True) + e2.sum(-1, True) + torch.exp(sink - top))
    return e1 * inv, e2 * inv


@quant.fused
def _softmax_one(s1: Tensor, m1: Tensor, sink: Tensor, scale: float) -> Tensor:
    s1 = torch.where(m1, s1 * scale, -1e30)
    sink = sink[:, None]
    top = torch.maximum(s1.amax(-1, True), sink).detach()
    e1 = torch.exp(s1 - top)
    return e1 / (e1.sum(-1, True) + torch.exp(sink - top))


@quant.fused
def _pool(k: Tensor, g: Tensor) -> Tensor:
    """Softmax over rows (dim 2) of g, weighted sum of k."""
    return (torch.softmax(g, 2) * k).sum(2)


# ------------------------------------------------------------------ pieces of the forward pass

def linear(x: Tensor, w: Tensor, num: Numerics) -> Tensor:
    """A linear layer whose input is already quantised."""
    return low(F.linear(x, w), num)


def act(x: Tensor, num: Numerics) -> Tensor:
    """Input of an FP8 or FP4 linear."""
    return quant.through(_act, x) if num.quantised else x


@functools.cache
def _rope_table(r: int, base: float, yarn: tuple[float, ...] | None, length: int,
                width: int) -> Tensor:
    f = 1.0 / base ** (torch.arange(0, r, 2, dtype=torch.float32) / r)
    if yarn:
        factor, original, fast, slow = yarn

        def at(n: float) -> float:
            return r * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base))

        lo, hi = max(math.floor(at(fast)), 0), min(math.ceil(at(slow)), r - 1)
        ramp = ((torch.arange(r // 2, dtype=torch.float32) - lo) / max(hi - lo, 0.001)).clamp(0, 1)
        f = f / factor * ramp + f * (1 - ramp)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * f
    plain = torch.ones(length, (width - r) // 2, dtype=torch.complex64)
    return torch.cat([plain, torch.complex(torch.cos(angle), torch.sin(angle))], 1)


def rope_table(cfg: dict[str, Any], ratio: int, length: int, width: int) -> Tensor:
    """complex64 [length, width/2] of SPEC 3.2, ones before the rotary dims."""
    y = cfg["rope_scaling"]
    yarn = (y["factor"], y["original_max_position_embeddings"], y["beta_fast"], y["beta_slow"])
    base = float(cfg["compress_rope_theta"] if ratio else cfg["rope_theta"])
    return _rope_table(cfg["qk_rope_head_dim"], base, yarn if ratio else None, length, width)


def rope(x: Tensor, table: Tensor, num: Numerics) -> Tensor:
    """Rotates pairs of the last dimension of x; table broadcasts against [..., D/2]."""
    z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return low(torch.view_as_real(z * table).flatten(-2), num)


def kv_sim(x: Tensor, cfg: dict[str, Any], num: Numerics) -> Tensor:
    """FP8 rounding of the dims before the rotary ones (SPEC 3.4)."""
    if not num.quantised:
        return x
    n = x.shape[-1] - cfg["qk_rope_head_dim"]
    return torch.cat([quant.through(_act64, x[..., :n]), x[..., n:]], -1)


def compress(p: Params, pre: str, u: Tensor, ratio: int, cfg: dict[str, Any],
             num: Numerics) -> Tensor:
    """Compressed entries [B, L // ratio, width] after norm and rope; u [B, L, d] (SPEC 3.5)."""
    b, length, _ = u.shape
    ape = p[pre + "ape"]
    n, width = length // ratio, p[pre + "norm.weight"].shape[0]
    k = F.linear(u, p[pre + "wkv.weight"])[:, :n * ratio].view(b, n, ratio, -1)
    g = F.linear(u, p[pre + "wgate.weight"])[:, :n * ratio].view(b, n, ratio, -1) + ape
    if ratio == 4:
        k = torch.cat([F.pad(k[:, :-1, :, :width], (0, 0, 0, 0, 1, 0)), k[..., width:]], 2)
        before = F.pad(g[:, :-1, :, :width], (0, 0, 0, 0, 1, 0), value=-1e30)
        g = torch.cat([before, g[..., width:]], 2)
    e = rmsnorm(low(_pool(k, g), num), p[pre + "norm.weight"], cfg, num)
    return rope(e, rope_table(cfg, ratio, length, width)[:n * ratio:ratio], num)


def head_norm(q: Tensor, eps: float, num: Numerics) -> Tensor:
    """Per-head RMS norm without weight; the reference runs it in bf16, step by step (SPEC 3.1)."""
    mean = low(low(q.square(), num).mean(-1, keepdim=True), num)
    return low(q * low(torch.rsqrt(low(mean + eps, num)), num), num)


@quant.fused
def _head_norm_free(q: Tensor, eps: float) -> Tensor:
    return q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps)


@functools.cache
def window_mask(length: int, window: int) -> Tensor:
    """bool [1, L, 1, window + BLOCK]: which keys of a query's tile are in its window."""
    qp = torch.arange(length)[:, None]
    kp = (qp // BLOCK) * BLOCK - window + torch.arange(window + BLOCK)[None]
    return ((kp >= 0) & (kp <= qp) & (kp > qp - window))[None, :, None]


@functools.cache
def visible(length: int, ratio: int) -> Tensor:
    """bool [1, L, L // ratio]: entry s may be seen from p iff s < (p + 1) // ratio (SPEC 3.7)."""
    p = torch.arange(length)[:, None]
    return (torch.arange(length // ratio)[None] < (p + 1) // ratio)[None]


def index_keys(p: Params, pre: str, u: Tensor, ratio: int, cfg: dict[str, Any],
               num: Numerics) -> Tensor:
    """Index rows [B, entries, width]: entries of the indexer's own compressor, rotated, FP4."""
    keys = compress(p, pre + "compressor.", u, ratio, cfg, num)
    keys = F.linear(keys, quant.hadamard(keys.shape[-1]))
    return quant.through(_fp4, low(keys, num)) if num.quantised else keys


def index_scores(p: Params, pre: str, u: Tensor, qr: Tensor, keys: Tensor, ratio: int,
                 cfg: dict[str, Any], num: Numerics, stride: int = 1) -> Tensor:
    """Scores [B, L / stride, entries] of the lightning indexer (SPEC 3.6).

    With a stride only the last query of each `stride` is scored: enough to train on.
    """
    b, length, _ = u.shape
    n, w = cfg["index_n_heads"], cfg["index_head_dim"]
    table = rope_table(cfg, ratio, length, w)[stride - 1::stride, None]
    u, qr = u[:, stride - 1::stride], qr[:, stride - 1::stride]
    q = linear(act(qr, num), p[pre + "wq_b.weight"], num).view(b, -1, n, w)
    q = F.linear(rope(q, table, num), quant.hadamard(w))
    if num.quantised:
        q = quant.through(_fp4, low(q, num))
    dots = (q.reshape(b, -1, w) @ keys.transpose(1, 2)).view(b, -1, n, keys.shape[1])
    weight = low(linear(u, p[pre + "weights_proj.weight"], num) * (w**-0.5 * n**-0.5), num)
    return low(low(torch.relu(low(dots, num)) * weight[..., None], num).sum(2), num)


def top_entries(scores: Tensor, seen: Tensor, k: int, num: Numerics) -> Tensor:
    """bool mask of the k best visible entries; equal scores: the lower id (where it matters)."""
    scores = scores.masked_fill(~seen, float("-inf"))
    if scores.shape[-1] <= k:
        return seen.expand_as(scores)
    if num.rounded:
        order = torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :k]
    else:
        order = torch.topk(scores, k, sorted=False).indices
    return torch.zeros_like(seen.expand_as(scores)).scatter(-1, order, True) & seen


def attend_tiles(q: Tensor, kv: Tensor, entries: Tensor | None, mask: Tensor | None, sink: Tensor,
                 cfg: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Window and entries under one softmax with a sink: o [B, L, H, D], entry weights."""
    b, length, h, d = q.shape
    window, nb, scale = cfg["sliding_window"], length // BLOCK, d**-0.5
    tiles = F.pad(kv, (0, 0, window, 0)).view(b, -1, BLOCK, d)
    keys = torch.cat([tiles[:, i:nb + i] for i in range(window // BLOCK + 1)], 2)
    keys = keys.view(b * nb, -1, d)
    s1 = (q.reshape(b * nb, BLOCK * h, d) @ keys.transpose(1, 2)).view(b, length, h, -1)
    if entries is None:
        w1, w2 = _softmax_one(s1, window_mask(length, window), sink, scale), None
    else:
        s2 = (q.reshape(b, length * h, d) @ entries.transpose(1, 2)).view(b, length, h, -1)
        w1, w2 = _softmax_two(s1, s2, window_mask(length, window), mask[:, :, None], sink, scale)
    o = (w1.view(b * nb, BLOCK * h, -1) @ keys).view(b, length, h, d)
    if w2 is not None:
        o = o + (w2.view(b, length * h, -1) @ entries).view(b, length, h, d)
    return o, w2


def attend_reference(q: Tensor, kv: Tensor, entries: Tensor | None, mask: Tensor | None,
                     sink: Tensor, cfg: dict[str, Any]) -> Tensor:
    """The kernel of SPEC 3.8: keys in rank order, blocks of 64, P rounded to bf16, one sequence."""
    length, window, scale = q.shape[1], cfg["sliding_window"], q.shape[-1] ** -0.5
    p = torch.arange(length)[:, None]
    at = (p - window + 1).clamp_min(0) + torch.arange(window)
    keys, valid = kv[0, at.clamp_max(length - 1)], at <= p
    if entries is not None and entries.shape[1]:
        most = int(mask[0].sum(-1).max())
        most += -most % 64
        rank = torch.where(mask[0], torch.arange(entries.shape[1]), entries.shape[1])
        rank = F.pad(rank.sort(-1).values, (0, max(0, most - rank.shape[1])),
                     value=entries.shape[1])[:, :most]
        keys = torch.cat([keys, F.pad(entries[0], (0, 0, 0, 1))[rank]], 1)
        valid = torch.cat([valid, rank < entries.shape[1]], 1)
    s = (q[0] @ keys.transpose(1, 2)) * scale
    s = s.masked_fill(~valid[:, None], float("-inf"))
    top = torch.full(s.shape[:2] + (1,), float("-inf"))
    total, acc = torch.zeros_like(top), torch.zeros_like(q[0])
    for j in range(0, s.shape[-1], 64):
        new = torch.maximum(top, s[..., j:j + 64].amax(-1, True))
        e, fade = torch.exp(s[..., j:j + 64] - new), torch.exp(top - new)
        total = total * fade + e.sum(-1, True)
        acc = acc * fade + quant.bf16(e) @ keys[:, j:j + 64]
        top = new
    return quant.bf16(acc / (total + torch.exp(sink[:, None] - top)))[None]


def attention(p: Params, pre: str, u: Tensor, layer: int, cfg: dict[str, Any], num: Numerics,
              aux: dict[str, Any]) -> Tensor:
    """u [B, L, d] -> [B, L, d] (SPEC 3).  aux: "select" (use the indexer), "index_loss" (sum)."""
    b, length, _ = u.shape
    ratio, h, d = cfg["compress_ratios"][layer], cfg["num_attention_heads"], cfg["head_dim"]
    table = rope_table(cfg, ratio, length, d)
    uq = act(u, num)
    qr = rmsnorm(linear(uq, p[pre + "wq_a.weight"], num), p[pre + "q_norm.weight"], cfg, num)
    q = linear(act(qr, num), p[pre + "wq_b.weight"], num).view(b, length, h, d)
    eps = cfg["rms_norm_eps"]
    q = head_norm(q, eps, num) if num.rounded else _head_norm_free(q, eps)
    q = rope(q, table[:, None], num)
    kv = rmsnorm(linear(uq, p[pre + "wkv.weight"], num), p[pre + "kv_norm.weight"], cfg, num)
    kv = kv_sim(rope(kv, table, num), cfg, num)
    entries = mask = None
    if ratio:
        entries = kv_sim(compress(p, pre + "compressor.", u, ratio, cfg, num), cfg, num)
        mask = visible(length, ratio)
    if ratio == 4:
        index = index_keys(p, pre + "indexer.", u.detach(), ratio, cfg, num)
    if ratio == 4 and aux.get("select", True):
        with torch.no_grad():
            scores = index_scores(p, pre + "indexer.", u, qr, index, ratio, cfg, num)
            seen, mask = mask, top_entries(scores, mask, cfg["index_topk"], num)
            aux.setdefault("selected", {})[layer] = mask
            aux.setdefault("seen", {})[layer] = seen
    sink = p[pre + "attn_sink"]
    if num.rounded:
        o = torch.cat([attend_reference(q[i:i + 1], kv[i:i + 1],
                                        None if entries is None else entries[i:i + 1],
                                        None if mask is None else mask[i * (len(mask) > 1):][:1],
                                        sink, cfg) for i in range(b)])
    else:
        o, w2 = attend_tiles(q, kv, entries, mask, sink, cfg)
        if ratio == 4 and "index_loss" in aux:
            aux["index_loss"] = aux["index_loss"] + index_loss(
                p, pre, u.detach(), qr.detach(), index, q.detach(), entries.detach(), w2.detach(),
                ratio, cfg, num)
    o = rope(o, table.conj()[:, None], num)
    g = cfg["o_groups"]
    wo_a = p[pre + "wo_a.weight"].view(g, cfg["o_lora_rank"], -1)
    o = o.reshape(b * length, g, -1)
    z = torch.cat([linear(o[:, i], wo_a[i], num) for i in range(g)], -1)
    return linear(act(z, num), p[pre + "wo_b.weight"], num).view(b, length, -1)


def index_loss(p: Params, pre: str, u: Tensor, qr: Tensor, index: Tensor, q: Tensor,
               entries: Tensor, w2: Tensor, ratio: int, cfg: dict[str, Any],
               num: Numerics) -> Tensor:
    """Cross entropy of the index scores against the attention the heads would pay to all visible
    entries, on every fourth query; heads count by the weight they really pay to entries."""
    stride = 4
    q, w2 = q[:, stride - 1::stride], w2[:, stride - 1::stride]
    b, n, h, d = q.shape
    seen = visible(u.shape[1], ratio)[:, stride - 1::stride]
    with torch.no_grad():
        s = (q.reshape(b, n * h, d) @ entries.transpose(1, 2)).view(b, n, h, -1) * d**-0.5
        s = torch.softmax(s.masked_fill(~seen[:, :, None], -1e30), -1)
        share = w2.sum(-1, keepdim=True)
        target = (share * s).sum(2) / share.sum(2).clamp_min(1e-6)
    scores = index_scores(p, pre + "indexer.", u, qr, index, ratio, cfg, num, stride)
    logp = torch.log_softmax(scores.masked_fill(~seen, -1e30), -1)
    return -(target * logp).sum(-1).mean()


def route(p: Params, pre: str, x: Tensor, ids: Tensor, table: Tensor | None, cfg: dict[str, Any]):
    # type: ignore[no-untyped-def]
    """Experts int64 [T, k] and their weights float32 [T, k] (SPEC 4.1)."""
    s = torch.sqrt(F.softplus(F.linear(x, p[pre + "gate.weight"])))
    if table is not None:
        pick = table[ids]
    else:
        biased = s.detach() + p[pre + "gate.bias"].detach()
        pick = torch.topk(biased, cfg["num_experts_per_tok"]).indices
    w = s.gather(1, pick)
    return pick, w / w.sum(-1, keepdim=True) * cfg["routed_scaling_factor"]


def moe(p: Params, pre: str, x: Tensor, ids: Tensor, table: Tensor | None, cfg: dict[str, Any],
        num: Numerics, aux: dict[str, Any]) -> Tensor:
    """x [T, d] -> [T, d]: routed experts and the shared one (SPEC 4)."""
    t, d = x.shape
    e, k, limit = cfg["n_routed_experts"], cfg["num_experts_per_tok"], cfg["swiglu_limit"]
    pick, weight = route(p, pre, x, ids, table, cfg)
    flat, order = torch.sort(pick.flatten(), stable=True)
    counts = torch.bincount(flat, minlength=e)
    aux.setdefault("picks", {})[pre] = pick
    rows = order // k
    xq = act(x, num)
    parts = xq[rows].split(counts.tolist())
    w13, w2 = p[pre + "experts.w13"], p[pre + "experts.w2"]
    h = torch.cat([linear(parts[i], w13[i].flatten(0, 1), num) for i in range(e)])
    h = act(low(_swiglu(h.view(t * k, 2, -1), weight.flatten()[order], limit), num), num)
    out = torch.cat([linear(a, w2[i], num) for i, a in enumerate(h.split(counts.tolist()))])
    y = torch.zeros(t, d).index_add(0, rows, out)
    s = linear(xq, p[pre + "shared_experts.w13"].flatten(0, 1), num).view(t, 2, -1)
    s = linear(act(low(_swiglu_shared(s, limit), num), num), p[pre + "shared_experts.w2"][0], num)
    return low(y + s, num)


def hc_pre(p: Params, name: str, x: Tensor, cfg: dict[str, Any], num: Numerics):
    # type: ignore[no-untyped-def]
    """Streams x [T, n, d] -> collapsed [T, d], post [n, T], comb [n, n, T] (SPEC 2.2)."""
    eps = cfg["rms_norm_eps"]
    m = p[name + "_fn"] @ x.flatten(1).t()
    pre, post, comb = _hc_split(m, _rms_scale(x, eps), p[name + "_scale"], p[name + "_base"],
                                cfg["hc_mult"], cfg["hc_sinkhorn_iters"], cfg["hc_eps"])
    return low(_hc_collapse(pre, x), num), post, comb


def hc_head(p: Params, pre: str, x: Tensor, cfg: dict[str, Any], num: Numerics) -> Tensor:
    """Final collapse and norm (SPEC 2.4): the input of the head."""
    m = p[pre + "hc_head_fn"] @ x.flatten(1).t() * _rms_scale(x, cfg["rms_norm_eps"])
    w = torch.sigmoid(m * p[pre + "hc_head_scale"] + p[pre + "hc_head_base"][:, None])
    w = w + cfg["hc_eps"]
    return rmsnorm(low(_hc_collapse(w, x), num), p[pre + "norm.weight"], cfg, num)


def block(p: Params, pre: str, layer: int, x: Tensor, ids: Tensor, table: Tensor | None,
          cfg: dict[str, Any], num: Numerics, aux: dict[str, Any], drop: float) -> Tensor:
    """One layer on streams [B*L, n, d] (SPEC 2): attention site, then expert site."""
    b, length = ids.shape
    c, post, comb = hc_pre(p, pre + "hc_attn", x, cfg, num)
    u = rmsnorm(c, p[pre + "attn_norm.weight"], cfg, num).view(b, length, -1)
    y = attention(p, pre + "attn.", u, layer, cfg, num, aux).flatten(0, 1)
    x = low(_hc_spread(F.dropout(y, drop, drop > 0), x, post, comb), num)
    c, post, comb = hc_pre(p, pre + "hc_ffn", x, cfg, num)
    u = rmsnorm(c, p[pre + "ffn_norm.weight"], cfg, num)
    y = moe(p, pre + "ffn.", u, ids.flatten(), table, cfg, num, aux)
    return low(_hc_spread(F.dropout(y, drop, drop > 0), x, post, comb), num)


def forward(p: Params, tables: Params, ids: Tensor, cfg: dict[str, Any], num: Numerics,
            aux: dict[str, Any] | None = None, drop: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits float32 [B, L, vocab] and the streams after the last layer [B*L, n, d].

    ids int64 [B, L], L a multiple of 128 (pad at the end: nothing looks ahead); p from `stored`.
    """
    aux = {} if aux is None else aux
    e = F.dropout(F.embedding(ids, p["embed.weight"]).flatten(0, 1), drop, drop > 0)
    x = e[:, None].expand(-1, cfg["hc_mult"], -1).contiguous()
    for i in range(cfg["num_hidden_layers"]):
        x = block(p, f"layers.{i}.", i, x, ids, tables.get(f"layers.{i}.ffn.gate.tid2eid"), cfg,
                  num, aux, drop)
    h = F.dropout(hc_head(p, "", x, cfg, num), drop, drop > 0)
    return F.linear(h, p["head.weight"]).view(*ids.shape, -1), x


def draft(p: Params, streams: Tensor, following: Tensor, cfg: dict[str, Any], num: Numerics,
          aux: dict[str, Any] | None = None, drop: float = 0.0) -> Tensor:
    """Logits of the MTP block (SPEC 5.2): streams of t and the id of t+1 predict t+2."""
    pre, n = "mtp.0.", cfg["num_hidden_layers"]
    e = F.embedding(following, p["embed.weight"]).flatten(0, 1)
    e = rmsnorm(e, p[pre + "enorm.weight"], cfg, num)
    h = rmsnorm(streams, p[pre + "hnorm.weight"], cfg, num)
    x = low(linear(act(e, num), p[pre + "e_proj.weight"], num)[:, None]
            + linear(act(h, num), p[pre + "h_proj.weight"], num), num)
    x = block(p, pre, n, x, following, None, cfg, num, {} if aux is None else aux, drop)
    return F.linear(hc_head(p, pre, x, cfg, num), p["head.weight"]).view(*following.shape, -1)
