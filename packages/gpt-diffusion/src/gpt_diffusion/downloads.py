"""Fetching the released models and data sets: resumable, checked, and offline once they are here.

Beside the files lies ``checksums.json``: name to size, SHA-256 and address at first use. A file that is there, or is
fetched again, must agree with it.
"""

import hashlib
import http.client
import json
import os
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from zoo_common.files import read_json, sync_folder, write_json

from gpt_diffusion.config import preset_name

#: Where the files were published; the environment variable GPT_DIFFUSION_SERVER names a mirror.
SERVER = "http://learn2learn.eecs.berkeley.edu"
MODELS = ("mnist_loss.pt", "mnist_error.pt", "cifar10_loss.pt", "cifar10_error.pt", "cartpole.pt")
DATASETS = ("mnist", "cifar10", "cartpole")
MODELS_FOLDER, DATASETS_FOLDER = Path("pretrained_models"), Path("checkpoint_datasets")
_CHECKSUMS = "checksums.json"
_PIECE = 2**20
_TIMEOUT = 60.0
_WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each new attempt; a transfer that made progress counts from the beginning again."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_BROKEN = (OSError, http.client.HTTPException)  # urllib's own errors are OSErrors


@dataclass(frozen=True)
class Downloaded:
    """One file or folder."""

    name: str
    path: Path
    fetched: bool
    """Whether it came over the network just now."""
    sha256: str | None
    """Of the file, or of the archive that the folder came from; None for a folder that came from elsewhere."""


def model_name(name: str | Path) -> str | None:
    """File name of a released model by any of its names (``cifar_loss.pt``, ``mnist-loss``); None: there is none."""
    text = f"{preset_name(str(name).removesuffix('.pt'))}.pt"
    return text if text in MODELS else None


def dataset_name(path: str | Path) -> str | None:
    """The published data set that a folder is named after: ``.../mnist_small`` is ``mnist``; None: there is none."""
    name = Path(path).name.split("_")[0].lower()
    return name if name in DATASETS else None


def find_model(name: str | Path, folder: Path | None = None, **options: Any) -> Path:  # noqa: ANN401
    """File of a released model, fetched if it is not in ``folder`` yet (options and errors of :func:`download`)."""
    known = model_name(name)
    if known is None:
        raise ValueError(f"there is no released model {str(name)!r}; there are {', '.join(MODELS)}")
    return download(known, folder, **options).path


def find_checkpoints(path: str | Path, **options: Any) -> Path:  # noqa: ANN401
    """A local folder, or else the published data set that it is named after, fetched and unpacked to it."""
    path = Path(path)
    if path.exists():
        return path
    name = dataset_name(path)
    if name is None:
        raise FileNotFoundError(f"there is no folder {path}, and it is not named after one of {', '.join(DATASETS)}")
    return _dataset(name, path, _Options(**options)).path


def download(name: str, folder: Path | None = None, **options: Any) -> Downloaded:  # noqa: ANN401
    """Fetch a released model (``mnist_loss.pt``) or data set (``mnist``), unless it is there.

    A transfer that broke goes on where it ended, also in a later call. A file has its name only when it is complete.

    Args:
        name: Model or data set.
        folder: Where to put it; default: ``pretrained_models`` or ``checkpoint_datasets``.
        options: ``server``: address instead of the published one. ``offline``: use what is there. ``progress``: show a
            bar on stderr. ``waits``: seconds before each new attempt.

    Raises:
        ValueError: Unknown name, or a file that is not the one recorded at first use, or a damaged archive.
        FileNotFoundError: Not there although ``offline``, or the server does not have it.
        OSError: The server cannot be reached, the transfer keeps breaking, or the disk has too little room.
    """
    given = _Options(**options)
    if name in DATASETS:
        return _dataset(name, (folder or DATASETS_FOLDER) / name, given)
    if (model := model_name(name)) is not None:
        place = (folder or MODELS_FOLDER) / model
        with _alone(place, given.offline):
            return _fetched(f"{MODELS_FOLDER}/{model}", place, given)
    raise ValueError(f"unknown download {name!r}: there are {', '.join((*MODELS, *DATASETS))}")


@dataclass(frozen=True)
class _Options:
    server: str | None = None
    offline: bool = False
    progress: bool = True
    waits: tuple[float, ...] = _WAITS

    def address(self, path: str) -> str:
        server = self.server or os.environ.get("GPT_DIFFUSION_SERVER") or SERVER
        if not server.startswith(("http://", "https://")):
            raise ValueError(f"the server's address must start with http:// or https://, got {server!r}")
        return f"{server.rstrip('/')}/{path}"


def _dataset(name: str, target: Path, options: _Options) -> Downloaded:
    with _alone(target, options.offline):
        archive = target.with_name(f"{name}.zip")
        if target.exists():
            if archive.exists() and _records(archive).get(archive.name, {}).get("size") == archive.stat().st_size:
                archive.unlink()  # a process was killed between unpacking it and this
            return Downloaded(name, target, False, None)
        got = _fetched(f"{DATASETS_FOLDER}/{name}.zip", archive, options)
        try:
            _unpack(archive, target, options.progress)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            _record(archive, None)
            raise ValueError(f"{archive} is damaged ({error}): remove it and repeat the download") from error
        archive.unlink()
        return Downloaded(name, target, True, got.sha256)


def _fetched(path: str, target: Path, options: _Options) -> Downloaded:
    """A file, from the disk or the server, that agrees with its record; it is recorded at first use."""
    there = target.exists()
    if not there and options.offline:
        raise FileNotFoundError(f"{target} is not there: repeat without --offline, or copy it there")
    address = options.address(path)
    source = target if there else _transfer(address, target, options)
    found: dict[str, Any] = {"size": source.stat().st_size, "sha256": _sha256(source, options.progress)}
    known = _records(target).get(target.name)
    if known is not None and {key: known.get(key) for key in found} != found:
        if not there:
            source.unlink()
        raise ValueError(
            f"{address if not there else target} is not the file that was used first ({known.get('size')} bytes, SHA-256 "
            f"{str(known.get('sha256'))[:12]}...; now {found['size']} bytes, {found['sha256'][:12]}...): "
            f"{'remove it' if there else 'try another server'}, or remove its entry in {_CHECKSUMS} to accept the new one"
        )
    if known is None:
        _record(target, found | {"from": str(target) if there else address})
    if not there:
        os.replace(source, target)
        sync_folder(target.parent)
    return Downloaded(target.name, target, not there, found["sha256"])


def _records(file: Path) -> dict[str, Any]:
    """Name to what is recorded of the files beside this one."""
    book = file.with_name(_CHECKSUMS)
    records = read_json(book) if book.exists() else {}
    if not isinstance(records, dict) or not all(isinstance(entry, dict) for entry in records.values()):
        raise ValueError(f"{book} is damaged: remove it to record the sums anew")
    return records


def _record(file: Path, found: dict[str, Any] | None) -> None:
    """Record a file, or forget it."""
    with _alone(file.with_name(_CHECKSUMS)):
        records = {name: entry for name, entry in _records(file).items() if name != file.name}
        write_json(file.with_name(_CHECKSUMS), records | ({file.name: found} if found else {}))


def _transfer(address: str, target: Path, options: _Options) -> Path:
    """The complete content of an address in a hidden file beside the target."""
    part, note = (target.with_name(f".{target.name}.{ending}") for ending in ("part", "part.json"))
    attempt = 0
    with tqdm(desc=target.name, unit="B", unit_scale=True, disable=not options.progress, leave=False) as bar:
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                if _receive(address, part, note, bar):
                    note.unlink(missing_ok=True)
                    return part
                reason = "the connection ended early"
            except urllib.error.HTTPError as error:
                if error.code not in _PASSING:
                    raise FileNotFoundError(
                        f"{address} answers {error.code} {error.reason}: try a mirror with --server, or copy the file "
                        f"to {target}"
                    ) from None
                reason = f"{error.code} {error.reason}"
            except _Disk as error:
                raise OSError(str(error)) from error.__cause__
            except _BROKEN as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            moved = part.exists() and part.stat().st_size > before
            attempt = 0 if moved else attempt + 1
            if attempt > len(options.waits):
                raise OSError(
                    f"{address} cannot be fetched ({reason}): repeat later (what has arrived is kept), try a mirror with "
                    f"--server, or copy the file to {target}"
                )
            time.sleep(options.waits[max(0, attempt - 1)] if options.waits else 0)


class _Disk(Exception):
    """The disk is full, or will be: no reason to try again."""


def _receive(address: str, part: Path, note: Path, bar: Any) -> bool:  # noqa: ANN401 (a tqdm bar)
    """Receive what is missing of a file; whether it is complete now."""
    known = _read_note(note) if part.exists() else {}
    have = part.stat().st_size if known else 0
    request = urllib.request.Request(address, headers={"User-Agent": "gpt-diffusion"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if known.get("version"):
            request.add_header("If-Range", known["version"])
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if have == known.get("size"):
            return True
        part.unlink()  # the file there is shorter now
        return False
    with response:
        version, size = response.headers.get("ETag") or response.headers.get("Last-Modified"), response.length
        if response.status != 206 or not str(response.headers.get("Content-Range", "")).startswith(f"bytes {have}-"):
            have = 0  # all of it, from a server without ranges or of another version
        size = None if size is None else have + size
        if (have and known.get("size") not in (None, size)) or (response.status == 206 and not have):
            part.unlink(missing_ok=True)
            return False
        _check_room(part, (size or 0) - have)
        try:
            if not have:
                part.unlink(missing_ok=True)  # first, or else a kill would leave it with the note of another version
                note.write_text(json.dumps({"version": version, "size": size}))
            file = part.open("r+b" if have else "wb")
        except OSError as error:
            raise _Disk(f"cannot write {part}: {error.strerror}") from error
        bar.total, bar.n = size, have
        with file:
            file.seek(have)
            while piece := response.read1(_PIECE):
                try:
                    file.write(piece)
                except OSError as error:
                    raise _Disk(f"cannot write {part}: {error.strerror}") from error
                bar.update(len(piece))
            file.flush()
            os.fsync(file.fileno())
    return size is None or part.stat().st_size == size


def _read_note(note: Path) -> dict[str, Any]:
    try:
        known = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise _Disk(
            f"{path.parent} has {free / 1e9:.2f} GB left, {needed / 1e9:.2f} GB are needed: make room and repeat"
        )


def _sha256(path: Path, progress: bool) -> str:
    digest = hashlib.sha256()
    options: Any = {"unit": "B", "unit_scale": True, "disable": not progress, "leave": False, "delay": 2}
    with tqdm(total=path.stat().st_size, desc=f"check {path.name}", **options) as bar, path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


def _unpack(archive: Path, target: Path, progress: bool) -> None:
    """Unpack an archive of one data set; the folder has its name when everything is in it and on disk.

    No file can leave the folder or be larger than the archive declares, and what it declares must fit the disk.
    """
    part = target.with_name(f".{target.name}.unpacked")
    shutil.rmtree(part, ignore_errors=True)
    with zipfile.ZipFile(archive) as files:
        members = files.infolist()
        for member in members:
            parts = member.filename.rstrip("/").split("/")
            kind = stat.S_IFMT(member.external_attr >> 16)
            if not set(parts).isdisjoint(("", ".", "..")) or "\\" in member.filename or ":" in parts[0]:
                raise ValueError(
                    f"{archive} holds {member.filename!r}, which points out of it: do not use this archive"
                )
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or member.flag_bits & 1:
                raise ValueError(f"{archive} holds {member.filename!r}, a link or encrypted: do not use this archive")
        size = sum(member.file_size for member in members)
        try:
            _check_room(part, size)
        except _Disk as error:
            raise OSError(str(error)) from None
        part.mkdir()
        try:
            with tqdm(
                total=size, desc=target.name, unit="B", unit_scale=True, disable=not progress, leave=False
            ) as bar:
                for member in members:
                    files.extract(member, part)
                    bar.update(member.file_size)
            if hasattr(os, "sync"):
                os.sync()
            inside = [entry for entry in part.iterdir() if not entry.name.startswith(".")]
            single = len(inside) == 1 and inside[0].is_dir() and not (inside[0] / "data.mdb").exists()
            os.replace(inside[0] if single else part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    sync_folder(target.parent)


@contextmanager
def _alone(target: Path, offline: bool = False) -> Iterator[None]:
    """Let other processes that want the same file wait (where the system has such locks)."""
    if offline and not target.parent.is_dir():
        raise FileNotFoundError(f"{target} is not there: repeat without --offline, or copy it there")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield
