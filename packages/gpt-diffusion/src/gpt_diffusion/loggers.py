"""Where metrics go beside ``metrics.jsonl``: nowhere, or to Weights & Biases."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from gpt_diffusion.config import Config
from gpt_diffusion.curves import Curves


class Logger:
    """Takes the lines of ``metrics.jsonl``; this one drops them."""

    def log(self, line: Mapping[str, float]) -> None:
        """Take one line; ``step`` counts optimizer steps."""

    def log_curves(self, step: int, figures: Mapping[str, Curves]) -> None:
        """Take the curves of a prompting, by their published names."""


class WandbLogger(Logger):
    """Hands lines to a run of Weights & Biases."""

    def __init__(self, run: Any) -> None:  # noqa: ANN401 (a class of an optional package)
        self.run = run

    def log(self, line: Mapping[str, float]) -> None:
        """Log one line at its step."""
        self.run.log({key: value for key, value in line.items() if key != "step"}, step=int(line["step"]))

    def log_curves(self, step: int, figures: Mapping[str, Curves]) -> None:
        """Log a chart of lines for each figure."""
        from wandb.plot import line_series

        charts = {name: line_series(xs=c["x"], ys=c["y"], keys=c["key"], title=name) for name, c in figures.items()}
        self.run.log(charts, step=step)


def open_logger(config: Config) -> Callable[[Path], AbstractContextManager[Logger]]:
    """How to open the configuration's logger, once the folder of the run is there.

    Raises:
        ImportError: The extra ``wandb`` is missing.
    """
    if config.logger == "jsonl":
        return lambda folder: nullcontext(Logger())
    try:
        import wandb
    except ImportError as error:
        raise ImportError("logger=wandb needs Weights & Biases: pip install 'gpt-diffusion[wandb]'") from error

    @contextmanager
    def opened(folder: Path) -> Iterator[Logger]:
        options = dataclasses.asdict(config.wandb) | {"name": config.wandb.name or config.exp_name}
        run: Any = wandb.init(**options, dir=os.fspath(folder), config=dataclasses.asdict(config))
        try:
            yield WandbLogger(run)
        finally:
            run.finish()

    return opened
