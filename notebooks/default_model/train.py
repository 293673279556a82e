# SPDX-License-Identifier: Apache-2.0
"""Trains the model inside the package on two CPU cores; `--eval` measures, `--sample` writes text.

    python train.py --run RUN                     train (or go on: --resume)
    python train.py --run RUN --merge RUN/kept-*.pt   average the kept checkpoints
    python train.py --run RUN --draft-steps 400   then train the MTP block on the frozen model
    python train.py --run RUN --eval official     bits per byte on the held-out text

Muon for the matrices, AdamW for the rest, quantisation-aware from the first step, an average of
the weights (EMA) as the result.  Needs torch and tokenizers; a C++ compiler for the fused kernels.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import data
import model as M
import params as P
import quant
import torch
import torch.nn.functional as F
from torch import Tensor

NUMERICS = {"float": P.FLOAT, "qat": P.QAT, "official": P.OFFICIAL}


def is_matrix(name: str, t: Tensor) -> bool:
    """Muon's share: everything that maps activations to activations."""
    small = ("embed.", "head.weight", "gate.weight", "_fn", "ape", "weights_proj", "tid2eid")
    return t.dim() >= 2 and not any(s in name for s in small)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration on matrices [n, r, c] in bfloat16."""
    x = g.to(torch.bfloat16)
    flip = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if flip else x
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-12).to(torch.bfloat16)
    for _ in range(steps):
        a = x @ x.transpose(1, 2)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.transpose(1, 2) if flip else x).float()


class Muon:
    """Momentum, orthogonalised per matrix, decoupled weight decay; same shapes go in one batch."""

    def __init__(self, params: P.Params, momentum: float, decay: float) -> None:
        self.params, self.momentum, self.decay = params, momentum, decay
        self.state = {n: torch.zeros_like(p) for n, p in params.items()}
        self.groups: dict[tuple[int, int], list[str]] = {}
        for n, p in params.items():
            self.groups.setdefault((p.shape[-2], p.shape[-1]), []).append(n)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for (r, c), names in self.groups.items():
            rows = []
            for n in names:
                m, g = self.state[n], self.params[n].grad
                m.lerp_(g, 1 - self.momentum)
                rows.append(g.lerp(m, self.momentum).reshape(-1, r, c))
            update = orthogonalise(torch.cat(rows)) * max(1.0, r / c) ** 0.5
            for n, u in zip(names, update.split([len(x) for x in rows]), strict=True):
                p = self.params[n]
                p.mul_(1 - lr * self.decay).add_(u.view_as(p), alpha=-lr)


class Trainer:
    """Parameters, optimisers, average and history of one run folder."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.run = a, Path(a.run)
        self.run.mkdir(parents=True, exist_ok=True)
        tok = self.run / "tokenizer.json"
        if not tok.exists():
            tok.write_text(data.make_tokenizer(P.CONFIG["vocab_size"]))
        self.cfg = dict(P.CONFIG)
        self.data = data.Corpus(tok.read_text(), a.bpe_dropout, a.seed)
        counts = torch.bincount(self.data.plain, minlength=self.cfg["vocab_size"])
        cfg = self.cfg
        table = P.hash_table(counts, cfg["n_routed_experts"], cfg["num_experts_per_tok"])
        self.tables = {f"layers.{i}.ffn.gate.tid2eid": table for i in range(cfg["num_hash_layers"])}
        self.params = {n: p.requires_grad_() for n, p in P.initial(self.cfg, a.seed).items()}
        self.ema = {n: p.detach().clone() for n, p in self.params.items()}
        self.step, self.seconds, self.history, self.stopped = 0, 0.0, [], False
        self.phase = 0.0  # training seconds before this phase
        self.optimisers("layers." if not a.draft_steps else "mtp.")
        if a.resume or a.draft_steps or a.eval or a.sample or a.merge:
            self.load()

    def optimisers(self, prefix: str) -> None:
        """Main phase: everything but mtp.*; draft phase: mtp.* alone."""
        draft = prefix == "mtp."
        mine = {n: p for n, p in self.params.items() if n.startswith("mtp.") == draft}
        self.muon = Muon({n: p for n, p in mine.items() if is_matrix(n, p)}, 0.95, self.a.decay)
        rest = [(n, p) for n, p in mine.items()
                if not is_matrix(n, p) and not n.endswith("gate.bias")]
        tables = [p for n, p in rest if n in ("embed.weight", "head.weight")]
        other = [p for n, p in rest if n not in ("embed.weight", "head.weight")]
        groups = [dict(params=tables, weight_decay=0.1), dict(params=other, weight_decay=0.0)]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-3,
                                      betas=(0.9, 0.97), eps=1e-10)
        self.active = mine

    def save(self) -> None:
        state = dict(params={n: p.detach() for n, p in self.params.items()}, ema=self.ema,
                     muon=self.muon.state, adam=self.adam.state_dict(), step=self.step,
                     seconds=self.seconds, history=self.history, config=self.cfg,
                     tables=self.tables, rng=torch.get_rng_state(),
                     numpy=self.data.rng.bit_generator.state)
        torch.save(state, self.run / "new.pt")
        os.replace(self.run / "new.pt", self.run / "last.pt")
        (self.run / "loss.json").write_text(json.dumps(self.history))

    def merge(self, files: list[str]) -> None:
        """The plain mean of the averaged weights of several checkpoints becomes the result; the
        MTP block stays this run's."""
        states = [torch.load(f, weights_only=False) for f in files]
        for n in self.ema:
            if not n.startswith("mtp."):
                self.ema[n] = torch.stack([s["ema"][n] for s in states]).mean(0)
        self.log(dict(phase="merge", steps=[s["step"] for s in states], held=self.quick(self.ema)))
        self.save()

    def load(self) -> None:
        state = torch.load(self.run / "last.pt", weights_only=False)
        with torch.no_grad():
            for n, p in self.params.items():
                p.copy_(state["params"][n])
        self.ema, self.tables = state["ema"], state["tables"]
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        if set(state["muon"]) == set(self.muon.state):
            self.muon.state = state["muon"]
            self.adam.load_state_dict(state["adam"])
            torch.set_rng_state(state["rng"])
            self.data.rng.bit_generator.state = state["numpy"]

    def rate(self) -> float:
        """Warm up, hold, then fall linearly to zero over the last `fall` of the steps or of the
        time, whichever ends first (a shared machine gives a time, not a number of steps)."""
        a = self.a
        left = min(1 - self.step / a.steps, 1 - (self.seconds - self.phase) / (60 * a.minutes))
        return min(1.0, (self.step + 1) / 40) * min(1.0, max(0.02, left / a.fall))

    def average(self, names: list[str], decay: float) -> None:
        with torch.no_grad():
            for n in names:
                self.ema[n].lerp_(self.params[n], 1 - decay)

    def update(self) -> None:
        rate = self.rate()
        for g in self.adam.param_groups:
            g["lr"] = rate * self.a.adam_lr
        graded = [p for p in self.active.values() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(graded, 1.0)
        self.muon.step(rate * self.a.muon_lr)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for p in self.muon.params.values():
            p.grad = None
        self.average(list(self.active), min(self.a.ema, (1 + self.step) / (10 + self.step)))
        self.norm = float(norm)

    def balance(self, aux: dict[str, Any]) -> None:
        """Aux-loss-free balancing: move each selection bias against its expert's load."""
        e = self.cfg["n_routed_experts"]
        for pre, pick in aux["picks"].items():
            bias = self.params.get(pre + "gate.bias")
            if bias is not None:
                load = torch.bincount(pick.flatten(), minlength=e).float()
                with torch.no_grad():
                    bias += 2e-3 * self.rate() * torch.sign(load.mean() - load)
                    bias -= bias.mean()

    def main_step(self) -> tuple[float, float]:
        a = self.a
        x, y = self.data.batch(a.rows, a.length)
        aux: dict[str, Any] = {"index_loss": torch.zeros(()), "select": self.step >= a.select_from}
        num = P.QAT if self.step >= a.qat_from else P.FLOAT
        p = P.stored(self.active, num)
        logits, _ = M.forward(p, self.tables, x, self.cfg, num, aux, a.dropout)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        (loss + aux["index_loss"]).backward()
        self.update()
        self.balance(aux)
        return loss.item(), aux["index_loss"].item()

    def draft_step(self, frozen: P.Params) -> tuple[float, float]:
        """One step of the MTP block on the frozen averaged model; the last id has no target."""
        x, y = self.data.batch(self.a.rows, self.a.length)
        with torch.no_grad():
            _, streams = M.forward(frozen, self.tables, x, self.cfg, P.QAT)
        p = frozen | P.stored(self.active, P.QAT)
        aux: dict[str, Any] = {}
        logits = M.draft(p, streams, y, self.cfg, P.QAT, aux, self.a.dropout)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
        loss.backward()
        self.update()
        self.balance(aux)
        return loss.item(), 0.0

    def log(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        with open(self.run / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def quick(self, params: P.Params) -> float:
        """Bits per byte on every second unstrided window of the held-out text (QAT numerics)."""
        w = [x for x in data.windows(self.data.held, self.a.length, self.a.length)
             if len(x[1]) == self.a.length][::2]
        w = w[:len(w) // self.a.rows * self.a.rows]
        nats = count = 0
        with torch.no_grad():
            p = P.stored(params, P.QAT)
            for i in range(0, len(w), self.a.rows):
                x, y = (torch.stack([v[j] for v in w[i:i + self.a.rows]]) for j in (0, 1))
                logits, _ = M.forward(p, self.tables, x, self.cfg, P.QAT)
                nats += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
                count += sum(len(self.data.exact.decode(r.tolist()).encode()) for r in y)
        return nats / math.log(2) / count

    def stop(self, *_: object) -> None:
        """SIGTERM: finish the step, save, leave."""
        self.stopped = True

    def train(self) -> None:
        a = self.a
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        quant.enable_fusion()
        torch.manual_seed(a.seed + self.step)
        saved = start = time.time()
        begun, losses, draft = self.seconds, [], a.draft_steps > 0
        frozen = {n: t for n, t in P.stored(self.ema, P.QAT).items()} if draft else {}
        if draft:
            self.step = 0
        goal = a.draft_steps if draft else a.steps
        a.steps, a.fall = goal, (0.7 if draft else a.fall)
        self.phase = begun if draft else 0.0
        signal.signal(signal.SIGTERM, self.stop)
        end = self.phase + 60 * a.minutes
        while self.step < goal and self.seconds < end and not self.stopped:
            if self.step % 190 == 0:
                self.data.refresh()
            losses.append(self.draft_step(frozen) if draft else self.main_step())
            self.step += 1
            self.seconds = begun + time.time() - start
            if self.step % 20 == 0:
                mean = [sum(x) / len(x) for x in zip(*losses, strict=True)]
                losses = []
                row = dict(step=self.step, seconds=round(self.seconds), loss=mean[0], index=mean[1],
                           norm=self.norm, phase="draft" if draft else "main")
                if self.step % a.eval_every == 0 and not draft:
                    row["held"] = self.quick(self.ema)
                self.log(row)
            if time.time() - saved > 200:
                self.save()
                saved = time.time()
            if not draft and self.step % a.keep_every == 0:
                self.save()
                shutil.copy(self.run / "last.pt", self.run / f"kept-{self.step}.pt")
        self.save()


def evaluate(params: P.Params, tables: P.Params, cfg: dict[str, Any], held: Tensor, text: str,
             num: P.Numerics, length: int = 1024, stride: int = 512) -> tuple[float, Tensor]:
    """Bits per byte of the held-out text and -log2 p of each of its ids (windows: data.windows)."""
    bits = torch.zeros(len(held))
    at = 0
    with torch.no_grad():
        p = P.stored(params, num)
        for x, y, first in data.windows(held, length, stride):
            padded = F.pad(x, (0, -len(x) % 128))[None]
            logits, _ = M.forward(p, tables, padded, cfg, num)
            nll = F.cross_entropy(logits[0, :len(y)], y, reduction="none")[first:]
            bits[at:at + len(nll)] = nll / math.log(2)
            at += len(nll)
    assert at == len(held)
    return float(bits.double().sum()) / len(text.encode()), bits


def sample(params: P.Params, tables: P.Params, cfg: dict[str, Any], prompt: list[int], n: int,
           temperature: float, seed: int) -> list[int]:
    """n further ids by sampling from the whole distribution (QAT numerics, no cache: slow)."""
    g, ids = torch.Generator().manual_seed(seed), [0, *prompt]
    with torch.no_grad():
        p = P.stored(params, P.QAT)
        for _ in range(n):
            x = F.pad(torch.tensor(ids), (0, -len(ids) % 128))[None]
            logits = M.forward(p, tables, x, cfg, P.QAT)[0][0, len(ids) - 1]
            probs = torch.softmax(logits / temperature, -1)
            ids.append(int(torch.multinomial(probs, 1, generator=g)))
    return ids[1:]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--run", required=True, help="folder of checkpoints and logs")
    p.add_argument("--resume", action="store_true")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--steps", type=int, default=5000)
    p.add_argument("--minutes", type=float, default=1e6, help="end after this training time")
    p.add_argument("--fall", type=float, default=0.5, help="share of the run with falling rate")
    p.add_argument("--draft-steps", type=int, default=0)
    p.add_argument("--rows", type=int, default=2)
    p.add_argument("--length", type=int, default=1024)
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--bpe-dropout", type=float, default=0.05)
    p.add_argument("--muon-lr", type=float, default=0.015)
    p.add_argument("--adam-lr", type=float, default=3e-3)
    p.add_argument("--decay", type=float, default=0.1, help="weight decay of the matrices")
    p.add_argument("--ema", type=float, default=0.995)
    p.add_argument("--select-from", type=int, default=150, help="step at which selection begins")
    p.add_argument("--qat-from", type=int, default=0)
    p.add_argument("--eval-every", type=int, default=100)
    p.add_argument("--keep-every", type=int, default=200, help="steps between kept checkpoints")
    p.add_argument("--merge", nargs="+", metavar="FILE", help="average checkpoints")
    p.add_argument("--eval", choices=list(NUMERICS), help="measure instead of training")
    p.add_argument("--sample", help="write text after this prompt instead of training")
    return p.parse_args(argv)


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    t = Trainer(a)
    if a.eval:
        begin = time.time()
        bpb, _ = evaluate(t.ema, t.tables, t.cfg, t.data.held, t.data.held_text, NUMERICS[a.eval])
        print(f"{a.eval}: {bpb:.4f} bits per byte on {len(t.data.held)} tokens, step {t.step}, "
              f"{time.time() - begin:.0f} s")
    elif a.merge:
        t.merge(a.merge)
        print(t.history[-1])
    elif a.sample:
        ids = sample(t.ema, t.tables, t.cfg, t.data.exact.encode(a.sample).ids, 200, 0.8, a.seed)
        print(t.data.exact.decode(ids))
    else:
        t.train()


if __name__ == "__main__":
    main()
