"""Embeddings of whatever holds networks: a zoo, a folder of files, or one file.

Shapes: ``n`` checkpoints of ``d`` numbers; embeddings of ``l`` numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from zoo_common.formats import open_source
from zoo_common.formats.source import DROPPED, BadRunError
from zoo_common.formats.state_dicts import FileRuns, read_state
from zoo_common.formats.zoos import ZooRuns
from zoo_common.layout import ParameterLayout

from sane.model import Halo, SaneModel

_TOGETHER = 2**25
"""Numbers of weights that are aligned at once."""
_COMPARED = 4
"""Checkpoints on which windows are compared with full attention."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings of checkpoints, with where they come from."""

    vectors: Tensor
    """(n, l)."""
    runs: list[str]
    """Run, or file, of each checkpoint."""
    steps: list[int]
    method: str
    cosine: float | None
    """Mean cosine to full attention on the first checkpoints, for windows."""
    left_out: dict[str, str]
    """File or run that could not be used -> the reason."""


def read_networks(
    path: str | Path, layout: ParameterLayout, left_out: dict[str, str]
) -> Iterator[tuple[str, list[int], Tensor]]:
    """Runs of a zoo, a folder (zoo, trials, G.pt or state dicts) or a file with one state dict, in a model's layout.

    Args:
        path: Where they are.
        layout: The model's; precisions may differ, also from file to file.
        left_out: Gets the files and runs that cannot be used, each with the reason.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: A zoo, or the one file, has other tensors; the message has the first differences.
    """
    path = Path(path)
    if path.is_file():
        yield path.stem, [0], _read_file(path, layout)[None]
        return
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: give a zoo, a folder of .pt or .safetensors files, or one file")
    source = open_source(path)
    if not isinstance(source, FileRuns):
        _fitted(layout, source.layout, str(path))
    for run_id in source.run_ids:
        if isinstance(source, FileRuns):
            found = {}
            for step, file in source.checkpoints(run_id):
                try:
                    found[step] = _read_file(file, layout)
                except ValueError as error:
                    left_out[str(file)] = str(error)
            if found:
                yield run_id, [*found], torch.stack([*found.values()])
            continue
        try:
            run = source.read(run_id)
        except BadRunError as error:
            left_out[run_id] = str(error)
            continue
        dropped = run.config.get(DROPPED)
        if isinstance(dropped, list) and not isinstance(source, ZooRuns):  # of a zoo, they were told when it was made
            left_out |= {f"{run_id}, {number}": str(reason) for number, reason in enumerate(dropped)}
        params = torch.as_tensor(run.params).float()
        if source.layout.names != layout.names:
            params = layout.flatten({k: v for k, v in source.layout.unflatten(params).items() if k in layout.names})
        good = params.isfinite().all(1)
        if not good.all():
            left_out[run_id] = f"{int((~good).sum())} checkpoints have weights that are not finite"
        if good.any():
            yield run_id, [int(step) for step, fine in zip(run.steps, good.tolist(), strict=True) if fine], params[good]


def _read_file(path: Path, layout: ParameterLayout) -> Tensor:
    """The state dict in a file as a vector (d,) of a model's layout; ``ValueError`` if it is none, or not finite."""
    state = read_state(path)
    try:
        found = ParameterLayout.from_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _fitted(layout, found, str(path))
    vector = layout.flatten({name: tensor for name, tensor in state.items() if name in layout.names}).float()
    if not vector.isfinite().all():
        raise ValueError(f"{path} has weights that are not finite: leave it out")
    return vector


def embed(model: SaneModel, path: str | Path, *, halo: Halo | None = None, quiet: bool = True) -> Embedded:
    """Embed all checkpoints of a zoo, a folder or a file.

    Args:
        model: The autoencoder.
        path: See :func:`read_networks`.
        halo: Windows instead of full attention: an approximation, whose cosine to full attention is reported.
        quiet: No progress bar.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: Nothing can be embedded: networks have other tensors than the model's, or are not finite.
    """
    runs: list[str] = []
    steps: list[int] = []
    parts: list[Tensor] = []
    cosine: float | None = None
    block: list[tuple[str, list[int], Tensor]] = []
    left_out: dict[str, str] = {}

    def finish() -> None:
        nonlocal cosine
        vectors = align_runs(model, [params for _, _, params in block])
        if halo is not None and cosine is None:
            cosine = model.compare(vectors[:_COMPARED], halo)
        parts.append(model.embed(vectors, halo))
        for name, numbers, params in block:
            runs.extend([name] * len(params))
            steps.extend(numbers)
        bar.update(len(vectors))
        block.clear()

    with tqdm(desc="embed", unit="checkpoint", disable=quiet, leave=False, delay=1) as bar:
        for item in read_networks(path, model.tokenizer.layout, left_out):
            block.append(item)
            if sum(params.numel() for _, _, params in block) >= _TOGETHER:
                finish()
        if block:
            finish()
    if not parts:
        raise ValueError(f"nothing in {path} can be embedded: {next(iter(left_out.values()), 'it is empty')}")
    method = "full attention"
    if halo is not None:
        method = f"windows of {halo.window} tokens with a halo of {halo.halo}: an approximation"
    return Embedded(torch.cat(parts), runs, steps, method, cosine, left_out)


def align_runs(model: SaneModel, runs: list[Tensor]) -> Tensor:
    """Checkpoints of several runs, each run permuted by what brings its last checkpoint near the reference."""
    vectors = torch.cat(runs)
    if model.facts.get("align", "none") == "none":
        return vectors
    last = torch.stack([params[-1] for params in runs])
    counts = torch.tensor([len(params) for params in runs])
    tables = model.symmetry.match(last, model.reference)
    return model.symmetry.apply(vectors, [table.repeat_interleave(counts, 0) for table in tables])


def _fitted(layout: ParameterLayout, found: ParameterLayout, where: str) -> ParameterLayout:
    """The model's layout, after a check that the other one has the same tensors."""
    expected, there = (dict(zip(x.names, x.shapes, strict=True)) for x in (layout, found))
    wrong = [
        f"{name}: {there.get(name, 'absent')} there, {expected.get(name, 'absent')} in the model"
        for name in dict.fromkeys([*expected, *there])
        if expected.get(name) != there.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{where} holds networks of another layout ({'; '.join(wrong[:3])}{more}): use a model that was trained on "
            "such networks"
        )
    return layout
