"""Who sets which parameter of a model, found out before anything is computed."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from ghn.build import Dialect, nodes_of
from ghn.support import norm_bias
from ghn.trace import Owner

Setter = Literal["published", "extended", "kept"]

_MEANING = {
    "published": "predicted by the published dialect",
    "extended": "predicted by our extension only (extended=True)",
    "kept": "kept at its own initialisation",
}


class ParameterSource(NamedTuple):
    """Who sets one parameter."""

    name: str
    shape: tuple[int, ...]
    setter: Setter
    reason: str


@dataclass(frozen=True)
class CheckReport:
    """Every parameter of a model, in order, with who sets it."""

    model: str
    parameters: list[ParameterSource]

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors by who sets them."""
        found = Counter(entry.setter for entry in self.parameters)
        return {setter: found[setter] for setter in ("published", "extended", "kept")}

    def of(self, setter: Setter) -> list[str]:
        """Names of the parameters that one of them sets."""
        return [entry.name for entry in self.parameters if entry.setter == setter]

    def __str__(self) -> str:
        """A table, and a summary."""
        width = max(len(entry.name) for entry in self.parameters)
        rows = [
            f"{entry.name:{width}}  {'x'.join(map(str, entry.shape)) or '1':>16}  {entry.setter:9}  {entry.reason}"
            for entry in self.parameters
        ]
        totals = [f"{count} tensors {_MEANING[setter]}" for setter, count in self.counts.items()]
        return "\n".join([*rows, f"{self.model}: " + ", ".join(totals)])


def check(model: nn.Module, *, example_inputs: Any = None, dialect: Dialect = "ghn3") -> CheckReport:  # noqa: ANN401
    """List each parameter of a model and who sets it; nothing is computed or allocated.

    Args:
        model: Any module, also on the meta device.
        example_inputs: As for :class:`ghn.Graph`.
        dialect: The published dialect to judge by.

    Raises:
        ValueError: The model has no parameters, or its forward fails on the input.
    """
    published = _set_by(model, nodes_of(model, example_inputs, dialect=dialect).params)
    extended = _set_by(model, nodes_of(model, example_inputs, extended=True).params)
    found = []
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    for key, owners in _owners(model).items():
        names = {owner.name for owner in owners}
        setter: Setter = "published" if names & published else "extended" if names & extended else "kept"
        owner = owners[0]
        reason = _reason(owner, setter) + ("; frozen, but predicted" if key in frozen and setter != "kept" else "")
        found.append(ParameterSource(owner.name.removeprefix("."), owner.shape, setter, reason))
    return CheckReport(type(model).__name__, found)


def _owners(model: nn.Module) -> dict[int, list[Owner]]:
    """Places of each parameter; several if it is shared."""
    places: dict[int, list[Owner]] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                places.setdefault(id(p), []).append(Owner(f"{path}.{name}", module, tuple(p.shape)))
    return places


def _set_by(model: nn.Module, params: list[str | None]) -> set[str]:
    """Names of parameters with a node, and of the biases of norms whose weight has one."""
    found = {name for name in params if name is not None}
    for owners in _owners(model).values():
        for owner in owners:
            if norm_bias(owner) and f"{owner.name.rpartition('.')[0]}.weight" in found:
                found.add(owner.name)
    return found


def _reason(owner: Owner, setter: Setter) -> str:
    kind = type(owner.module).__name__
    if setter == "kept":
        return f"{kind}: no operation on the traced input reads it"
    if norm_bias(owner):
        return f"{kind}: together with its weight"
    return kind if setter == "published" else f"{kind}: the published dialect has no node for it"
