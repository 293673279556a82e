# SPDX-License-Identifier: Apache-2.0
"""Bit rot: one flipped bit in any tensor is found and the tensor named."""

import hashlib
import json
import os
import random
import shutil

import pytest

from dsv4.checkpoint import Checkpoint
from dsv4.checksums import MANIFEST, manifest, verify
from dsv4.errors import FormatError


@pytest.fixture
def model(nano, tmp_path):
    return shutil.copytree(nano("nano-odd"), tmp_path / "model")


def flip(path, offset, bit):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_flipped_bit_in_each_tensor(model, tmp_path):
    """Every tensor of a checkpoint gets one flipped bit in turn."""
    manifest(model, save=tmp_path / "sums.json")
    rng = random.Random(3)
    with Checkpoint.open(model) as checkpoint:
        places = [
            (info, checkpoint.shards[info.shard].path, info.offset + rng.randrange(info.nbytes))
            for info in checkpoint.tensors.values()
        ]
    for first in range(0, len(places), 20):  # flip 20 tensors at a time: all must be named
        some = places[first : first + 20]
        for _, path, offset in some:
            flip(path, offset, offset % 8)
        with pytest.raises(FormatError) as caught:
            verify(model, manifest=tmp_path / "sums.json")
        text = str(caught.value)
        assert text.count("checksum (crc)") == len(some) and "more" not in text
        for info, path, offset in some:
            assert f"{path.name}: {info.name}: checksum (crc): got " in text
            flip(path, offset, offset % 8)
    assert verify(model, manifest=tmp_path / "sums.json").checked == len(places)


def test_one_flipped_bit_is_one_sentence(model, tmp_path):
    manifest(model, save=tmp_path)
    with Checkpoint.open(model) as checkpoint:
        info = checkpoint.tensors["norm.weight"]
        flip(checkpoint.shards[info.shard].path, info.offset, 0)
    with pytest.raises(FormatError) as caught:
        verify(model, manifest=tmp_path)
    assert caught.value.tensor == "norm.weight" and caught.value.rule == "checksum (crc)"
    assert "download it again" in str(caught.value)


def test_nothing_is_written_into_the_model_folder_unless_asked(model, tmp_path):
    before = sorted(os.listdir(model))
    result = manifest(model)
    assert sorted(os.listdir(model)) == before
    with pytest.raises(FileNotFoundError, match=MANIFEST):
        verify(model)
    manifest(model, save=model)
    assert sorted(os.listdir(model)) == sorted([*before, MANIFEST])
    assert json.loads((model / MANIFEST).read_text()) == result
    assert verify(model).mode == "crc"


def test_sha256_of_shards(model, tmp_path):
    result = manifest(model, "sha256", save=model)
    for name, digest in result["digests"].items():
        assert hashlib.sha256((model / name).read_bytes()).hexdigest() == digest
    verified = verify(model, "sha256")
    assert verified.checked == len(result["digests"])
    assert verified.nbytes == sum(path.stat().st_size for path in model.glob("*.safetensors"))
    name = "model-00001-of-00006.safetensors"
    flip(model / name, 1000, 3)
    with pytest.raises(FormatError, match="sha256") as caught:
        verify(model, "sha256")
    assert caught.value.file == name
    with pytest.raises(FormatError, match="mode: got sha256, wanted crc"):
        verify(model, "crc")


def test_sha256_as_the_hub_noted_it(model, tmp_path):
    """The cache names its blobs by digest; downloads into a folder keep notes beside."""
    with pytest.raises(FileNotFoundError):
        verify(model, "sha256")
    notes = model / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    entry = tmp_path / "models--org--odd"
    snapshot = entry / "snapshots" / "abc"
    (entry / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            (notes / f"{path.name}.metadata").write_text(f"commit\n{digest}\n1700000000.0\n")
            shutil.copy(path, entry / "blobs" / digest)
            (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    assert verify(model, "sha256").checked == verify(snapshot, "sha256").checked == 6
    for folder in (model, snapshot):
        flip(folder / "model-00002-of-00006.safetensors", 9000, 1)
        with pytest.raises(FormatError, match="model-00002-of-00006"):
            verify(folder, "sha256")
    (notes / "model-00003-of-00006.safetensors.metadata").unlink()
    with pytest.raises(FormatError, match="model-00003-of-00006.safetensors: got no checksum"):
        verify(model, "sha256")


def test_manifests_that_do_not_fit(model):
    result = manifest(model)
    for change, word in (
        (dict(version=2), "version 1"), (dict(digests=[]), "digests"), (dict(mode="x"), "mode"),
        (dict(digests={k: v for k, v in result["digests"].items() if k != "norm.weight"}),
         "norm.weight: got no checksum"),
        (dict(digests={**result["digests"], "extra": "0"}), "extra: got a checksum"),
    ):
        (model / MANIFEST).write_text(json.dumps({**result, **change}))
        with pytest.raises(FormatError, match=word):
            verify(model)
    with pytest.raises(ValueError, match="mode: got 'md5'"):
        verify(model, "md5")


def test_progress_counts_every_byte(model):
    seen = []
    manifest(model, progress=seen.append)
    with Checkpoint.open(model) as checkpoint:
        assert sum(seen) == checkpoint.nbytes
