# SPDX-License-Identifier: Apache-2.0
"""A row's logits are the same bits however it was computed.

Alone or among neighbours, in one piece or any pieces, with any number of threads, any pass length
and any instruction set, cold or resumed.  Breaking one piece of a session's state on purpose (the
window ring, a compressor's raw rows or gates, those of the index compressor, the cut of a window
over two passes) makes these tests fail; that was tried for each.
"""

import numpy as np
import pytest
from harness import fed, load, pieces, prompt, same, state, step_with

from dsv4.kernel_calls import masks

NANO = ("nano-flash", "nano-base", "nano-odd")
MASKS = masks()
LENGTH = 300  # past two windows of 128 tokens, with a rest


@pytest.fixture(scope="module")
def straight(tiny):
    """All logits of LENGTH tokens in one piece, and the ids."""
    ids = prompt(tiny, LENGTH)
    return ids, fed(tiny, [ids])


# ---- pieces ----

@pytest.mark.parametrize("first", range(1, 258, 32))
def test_every_chunk_size(tiny, straight, first: int) -> None:
    """1 to 257 tokens a step."""
    ids, want = straight
    for size in range(first, min(first + 32, 258)):
        same(fed(tiny, pieces(ids, size)), want, f"pieces of {size}")


@pytest.mark.parametrize("numerics", ["official", "weights"])
@pytest.mark.parametrize("name", NANO)
def test_chunk_sizes_of_stored_checkpoints(models, expected, name: str, numerics: str) -> None:
    """Lengths around the compression ratios and the windows, on the stored prompt."""
    model, ids = models(name, numerics), expected(name)["prompt130/ids"]
    want = fed(model, [ids])
    for size in (1, 3, 4, 31, 33, 127, 128, 129):
        same(fed(model, pieces(ids, size)), want, f"pieces of {size}")


def test_random_pieces(tiny, straight) -> None:
    ids, want = straight
    draw = np.random.default_rng(3)
    for _ in range(20):
        cuts = np.sort(draw.choice(np.arange(1, LENGTH), draw.integers(1, 40), replace=False))
        same(fed(tiny, np.split(ids, cuts)), want, f"cut at {cuts.tolist()}")


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16, 31, 64, 127, 128, 200])
def test_passes_of_any_length(tiny_folder, straight, chunk: int) -> None:
    """The engine cuts a long piece into passes of its own."""
    ids, want = straight
    with load(tiny_folder, chunk=chunk) as model:
        assert model._core.chunk == chunk
        same(fed(model, [ids]), want)
        same(fed(model, pieces(ids, 97)), want)


def test_lengths_from_one(tiny, straight) -> None:
    """Every length to LENGTH: its last row, and the state it leaves."""
    ids, want = straight
    with tiny.session() as grown:
        for n in range(1, LENGTH + 1):
            grown.append(ids[n - 1 : n], logits="none")
            with tiny.session() as at_once:
                same(at_once.append(ids[:n]), want[n - 1 : n], f"length {n}")
                for a, b in zip(state(at_once), state(grown), strict=True):
                    same(a, b, f"state at {n}")


def test_resumed_at_every_split(tiny, straight) -> None:
    """A new session that replays the first part continues like the old one."""
    ids, want = straight
    for split in [*range(1, 40), *range(124, 134), 255, 256, 257, 299]:
        got = fed(tiny, [ids[:split], ids[split : split + 3]])
        same(got[split:], want[split : split + 3], f"split at {split}")


# ---- neighbours ----

def test_batch_of_sixteen(tiny) -> None:
    """Sixteen prompts of different lengths in one step, then token by token together."""
    prompts = [prompt(tiny, n, seed=n) for n in
               (1, 2, 3, 4, 5, 7, 8, 31, 33, 64, 65, 127, 128, 129, 150, 40)]
    alone = [fed(tiny, [ids]) for ids in prompts]
    for tail in (0, 1, 2):  # the last tokens one by one, all sessions in one step
        sessions = [tiny.session() for _ in prompts]
        heads = [(s, ids[: max(1, len(ids) - tail)])
                 for s, ids in zip(sessions, prompts, strict=True)]
        for (_, ids), got, want in zip(heads, tiny.step(heads, "all"), alone, strict=True):
            same(got, want[: len(ids)], f"{len(ids)} of {len(want)} tokens")
        while live := [(s, ids[s.position :][:1], want) for s, ids, want
                       in zip(sessions, prompts, alone, strict=True) if s.position < len(ids)]:
            out = tiny.step([(s, ids) for s, ids, _ in live])
            for (s, _, want), got in zip(live, out, strict=True):
                same(got, want[s.position - 1 : s.position], f"token {s.position}")


@pytest.mark.parametrize("others", [1, 2, 5, 12, 31])
def test_random_neighbours(tiny, straight, others: int) -> None:
    """Prompt and decode among 1 to 31 others of any length, in any order."""
    ids, want = straight
    draw = np.random.default_rng(others)
    mine = tiny.session()
    crowd = [tiny.session() for _ in range(others)]
    for at, n in ((0, 60), (60, 1), (61, 1), (62, 90), (152, 1)):
        segments = [(s, prompt(tiny, int(draw.integers(1, 30)), seed=at + i))
                    for i, s in enumerate(crowd)]
        segments.append((mine, ids[at : at + n]))
        draw.shuffle(segments)
        place = next(i for i, (session, _) in enumerate(segments) if session is mine)
        same(tiny.step(segments, "all")[place], want[at : at + n], f"at {at}, place {place}")


@pytest.mark.parametrize("place", [0, 7, 15])
def test_place_among_neighbours(models, expected, place: int) -> None:
    """The stored prompt of nano-flash at any place of sixteen, decode beside prompts."""
    model, ids = models("nano-flash"), expected("nano-flash")["prompt130/ids"][:70]
    want = fed(model, [ids])
    others = [(model.session(), prompt(model, 1 + 3 * i, seed=i)) for i in range(15)]
    model.step(others, "none")
    mine = model.session()
    mine.append(ids[:40], logits="none")
    batch = [(s, prompt(model, 1 + i % 3, seed=9)) for i, (s, _) in enumerate(others)]
    batch.insert(place, (mine, ids[40:41]))
    same(model.step(batch)[place], want[40:41])
    batch = [(s, prompt(model, 1, seed=4)) for s, _ in batch]
    batch[place] = (mine, ids[41:])
    same(model.step(batch, "all")[place], want[41:])


@pytest.mark.parametrize("seed", range(4))
def test_random_schedules(tiny, tiny_folder, seed: int) -> None:
    """Prompts and single tokens of many sessions in steps of any mix; sessions come and go."""
    draw = np.random.default_rng(seed)
    prompts = [prompt(tiny, int(n), seed=int(n)) for n in draw.integers(1, 220, 12)]
    alone = [fed(tiny, [ids]) for ids in prompts]
    with load(tiny_folder, chunk=int(draw.integers(7, 90)), threads=1 + seed % 3) as model:
        waiting, running = list(range(12)), {}
        while waiting or running:
            while waiting and len(running) < 6:
                running[waiting.pop()] = model.session()
            chosen = [i for i in running if draw.random() < 0.7] or list(running)
            draw.shuffle(chosen)
            segments = []
            for i in chosen:
                at = running[i].position
                n = int(draw.choice([1, 1, 2, 5, 40]))
                segments.append((running[i], prompts[i][at : at + n]))
            for i, got in zip(chosen, model.step(segments, "all"), strict=True):
                end = running[i].position
                same(got, alone[i][end - len(got) : end], f"session {i} at {end}")
                if end == len(prompts[i]):
                    running.pop(i).close()


# ---- threads, instruction sets ----

@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads(tiny_folder, straight, threads: int) -> None:
    ids, want = straight
    with load(tiny_folder, threads=threads) as model:
        assert model.threads == threads
        same(fed(model, [ids]), want)
        same(fed(model, [ids[:130], *pieces(ids[130:170], 1), ids[170:]]), want)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name", NANO)
def test_threads_on_stored_checkpoints(nano, models, expected, name: str, threads: int) -> None:
    ids = expected(name)["prompt130/ids"]
    want = fed(models(name), [ids])
    with load(nano(name), threads=threads) as model:
        same(fed(model, [ids[:100], *pieces(ids[100:], 1)]), want)


@pytest.mark.parametrize("numerics", ["official", "weights"])
@pytest.mark.parametrize("name", [*NANO, "nano-0731"])
def test_instruction_sets(nano, models, expected, name: str, numerics: str) -> None:
    """Portable C, AVX2, AVX-512, AVX-512 with the bf16 dot: prompt and single tokens."""
    ids = expected(name)["prompt130/ids"]
    want = fed(models(name, numerics), [ids])
    for disable in MASKS:
        with load(nano(name), disable=disable, numerics=numerics) as model:
            cut = [ids] if disable == MASKS[0] else [ids[:110], *pieces(ids[110:], 1)]
            same(fed(model, cut), want, f"without {disable or 'nothing'}")


def test_masks_change_the_kernels(tiny_folder) -> None:
    """Else the test above compares a table with itself."""
    for disable in MASKS:
        with load(tiny_folder, disable=disable) as model:
            used = {variant.split("/")[0] for variant in model.kernel_info.values()}
        assert disable not in used
        assert used == {"ref"} if disable == "avx2" else used - {"ref"} or MASKS == [""]


@pytest.mark.parametrize("disable", MASKS)
def test_instruction_sets_on_every_path(tiny_folder, straight, disable: str) -> None:
    """Few and many tokens, threads, short passes."""
    ids, want = straight
    for threads, chunk in ((1, 0), (3, 50)):
        with load(tiny_folder, threads=threads, chunk=chunk, disable=disable) as model:
            same(fed(model, [ids[:150], *pieces(ids[150:180], 2), ids[180:]]), want)


def test_internals_do_not_depend_on_the_cut(tiny, straight) -> None:
    """Not only the logits: streams, sites, routing and selections of every layer."""
    ids, _ = straight
    for layer in range(tiny.config.num_hidden_layers):
        with tiny.session() as one, tiny.session() as two, tiny.session() as other:
            _, want = step_with(tiny, [(one, ids)], layer)
            two.append(ids[:77], logits="none")
            _, got = step_with(tiny, [(other, ids[:9]), (two, ids[77:])], layer)
        for name in want:
            same(got[name][9:], want[name][77:], f"{name} of layer {layer}")
