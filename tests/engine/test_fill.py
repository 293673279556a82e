# SPDX-License-Identifier: Apache-2.0
"""Sessions advanced without computing, on which long contexts are measured."""

from collections.abc import Iterator
from pathlib import Path

import harness
import numpy as np
import pytest

import dsv4

POSITIONS = (1, 4, 31, 127, 128, 1000, 3001)


@pytest.fixture(scope="module")
def pair(tiny_folder: Path) -> Iterator[list[dsv4.Model]]:
    """The tiny model with one thread and with two."""
    with harness.load(tiny_folder) as one, harness.load(tiny_folder, threads=2) as two:
        yield [one, two]


def filled(model: dsv4.Model, *positions: int, seed: int = 0) -> dsv4.Session:
    session = model.session()
    for position in positions:
        session._fill(position, seed)
    return session


@pytest.mark.parametrize("position", POSITIONS)
def test_decode_goes_on_with_the_same_bits(pair: list[dsv4.Model], position: int) -> None:
    """One thread or two, token by token or in one piece."""
    ids = harness.prompt(pair[0], 40)
    seen = []
    for model in pair:
        for size in (1, len(ids)):
            session = filled(model, position)
            rows = [session.append(cut, logits="all") for cut in harness.pieces(ids, size)]
            assert session.tokens.tolist() == [0] * position + ids.tolist()
            seen.append((np.concatenate(rows), harness.state(session)))
    for rows, state in seen[1:]:
        assert np.isfinite(rows).all()
        harness.same(rows, seen[0][0])
        for got, want in zip(state, seen[0][1], strict=True):
            harness.same(got, want)


def test_everything_is_there_and_of_ordinary_size(tiny: dsv4.Model) -> None:
    session, empty = filled(tiny, 3001), tiny.session()
    parts = harness.state(session)
    assert session.nbytes > empty.nbytes and len(parts) == 9
    for part in parts[1:]:
        values = (part.astype(np.uint32) << 16).view(np.float32)
        assert np.abs(values).max() < 16 and values.std() > 0.1
        assert len(np.unique(part, axis=0)) == len(part), "no row twice"


def test_the_seed_alone_decides(tiny: dsv4.Model) -> None:
    def grown(*positions: int, seed: int = 0) -> list[np.ndarray]:
        return harness.state(filled(tiny, *positions, seed=seed))

    want = grown(3001, seed=7)
    for got, part in zip(grown(5, 1000, 3001, seed=7), want, strict=True):
        harness.same(got, part)
    for got, part in zip(grown(3001, seed=8)[1:], want[1:], strict=True):
        assert (got != part).any()


@pytest.mark.parametrize("position", [4, 5000])
def test_refused(tiny: dsv4.Model, position: int) -> None:
    session = filled(tiny, 5)
    with pytest.raises(ValueError, match=f"got {position}, wanted one from .* 5, to 4096"):
        session._fill(position)
    assert session.position == 5


def test_a_closed_session(tiny: dsv4.Model) -> None:
    session = tiny.session()
    session.close()
    with pytest.raises(ValueError, match="the session is closed"):
        session._fill(5)
