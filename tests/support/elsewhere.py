"""A device that is not the CPU, for machines without a GPU: it computes there, but tensors do not mix with the CPU's.

Inside :func:`elsewhere`, tensors "on" :data:`DEVICE` hold their numbers in memory of the CPU. An operation that takes
some of them and some of the CPU fails as it does on CUDA, and so does a random number with the other device's generator;
what CUDA allows (scalars, copies, indices of the CPU) works.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self
from unittest import mock

import torch
import torch._dynamo  # torch.compile may not be imported with the modes below active
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map_only

DEVICE = torch.device("lazy")
"""A type of device that torch knows, whose backend is not part of its wheels."""

_aten = torch.ops.aten
_TAKE_INDICES = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)
_Generator = torch.Generator


class Elsewhere(torch.Tensor):
    """A tensor on :data:`DEVICE`; ``inner`` is its copy on the CPU, with the same memory format."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Self:
        found = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE,
        )  # fmt: skip
        found.inner = inner
        return found

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            copied: torch.Tensor = Elsewhere(self.inner.clone())
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if parameter else copied
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what belongs to the device."""
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, Elsewhere)]
    _refuse_mixtures(func, args, tensors)
    device = kwargs.get("device")
    inside = _is_ours(device) if device is not None else bool(ours)
    if func is _aten.copy_.default:
        inside = isinstance(args[0], Elsewhere)
    generator = kwargs.get("generator")
    if generator is not None and inside != (generator._cdata in _ForDevice.made):
        raise RuntimeError(f"{func}: the generator is of another device than the tensor")
    inner_args, inner_kwargs = tree_map_only(Elsewhere, lambda x: x.inner, (args, kwargs))
    if inside and device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if not inside:
        return args[0] if func is _aten.copy_.default else result
    known = {id(x.inner): x for x in ours}
    wrapped = tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else Elsewhere(x), result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours and not func._schema.is_mutable else wrapped


def _refuse_mixtures(func: Any, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    ours = [isinstance(x, Elsewhere) for x in tensors]
    others = [x for x, our in zip(tensors, ours, strict=True) if not our and x.ndim]
    if not any(ours) or not others or func in (_aten.copy_.default, _aten._to_copy.default):
        return
    indices = args[1] if func in _TAKE_INDICES and isinstance(args[0], Elsewhere) else ()
    if any(all(x is not index for index in indices) for x in others):
        raise RuntimeError(f"{func}: tensors on {DEVICE} and on the CPU: {[tuple(x.shape) for x in others]}")


class _ForDevice(type):
    """Makes generators that count as the device's."""

    made: dict[int, torch.Generator] = {}  # noqa: RUF012 (one for all)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _Generator)

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        if not _is_ours(device):
            return _Generator(device)
        found = _OurGenerator()
        _ForDevice.made[found._cdata] = found
        return found


class _OurGenerator(_Generator):
    device = DEVICE


class _Generators(metaclass=_ForDevice):
    """Stands for ``torch.Generator``."""


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch's C++ does before it dispatches."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].inner.tolist()
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]), *args[2:])
        if func in (torch.tensor, torch.as_tensor) and _is_ours(kwargs.get("device")):
            options = {key: value for key, value in kwargs.items() if key != "device"}
            return func(*args, **options).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def elsewhere(*chosen: str) -> Iterator[torch.device]:
    """With :data:`DEVICE` as what the functions named ``package.module.choose_device`` return."""
    begin = torch.autocast.__init__

    def autocast(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        begin(self, "cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    with ExitStack() as stack:
        for name in chosen:
            stack.enter_context(mock.patch(name, lambda *_: DEVICE))
        stack.enter_context(mock.patch("torch.Generator", _Generators))
        fused = {"_get_fused_kernels_supported_devices": lambda: ["cpu", "cuda", DEVICE.type]}
        stack.enter_context(mock.patch.multiple(sys.modules["torch.optim.optimizer"], **fused))
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", autocast))
        stack.enter_context(_Dispatch())
        stack.enter_context(_Functions())
        yield DEVICE
