"""Reading published ``.pt``, ``.pth``, ``.th`` and joblib files without running what they contain.

Their pickles are interpreted by :mod:`zoo_common.inert`; neither ``torch.load`` nor ``pickle.load`` nor joblib takes
part, and nothing is unpacked to disk.
"""

import bz2
import io
import lzma
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo_common.inert import DAMAGE, Budget, Global, Refused, Stream, Unpickler, flat_tensor, load_pickles, shown

_LEAST_BUDGET, _LZMA_MEMORY, _LARGEST_READ = 2**28, 2**28, 2**22


def load_untrusted(path: str | Path, *, stubs: Sequence[str] = (), max_bytes: int | None = None) -> Any:  # noqa: ANN401
    """Read a published weight file from anyone: ``torch.save`` (zip and older format) or joblib, compressed or not.

    Tensors come on the CPU, tied ones still tied; arrays, NumPy scalars, ``OrderedDict``, ``argparse.Namespace`` and
    builtin containers come as themselves. Python attributes of tensors are dropped.

    Args:
        path: File to read. The content decides on the format, not the name.
        stubs: Names (``*`` stands for any part) of functions and classes to stand for: an object of such a class is a
            :class:`zoo_common.inert.Record` with its attributes, as in ``record.state["_parameters"]`` of a module.
            They are not imported either.
        max_bytes: Memory that the content may take. By default four times the size of the file, at least 256 MiB.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: In one line: the file asks for anything else (the message names the function or class, which has
            not been called, nor its module imported), is damaged, or would take more memory than allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give the path of a .pt, .pth, .th or joblib file")
    size = path.stat().st_size
    budget = Budget(max(_LEAST_BUDGET, 4 * size) if max_bytes is None else max_bytes, stubs)
    try:
        with _SmallReads(path) as file:
            return _load(file, size, budget)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except (*DAMAGE, zipfile.BadZipFile, lzma.LZMAError, zlib.error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{path} is damaged, or no torch or joblib file ({reason}): fetch it again from its source"
        ) from error


class _SmallReads(io.FileIO):
    """A file that is read in small pieces, which also bounds the table of contents that ``zipfile`` reads at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST_READ:
            raise Refused(f"has a table of contents of {size} bytes: no torch file needs that")
        return super().read(size) or b""


class _Inflated(io.RawIOBase):
    """The inflated content of a compressed file, piece by piece."""

    def __init__(self, file: io.FileIO, codec: Any) -> None:  # noqa: ANN401 (three unrelated classes of the library)
        self._file, self._codec = file, codec

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401
        while not self._codec.eof:
            tail = getattr(self._codec, "unconsumed_tail", b"")  # zlib's way; the others keep it to themselves
            hungry = not tail and getattr(self._codec, "needs_input", True)
            fresh = self._file.read(2**16) if hungry else tail
            out = self._codec.decompress(fresh, len(buffer))
            if out:
                buffer[: len(out)] = out
                return len(out)
            if hungry and not fresh:
                raise EOFError("compressed content ends too early")
        return 0


_CODECS: dict[bytes, Callable[[], Any]] = {
    b"\x78": lambda: zlib.decompressobj(zlib.MAX_WBITS),
    b"\x1f\x8b": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY),
    b"\x5d\x00": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY),
}
_OLD = (
    (0, b"\x04\x22\x4d\x18", "a joblib file compressed by lz4"),
    (0, b"ZF", "a joblib file of a version below 0.10"),
    (257, b"ustar", "a tar file (of a torch version below 0.2?)"),
)


def _load(file: io.FileIO, size: int, budget: Budget) -> Any:  # noqa: ANN401
    head = file.read(512)
    file.seek(0)
    if head.startswith(b"PK"):
        return _load_zip(file, size, budget)
    for start, magic, kind in _OLD:
        if head[start:].startswith(magic):
            raise Refused(f"is {kind}, which is not read here: ask its author for a safetensors file")
    for magic, codec in _CODECS.items():
        if head.startswith(magic):
            with io.BufferedReader(_Inflated(file, codec()), 2**16) as inflated:
                content = load_pickles(Stream(inflated, sys.maxsize, budget))
                if inflated.read(1):  # the end, where the checksum stands
                    raise ValueError("more content follows the end")
                return content
    with io.BufferedReader(file, 2**16) as plain:
        return load_pickles(Stream(plain, size, budget))


def _load_zip(file: io.FileIO, size: int, budget: Budget) -> Any:  # noqa: ANN401
    """The format of torch since 1.6: ``<root>/data.pkl`` and one record ``<root>/data/<key>`` per storage, uncompressed."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        for name, info in members.items():
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise Refused(f"holds a member {shown(name)} that points out of it: no torch file does")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise Refused(f"holds a compressed member {shown(name)}: no torch file does")
        roots = [name.removesuffix("data.pkl") for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1 or f"{roots[0]}constants.pkl" in members:
            raise Refused("is an archive, but not of tensors (a TorchScript program?): ask its author for a state dict")

        def content(name: str) -> bytearray:
            info = members[roots[0] + name]
            with archive.open(info) as member:
                stream = Stream(member, min(info.file_size, size), budget)
                return stream.fill(bytearray(stream.check(info.file_size)))

        if f"{roots[0]}byteorder" in members and content("byteorder") != b"little":
            raise Refused("holds big-endian tensors, which are not read here: ask its author for a safetensors file")
        storages: dict[str, Tensor] = {}

        def storage(kind: Global, key: str, numel: int) -> Tensor:
            if key not in storages:
                storages[key] = flat_tensor(content(f"data/{key}"), kind.dtype)
            if storages[key].numel() != numel or storages[key].dtype != kind.dtype:
                raise ValueError(f"storage {key} holds {storages[key].numel()} elements where {numel} are declared")
            return storages[key]

        program = content("data.pkl")
        return Unpickler(Stream(io.BytesIO(program), len(program), budget), storage).load()
