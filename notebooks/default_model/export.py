# SPDX-License-Identifier: Apache-2.0
"""Writes a trained run as a checkpoint in the official on-disk format (SPEC 1 and 6).

    python export.py --run RUN --out FOLDER [--vectors FILE.npz [--measure]]

The averaged weights of the run are rounded exactly as in training: FP8 e4m3 with an E8M0 scale per
128x128, FP4 e2m1 with an E8M0 scale per 32, BF16, F32.  Every file is read back and compared with
the values the model was trained with, bit for bit.  `--vectors` also writes what the torch model
computes on held-out text, for tests.
"""
from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path
from typing import Any

import data
import model as M
import numpy as np
import params as P
import quant
import torch
import train
from torch import Tensor

DTYPES = ["I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8"]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
Shard = dict[str, tuple[str, np.ndarray]]


def e8m0(scale: Tensor) -> np.ndarray:
    """Powers of two -> E8M0 bytes."""
    return (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8).numpy()


def put_fp8(out: Shard, name: str, w: Tensor) -> None:
    s = quant.fp8_weight_scale(w)
    o, k = w.shape
    full = s.repeat_interleave(128, 0)[:o].repeat_interleave(128, 1)[:, :k]
    codes = (quant.fp8_weight_values(w) / full).to(torch.float8_e4m3fn)
    out[name + ".weight"] = ("F8_E4M3", codes.view(torch.uint8).numpy())
    out[name + ".scale"] = ("F8_E8M0", e8m0(s))


def put_fp4(out: Shard, name: str, w: Tensor) -> None:
    v = quant.fp4_values(w)
    o, k = w.shape
    s = quant.fp4_scale(w)
    q = (v.view(o, -1, 32) / s[..., None]).view(o, k)
    sign = torch.signbit(q).to(torch.uint8) << 3
    codes = torch.searchsorted(E2M1, q.abs()).to(torch.uint8) | sign
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8)
    out[name + ".weight"] = ("I8", packed.numpy())
    out[name + ".scale"] = ("F8_E8M0", e8m0(s))


def put(out: Shard, name: str, w: Tensor) -> None:
    """One tensor of the model -> its tensors in the checkpoint; stacked experts come apart."""
    k = P.kind(name)
    if k == "f32":
        out[name] = ("F32", w.numpy())
    elif k == "bf16":
        bits = quant.bf16(w).view(torch.int32) >> 16
        out[name] = ("BF16", bits.to(torch.int32).numpy().astype(np.uint16))
    elif w.dim() == 2:
        put_fp8(out, name.removesuffix(".weight"), w)
    else:
        base, leaf = name.rsplit(".", 1)
        one = put_fp4 if k == "fp4" else put_fp8
        stack = w if k == "fp4" else w[None]
        for e, x in enumerate(stack):
            at = f"{base}.{e}" if k == "fp4" else base
            if leaf == "w13":
                one(out, f"{at}.w1", x[0])
                one(out, f"{at}.w3", x[1])
            else:
                one(out, f"{at}.w2", x if k == "fp4" else x[0])


def shards(params: P.Params, tables: P.Params, cfg: dict[str, Any]) -> list[Shard]:
    """Embedding, each layer, head, MTP block: one shard each, like the published checkpoints."""
    prefixes = [f"layers.{i}." for i in range(cfg["num_hidden_layers"])]
    if cfg["num_nextn_predict_layers"]:
        prefixes.append("mtp.0.")
    parts: dict[str, Shard] = {"embed.": {}} | {p: {} for p in prefixes[:cfg["num_hidden_layers"]]}
    parts |= {"": {}} | {p: {} for p in prefixes[cfg["num_hidden_layers"]:]}
    for name, w in params.items():
        home = next((p for p in parts if p and name.startswith(p)), None)
        if home is None:
            if name.startswith("mtp."):
                continue
            home = ""
        put(parts[home], name, w.detach().float().contiguous())
    for name, t in tables.items():
        parts[name.split("ffn")[0]][name] = ("I64", t.numpy())
    return list(parts.values())


def write_shard(path: Path, tensors: Shard) -> int:
    """Tensors grouped by dtype, then by name, packed without alignment (SPEC 6.1)."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body, offset = [], 0
    for n in sorted(tensors, key=lambda n: (DTYPES.index(tensors[n][0]), n)):
        dtype, array = tensors[n]
        raw = np.ascontiguousarray(array).tobytes()
        end = offset + len(raw)
        head[n] = dict(dtype=dtype, shape=list(array.shape), data_offsets=[offset, end])
        offset = end
        body.append(raw)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(body))
    return offset


def read_back(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32 (or int64) values; FP8 and FP4 with their scales applied."""
    raw: dict[str, tuple[str, np.ndarray]] = {}
    kinds = {"I64": np.int64, "F32": np.float32, "BF16": np.uint16, "F8_E8M0": np.uint8,
             "F8_E4M3": np.uint8, "I8": np.uint8}
    for f in sorted(folder.glob("*.safetensors")):
        b = f.read_bytes()
        n = struct.unpack("<Q", b[:8])[0]
        for name, t in json.loads(b[8:8 + n]).items():
            if name != "__metadata__":
                lo, hi = t["data_offsets"]
                flat = np.frombuffer(b[8 + n + lo:8 + n + hi], kinds[t["dtype"]])
                raw[name] = (t["dtype"], flat.reshape(t["shape"]))
    out = {}
    for name, (dtype, a) in raw.items():
        if dtype == "F8_E8M0":
            continue
        if dtype == "BF16":
            out[name] = (a.astype(np.uint32) << 16).view(np.float32)
        elif dtype in ("F8_E4M3", "I8"):
            s = raw[name.removesuffix("weight") + "scale"][1].astype(int)
            s = np.ldexp(np.float32(1), s - 127)
            if dtype == "I8":
                e2m1 = np.concatenate([E2M1.numpy(), -E2M1.numpy()])
                v = np.stack([e2m1[a & 15], e2m1[a >> 4]], -1).reshape(a.shape[0], -1)
                out[name] = v * np.repeat(s, 32, 1)
            else:
                v = torch.tensor(a).view(torch.float8_e4m3fn).float().numpy()
                s = np.repeat(np.repeat(s, 128, 0)[:v.shape[0]], 128, 1)[:, :v.shape[1]]
                out[name] = v * s
        else:
            out[name] = a
    return out


def check(folder: Path, params: P.Params, tables: P.Params) -> int:
    """The files hold `stored(params, OFFICIAL)`, bit for bit; returns the number of tensors."""
    got = read_back(folder)
    want: dict[str, np.ndarray] = {n: t.numpy() for n, t in tables.items()}
    for name, w in P.stored(params, P.OFFICIAL).items():
        base, _, leaf = name.rpartition(".")
        if leaf == "w13" and w.dim() == 4:
            want |= {f"{base}.{e}.{x}.weight": w[e, j].numpy()
                     for e in range(len(w)) for j, x in ((0, "w1"), (1, "w3"))}
        elif leaf == "w13":
            want |= {f"{base}.w1.weight": w[0].numpy(), f"{base}.w3.weight": w[1].numpy()}
        elif leaf == "w2":
            shared = "shared" in base
            want |= {f"{base}.w2.weight" if shared else f"{base}.{e}.w2.weight": x.numpy()
                     for e, x in enumerate(w)}
        else:
            want[name] = w.numpy()
    if set(got) != set(want):
        raise SystemExit(f"tensor names differ: {sorted(set(got) ^ set(want))[:5]}")
    bad = [n for n in want if not np.array_equal(got[n], want[n])]
    if bad:
        raise SystemExit(f"{len(bad)} tensors differ from the trained values: {bad[:5]}")
    return len(want)


def added(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True,
            "rstrip": False, "single_word": False}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_folder(out: Path, params: P.Params, tables: P.Params, cfg: dict[str, Any],
                 tokenizer: str, temperature: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for f in out.glob("*.safetensors"):
        f.unlink()
    parts = shards(params, tables, cfg)
    where, total = {}, 0
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        total += write_shard(out / name, part)
        where.update(dict.fromkeys(part, name))
    write_json(out / "model.safetensors.index.json",
               {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    write_json(out / "config.json", cfg)
    write_json(out / "generation_config.json", {
        "_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True,
        "temperature": temperature, "top_p": 1.0, "transformers_version": "4.46.3"})
    write_json(out / "tokenizer_config.json", {
        "add_bos_token": False, "add_eos_token": False, "bos_token": added(data.BOS),
        "clean_up_tokenization_spaces": False, "eos_token": added(data.EOS), "legacy": True,
        "model_max_length": cfg["max_position_embeddings"], "pad_token": added(data.EOS),
        "sp_model_kwargs": {}, "unk_token": None, "tokenizer_class": "PreTrainedTokenizerFast"})
    (out / "tokenizer.json").write_text(tokenizer.rstrip() + "\n")


def vectors(t: train.Trainer, cfg: dict[str, Any], measure: bool) -> dict[str, np.ndarray]:
    """Logits, router and indexer choices of the torch model (official numerics) on 600 held-out
    ids (BOS first); if `measure`, also the bits per byte in each numerics and -log2 p of every
    held-out id with the windows of `data.windows`."""
    ids = torch.cat([torch.tensor([0]), t.data.held[20000:20599]])
    at = torch.tensor([0, 1, 2, 3, 7, 63, 64, 127, 128, 129, 255, 256, 300, 420, 511, 599])
    out: dict[str, np.ndarray] = {"ids": ids.numpy().astype(np.int32),
                                  "positions": at.numpy().astype(np.int32)}
    for label, num in train.NUMERICS.items() if measure else ():
        bpb, bits = train.evaluate(t.ema, t.tables, cfg, t.data.held, t.data.held_text, num)
        out[f"{label}/bits_per_byte"] = np.array(bpb, np.float64)
        if label == "official":
            out["official/held_bits"] = bits.numpy().astype(np.float16)
        print(f"{label}: {bpb:.4f} bits per byte")
    with torch.no_grad():
        aux: dict[str, Any] = {}
        padded = torch.nn.functional.pad(ids, (0, -len(ids) % 128))[None]
        p = P.stored(t.ema, P.OFFICIAL)
        logits, streams = M.forward(p, t.tables, padded, cfg, P.OFFICIAL, aux)
        out["official/logits"] = logits[0, at].numpy()
        for i in range(cfg["num_hidden_layers"]):
            picks = aux["picks"][f"layers.{i}.ffn."]
            out[f"layers.{i}/experts"] = picks[at].numpy().astype(np.uint8)
            used = torch.bincount(picks[:len(ids)].flatten(), minlength=cfg["n_routed_experts"])
            out[f"layers.{i}/expert_counts"] = used.numpy().astype(np.int32)
        for i, mask in aux.get("selected", {}).items():
            out[f"layers.{i}/selected"] = mask[0, at, :len(ids) // 4].numpy()
        if cfg["num_nextn_predict_layers"]:
            draft = M.draft(p, streams, padded.roll(-1, 1), cfg, P.OFFICIAL)
            out["official/mtp_logits"] = draft[0, at[:-1]].numpy()
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--run", required=True)
    p.add_argument("--out", required=True, help="the checkpoint folder")
    p.add_argument("--vectors", help="also write this .npz of expected values")
    p.add_argument("--measure", action="store_true", help="with bits per byte (minutes)")
    p.add_argument("--temperature", type=float, default=0.7, help="generation_config.json")
    a = p.parse_args()
    t = train.Trainer(train.arguments(["--run", a.run, "--resume"]))
    cfg = dict(t.cfg)
    write_folder(Path(a.out), t.ema, t.tables, cfg, (Path(a.run) / "tokenizer.json").read_text(),
                 a.temperature)
    n = check(Path(a.out), t.ema, t.tables)
    size = sum(f.stat().st_size for f in Path(a.out).iterdir())
    print(f"{n} tensors as trained, step {t.step}, folder {size / 1e6:.2f} MB")
    if a.vectors:
        np.savez_compressed(a.vectors, **vectors(t, cfg, a.measure))


if __name__ == "__main__":
    main()
