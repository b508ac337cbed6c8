"""Recording a run in anyone's own training loop."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from zoo_common.layout import ParameterLayout
from zoo_common.shard import check_name
from zoo_common.zoo import Run, Zoo


class ZooRecorder:
    """Keeps the weights of a module at the steps you choose, and writes them as one run at the end.

    Three lines in a training loop::

        with ZooRecorder("my-zoo", model, config={"lr": lr}) as recorder:
            for step in range(1000):
                ...
                recorder.record(step, loss=loss)

    Nothing is written if the block ends with an exception: a zoo holds complete runs only.

    Args:
        zoo: A zoo, or its folder; a new one is made where there is none.
        module: The network; its weights are read at every :meth:`record`.
        run_id: Unique name of the run; default: a random one.
        config: What made this run, as JSON can hold it.

    Raises:
        ValueError: The zoo has the run already, or the module has another layout than the zoo (open it and use
            :meth:`Zoo.with_layout` to store several).
    """

    def __init__(
        self,
        zoo: Zoo | str | Path,
        module: nn.Module,
        run_id: str | None = None,
        config: Mapping[str, object] | None = None,
    ) -> None:
        """Open the zoo and check the module against it."""
        layout = ParameterLayout.from_module(module)
        if not isinstance(zoo, Zoo):
            there = (Path(zoo) / "zoo.json").exists()
            zoo = Zoo.open(zoo) if there else Zoo.create(zoo, layout=layout, exist_ok=True)
        if zoo.layout != layout:
            raise ValueError(f"the module's layout {layout.id} is not that of the zoo in {zoo.path} ({zoo.layout.id})")
        self.run_id = uuid.uuid4().hex if run_id is None else run_id
        check_name(self.run_id, "run id")
        if self.run_id in zoo:
            raise ValueError(f"run {self.run_id!r} is in {zoo.path} already: choose another id")
        self.zoo = zoo
        self._module = module
        self._config = dict(config or {})
        self._vectors: list[Tensor] = []
        self._buffers: list[dict[str, Tensor]] = []
        self._steps: list[int] = []
        self._metrics: list[dict[str, float]] = []

    def record(self, step: int, **metrics: float | Tensor) -> None:
        """Keep the weights as they are now, with the optimizer step (rising from call to call) and any metrics."""
        if self._steps and step <= self._steps[-1]:
            raise ValueError(f"run {self.run_id!r}: step {step} comes after step {self._steps[-1]}, steps must rise")
        state = self._module.state_dict()
        self._vectors.append(self.zoo.layout.flatten(state).cpu())
        self._buffers.append({name: t.cpu().clone() for name, t in self.zoo.layout.buffers_of(state).items()})
        self._steps.append(int(step))
        self._metrics.append(
            {name: value.item() if isinstance(value, Tensor) else float(value) for name, value in metrics.items()}
        )

    def close(self) -> None:
        """Write the run; a metric that was not given at a step is NaN there."""
        if not self._vectors:
            raise ValueError(f"run {self.run_id!r}: nothing was recorded, call record() at least once")
        names = dict.fromkeys(name for row in self._metrics for name in row)
        run = Run(
            self.run_id,
            torch.stack(self._vectors),
            self._steps,
            {name: np.array([row.get(name, np.nan) for row in self._metrics]) for name in names},
            self._config,
            {name: torch.stack([row[name] for row in self._buffers]) for name in self._buffers[0]},
        )
        self.zoo.append([run], name=self.run_id)

    def __enter__(self) -> Self:
        """Start of a run."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the run, unless it failed."""
        if kind is None:
            self.close()
