# SPDX-License-Identifier: Apache-2.0
"""Corpus, tokenizer and batches: byte-level BPE with V4's splitting rules and special tokens.

The tokenizer is trained on the first 90 % of the corpus bytes; the last 10 % are held out from
everything.  Source: SPEC 7.1.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

HERE = Path(__file__).parent
CORPUS = HERE / "corpus" / "tinyshakespeare.txt"
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
MARKERS = [
    "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜",
    "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>",
    "<｜title｜>", "<｜extracted_url｜>", "<｜read_url｜>",
]
SPLITS = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r'''[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+'''
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]


def halves() -> tuple[str, str]:
    """Training text and held-out text: cut at 90 % of the bytes."""
    raw = CORPUS.read_bytes()
    cut = int(0.9 * len(raw))
    return raw[:cut].decode(), raw[cut:].decode()


def make_tokenizer(vocab: int) -> str:
    """tokenizer.json text: ids 0-2 special, then bytes and merges, then the 13 markers."""
    tok = Tokenizer(models.BPE())
    stages = [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False}
              for r in SPLITS]
    stages.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                   "use_regex": False})
    shell = json.loads(tok.to_str())
    shell["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": stages}
    tok = Tokenizer.from_str(json.dumps(shell))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(MARKERS), special_tokens=[BOS, EOS, PAD], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tok.train_from_iterator([halves()[0]], trainer)
    out = json.loads(tok.to_str())
    flags = dict(single_word=False, lstrip=False, rstrip=False)
    out["added_tokens"] = [
        dict(id=i, content=t, **flags, normalized=False, special=True)
        for i, t in enumerate((BOS, EOS, PAD))
    ] + [dict(id=vocab - len(MARKERS) + i, content=t, **flags, normalized=True, special=False)
         for i, t in enumerate(MARKERS)]
    out["normalizer"] = {"type": "Sequence", "normalizers": []}
    out["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                             "use_regex": True}
    out["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                      "use_regex": True}
    return json.dumps(out, ensure_ascii=False, indent=1)


class Corpus:
    """Batches of training tokens; every `refresh` segments the text anew with BPE dropout."""

    def __init__(self, tokenizer_json: str, dropout: float, seed: int) -> None:
        self.text, self.held_text = halves()
        self.exact = Tokenizer.from_str(tokenizer_json)
        self.noisy = Tokenizer.from_str(tokenizer_json)
        self.noisy.model.dropout = dropout or None
        self.held = torch.tensor(self.exact.encode(self.held_text).ids)
        self.plain = torch.tensor(self.exact.encode(self.text).ids)
        self.rng = np.random.default_rng(seed)
        self.refresh()

    def refresh(self) -> None:
        # Pieces end at blank lines, so a speech always begins a piece.
        ids: list[int] = []
        starts: list[int] = []
        speeches = self.text.split("\n\n")
        for e in self.noisy.encode_batch([s + "\n\n" for s in speeches]):
            starts.append(len(ids))
            ids.extend(e.ids)
        self.ids = torch.tensor(ids)
        self.starts = np.array(starts)

    def batch(self, rows: int, length: int, bos: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets [rows, length]; 4 of 5 rows begin with BOS, half at a speech."""
        out = []
        last = len(self.ids) - length - 1
        for _ in range(rows):
            at = int(self.rng.integers(last))
            if self.rng.random() < 0.5:
                at = int(self.rng.choice(self.starts[self.starts <= last]))
            row = self.ids[at:at + length + 1]
            if self.rng.random() < 0.8:
                row = torch.cat([torch.tensor([bos]), row[:-1]])
            out.append(row)
        x = torch.stack(out)
        return x[:, :-1], x[:, 1:]


def windows(
    ids: Tensor, length: int, stride: int, bos: int = 0
) -> list[tuple[Tensor, Tensor, int]]:
    """(input, target, first scored) per window: BOS + ids from a multiple of `stride`, at most
    `length` inputs; every id is the scored target of exactly one window, with at least
    `length - stride` ids of context except in the first."""
    out = []
    for at in range(0, len(ids), stride):
        first = 0 if at == 0 else length - stride
        target = ids[at:at + length]
        if len(target) <= first:
            break
        out.append((torch.cat([torch.tensor([bos]), target[:-1]]), target, first))
    return out
