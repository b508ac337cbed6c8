"""Reading published ``.pt``, ``.pth``, ``.th`` and joblib files without running what they contain.

A pickle is a program: it may name any function and call it. Here it is interpreted by a machine that knows tensors,
arrays and plain containers and nothing else: no name in a file is ever imported or looked up as an attribute, every
instruction and every byte is charged to a budget, and nothing is unpacked to disk. Neither ``torch.load`` nor
``pickle`` nor joblib takes part (their formats are described in ``torch/serialization.py``, in ``pickletools`` and in
joblib's ``numpy_pickle.py``).
"""

import bz2
import io
import lzma
import math
import pickletools
import re
import sys
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

_LEAST_BUDGET, _CHUNK, _DEEPEST = 2**28, 2**20, 100
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_LZMA_MEMORY = 2**28
_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU][1-9]\d{0,5}|O8?)")
_DAMAGE = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError)
_CODEC_DAMAGE = (ValueError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)


class _Refused(ValueError):
    """The file asks for something that is never done; the message is complete but for the file's name."""


def load_untrusted(path: str | Path, *, max_bytes: int | None = None) -> Any:  # noqa: ANN401
    """Read a published weight file from anyone: ``torch.save`` (zip and older format) or joblib, compressed or not.

    Tensors come on the CPU, tied ones still tied; arrays, NumPy scalars, ``OrderedDict``, ``argparse.Namespace`` and
    builtin containers come as themselves. Python attributes of tensors are dropped.

    Args:
        path: File to read. The content decides on the format, not the name.
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
    budget = _Budget(max(_LEAST_BUDGET, 4 * size) if max_bytes is None else max_bytes)
    try:
        with _SmallReads(path) as file:
            return _load(file, size, budget)
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except (*_DAMAGE, *_CODEC_DAMAGE) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{path} is damaged, or no torch or joblib file ({reason}): fetch it again from its source"
        ) from error


class _Budget:
    """Bytes that the content of one file may still take."""

    def __init__(self, limit: int) -> None:
        self.limit = self.left = limit

    def charge(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise _Refused(f"needs more than {self.limit} bytes of memory: if you expect that, pass a larger max_bytes")


class _SmallReads(io.FileIO):
    """A file that is read in small pieces, which also bounds the table of contents that ``zipfile`` reads at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > 4 * _CHUNK:
            raise _Refused(f"has a table of contents of {size} bytes: no torch file needs that")
        return super().read(size) or b""


class _Binary(Protocol):
    """What is asked of a file."""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes."""

    def readline(self, size: int, /) -> bytes:
        """Up to a line end, but at most ``size`` bytes."""


class _Stream:
    """Bytes read once from the start to the end; nothing is allocated for what cannot be there.

    Args:
        file: Where they come from.
        left: How many there can be.
        budget: What larger pieces are charged to.
    """

    def __init__(self, file: _Binary, left: int, budget: _Budget) -> None:
        self._file, self.left, self.budget = file, left, budget

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes."""
        self.budget.charge(self.check(size))
        pieces = []
        while size:
            pieces.append(self._file.read(min(size, _CHUNK)))
            if not pieces[-1]:
                raise EOFError(f"ends {size} bytes too early")
            self.left -= len(pieces[-1])
            size -= len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readline(self) -> bytes:
        """A line of at most 64 KiB."""
        line = self._file.readline(min(self.left, 2**16))
        self.left -= len(line)
        return line

    def check(self, size: int) -> int:
        """The same size, if so many bytes can follow and may be taken."""
        if not 0 <= size <= self.left:
            raise EOFError(f"declares {size} bytes where at most {self.left} follow")
        if size > self.budget.left:
            self.budget.charge(size)
        return size

    def fill(self, size: int) -> bytearray:
        """The next ``size`` bytes, writable."""
        buffer = bytearray(self.check(size))
        self.fill_into(buffer)
        return buffer

    def fill_into(self, buffer: bytearray) -> None:
        """Replace the content of ``buffer`` by the bytes that follow."""
        for start in range(0, len(buffer), _CHUNK):
            end = min(start + _CHUNK, len(buffer))
            buffer[start:end] = self.read(end - start)


class _Inflated(io.RawIOBase):
    """The inflated content of a compressed file, piece by piece."""

    def __init__(self, file: _Binary, codec: Any) -> None:  # noqa: ANN401 (three unrelated classes of the library)
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


def _load(file: io.FileIO, size: int, budget: _Budget) -> Any:  # noqa: ANN401
    head = file.read(512)
    file.seek(0)
    if head.startswith(b"PK"):
        return _load_zip(file, size, budget)
    for start, magic, kind in _OLD:
        if head[start:].startswith(magic):
            raise _Refused(f"is {kind}, which is not read here: ask its author for a safetensors file")
    for magic, codec in _CODECS.items():
        if head.startswith(magic):
            with io.BufferedReader(_Inflated(file, codec()), 2**16) as inflated:
                content = _load_pickles(_Stream(inflated, sys.maxsize, budget))
                if inflated.read(1):  # the end, where the checksum stands
                    raise ValueError("more content follows the end")
                return content
    with io.BufferedReader(file, 2**16) as plain:
        return _load_pickles(_Stream(plain, size, budget))


def _load_zip(file: io.FileIO, size: int, budget: _Budget) -> Any:  # noqa: ANN401
    """The format of torch since 1.6: ``<root>/data.pkl`` and one record ``<root>/data/<key>`` per storage, uncompressed."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        for name, info in members.items():
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise _Refused(f"holds a member {_shown(name)} that points out of it: no torch file does")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise _Refused(f"holds a compressed member {_shown(name)}: no torch file does")
        roots = [name.removesuffix("data.pkl") for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1 or f"{roots[0]}constants.pkl" in members:
            raise _Refused(
                "is an archive, but not of tensors (a TorchScript program?): ask its author for a state dict"
            )

        def content(name: str) -> bytearray:
            info = members[roots[0] + name]
            with archive.open(info) as member:
                return _Stream(member, min(info.file_size, size), budget).fill(info.file_size)

        if f"{roots[0]}byteorder" in members and content("byteorder") != b"little":
            raise _Refused("holds big-endian tensors, which are not read here: ask its author for a safetensors file")
        storages: dict[str, Tensor] = {}

        def storage(kind: "_Global", key: str, numel: int) -> Tensor:
            if key not in storages:
                storages[key] = _typed(content(f"data/{key}"), kind.dtype)
            if storages[key].numel() != numel or storages[key].dtype != kind.dtype:
                raise ValueError(f"storage {key} holds {storages[key].numel()} elements where {numel} are declared")
            return storages[key]

        program = content("data.pkl")
        return _checked(*_Machine(_Stream(io.BytesIO(program), len(program), budget), storage).run())


def _load_pickles(stream: _Stream) -> Any:  # noqa: ANN401
    """A joblib file, or torch's format before 1.6 (which starts with a magic number); also inside joblib files."""
    first, instructions = _Machine(stream).run()
    if type(first) is not int or first != _TORCH_MAGIC:
        return _checked(first, instructions)
    version, system = _Machine(stream).run()[0], _Machine(stream).run()[0]
    if version != 1001 or not system.get("little_endian"):
        raise _Refused("holds big-endian tensors, or is of an unknown version: ask its author for a safetensors file")
    storages: dict[str, tuple[bytearray, Tensor]] = {}

    def storage(kind: "_Global", key: str, numel: int) -> Tensor:
        if key not in storages:
            declared = sum(len(buffer) for buffer, _ in storages.values())
            size = stream.check(declared + numel * kind.dtype.itemsize) - declared
            buffer = bytearray(size)
            storages[key] = buffer, _typed(buffer, kind.dtype)
        return storages[key][1]

    content, instructions = _Machine(stream, storage).run()
    for key in _items(_Machine(stream).run()[0]):
        buffer, tensor = storages.pop(str(_key(key)))
        if int.from_bytes(stream.read(8), "little") != tensor.numel():
            raise ValueError(f"storage {key} does not hold the declared {tensor.numel()} elements")
        stream.fill_into(buffer)
    if storages:
        raise EOFError(f"{len(storages)} storages are missing")
    return _checked(content, instructions)


def _typed(buffer: bytearray, dtype: torch.dtype) -> Tensor:
    """Memory as a flat tensor; this is what stands for a storage here."""
    return torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)


@dataclass(frozen=True)
class _Global:
    """A name that files may ask for, and what stands for calling it."""

    name: str
    make: Callable[..., Any] | None = None
    dtype: torch.dtype = torch.uint8
    """Of the elements, where the name is that of a storage."""


class _JoblibArray:
    """Announces an array whose bytes follow in the stream."""


def _items(values: Any) -> Any:  # noqa: ANN401
    """The same list or tuple; anything else (a tensor would become one object per element) is not iterated over."""
    if type(values) not in (list, tuple, torch.Size):
        raise TypeError(f"a {type(values).__name__} where a list is expected")
    return values


def _sizes(values: Iterable[int]) -> tuple[int, ...]:
    sizes = tuple(_items(values))
    if len(sizes) > 64 or any(type(n) is not int or not 0 <= n < 2**63 for n in sizes):
        raise ValueError("a shape, stride or offset is no natural number")
    return sizes


def _tensor(
    storage: Tensor, offset: int, shape: Iterable[int], stride: Iterable[int], requires_grad: bool = False, *_: object
) -> Tensor:
    shape, stride, (offset,) = _sizes(shape), _sizes(stride), _sizes([offset])
    last = offset + sum(step * (n - 1) for step, n in zip(stride, shape, strict=True) if n)
    if (
        not isinstance(storage, Tensor)
        or math.prod(shape) > storage.numel()
        or (all(shape) and last >= storage.numel())
    ):
        raise ValueError(f"a tensor of shape {shape} and stride {stride} does not fit in its storage")
    tensor = storage.as_strided(shape, stride, offset)
    return tensor.requires_grad_() if requires_grad is True else tensor


def _tensor_of_bytes(storage: Tensor, *arguments: Any) -> Tensor:  # noqa: ANN401
    *place, _, dtype = arguments[:6]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("the type of a tensor is no torch.dtype")
    return _tensor(storage.view(dtype), *place)


def _parameter(data: Tensor, requires_grad: bool = True, *_: object) -> nn.Parameter:
    return nn.Parameter(data, requires_grad is True)


def _like(function: _Global, _: object, arguments: tuple[Any, ...], *__: object) -> Tensor:
    if function.make not in (_tensor, _tensor_of_bytes, _parameter):
        raise ValueError(f"{function.name} builds no tensor")
    return function.make(*_items(arguments))


def _dtype(code: str, *_: object) -> np.dtype[Any]:
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        raise _Refused(f"asks for arrays of type {_shown(code)}: only numbers, strings and lists of them are read")
    return np.dtype(code, False, True)  # a copy, which its state may change


def _array(dtype: np.dtype[Any], shape: Iterable[int], content: Any, fortran: bool) -> tuple[Any, ...]:  # noqa: ANN401
    """The checked state of an array; of an array of objects these are a list of scalars."""
    shape = _sizes(shape)
    if dtype.hasobject and not (
        type(content) is list and all(isinstance(x, str | bytes | int | float | None) for x in content)
    ):
        raise _Refused(
            "holds an array of objects that are no strings or numbers: ask its author for a safetensors file"
        )
    if not dtype.hasobject and type(content) not in (bytes, bytearray):
        raise TypeError("the content of an array is no bytes")
    if math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize) != len(content):
        raise ValueError(f"an array of shape {shape} has {len(content)} bytes or elements")
    return 1, shape, dtype, fortran is True, content


def _scalar(dtype: np.dtype[Any], content: bytes) -> Any:  # noqa: ANN401
    state = _array(dtype, (), _raw(content), False)
    return np.frombuffer(state[-1], dtype)[0]


def _numbers(
    content: bytes | bytearray, dtype: np.dtype[Any], shape: Iterable[int], order: str
) -> np.ndarray[Any, Any]:
    writable = content if type(content) is bytearray else bytearray(_array(dtype, shape, content, False)[-1])
    return np.frombuffer(writable, dtype).reshape(_sizes(shape), order="F" if order == "F" else "C")


def _raw(content: Any) -> Any:  # noqa: ANN401
    return content.encode("latin1") if isinstance(content, str) else content  # Python 2 wrote bytes as text


def _set(kind: type[Any]) -> Callable[..., Any]:
    return lambda items=(): kind(map(_key, _items(items)))


def _key(value: object) -> object:
    """A key of a dict or set: cheap to hash, however it was made."""
    for part in value if type(value) is tuple else [value]:
        if not (part is None or type(part) in (str, bytes, bool, float) or (type(part) is int and abs(part) < 2**63)):
            raise _Refused(f"holds a key of type {type(part).__name__}, or a huge one: no weight file needs that")
    return value


_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_GLOBALS: dict[str, Callable[..., Any] | None] = {
    "_codecs.encode": lambda text, encoding: bytes(text, "latin1"),  # the only encoding that pickle writes
    "argparse.Namespace": Namespace,
    "collections.OrderedDict": lambda items=(): OrderedDict((_key(k), v) for k, v in map(_items, _items(items))),
    "joblib.numpy_pickle.NumpyArrayWrapper": _JoblibArray,
    "numpy.dtype": _dtype,
    "numpy.ndarray": None,
    "torch.device": lambda kind, index=None: torch.device(str.lower(kind), *([] if index is None else _sizes([index]))),
    "torch.Size": lambda sizes: torch.Size(_sizes(sizes)),
    "torch.Tensor": None,
    "torch._tensor._rebuild_from_type_v2": _like,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.storage._load_from_bytes": None,  # needs the budget: see _Machine
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: np.empty(0) for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _numbers for core in ("core", "_core")},
    **{f"{module}.{kind.__name__}": _set(kind) for module in ("builtins", "__builtin__") for kind in (set, frozenset)},
    **{f"{module}.bytes": lambda: b"" for module in ("builtins", "__builtin__")},  # of empty ones only
    **{f"{module}.complex": lambda re, im: complex(re, im) for module in ("builtins", "__builtin__")},
}


def _find(module: str, name: str) -> object:
    """What a file means by a name; the only place where names of a file are looked up."""
    if type(module) is not str or type(name) is not str:
        raise TypeError("a name that is no text")
    if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
        return dtype
    if module in ("torch", "torch.cuda") and name in _STORAGES:
        return _Global(name, dtype=_STORAGES[name])
    if (module, name) == ("torch.storage", "UntypedStorage"):
        return _Global(name)
    if f"{module}.{name}" not in _GLOBALS:
        raise _Refused(
            f"asks for {_shown(f'{module}.{name}')}, which is neither tensor, array nor plain container and could run "
            "any code: nothing was run; ask its author for a safetensors file"
        )
    return _Global(f"{module}.{name}", _GLOBALS[f"{module}.{name}"])


def _shown(text: str) -> str:
    """Foreign text, short and on one line."""
    return text[:80] if text.isprintable() else ascii(text[:80])


_NEW: dict[str, Callable[[], object]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": set,
    "EMPTY_TUPLE": tuple,
    "NEWFALSE": lambda: False,
    "NEWTRUE": lambda: True,
    "NONE": lambda: None,
}
_LITERALS = {
    op.name
    for op in pickletools.opcodes
    if op.arg and not op.stack_before and op.stack_after and op.stack_after[0] is not pickletools.anyobject
} - {"LONG4", "STRING"}  # integers of more than 255 bytes; text that must be evaluated
_COLLECT: dict[str, Callable[[list[Any]], object]] = {
    "FROZENSET": _set(frozenset),
    "LIST": list,
    "TUPLE": tuple,
    "DICT": lambda items: {_key(k): v for k, v in _pairs(items)},
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


class _Machine:
    """Interprets one pickle of a stream and stops behind it.

    Args:
        stream: Where the pickle starts.
        storage: Gives the storage of a type, key and number of elements (files of ``torch.save`` only).
    """

    def __init__(self, stream: _Stream, storage: Callable[[_Global, str, int], Tensor] | None = None) -> None:
        self._stream, self._storage = stream, storage
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        """The value, and the number of instructions that made it."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], self._stream))):  # noqa: B007
            self._stream.budget.charge(64)
            self._step(opcode.name, argument)
        return self._stack.pop(), count

    def _step(self, name: str, argument: Any) -> None:  # noqa: ANN401
        stack = self._stack
        if name in _NEW:
            stack.append(_NEW[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _COLLECT:
            items = self._to_mark()
            self._stack.append(_COLLECT[name](items))
        elif name in _TUPLES:
            size = _TUPLES[name]
            if len(stack) < size:
                raise IndexError("stack underflow")
            stack[-size:] = [tuple(stack[-size:])]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._marked.append(stack)
            self._stack = []
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"):
            self._extend(name)
        elif name == "GLOBAL":
            stack.append(_find(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_find(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1] = self._build(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(self._persistent(stack.pop()))
        elif name not in ("PROTO", "FRAME", "STOP"):
            if name == "INST":
                _find(*argument.split(" ", 1))
            raise _Refused(f"uses the pickle instruction {name}, which no weight file needs: nothing was run")

    def _to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _extend(self, name: str) -> None:
        if name in ("APPEND", "SETITEM"):
            size = 1 if name == "APPEND" else 2
            items = [self._stack.pop() for _ in range(size)][::-1]
        else:
            items = self._to_mark()
        target = self._stack[-1]
        if name.startswith("APPEND") and type(target) is list:
            target.extend(items)
        elif name.startswith("SET") and type(target) in (dict, OrderedDict):
            target.update((_key(k), v) for k, v in _pairs(items))
        elif name == "ADDITEMS" and type(target) is set:
            target.update(map(_key, items))
        else:
            raise TypeError(f"{name} of a {type(target).__name__}")

    def _call(self, function: Any, arguments: Any) -> Any:  # noqa: ANN401
        self._stream.budget.charge(1024)
        if type(function) is not _Global or type(arguments) is not tuple:
            raise TypeError(f"a call of a {type(function).__name__}")
        if function.name == "torch.storage._load_from_bytes":
            (content,) = arguments
            return _load_pickles(_Stream(io.BytesIO(content), len(content), self._stream.budget))
        if function.make is None:
            raise TypeError(f"a call of {function.name}")
        self._charge_copies(arguments)
        return function.make(*arguments)

    def _charge_copies(self, values: tuple[Any, ...]) -> None:
        """Values on their way into a new object: one that is stored once can be copied many times."""
        for value in values:
            if type(value) in (bytes, bytearray, str):
                self._stream.budget.charge(len(value))
            elif type(value) in (list, tuple, dict, OrderedDict, set):
                self._stream.budget.charge(128 * len(value))

    def _persistent(self, name: Any) -> Tensor:  # noqa: ANN401
        if self._storage is None:
            raise _Refused("refers to persistent objects outside of a torch file: nothing was run")
        tag, kind, key, _, numel, *view = _items(name)
        if tag != "storage" or type(kind) is not _Global or type(key) is not str or view not in ([], [None]):
            raise _Refused("refers to a persistent object that is no storage: nothing was run")
        return self._storage(kind, key, *_sizes([numel]))

    def _build(self, value: Any, state: Any) -> Any:  # noqa: ANN401
        """Give a value its state; only known kinds have one."""
        self._charge_copies(state if type(state) is tuple else (state,))
        match value:
            case Namespace() if type(state) is dict and all(
                type(name) is str and not name.startswith("__") for name in state
            ):
                vars(value).update(state)
            case OrderedDict():
                vars(value).update({"_metadata": state["_metadata"]} if "_metadata" in dict(state) else {})
            case np.dtype():
                order, names = state[1], state[2:5]
                if type(order) is not str or order not in "<>|=" or any(part is not None for part in names):
                    raise _Refused("holds a structured array: ask its author for a safetensors file")
                extended = (value.itemsize, value.alignment) if value.kind in "SU" else (-1, -1)
                value.__setstate__((3, order, None, None, None, *extended, value.flags))  # type: ignore[attr-defined]
            case np.ndarray():
                _, shape, dtype, fortran, content = _items(state)
                value.__setstate__(_array(dtype, shape, _raw(content), fortran))
            case _JoblibArray():
                return self._joblib_array(**state)
            case _:
                raise TypeError(f"a {type(value).__name__} with a state")
        return value

    def _joblib_array(
        self,
        *,
        shape: Iterable[int],
        order: str,
        dtype: np.dtype[Any],
        numpy_array_alignment_bytes: int | None = None,
        **_: object,
    ) -> np.ndarray[Any, Any]:
        """The array whose bytes (of objects: whose pickle) follow in the stream."""
        if dtype.hasobject:
            array = _Machine(self._stream).run()[0]
            if not isinstance(array, np.ndarray):
                raise TypeError("an array of objects is no array")
            return array
        if numpy_array_alignment_bytes is not None:
            self._stream.read(self._stream.read(1)[0])
        content = self._stream.fill(math.prod(_sizes(shape)) * dtype.itemsize)
        return _numbers(content, dtype, shape, order)


def _checked(value: Any, instructions: int) -> Any:  # noqa: ANN401
    """The value, if it is finished, and walking it as a tree takes no more time than reading it did."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > 1000 + 10 * instructions:
            raise _Refused(f"is nested more than {_DEEPEST} levels deep, or contains itself: no weight file does")
        if isinstance(item, _Global | _JoblibArray):
            raise _Refused(f"holds {getattr(item, 'name', 'an array without content')} as a value: no weight file does")
        inside = vars(item) if isinstance(item, Namespace) else item
        if isinstance(inside, dict):
            waiting += [(part, depth + 1) for part in inside.values()]
            waiting += [(part, depth + 1) for part in getattr(inside, "__dict__", {}).values()]
        elif type(inside) in (list, tuple):
            waiting += [(part, depth + 1) for part in inside]
    return value
