"""Zoos and models on a hub, through ``huggingface_hub``: revisions, cache, resuming and tokens are that library's.

Its environment variables hold: ``HF_ENDPOINT`` (which hub), ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and ``HF_HUB_CACHE``. A
zoo is a repository of type "dataset", written in one commit, so that nobody sees a part of it.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, errors
from huggingface_hub.utils import logging

from zoo_common.files import sync_folder, visible_files
from zoo_common.manifest import read_document
from zoo_common.merge import link_or_copy, merge_zoos
from zoo_common.verify import verify_zoo

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?")
# The base of all errors of the HTTP library, of which huggingface_hub has had several.
_CONNECTION: type[Exception] = errors.HfHubHTTPError.__bases__[0]


def push_zoo(path: str | Path, repo: str, *, revision: str | None = None, private: bool = False) -> str:
    """Upload a zoo; what is there already is not sent again, and shards that only the hub has stay.

    Args:
        path: Folder of the zoo.
        repo: ``owner/name``; made if there is none.
        revision: Branch to write to; made if there is none. Default: ``main``.
        private: Whether a new repository is hidden from others.

    Returns:
        The new commit.

    Raises:
        FileNotFoundError: There is no zoo.
        ValueError: The zoo is damaged, or the repository holds another one; nothing has been sent.
        OSError: The hub cannot be reached or refuses; the message has the remedy.
    """
    path = Path(path)
    _check(path, f"{path} is not sent")
    mine = read_document(path)
    with tempfile.TemporaryDirectory() as folder:  # not the cache, where this file means that all the others are there
        with _told(repo, revision):
            api = HfApi()
            place: Any = {"repo_id": repo, "repo_type": "dataset", "revision": revision, "filename": "zoo.json"}
            is_there = api.file_exists(**place) and api.hf_hub_download(**place, local_dir=folder)
        theirs = read_document(Path(folder)) if is_there else mine
    if other := [key for key in ("task", "layout", "split") if theirs[key] != mine[key]]:
        raise ValueError(f"{repo} holds another zoo (other {', '.join(other)}): choose another repository")
    files = {str(file.relative_to(path).as_posix()): file for file in _files(path)}
    return _upload(files, repo, "dataset", revision, private)


def pull_zoo(repo: str, path: str | Path, *, revision: str | None = None, offline: bool = False) -> str:
    """Download a zoo through the hub's cache, check it, and put it in a folder: as hard links where possible.

    A folder that is new appears whole or not at all; one that holds the same zoo gets the shards that it lacks. A pull
    that was interrupted and is run again does not fetch finished files again.

    Args:
        repo: ``owner/name``.
        path: Folder of the zoo: absent, empty, or with an earlier state of the same zoo.
        revision: Branch, tag or commit; default: ``main``.
        offline: Use the cache alone. It is also used when the hub cannot be reached.

    Returns:
        The commit that was pulled.

    Raises:
        FileNotFoundError: No such repository or revision, or it is not in the cache and the hub cannot be reached.
        FileExistsError: The folder holds something else.
        ValueError: The zoo is damaged, or the folder holds another one.
        OSError: The hub cannot be reached or refuses.
    """
    path = Path(path)
    is_zoo = (path / "zoo.json").exists()
    if not is_zoo and path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} holds other files: choose a new folder for the zoo of {repo}")
    with _told(repo, revision):
        api = HfApi()
        place: Any = {"repo_id": repo, "repo_type": "dataset", "local_files_only": offline}
        parts = ["layouts/*.json", "shards/*.safetensors"]
        commit = Path(api.snapshot_download(**place, revision=revision, allow_patterns=parts)).name
        # Comes last: where it is in the cache, so is everything else of this commit.
        folder = Path(api.hf_hub_download(**place, revision=commit, filename="zoo.json")).parent
    _check(folder, f"{repo} is damaged; if not at its source, then in the cache: remove {folder.parents[1]} and repeat")
    if is_zoo:
        merge_zoos(path, [folder])
        return commit
    target = path.absolute()
    part = target.with_name(f".{target.name}-pulled")
    shutil.rmtree(part, ignore_errors=True)
    for file in _files(folder):
        (copy := part / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(file, copy)
    os.replace(part, target)
    sync_folder(target.parent)
    return commit


def push_file(path: str | Path, repo: str, filename: str, *, revision: str | None = None, private: bool = False) -> str:
    """Upload one file as ``filename`` of a model repository; arguments, result and errors as of :func:`push_zoo`."""
    return _upload({filename: Path(path)}, repo, "model", revision, private)


def fetch_file(name: str | Path, filename: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """Where a file of a model is: here, or downloaded from the hub into its cache.

    Args:
        name: A file; a folder, then its file ``filename`` (which may be absent); otherwise a repository
            ``owner/name`` or ``owner/name@revision``. If there is a folder ``owner`` here, the second form is needed.
        filename: File in the folder or repository.
        revision: Branch, tag or commit, where the name has none; default: ``main``.
        offline: Use the cache alone.

    Raises:
        FileNotFoundError: Neither is there such a file here, nor on the hub, nor (without a connection) in the cache.
        OSError: The hub cannot be reached or refuses.
    """
    path, match = Path(name), _NAME.fullmatch(str(name))
    if path.exists():
        return path / filename if path.is_dir() else path
    if not match or (path.parent.is_dir() and not match[2]):
        raise FileNotFoundError(f"there is no file or folder {name}; a model on the hub is owner/name@revision")
    revision = match[2] or revision
    with _told(match[1], revision, filename):
        return Path(HfApi().hf_hub_download(match[1], filename, revision=revision, local_files_only=offline))


def _files(zoo: Path) -> list[Path]:
    """What belongs to a zoo."""
    return [*visible_files(zoo / "layouts", ".json"), *visible_files(zoo / "shards", ".safetensors"), zoo / "zoo.json"]


def _check(zoo: Path, otherwise: str) -> None:
    problems = verify_zoo(zoo).problems
    if problems:
        raise ValueError(f"{otherwise}: {len(problems)} problem(s), the first: {problems[0]}")


def _upload(files: Mapping[str, Path], repo: str, kind: str, revision: str | None, private: bool) -> str:
    added = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
    message = f"Upload with {__package__}"
    with _told(repo, revision):
        api = HfApi()
        api.create_repo(repo, repo_type=kind, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, repo_type=kind, branch=revision, exist_ok=True)
        return api.create_commit(repo, added, commit_message=message, repo_type=kind, revision=revision).oid


@contextmanager
def _told(repo: str, revision: str | None, filename: str = "zoo.json") -> Iterator[None]:
    """Turn what ``huggingface_hub`` raises and warns of into one error with a remedy."""
    hub, what = constants.ENDPOINT, f"{repo} (revision {revision!r})" if revision else repo
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"{repo!r} does not name a repository (owner/name): {error}") from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{what} is not, or not completely, in the cache {constants.HF_HUB_CACHE}, and {hub} was not reached "
            "(offline?): repeat this with a connection, or give a folder"
        ) from error
    except errors.GatedRepoError as error:
        raise PermissionError(f"{what} is open to some only: ask for access at {hub}/{repo}, set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{hub} has no repository {repo}, or a private one: check the name, or set HF_TOKEN to a token for it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo} has no revision {revision!r}: give a branch, a tag or a full commit"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{what} has no {filename}: it holds something else, choose another") from error
    except (_CONNECTION, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # this machine's trouble, such as a full disk
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PermissionError(f"{hub} refuses {what}: set HF_TOKEN to a token that may do this") from error
        raise ConnectionError(
            f"{hub} cannot be reached for {what} ({error.__cause__ or error}): repeat this, it goes on"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
