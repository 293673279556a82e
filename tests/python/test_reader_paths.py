# SPDX-License-Identifier: Apache-2.0
"""Nothing outside the model folder is opened, whatever the index and the folder hold."""

import json
import os
import resource
import socket
import sys
import time

import pytest
from sparse import write_checkpoint

from dsv4.checkpoint import INDEX, Checkpoint
from dsv4.errors import FormatError
from dsv4.files import Folder
from dsv4.nano import CONFIG

TINY = dict(CONFIG, num_hidden_layers=1, num_hash_layers=1, n_routed_experts=3,
            compress_ratios=[0], num_nextn_predict_layers=0)
HEAD = "model-00003-of-00003.safetensors"

recorded = None


def record(event, arguments):
    if recorded is not None and event in ("open", "os.listdir"):
        recorded.append(arguments[0])


sys.addaudithook(record)


@pytest.fixture
def opened():
    """The paths opened during a test, through Python's audit events."""
    global recorded
    recorded = []
    yield recorded
    recorded = None


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "models" / "tiny"
    write_checkpoint(folder, TINY)
    return folder


def rename_in_index(folder, old, new):
    value = json.loads((folder / INDEX).read_text())
    where = value["weight_map"]
    value["weight_map"] = {k: new if v == old else v for k, v in where.items()}
    (folder / INDEX).write_text(json.dumps(value))


def refused(folder, *words, **options):
    start = time.monotonic()
    with pytest.raises(FormatError) as caught:
        Checkpoint.open(folder, **options)
    assert time.monotonic() - start < 5  # a FIFO would block for ever
    for word in words:
        assert word in str(caught.value)
    return caught.value


def test_only_files_of_the_folder_are_opened(model, opened):
    Checkpoint.open(model).close()
    shards = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    names = [path for path in opened if not isinstance(path, int)]
    assert names == [str(model), "config.json", INDEX, *shards]


@pytest.mark.parametrize(
    "name",
    ["../tiny/" + HEAD, "..", "/etc/passwd.safetensors", "/dev/zero.safetensors", "a/../" + HEAD,
     "a\\b.safetensors", "./" + HEAD, "a\0.safetensors", "x" * 300 + ".safetensors",
     ".safetensors/", "\ud800.safetensors", "", "/etc/passwd"],
)
def test_names_that_are_paths(model, opened, name):
    rename_in_index(model, HEAD, name)
    del opened[:]
    error = refused(model)
    assert error.file == INDEX
    assert opened == [str(model), "config.json", INDEX]


def test_every_bad_name_is_listed(model):
    value = json.loads((model / INDEX).read_text())
    for i, key in enumerate(value["weight_map"]):
        value["weight_map"][key] = f"../{i:02d}.safetensors"
    (model / INDEX).write_text(json.dumps(value))
    count = len(value["weight_map"])
    text = str(refused(model, "../00.safetensors", "../19.safetensors", f"{count} faults"))
    assert f"and {count - 20} more" in text and "../20.safetensors" not in text


@pytest.mark.parametrize("file", [HEAD, "config.json", INDEX])
@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "link out", "loop", "dangling"])
def test_what_is_not_a_regular_file(model, opened, file, kind, monkeypatch):
    outside = model.parent / "outside"
    (model / file).rename(outside)
    monkeypatch.chdir(model)  # the path of a socket must be short
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        os.mkdir(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(file)
    else:
        os.symlink({"link out": outside, "loop": file, "dangling": "nothing"}[kind], file)
    del opened[:]
    assert refused(model).file == file
    paths = {path for path in opened if not isinstance(path, int)}
    names = {str(model), "config.json", INDEX, *(path.name for path in model.iterdir())}
    assert paths <= names - {file}


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_exchanged_while_it_is_opened(model, kind, monkeypatch):
    """The entry was a regular file when looked at and is another thing when opened."""
    before = os.stat(model / HEAD)
    (model / HEAD).rename(model.parent / "outside")
    if kind == "link":
        (model / HEAD).symlink_to(model.parent / "outside")
    elif kind == "fifo":
        os.mkfifo(model / HEAD)
    else:
        (model / HEAD).mkdir()
    count = len(os.listdir("/proc/self/fd"))
    with Folder(model) as folder:
        monkeypatch.setattr(os, "stat", lambda *args, **kwargs: before)
        with pytest.raises(FormatError, match=HEAD):
            folder.open(HEAD)
        monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == count


def test_links_are_followed_only_when_asked(model):
    outside = model.parent / "outside"
    (model / HEAD).rename(outside)
    (model / HEAD).symlink_to(outside)
    refused(model, "symbolic link", "allow_symlinks")
    refused(model, "symbolic link", allow_symlinks=False)
    Checkpoint.open(model, allow_symlinks=True).close()
    (model / HEAD).unlink()
    (model / HEAD).symlink_to("/dev/zero")
    refused(model, "a device", allow_symlinks=True)
    refused(model, "symbolic link")


@pytest.fixture
def cached(tmp_path):
    """A model in the layout of the Hugging Face cache; gives (snapshot folder, cache entry)."""
    entry = tmp_path / "hub" / "models--org--tiny"
    snapshot = entry / "snapshots" / "0123abcd"
    write_checkpoint(snapshot, TINY)
    (entry / "blobs").mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(entry / "blobs" / f"{i:064x}")
        path.symlink_to(f"../../blobs/{i:064x}")
    return snapshot, entry


def test_the_cache_of_hugging_face(cached, tmp_path):
    snapshot, _ = cached
    Checkpoint.open(snapshot).close()
    refused(snapshot, "symbolic link", allow_symlinks=False)
    (tmp_path / "elsewhere").symlink_to(snapshot)  # the folder itself may be reached by a link
    Checkpoint.open(tmp_path / "elsewhere").close()


@pytest.mark.parametrize("target", ["../../../outside", "../../../models--org--other/blobs/0"])
def test_links_out_of_the_cache_entry(cached, target):
    snapshot, entry = cached
    path = (snapshot / target).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    (snapshot / HEAD).resolve().rename(path)
    (snapshot / HEAD).unlink()
    (snapshot / HEAD).symlink_to(target)
    refused(snapshot, "symbolic link", f"inside {entry}")


def test_a_path_that_only_looks_like_the_cache(model, tmp_path):
    fake = tmp_path / "models--org--tiny"
    write_checkpoint(fake / "files", TINY)
    (fake / "files" / HEAD).rename(fake / "blob")
    (fake / "files" / HEAD).symlink_to("../blob")
    refused(fake / "files", "allow_symlinks")


def test_missing_things(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(NotADirectoryError):
        Checkpoint.open(model / "config.json")
    (model / HEAD).unlink()
    assert refused(model, "No such file").file == HEAD
    (model / INDEX).unlink()
    refused(model, "2 other .safetensors files", "model.safetensors")
    (model / "config.json").unlink()
    assert refused(model, "No such file").file == "config.json"


def test_too_many_open_files_are_not_the_fault_of_a_file(model):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    count = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 3, hard))
        with pytest.raises(OSError, match="Too many open files"):
            Checkpoint.open(model)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == count


def test_files_beside_are_left_alone(model, opened):
    (model / "other.safetensors").write_bytes(b"not read")
    (model / os.fsdecode(b"\xff.safetensors")).write_bytes(b"not read")
    with Checkpoint.open(model) as checkpoint:
        assert checkpoint.warnings == ("other.safetensors is not in the index and was not opened",)
    assert "other.safetensors" not in opened


def test_a_file_that_shrinks_is_noticed(model):
    from dsv4.files import read_exactly

    with Folder(model) as folder:
        fd, size = folder.open("config.json")
    os.truncate(model / "config.json", size - 1)
    with pytest.raises(FormatError, match="became shorter"):
        read_exactly(fd, size, 0, "config.json")
    os.close(fd)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{}", ["weight_map"]),
        (b"[]", ["weight_map"]),
        (b'{"weight_map": {}}', ["weight_map"]),
        (b'{"weight_map": {"a": 1}}', ["a"]),
        (b'{"weight_map": {"a": "x.bin"}}', ["x.bin"]),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', ["twice"]),
        (b'{"weight_map": ' + b"[" * 1_000_000, ["items"]),
        (b'{"weight_map": {"a": "' + b"x" * 1_000_000 + b'.safetensors"}}', ["bytes"]),
    ],
)
def test_bad_indexes(model, text, words):
    (model / INDEX).write_bytes(text)
    error = refused(model, *words)
    assert error.file == INDEX and len(str(error)) < 600


def test_a_total_size_that_is_wrong_is_a_warning(model):
    value = json.loads((model / INDEX).read_text())
    value["metadata"]["total_size"] += 1
    (model / INDEX).write_text(json.dumps(value))
    with Checkpoint.open(model) as checkpoint:
        assert len(checkpoint.warnings) == 1 and "total_size" in checkpoint.warnings[0]
