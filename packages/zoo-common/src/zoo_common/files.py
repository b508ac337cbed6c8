"""Files that exist whole or not at all, and tensors with a checksum each.

A tensor file is a ``safetensors`` file whose header metadata holds ``format`` (what the file is), one JSON text per
further entry, ``tensors`` (dtype, shape and SHA-256 of the bytes of every tensor) and ``sha256`` (of all other entries).
Any flipped bit is therefore found, and any reader of ``safetensors`` can read the file. The header is read here without
``safetensors``, which maps the file at once: that takes four times as long, seconds in a zoo of 10,000 files.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_SMALL, _LARGE = 2**18, 2**27
"""Bytes from which a matrix has pages of its own, and from which it lies in a file."""
_HEAD = 4096
"""Bytes that are read first; most headers are shorter."""
_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""Dtypes of the format, as torch calls them."""
_SIZES = {code: getattr(torch, name).itemsize for code, name in _NAMES.items()}
_LEFTOVER = re.compile(r"\.([0-9a-f]{32}-.+|tmp[A-Za-z0-9]{6})")
"""Temporary names of :func:`atomic_write`, and of ``save_file``, which has its own."""


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
        own = error.filename is None or str(temporary) in (str(error.filename), str(error.filename2))
        if error.errno is not None and own:
            error.filename, error.filename2 = str(path), None
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
        temporary.write_text(json_text(document))


def json_text(document: object) -> str:
    """The text that :func:`write_json` writes."""
    return json.dumps(document, indent=1) + "\n"


def read_json(path: str | Path) -> Any:  # noqa: ANN401
    """Read a JSON document; a damaged one is a ``ValueError`` that names the file."""
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from another copy") from error


def visible_files(folder: Path, suffix: str) -> list[Path]:
    """Finished files of a folder with this suffix, by name; temporary files of killed writers are left out."""
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in sorted(names) if name.endswith(suffix) and not name.startswith(".")]


def leftover_files(folder: Path) -> list[Path]:
    """Temporary files in a folder, of writers that are at work or were killed."""
    return [path for path in folder.glob(".*") if _LEFTOVER.fullmatch(path.name)]


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
            # "I/O error: No space left on device (os error 28)", or in older versions "Os { code: 28, ..."
            number = re.search(r"(?:os error|code:) (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error


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
        self.path = path if isinstance(path, Path) else Path(path)
        try:
            header, self._start, self._size, self._first = _read_header(self.path)
            self._entries: dict[str, str] = header.pop("__metadata__", {})
            self._spans = {name: row["data_offsets"] for name, row in header.items()}
            if (end := self._start + _end_of_payload(header)) != self._size:
                raise ValueError(f"{self._size} bytes instead of {end}")
            if self._entries.get("format") == kind:
                self.digest = self._entries.pop("sha256")
                if self.digest != _digest(self._entries):
                    raise ValueError("wrong SHA-256 of the header")
                self.table: dict[str, dict[str, Any]] = json.loads(self._entries.pop("tensors"))
                written = {name: (row["dtype"], row["shape"]) for name, row in self.table.items()}
                if {name: (_NAMES[row["dtype"]], row["shape"]) for name, row in header.items()} != written:
                    raise ValueError("the header contradicts itself")
            found = self._entries.pop("format", "foreign safetensors")
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no file {self.path}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.path} is truncated or damaged ({error}): restore it from another copy, or delete it"
            ) from error
        if found != kind:
            raise ValueError(f"{self.path} is a {found} file, expected a {kind}")

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What the writer gave as metadata."""
        return {name: json.loads(text) for name, text in self._entries.items()}

    def entry(self, name: str) -> Any:  # noqa: ANN401
        """One entry of the metadata; None if there is none."""
        return json.loads(self._entries.get(name, "null"))

    @cached_property
    def _mapped(self) -> Tensor:
        """Bytes of the file; the mapping needs no open file handle, so the limit on these does not matter."""
        try:
            storage: Any = torch.UntypedStorage.from_file(str(self.path), False, self._size)
        except RuntimeError as error:
            raise OSError(f"cannot map {self.path}, was it removed since it was opened? ({error})") from error
        return torch.empty(0, dtype=torch.uint8).set_(storage)

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from the file without a copy; writing to it changes this process's view only."""
        row, (begin, end) = self.table[name], self._spans[name]
        part = self._mapped[self._start + begin : self._start + end]
        return part.view(getattr(torch, row["dtype"])).view(row["shape"])

    def array(self, name: str) -> np.ndarray:
        """One tensor, read into memory; quicker than mapping a whole file for a few numbers."""
        row, (begin, end) = self.table[name], self._spans[name]
        content = self._first[begin:end]
        if len(content) < end - begin:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self._start + begin)
                content = file.read(end - begin)
        return np.frombuffer(bytearray(content), row["dtype"]).reshape(row["shape"])

    def damaged(self) -> list[str]:
        """Names of the tensors whose bytes are not those that were written (reads the whole file)."""
        return [name for name, row in self.table.items() if row["sha256"] != sha256(self.tensor(name))]

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


def _read_header(path: Path) -> tuple[dict[str, Any], int, int, bytes]:
    """The JSON header of a safetensors file, where its payload starts, its size, and a little of the payload."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD)
        start = 8 + int.from_bytes(head[:8], "little")
        if len(head) < 8 or start > size:
            raise ValueError(f"{size} bytes cannot hold the header")
        if start > len(head):
            head += file.read(start - len(head))
    return json.loads(head[8:start].decode()), start, size, head[start:]


def _end_of_payload(header: Mapping[str, dict[str, Any]]) -> int:
    """Bytes of all tensors, after a check that they follow each other without a gap."""
    position = 0
    for row in sorted(header.values(), key=itemgetter("data_offsets")):
        begin, end = row["data_offsets"]
        if begin != position or end - begin != math.prod(row["shape"]) * _SIZES[row["dtype"]]:
            raise ValueError(f"no tensor can stand at {begin} to {end}")
        position = end
    return position
