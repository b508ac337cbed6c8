"""Running a model without computing anything, to see which operations it consists of.

Images are traced as an *empty batch*: every activation has zero elements, so no kernel does any work and nothing takes
memory, while autograd records the same operations as ever (a hundred times faster than tensors on the meta device,
whose kernels are written in Python). Code that cannot stand an empty batch, and inputs that the user gives, run on the
meta device; code that looks at values runs for real, as a last resort.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_map_only

from ghn.emptybatch import EmptyBatch, run_recurrent


@dataclass(frozen=True)
class Owner:
    """Where a parameter stands in a model."""

    name: str  #: path of the module, a dot, the parameter's own name
    module: nn.Module
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """What autograd has recorded of one call."""

    roots: list[Any]  #: functions of the outputs, in order
    children: dict[Any, list[Any]]  #: for each function those that made its inputs, in order
    leaves: dict[Any, Owner]  #: functions that stand for a parameter


@dataclass(frozen=True)
class Call:
    """Arguments for one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    guessed: bool

    def __str__(self) -> str:
        """Shapes of tensors, and other values as they are."""
        named = {**{str(i): value for i, value in enumerate(self.args)}, **self.kwargs}
        shown = {name: _in_words(value) for name, value in named.items()}
        return ", ".join(value if name.isdigit() else f"{name}={value}" for name, value in shown.items())

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """The call with every tensor changed."""
        args, kwargs = tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Call(args, kwargs, self.guessed)


def expected_input_size(model: nn.Module) -> Any:  # noqa: ANN401
    """Side length or shape of the image that a model expects.

    Its ``expected_input_sz``; else the size in its ``default_cfg``, which models of timm have; else 299 (Inception) or 224.
    """
    described = getattr(model, "default_cfg", None)
    size = getattr(model, "expected_input_sz", None) or (
        described.get("input_size") if isinstance(described, Mapping) else None
    )
    return size or (299 if type(model).__name__ == "Inception3" else 224)


def trace(model: nn.Module, example_inputs: Any = None) -> Trace:  # noqa: ANN401
    """Call a model and return what autograd has recorded; parameters, buffers and random states stay as they are.

    Args:
        model: Any module, on any device; called in its current training mode, with all parameters trainable. A model
            with a method ``get_var()`` is asked for its output instead.
        example_inputs: A tensor, a tuple of arguments or a mapping of keyword arguments. Default: two images of the
            expected size.

    Raises:
        ValueError: The model has no parameters, or its forward fails on the input (the message names it).
    """
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ValueError(f"parameter {lazy[0]!r} has no shape yet: call the model once before")
    named = [(name, module) for name, module in model.named_modules()]
    total = len({id(p) for _, module in named for p in module._parameters.values() if p is not None})
    if not total:
        raise ValueError(f"{type(model).__name__} has no parameters: there is nothing to make a graph of")
    call = _call_for(model, example_inputs)
    best: Trace | None = None
    problem: Exception | None = None
    for stand_in, change, context in _ways(model, call):
        try:
            found = _record(model, named, stand_in, call.map(change), context)
        except Exception as error:  # noqa: BLE001 (whatever the model's own code raises)
            problem = problem or error
            continue
        if best is None or len(found.leaves) > len(best.leaves):
            best = found
        if len(best.leaves) == total or not call.guessed:
            break
    if best is None:
        raise ValueError(_failure(model, call, problem)) from problem
    return best


def _call_for(model: nn.Module, example_inputs: Any) -> Call:  # noqa: ANN401
    if example_inputs is None:
        size = expected_input_size(model)
        shape = (3, size, size) if isinstance(size, int) else tuple(size)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return Call((torch.empty(2, *shape, dtype=dtype, device="meta"),), {}, guessed=True)
    if isinstance(example_inputs, Mapping):
        return Call((), dict(example_inputs), guessed=False)
    several = isinstance(example_inputs, tuple | list)
    return Call(tuple(example_inputs) if several else (example_inputs,), {}, guessed=False)


Way = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Any]


def _ways(model: nn.Module, call: Call) -> Iterator[Way]:
    """Ways to run a call, best first: what stands in for the model's tensors and for the input, and a context."""
    first = next(model.parameters())
    if call.guessed:
        yield _on_cpu, lambda x: x.new_empty(0, *x.shape[1:], device="cpu"), EmptyBatch
    to_meta = partial(torch.empty_like, device="meta")
    yield to_meta, lambda x: x.to("meta"), _on_meta
    if not first.is_meta:
        real = partial(torch.randn_like, device=first.device) if call.guessed else lambda x: x.to(first.device)
        yield lambda t: t.detach(), real, nullcontext


@contextmanager
def _on_meta() -> Iterator[None]:
    """New tensors have no values, and slow operations stand-ins."""
    with torch.device("meta"), EmptyBatch():
        yield


def _on_cpu(tensor: Tensor) -> Tensor:
    """The tensor itself, or one without a value (and, as long as nothing writes to it, without memory) for it."""
    if tensor.device.type == "cpu":
        return tensor.detach()
    make = torch.empty if tensor.is_floating_point() else torch.zeros  # an index must be a valid one
    return make(tensor.shape, dtype=tensor.dtype)


def _record(
    model: nn.Module,
    named: list[tuple[str, nn.Module]],
    stand_in: Callable[[Tensor], Tensor],
    call: Call,
    context: Callable[[], Any],
) -> Trace:
    """Run the model with other tensors in place of its own."""
    with ExitStack() as stack:
        owners, keep = stack.enter_context(_replaced(named, stand_in))
        stack.enter_context(_same_random_state(keep[0].device))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(context())
        output = model.get_var() if hasattr(model, "get_var") else model(*call.args, **call.kwargs)  # type: ignore[operator]
        roots = [get_gradient_edge(tensor).node for tensor in output_tensors(output) if tensor.requires_grad]
        if not roots:
            raise ValueError("no parameter reaches the output")
        return _collect(roots, owners)


def _collect(roots: list[Any], owners: Mapping[int, Owner]) -> Trace:
    children: dict[Any, list[Any]] = {}
    leaves: dict[Any, Owner] = {}
    waiting = list(roots)
    while waiting:
        function = waiting.pop()
        if function in children:
            continue
        children[function] = below = [child for child, _ in function.next_functions if child is not None]
        if not below and hasattr(function, "variable") and id(function.variable) in owners:
            leaves[function] = owners[id(function.variable)]
        waiting.extend(below)
    return Trace(roots, children, leaves)


@contextmanager
def _replaced(
    named: list[tuple[str, nn.Module]], stand_in: Callable[[Tensor], Tensor]
) -> Iterator[tuple[dict[int, Owner], list[Tensor]]]:
    """Put other tensors in the place of a model's own; on leaving, undo whatever the call did to its modules."""
    contents: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for _, module in named:
        for content in (module.__dict__, module._parameters, module._buffers, module._modules):
            contents.append((content, dict(content)))
    new: dict[int, Tensor] = {}
    owners: dict[int, Owner] = {}

    def replaced(tensor: Any, *, copy: bool = False) -> Any:  # noqa: ANN401
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in new:
            made = stand_in(tensor)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=made.is_floating_point())
            elif copy and made.device.type != "meta":
                made = made.clone()
            new[id(tensor)] = made
        return new[id(tensor)]

    try:
        for path, module in named:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = made = replaced(parameter)
                    owners[id(made)] = Owner(f"{path}.{name}", module, tuple(parameter.shape))
            for name, buffer in module._buffers.items():
                module._buffers[name] = replaced(buffer, copy=True)
            for name, value in module.__dict__.items():
                if isinstance(value, Tensor):
                    module.__dict__[name] = replaced(value, copy=True)
            if isinstance(module, nn.RNNBase):
                module.__dict__["forward"] = partial(run_recurrent, module)
        yield owners, list(new.values())
    finally:
        for content, before in contents:
            content.clear()
            content.update(before)


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """Leave the generators of Python, NumPy and torch as they were."""
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 (the models' code may use it)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)  # noqa: NPY002


def output_tensors(output: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """Tensors of an output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from output_tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from output_tensors(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from output_tensors(getattr(output, field.name))


def _in_words(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return repr(value)


def _failure(model: nn.Module, call: Call, problem: Exception | None) -> str:
    other = "example_inputs (--input)"
    remedy = f"set its expected_input_sz or give {other}" if call.guessed else f"give other {other}"
    origin = "the guessed input" if call.guessed else "example_inputs"
    return f"{type(model).__name__} fails on {origin} ({call}): {problem}; {remedy}"
