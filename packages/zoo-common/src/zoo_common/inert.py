"""Pickles as data: a machine that interprets them and knows tensors, arrays and plain containers, nothing else.

A pickle is a program: it may name any function and call it. Here no name in a file is ever imported or looked up as an
attribute, and every instruction and every byte is charged to a budget. The instructions are those of ``pickletools``,
the arrays of joblib those of its ``numpy_pickle.py``.
"""

import math
import pickletools
import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

_CHUNK, _DEEPEST = 2**20, 100
_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU][1-9]\d{0,5}|O8?)")


class Refused(ValueError):
    """The file asks for something that is never done; the message is complete but for the file's name."""


class Budget:
    """Bytes that the content of one file may still take."""

    def __init__(self, limit: int) -> None:
        self.limit = self.left = limit

    def charge(self, amount: int) -> None:
        """Take some of them, or refuse the file."""
        self.left -= amount
        if self.left < 0:
            raise Refused(f"needs more than {self.limit} bytes of memory: if you expect that, pass a larger max_bytes")


class Binary(Protocol):
    """What is asked of a file."""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes."""

    def readline(self, size: int, /) -> bytes:
        """Up to a line end, but at most ``size`` bytes."""


class Stream:
    """Bytes read once from the start to the end; nothing is allocated for what cannot be there.

    Args:
        file: Where they come from.
        left: How many there can be.
        budget: What larger pieces are charged to.
    """

    def __init__(self, file: Binary, left: int, budget: Budget) -> None:
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


def flat_tensor(buffer: bytearray, dtype: torch.dtype) -> Tensor:
    """Memory as a flat tensor; this is what stands for a storage here."""
    return torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)


@dataclass(frozen=True)
class Global:
    """A name that files may ask for, and what stands for calling it."""

    name: str
    make: Callable[..., Any] | None = None
    dtype: torch.dtype = torch.uint8
    """Of the elements, where the name is that of a storage."""


class _JoblibArray:
    """Announces an array whose bytes follow in the stream."""


def listed(values: Any) -> Any:  # noqa: ANN401
    """The same list or tuple; anything else (a tensor would become one object per element) is not iterated over."""
    if type(values) not in (list, tuple, torch.Size):
        raise TypeError(f"a {type(values).__name__} where a list is expected")
    return values


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


def _like(function: Global, _: object, arguments: tuple[Any, ...], *__: object) -> Tensor:
    if function.make not in (_tensor, _tensor_of_bytes, _parameter):
        raise ValueError(f"{function.name} builds no tensor")
    return function.make(*listed(arguments))


def _dtype(code: str, *_: object) -> np.dtype[Any]:
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        raise Refused(f"asks for arrays of type {shown(code)}: only numbers, strings and lists of them are read")
    return np.dtype(code, False, True)  # a copy, which its state may change


def _array(dtype: np.dtype[Any], shape: Iterable[int], content: Any, fortran: bool) -> tuple[Any, ...]:  # noqa: ANN401
    """The checked state of an array; of an array of objects these are a list of scalars."""
    shape = _sizes(shape)
    if dtype.hasobject and not (
        type(content) is list and all(isinstance(x, str | bytes | int | float | None) for x in content)
    ):
        raise Refused("holds an array of objects that are no strings or numbers: ask its author for a safetensors file")
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
    return lambda items=(): kind(map(_key, listed(items)))


def _key(value: object) -> object:
    """A key of a dict or set: cheap to hash, however it was made."""
    for part in value if type(value) is tuple else [value]:
        if not (part is None or type(part) in (str, bytes, bool, float) or (type(part) is int and abs(part) < 2**63)):
            raise Refused(f"holds a key of type {type(part).__name__}, or a huge one: no weight file needs that")
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
    "collections.OrderedDict": lambda items=(): OrderedDict((_key(k), v) for k, v in map(listed, listed(items))),
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
    "torch.storage._load_from_bytes": None,  # a whole file: see Machine
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
        return Global(name, dtype=_STORAGES[name])
    if (module, name) == ("torch.storage", "UntypedStorage"):
        return Global(name)
    if f"{module}.{name}" not in _GLOBALS:
        raise Refused(
            f"asks for {shown(f'{module}.{name}')}, which is neither tensor, array nor plain container and could run "
            "any code: nothing was run; ask its author for a safetensors file"
        )
    return Global(f"{module}.{name}", _GLOBALS[f"{module}.{name}"])


def shown(text: str) -> str:
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


class Machine:
    """Interprets one pickle of a stream and stops behind it.

    Args:
        stream: Where the pickle starts.
        file: Reads the file of ``torch.save`` that stands for a tensor outside of such files.
        storage: Gives the storage of a type, key and number of elements (files of ``torch.save`` only).
    """

    def __init__(
        self,
        stream: Stream,
        file: Callable[[bytes], Any],
        storage: Callable[[Global, str, int], Tensor] | None = None,
    ) -> None:
        self._stream, self._file, self._storage = stream, file, storage
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
            raise Refused(f"uses the pickle instruction {name}, which no weight file needs: nothing was run")

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
        if type(function) is not Global or type(arguments) is not tuple:
            raise TypeError(f"a call of a {type(function).__name__}")
        if function.name == "torch.storage._load_from_bytes":
            (content,) = arguments
            return self._file(content)
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
            raise Refused("refers to persistent objects outside of a torch file: nothing was run")
        tag, kind, key, _, numel, *view = listed(name)
        if tag != "storage" or type(kind) is not Global or type(key) is not str or view not in ([], [None]):
            raise Refused("refers to a persistent object that is no storage: nothing was run")
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
                    raise Refused("holds a structured array: ask its author for a safetensors file")
                extended = (value.itemsize, value.alignment) if value.kind in "SU" else (-1, -1)
                value.__setstate__((3, order, None, None, None, *extended, value.flags))  # type: ignore[attr-defined]
            case np.ndarray():
                _, shape, dtype, fortran, content = listed(state)
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
            array = Machine(self._stream, self._file).run()[0]
            if not isinstance(array, np.ndarray):
                raise TypeError("an array of objects is no array")
            return array
        if numpy_array_alignment_bytes is not None:
            self._stream.read(self._stream.read(1)[0])
        content = self._stream.fill(math.prod(_sizes(shape)) * dtype.itemsize)
        return _numbers(content, dtype, shape, order)


def checked(value: Any, instructions: int) -> Any:  # noqa: ANN401
    """The value, if it is finished, and walking it as a tree takes no more time than reading it did."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > 1000 + 10 * instructions:
            raise Refused(f"is nested more than {_DEEPEST} levels deep, or contains itself: no weight file does")
        if isinstance(item, Global | _JoblibArray):
            raise Refused(f"holds {getattr(item, 'name', 'an array without content')} as a value: no weight file does")
        inside = vars(item) if isinstance(item, Namespace) else item
        if isinstance(inside, dict):
            waiting += [(part, depth + 1) for part in inside.values()]
            waiting += [(part, depth + 1) for part in getattr(inside, "__dict__", {}).values()]
        elif type(inside) in (list, tuple):
            waiting += [(part, depth + 1) for part in inside]
    return value
