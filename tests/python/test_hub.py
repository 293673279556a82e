# SPDX-License-Identifier: Apache-2.0
"""Paths and hub ids: a folder never touches the network; offline, an id comes from the cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sparse import write_checkpoint

from dsv4.hub import is_repo_id, resolve
from dsv4.nano import CONFIG

REPO = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(script, **env):
    """Run Python with an empty hub cache setting of its own; its output."""
    names = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSAFEPATH")
    keep = {key: os.environ[key] for key in names if key in os.environ}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO,
        env={**keep, "PYTHONWARNINGS": "error", **env},
    )


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="revision: got 'main' for the local path"):
        resolve(tmp_path, revision="main")


@pytest.mark.parametrize("path", ["nothing", "/nothing/here", "./a/b", "a/b/c", "~/x", "", "a/..",
                                  Path("org/name")])
def test_what_is_neither(path):
    assert not is_repo_id(path)
    if path != "":
        with pytest.raises(FileNotFoundError, match="does not exist; wanted a folder or a hub id"):
            resolve(path)


def test_an_existing_folder_wins_over_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_repo_id("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_repo_id("org/name") and resolve("org/name") == Path("org/name")


def test_a_folder_imports_no_hub_code(tmp_path):
    script = (
        f"import sys\nfrom dsv4.hub import resolve\nresolve({str(tmp_path)!r})\n"
        "assert 'huggingface_hub' not in sys.modules"
    )
    result = run(script)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def cache(tmp_path):
    """A hub cache that holds the model org/tiny at main."""
    entry = tmp_path / "hub" / "models--org--tiny"
    snapshot = entry / "snapshots" / COMMIT
    config = dict(CONFIG, num_hidden_layers=1, n_routed_experts=3, num_hash_layers=0,
                  compress_ratios=[0])
    write_checkpoint(snapshot, config)
    (entry / "blobs").mkdir()
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(COMMIT)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(entry / "blobs" / f"{i:064x}")
        path.symlink_to(f"../../blobs/{i:064x}")
    return entry.parent, snapshot


OPEN = """
from dsv4.checkpoint import Checkpoint
from dsv4.hub import resolve
folder = resolve("org/tiny"{arguments})
Checkpoint.open(folder).close()
print(folder)
"""


@pytest.mark.parametrize(
    ("arguments", "env"),
    [(", local_files_only=True", {}), ("", {"HF_HUB_OFFLINE": "1"}), (", weights=False, "
     "local_files_only=True", {})],
)
def test_an_id_from_the_cache(cache, arguments, env):
    home, snapshot = cache
    result = run(OPEN.format(arguments=arguments), HF_HUB_CACHE=str(home), **env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(snapshot)


def test_an_id_that_is_not_in_the_cache(cache):
    script = OPEN.format(arguments="").replace("org/tiny", "org/other")
    result = run(script, HF_HUB_CACHE=str(cache[0]), HF_HUB_OFFLINE="1")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last == ("FileNotFoundError: model: 'org/other' is neither a folder nor complete in the "
                    "cache, and offline")


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        ("LocalEntryNotFoundError('x')", FileNotFoundError, "cannot be reached"),
        ("RepositoryNotFoundError('x', response=R)", FileNotFoundError, "can see on the hub"),
        ("RevisionNotFoundError('x', response=R)", FileNotFoundError, "at revision 'v9'"),
        ("GatedRepoError('x', response=R)", FileNotFoundError, "can see on the hub"),
        ("HfHubHTTPError('x', response=R)", OSError, "could not be downloaded"),
    ],
)
def test_what_the_hub_answers(monkeypatch, error, raised, words):
    import huggingface_hub
    from huggingface_hub import errors

    class Response:
        headers: dict[str, str] = {}
        request = None

    def download(repo, **arguments):
        assert repo == "org/name" and arguments["revision"] == "v9"
        assert arguments["allow_patterns"] == ["*.safetensors", "*.json"]
        raise eval(error, vars(errors), {"R": Response()})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(raised, match=words):
        resolve("org/name", revision="v9")
