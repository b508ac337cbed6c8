"""Pickles as data: an unpickler that knows tensors, arrays and plain containers, nothing else.

A pickle is a program: it may name any function and call it. Here no name in a file is ever imported or looked up as an
attribute, and every instruction and every byte is charged to a budget. Most instructions are those of Python's own
unpickler, of which the one in C would allocate whatever a file asks for. The formats are described in
``torch/serialization.py`` and in joblib's ``numpy_pickle.py``.
"""

import io
import math
import pickle
import pickletools
import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

_CHUNK, _DEEPEST, _TORCH_MAGIC = 2**20, 100, 0x1950A86A20F9469CFC6C
_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU][1-9]\d{0,5}|O8?)")

DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError),
    *(ValueError, pickle.UnpicklingError),
)
"""What reading a pickle that is damaged or hostile can raise."""


class Refused(ValueError):
    """The file asks for something that is never done; the message is complete but for the file's name."""


class Budget:
    """What the content of one file may take, and ask for.

    Args:
        limit: Bytes of memory.
        stubs: Patterns of names that become a :class:`Record`.
    """

    def __init__(self, limit: int, stubs: Sequence[str] = ()) -> None:
        self.limit = self.left = limit
        self.stubs = stubs

    def charge(self, amount: int) -> None:
        """Take some bytes, or refuse the file."""
        self.left -= amount
        if self.left < 0:
            raise Refused(f"needs more than {self.limit} bytes of memory: if you expect that, pass a larger max_bytes")


class Stream:
    """Bytes read once from the start to the end; nothing is allocated for what cannot be there.

    Args:
        file: Where they come from.
        left: How many there can be.
        budget: What all that is read is charged to.
    """

    def __init__(self, file: IO[bytes] | io.BufferedIOBase, left: int, budget: Budget) -> None:
        self._file, self.left, self.budget = file, left, budget

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes."""
        self.budget.charge(self.check(size))
        content = self._file.read(size)
        if len(content) < size:
            raise EOFError(f"ends {size - len(content)} bytes too early")
        self.left -= size
        return content

    def readline(self) -> bytes:
        """A line of at most 64 KiB, with its end."""
        line = self._file.readline(min(self.left, 2**16))
        if not line.endswith(b"\n"):
            raise EOFError("ends within a line, or has an endless one")
        self.left -= len(line)
        return line

    def check(self, size: int) -> int:
        """The same size, if so many bytes can follow and may be taken."""
        if not 0 <= size <= self.left:
            raise EOFError(f"declares {size} bytes where at most {self.left} follow")
        if size > self.budget.left:
            self.budget.charge(size)
        return size

    def fill(self, buffer: bytearray) -> bytearray:
        """The same buffer, its content replaced by the bytes that follow."""
        for start in range(0, len(buffer), _CHUNK):
            end = min(start + _CHUNK, len(buffer))
            buffer[start:end] = self.read(end - start)
        return buffer


@dataclass(eq=False)
class Record:
    """A function or class of a file that is known by name only, or (with ``arguments``) what it would have made."""

    name: str
    arguments: tuple[Any, ...] | None = None
    state: Any = None
    """What the object was to be given, for most classes the attributes by name."""


@dataclass(frozen=True)
class Global:
    """A name that files may ask for, and what stands for calling it."""

    name: str
    make: Callable[..., Any] | None = None
    dtype: torch.dtype = torch.uint8
    """Of the elements, where the name is that of a storage."""


class _JoblibArray:
    """Announces an array whose bytes follow in the stream."""


def flat_tensor(buffer: bytearray, dtype: torch.dtype) -> Tensor:
    """Memory as a flat tensor; this is what stands for a storage here."""
    return torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)


def listed(values: Any) -> Any:  # noqa: ANN401
    """The same list or tuple; anything else (a tensor would become one object per element) is not iterated over."""
    if type(values) not in (list, tuple, torch.Size):
        raise TypeError(f"a {type(values).__name__} where a list is expected")
    return values


def shown(text: str) -> str:
    """Foreign text, short and on one line."""
    return text[:80] if text.isprintable() else ascii(text[:80])


def _sizes(values: Iterable[int]) -> tuple[int, ...]:
    sizes = tuple(listed(values))
    if len(sizes) > 64 or any(type(n) is not int or not 0 <= n < 2**63 for n in sizes):
        raise ValueError("a shape, stride or offset is no natural number")
    return sizes


def _tensor(
    storage: Tensor, offset: int, shape: Iterable[int], stride: Iterable[int], requires_grad: bool = False, *_: object
) -> Tensor:
    shape, stride, (offset,) = _sizes(shape), _sizes(stride), _sizes([offset])
    last = offset + sum(step * (n - 1) for step, n in zip(stride, shape, strict=True) if n)
    if math.prod(shape) > Tensor.numel(storage) or (all(shape) and last >= storage.numel()):
        raise ValueError(f"a tensor of shape {shape} and stride {stride} does not fit in its storage")
    tensor = storage.as_strided(shape, stride, offset)
    return tensor.requires_grad_() if requires_grad is True else tensor


def _tensor_of_bytes(storage: Tensor, *arguments: Any) -> Tensor:  # noqa: ANN401
    *place, _, dtype = arguments[:6]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("the type of a tensor is no torch.dtype")
    return _tensor(Tensor.view(storage, dtype), *place)


def _parameter(data: Tensor, requires_grad: bool = True, *_: object) -> nn.Parameter:
    return nn.Parameter(data, requires_grad is True)


def _like(function: Global, _: object, arguments: tuple[Any, ...], *__: object) -> Tensor:
    if function.make not in (_tensor, _tensor_of_bytes, _parameter):
        raise ValueError(f"{function.name} builds no tensor")
    return function.make(*listed(arguments))


def _dtype(code: str, *_: object) -> np.dtype[Any]:
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        raise Refused(f"asks for arrays of type {shown(str(code))}: only numbers, strings and lists of them are read")
    return np.dtype(code, False, True)  # a copy, which its state may change


def _array_state(dtype: np.dtype[Any], shape: Iterable[int], content: Any, fortran: bool = False) -> tuple[Any, ...]:  # noqa: ANN401
    """The checked state of an array; ``content`` holds its bytes, or its elements where these are objects."""
    shape = _sizes(shape)
    if not isinstance(dtype, np.dtype):
        raise TypeError("the type of an array is no numpy.dtype")
    if isinstance(content, str):
        content = content.encode("latin1")  # Python 2 wrote bytes as text
    if type(content) is list and dtype.hasobject:
        if not all(isinstance(x, str | bytes | int | float | None) for x in content):
            raise Refused("holds an array of objects that are no strings or numbers: ask for a safetensors file")
    elif type(content) not in (bytes, bytearray) or dtype.hasobject:
        raise TypeError("the content of an array is no bytes")
    if math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize) != len(content):
        raise ValueError(f"an array of shape {shape} has {len(content)} bytes or elements")
    return 1, shape, dtype, fortran is True, content


def _scalar(dtype: np.dtype[Any], content: bytes) -> Any:  # noqa: ANN401
    return np.frombuffer(_array_state(dtype, (), content)[-1], dtype)[0]


def _numbers(content: bytearray, dtype: np.dtype[Any], shape: Iterable[int], order: str) -> np.ndarray[Any, Any]:
    content = _array_state(dtype, shape, content)[-1]
    content = content if type(content) is bytearray else bytearray(content)
    return np.frombuffer(content, dtype).reshape(_sizes(shape), order="F" if order == "F" else "C")


def _key(value: object) -> object:
    """A key of a dict or set: cheap to hash, however it was made."""
    for part in value if type(value) is tuple else [value]:
        if not (part is None or type(part) in (str, bytes, bool, float) or (type(part) is int and abs(part) < 2**63)):
            raise Refused(f"holds a key of type {type(part).__name__}, or a huge one: no weight file needs that")
    return value


def _set(kind: type[Any]) -> Callable[..., Any]:
    return lambda items=(): kind(map(_key, listed(items)))


_ELEMENTS = ("BFloat16", "Bool", "Double", "Float", "Half", "Int", "Long", "Short")
_STORAGES = {f"{name}Storage": getattr(torch, name.lower()) for name in _ELEMENTS}
_STORAGES |= {"ByteStorage": torch.uint8, "CharStorage": torch.int8}
_STORAGES |= {"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128}
_GLOBALS: dict[str, Callable[..., Any] | None] = {
    "_codecs.encode": lambda text, encoding: bytes(text, "latin1"),  # the only encoding that pickle writes
    "argparse.Namespace": Namespace,
    "builtins.bytes": lambda: b"",  # of empty ones only
    "builtins.complex": lambda re, im: complex(re, im),
    "builtins.frozenset": _set(frozenset),
    "builtins.set": _set(set),
    "collections.OrderedDict": lambda items=(): OrderedDict((_key(k), v) for k, v in map(listed, listed(items))),
    "joblib.numpy_pickle.NumpyArrayWrapper": _JoblibArray,
    "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _numbers,
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
    "torch.storage.UntypedStorage": None,
    "torch.storage._load_from_bytes": None,  # see Unpickler._call
}


class Unpickler(pickle._Unpickler):
    """Interprets one pickle of a stream and stops behind it.

    Args:
        stream: Where the pickle starts.
        storage: Gives the storage of a type, key and number of elements (files of ``torch.save`` only).
    """

    stack: list[Any]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: Stream, storage: Callable[[Global, str, int], Tensor] | None = None) -> None:
        super().__init__(stream, encoding="latin1")
        self._stream, self._storage, self._instructions = stream, storage, 0

    def load(self) -> Any:  # noqa: ANN401
        """The value, if it is finished, and walking it as a tree takes no more time than reading it did."""
        value = super().load()
        waiting, seen = [(value, 0)], 0
        while waiting:
            item, depth = waiting.pop()
            seen += 1
            if depth > _DEEPEST or seen > 1000 + 10 * self._instructions:
                raise Refused(f"is nested more than {_DEEPEST} levels deep, or contains itself: no weight file does")
            if isinstance(item, Global | _JoblibArray):
                what = getattr(item, "name", "an array without content")
                raise Refused(f"holds {what} as a value: no weight file does")
            inside = vars(item) if isinstance(item, Namespace | Record) else item
            if isinstance(inside, dict):
                waiting += [(part, depth + 1) for part in inside.values()]
                waiting += [(part, depth + 1) for part in getattr(inside, "__dict__", {}).values()]
            elif type(inside) in (list, tuple):
                waiting += [(part, depth + 1) for part in inside]
        return value

    def find_class(self, module: str, name: str) -> object:
        """What a file means by a name; the only place where names of a file are looked up."""
        whole = f"{module}.{name}"
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if module in ("torch", "torch.cuda") and name in _STORAGES:
            return Global(name, dtype=_STORAGES[name])
        known = whole.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
        if known in _GLOBALS:
            return Global(known, _GLOBALS[known])
        if any(fnmatchcase(whole, pattern) for pattern in self._stream.budget.stubs):
            return Record(whole)
        raise Refused(
            f"asks for {shown(whole)}, which is neither tensor, array nor plain container and could run any code: "
            "nothing was run; ask its author for a safetensors file"
        )

    def persistent_load(self, pid: Any) -> object:  # noqa: ANN401
        """A storage; or the class of a module, which older files give with its source."""
        if self._storage is None:
            raise Refused("refers to persistent objects outside of a torch file: nothing was run")
        tag, kind, *rest = listed(pid)
        if tag == "module" and type(kind) is Record:
            return kind
        if tag != "storage" or type(kind) is not Global or type(rest[0]) is not str or rest[3:] not in ([], [None]):
            raise Refused("refers to a persistent object that is no storage: nothing was run")
        return self._storage(kind, rest[0], *_sizes([rest[2]]))

    def _call(self) -> None:
        self._stream.budget.charge(1024)
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple or type(function) not in (Global, Record):
            raise TypeError(f"a call of a {type(function).__name__}")
        self._charge_copies(arguments)
        if type(function) is Record and function.arguments is None:
            self.stack.append(Record(function.name, arguments))
        elif function.name == "torch.storage._load_from_bytes":  # a whole file in the place of a tensor
            (content,) = arguments
            self.stack.append(load_pickles(Stream(io.BytesIO(content), len(content), self._stream.budget)))
        else:
            self.stack.append(function.make(*arguments))

    def _charge_copies(self, values: tuple[Any, ...]) -> None:
        """Values on their way into a new object: one that is stored once can be copied many times."""
        for value in values:
            if type(value) in (bytes, bytearray, str):
                self._stream.budget.charge(len(value))
            elif type(value) in (list, tuple, dict, OrderedDict, set):
                self._stream.budget.charge(128 * len(value))

    def _build(self) -> None:
        """Give a value its state; only known kinds have one."""
        state = self.stack.pop()
        self._charge_copies(state if type(state) is tuple else (state,))
        match value := self.stack[-1]:
            case Namespace() if all(type(name) is str and not name.startswith("__") for name in dict(state)):
                vars(value).update(state)
            case OrderedDict():
                vars(value).update({"_metadata": state["_metadata"]} if "_metadata" in dict(state) else {})
            case Record(arguments=tuple()):
                value.state = state
            case np.dtype():
                order, names = state[1], state[2:5]
                if type(order) is not str or order not in "<>|=" or any(part is not None for part in names):
                    raise Refused("holds a structured array: ask its author for a safetensors file")
                extended = (value.itemsize, value.alignment) if value.kind in "SU" else (-1, -1)
                value.__setstate__((3, order, None, None, None, *extended, value.flags))  # type: ignore[attr-defined]
            case np.ndarray():
                _, shape, dtype, fortran, content = listed(state)
                value.__setstate__(_array_state(dtype, shape, content, fortran))
            case _JoblibArray():
                self.stack[-1] = self._joblib_array(state)
            case _:
                raise TypeError(f"a {type(value).__name__} with a state")

    def _joblib_array(self, state: dict[str, Any]) -> np.ndarray[Any, Any]:
        """The array whose bytes (of objects: whose pickle) follow in the stream."""
        dtype, shape = state["dtype"], _sizes(state["shape"])
        if isinstance(dtype, np.dtype) and dtype.hasobject:
            array = Unpickler(self._stream).load()
            if not isinstance(array, np.ndarray):
                raise TypeError("an array of objects is no array")
            return array
        if state.get("numpy_array_alignment_bytes") is not None:
            self._stream.read(self._stream.read(1)[0])
        size = self._stream.check(math.prod(shape) * dtype.itemsize)
        return _numbers(self._stream.fill(bytearray(size)), dtype, shape, state["order"])

    def _add(self, items: list[Any]) -> None:
        """Put items into the container on top of the stack; those for a dict are keys and values in turn."""
        target = self.stack[-1]
        if type(target) is list:
            target += items
        elif type(target) is set:
            target.update(map(_key, items))
        elif type(target) in (dict, OrderedDict):
            target.update((_key(k), v) for k, v in zip(items[::2], items[1::2], strict=True))
        else:
            raise TypeError(f"items for a {type(target).__name__}")

    def _pop(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._add(items)

    def _frozenset(self) -> None:
        items = self.pop_mark()
        self.stack.append(_set(frozenset)(items))

    def _bytearray(self) -> None:
        size = int.from_bytes(self._stream.read(8), "little")
        self.stack.append(bytearray(self._stream.read(size)))


_OWN: dict[str, Callable[[Unpickler], object]] = {
    **dict.fromkeys(["ADDITEMS", "APPENDS", "SETITEMS"], lambda self: self._add(self.pop_mark())),
    **dict.fromkeys(["NEWOBJ", "REDUCE"], Unpickler._call),
    "APPEND": lambda self: self._add(self._pop(1)),
    "BUILD": Unpickler._build,
    "BYTEARRAY8": Unpickler._bytearray,
    "DICT": Unpickler._dict,
    "FRAME": lambda self: self._stream.read(8),  # its content follows
    "FROZENSET": Unpickler._frozenset,
    "SETITEM": lambda self: self._add(self._pop(2)),
}
_NEVER = {"DUP", "EXT1", "EXT2", "EXT4", "INST", "LONG4", "NEWOBJ_EX", "NEXT_BUFFER"}
_NEVER |= {"OBJ", "PERSID", "POP", "POP_MARK", "READONLY_BUFFER", "STRING"}


def _instruction(name: str, code: str) -> Callable[[Any], None]:
    load: Callable[[Any], object] = _OWN.get(name, pickle._Unpickler.dispatch[ord(code)])

    def step(self: Unpickler) -> None:
        self._stream.budget.charge(64)
        self._instructions += 1
        if name in _NEVER:
            lines = [self.readline()[:-1].decode() for _ in range({"INST": 2, "PERSID": 1}.get(name, 0))]
            if name == "INST":
                self.find_class(*lines)
            raise Refused(f"uses the pickle instruction {name}, which no weight file needs: nothing was run")
        load(self)

    return step


Unpickler.dispatch = {ord(op.code): _instruction(op.name, op.code) for op in pickletools.opcodes}


def load_pickles(stream: Stream) -> Any:  # noqa: ANN401
    """A pickle, a joblib file, or torch's format before 1.6 (which starts with a magic number); also inside joblib files."""
    first = Unpickler(stream).load()
    if type(first) is not int or first != _TORCH_MAGIC:
        return first
    version, system = Unpickler(stream).load(), Unpickler(stream).load()
    if version != 1001 or not system.get("little_endian"):
        raise Refused("holds big-endian tensors, or is of an unknown version: ask its author for a safetensors file")
    storages: dict[str, tuple[bytearray, Tensor]] = {}
    declared = 0

    def storage(kind: Global, key: str, numel: int) -> Tensor:
        nonlocal declared
        if key not in storages:
            size = numel * kind.dtype.itemsize
            declared = stream.check(declared + size)
            buffer = bytearray(size)
            storages[key] = buffer, flat_tensor(buffer, kind.dtype)
        return storages[key][1]

    content = Unpickler(stream, storage).load()
    for key in listed(Unpickler(stream).load()):
        if type(key) is not str:
            raise TypeError("the key of a storage is no text")
        buffer, tensor = storages.pop(key)
        if int.from_bytes(stream.read(8), "little") != tensor.numel():
            raise ValueError(f"storage {key} does not hold the declared {tensor.numel()} elements")
        stream.fill(buffer)
    if storages:
        raise EOFError(f"{len(storages)} storages are missing")
    return content
