# SPDX-License-Identifier: Apache-2.0
"""From a path or a hub id to a local folder.

A local folder never touches the network.  A hub id goes through huggingface_hub (imported only
then), its cache and its environment variables; HF_HUB_OFFLINE is honoured.
"""

import os
import re
from pathlib import Path

REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
WEIGHTS = ["*.safetensors", "*.json"]
CONFIG_ONLY = ["config.json"]


def is_repo_id(path_or_repo: str | os.PathLike[str]) -> bool:
    """Whether this is a hub id "org/name" and not an existing path."""
    if not isinstance(path_or_repo, str) or os.path.exists(path_or_repo):
        return False
    return REPO_ID.fullmatch(path_or_repo) is not None


def resolve(
    path_or_repo: str | os.PathLike[str], revision: str | None = None,
    local_files_only: bool = False, *, weights: bool = True,
) -> Path:
    """The local folder of a model, downloaded into the hub's cache if need be.

    Parameters
    ----------
    path_or_repo : path or str
        An existing path, or a hub id such as "deepseek-ai/DeepSeek-V4-Flash".
    revision : str, optional
        Branch, tag or commit of a hub id.
    local_files_only : bool
        Use what the cache has, never the network; HF_HUB_OFFLINE=1 does the same.
    weights : bool
        False fetches config.json alone.

    Raises
    ------
    FileNotFoundError
        No such path, no such repository or revision, or not in the cache while offline.
    ValueError
        A revision for a local path.
    OSError
        The download failed.

    Examples
    --------
    >>> resolve("/").is_dir()
    True
    """
    if not is_repo_id(path_or_repo):
        path = Path(path_or_repo)
        if not path.exists():
            raise FileNotFoundError(
                f"model: got {os.fspath(path_or_repo)!r}, which does not exist; "
                'wanted a folder or a hub id "org/name"'
            )
        if revision is not None:
            raise ValueError(f"revision: got {revision!r} for the local path {path}, wanted None")
        return path
    repo = os.fspath(path_or_repo)
    offline = local_files_only or _offline()
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ImportError(
            f"{repo!r} is not a folder; a hub id needs the package huggingface_hub"
        ) from None
    try:
        folder = snapshot_download(
            repo, revision=revision, local_files_only=offline,
            allow_patterns=WEIGHTS if weights else CONFIG_ONLY, ignore_patterns=["*/*"],
        )
    except errors.LocalEntryNotFoundError as error:
        why = "offline" if offline else "the hub cannot be reached"
        raise FileNotFoundError(
            f"model: {repo!r} is neither a folder nor complete in the cache, and {why}"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"model: {repo!r}{at} is neither a folder nor a repository you can see on the hub"
        ) from error
    except errors.HfHubHTTPError as error:
        raise OSError(f"model: {repo!r} could not be downloaded: {error}") from error
    return Path(folder)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
