"""Weights & Biases as a second place for the lines of ``metrics.jsonl``."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from sane.config import Config

Sink = Callable[[Mapping[str, Any]], None]
"""Takes one line of the log."""


def open_logger(config: Config) -> AbstractContextManager[Sink]:
    """What takes the lines: a run of the project ``config.wandb``, or nothing; a resumed training goes on with its run.

    Raises:
        ImportError: The extra ``wandb`` is missing.
    """
    if config.wandb is None:
        return nullcontext(lambda line: None)
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f'wandb={config.wandb} needs Weights & Biases: pip install "sane[wandb]"') from error
    return _run(wandb.init, config)


@contextmanager
def _run(init: Callable[..., Any], config: Config) -> Iterator[Sink]:
    run = init(
        project=config.wandb,
        name=config.name,
        dir=os.fspath(config.folder),
        config=dataclasses.asdict(config),
        id=hashlib.sha256(os.fsencode(config.folder.absolute())).hexdigest()[:16],
        resume="allow",
    )
    try:
        yield lambda line: run.log({key: value for key, value in line.items() if key != "step"}, step=int(line["step"]))
    finally:
        run.finish()
