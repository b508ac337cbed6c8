"""Files that exist whole or not at all, and tensors with a checksum each.

A tensor file is a ``safetensors`` file whose header metadata holds ``format`` (what the file is), one JSON text per
further entry, ``tensors`` (dtype, shape and SHA-256 of the bytes of every tensor) and ``sha256`` (of all other entries).
Any flipped bit is therefore found, and any reader of ``safetensors`` can read the file.
"""

import hashlib
import json
import mmap
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_SMALL, _LARGE = 2**18, 2**27
"""Bytes from which a matrix has pages of its own, and from which it lies in a file."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the same folder that takes the name ``path`` when the block ends without an error.

    The content is on disk before the rename, so the file is whole or absent after a crash. The temporary name starts
    with a dot and keeps the suffix; it is removed if the block fails. What a killed process leaves behind is never
    read (:func:`visible_files` passes over it). The file gets the permissions that the umask gives to new files,
    whatever the block's writer chose (that of ``safetensors`` lets only the owner read).

    Raises:
        FileNotFoundError: The folder does not exist.
        OSError: It cannot be written, or the disk is full; the error's file name is ``path``.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist, create it first")
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        temporary.touch()
        permissions = stat.S_IMODE(temporary.stat().st_mode)
        temporary.unlink()
        yield temporary
        temporary.chmod(permissions)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a new hidden folder beside ``path`` that takes this name, with all its content on disk, when the block ends.

    Raises:
        FileExistsError: There is something at ``path``.
        OSError: It cannot be written, or the disk is full; the error's file name is ``path``.
    """
    if path.exists():
        raise FileExistsError(f"{path} is there already, and not a whole run: remove it")
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                with open(os.path.join(folder, name), "rb+") as written:
                    os.fsync(written.fileno())
            sync_folder(Path(folder))
        os.rename(temporary, path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers of :func:`atomic_folder` left in a folder; no other may be at work in it."""
    for entry in folder.glob("." + "[0-9a-f]" * 32 + "-*"):
        shutil.rmtree(entry, ignore_errors=True)


def allocate(shape: tuple[int, int], dtype: torch.dtype, scratch: Path | None = None) -> Tensor:
    """Room for a matrix; a large one lies in a nameless file in the folder ``scratch`` (default: the system's)."""
    count = shape[0] * shape[1]
    if count * dtype.itemsize < _SMALL:
        return torch.empty(shape, dtype=dtype)
    if count * dtype.itemsize < _LARGE:  # pages of its own, which go back at once: a heap of such blocks only grows
        return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(shape)
    handle, name = tempfile.mkstemp(dir=scratch, prefix=".")
    try:
        if hasattr(os, "posix_fallocate"):  # or else a full disk would end the process at the first write to the map
            os.posix_fallocate(handle, 0, count * dtype.itemsize)
        return torch.from_file(name, shared=True, size=count, dtype=dtype).view(shape)
    except OSError as error:
        error.filename = str(Path(name).parent)
        raise
    finally:
        os.close(handle)
        os.unlink(name)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure (a no-op where folders cannot be opened)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: str | Path, document: object) -> None:
    """Write an indented JSON document atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")


def read_json(path: str | Path) -> Any:  # noqa: ANN401
    """Read a JSON document; a damaged one is a ``ValueError`` that names the file."""
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from another copy") from error


def visible_files(folder: Path, suffix: str) -> list[Path]:
    """Finished files of a folder with this suffix, by name; temporary files of killed writers are left out."""
    return sorted(path for path in folder.glob(f"*{suffix}") if not path.name.startswith("."))


def sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in C order, as hexadecimal digits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _digest(entries: Mapping[str, str]) -> str:
    text = json.dumps(dict(sorted(entries.items())))
    return hashlib.sha256(text.encode()).hexdigest()


def write_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write tensors and JSON metadata to one file, atomically.

    Args:
        path: File to create or replace.
        kind: What the file is, e.g. ``weightspace-checkpoint``; readers ask for it.
        tensors: Any dtypes and shapes; tensors that share memory are stored once each.
        metadata: Values that JSON can hold.
    """
    payload: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        payload[name] = own.clone() if storage in storages else own
        storages.add(storage)
    table = {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "sha256": sha256(tensor)}
        for name, tensor in payload.items()
    }
    entries = {name: json.dumps(value) for name, value in metadata.items()}
    entries |= {"format": kind, "tensors": json.dumps(table)}
    with atomic_write(path) as temporary:
        try:
            save_file(payload, temporary, entries | {"sha256": _digest(entries)})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


class TensorFile:
    """A file of :func:`write_tensors`: the header is read and checked at once, the payload is mapped when asked for.

    Args:
        path: File to open.
        kind: What it must be.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is truncated, its header is damaged, or it is something else; the message names it.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        """Read and check the header."""
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        try:
            self._file = safe_open(self.path, framework="pt")
            entries = dict(self._file.metadata() or {})
        except (SafetensorError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.path} is truncated or damaged ({error}): restore it from another copy, or delete it"
            ) from error
        if entries.get("format") != kind:
            raise ValueError(f"{self.path} is a {entries.get('format', 'foreign safetensors')} file, expected a {kind}")
        if entries.pop("sha256", None) != _digest(entries):
            raise ValueError(f"{self.path}: the header is damaged: restore it from another copy, or delete it")
        del entries["format"]
        self.digest = _digest(entries)
        self.table: dict[str, dict[str, Any]] = json.loads(entries.pop("tensors"))
        self._entries = entries
        shapes = {name: self._file.get_slice(name).get_shape() for name in self._file.keys()}  # noqa: SIM118
        if shapes != {name: row["shape"] for name, row in self.table.items()}:
            raise ValueError(f"{self.path}: the header is damaged: restore it from another copy, or delete it")

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What the writer gave as metadata."""
        return {name: json.loads(text) for name, text in self._entries.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from the file without a copy; writing to it changes this process's view only."""
        return self._file.get_tensor(name)

    def damaged(self) -> list[str]:
        """Names of the tensors whose bytes are not those that were written (reads the whole file)."""
        return [
            name
            for name, row in self.table.items()
            if row["dtype"] != str(self.tensor(name).dtype).removeprefix("torch.")
            or row["sha256"] != sha256(self.tensor(name))
        ]

    def check(self) -> None:
        """Read the whole file and compare the sums.

        Raises:
            ValueError: A tensor is damaged; the message names all that are.
        """
        if damaged := self.damaged():
            raise ValueError(
                f"{self.path} is damaged: wrong SHA-256 of {', '.join(damaged)}; restore it from another copy"
            )

    def load(self, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """All tensors in memory of their own, in the order written, after :meth:`check`."""
        self.check()
        return {name: self.tensor(name).to(device, copy=True) for name in self.table}
