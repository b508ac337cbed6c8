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
from zoo_common.formats.state_dicts import read_state
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


def read_networks(path: str | Path, layout: ParameterLayout) -> Iterator[tuple[str, list[int], Tensor]]:
    """Runs of a zoo, a folder (zoo, trials, G.pt or state dicts) or a file with one state dict, in a model's layout.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: A network has other tensors; the message has the first differences.
    """
    path = Path(path)
    if path.is_file():
        state = read_state(path)
        yield (
            path.stem,
            [0],
            _fitted(layout, ParameterLayout.from_state_dict(state), str(path))
            .flatten({name: t for name, t in state.items() if name in layout.names})[None]
            .float(),
        )
        return
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: give a zoo, a folder of .pt or .safetensors files, or one file")
    source = open_source(path)
    _fitted(layout, source.layout, str(path))
    for run_id in source.run_ids:
        run = source.read(run_id)
        params = torch.as_tensor(run.params).float()
        if source.layout.names != layout.names:
            params = layout.flatten({k: v for k, v in source.layout.unflatten(params).items() if k in layout.names})
        yield run_id, [int(step) for step in run.steps], params


def embed(model: SaneModel, path: str | Path, *, halo: Halo | None = None, quiet: bool = True) -> Embedded:
    """Embed all checkpoints of a zoo, a folder or a file.

    Args:
        model: The autoencoder.
        path: See :func:`read_networks`.
        halo: Windows instead of full attention: an approximation, whose cosine to full attention is reported.
        quiet: No progress bar.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: A network has other tensors than the model's, or is not finite.
    """
    runs: list[str] = []
    steps: list[int] = []
    parts: list[Tensor] = []
    cosine: float | None = None
    block: list[tuple[str, list[int], Tensor]] = []

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
        for item in read_networks(path, model.tokenizer.layout):
            if not item[2].isfinite().all():
                raise ValueError(f"{path}: {item[0]} has weights that are not finite: leave it out")
            block.append(item)
            if sum(params.numel() for _, _, params in block) >= _TOGETHER:
                finish()
        if block:
            finish()
    method = "full attention"
    if halo is not None:
        method = f"windows of {halo.window} tokens with a halo of {halo.halo}: an approximation"
    return Embedded(torch.cat(parts), runs, steps, method, cosine)


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
