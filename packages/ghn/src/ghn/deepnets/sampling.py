"""Random architectures: the generator of DeepNets-1M, and a family of small ones for laptops."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ghn.build import Dialect
from ghn.deepnets.genotypes import OPERATIONS, Edges, Genotype
from ghn.deepnets.network import Network
from ghn.deepnets.operations import Keys
from ghn.graph import Graph
from ghn.matching import lighten

Split = Literal["train", "val", "test", "wide", "deep", "dense", "bnfree", "search"]
#: Splits by the number that makes their random streams different; new ones go to the end.
SPLITS: tuple[Split, ...] = ("train", "val", "test", "wide", "deep", "dense", "bnfree", "search")

_POOLS = 4
"""Operations before the first one with a parameter that is no skip connection."""
_WIDTHS, _FC_WIDTHS = range(32, 129, 16), range(64, 513, 64)
_TEST_PARAMS = 2.5e6


@dataclass(frozen=True)
class Family:
    """Ranges from which architectures are drawn, both ends included."""

    steps: tuple[int, int, int] = (1, 2, 4)
    """Steps of a cell: fewest, most in a deep network, most."""
    cells: tuple[int, int] = (4, 18)
    deep: tuple[int, int] = (7, 10)
    """A network with more cells than a number drawn from here is deep."""
    max_params: float = 1e7
    """Of the network with 32 channels."""
    norms: tuple[str | None, ...] = ("bnorm", None)
    """What shallow networks normalise by; all others by the first."""
    always_preproc: bool = True
    """Whether the inputs of a cell are convolved in all networks without attention."""
    small: bool = False
    """8 channels, cells of at most 16 x 16 pixels, and one layer behind their mean."""


#: Settings of each split; ``wide`` has the architectures of ``test``, with more channels.
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("train", "val", "test", "wide"), Family()),
    "bnfree": Family(norms=(None,)),
    "deep": Family(cells=(10, 36), deep=(18, 18), max_params=1e8),
    "dense": Family(steps=(2, 6, 10), max_params=1e8),
    "search": Family((1, 3, 6), (6, 20), (10, 10), norms=("bnorm",), always_preproc=False),
}
SMALL = Family(steps=(1, 2, 2), cells=(3, 4), deep=(4, 4), norms=("bnorm",), small=True)


@dataclass(frozen=True)
class Architecture:
    """Arguments of a :class:`Network`."""

    genotype: Genotype
    n_cells: int
    ks: int
    C_mult: int
    preproc: bool
    glob_avg: bool
    norm: str | None
    stem_type: int
    stem_pool: bool
    fc_layers: int
    C: int = 32
    fc_dim: int = 256

    def build(self, num_classes: int = 10, *, is_imagenet_input: bool = False, keys: Keys = "ghn3") -> Network:
        """The network, on the default device of torch."""
        arguments = {**asdict(self), "genotype": self.genotype}
        return Network(num_classes=num_classes, is_imagenet_input=is_imagenet_input, keys=keys, **arguments)

    def build_light(self, num_classes: int = 10, **options: Any) -> Network:  # noqa: ANN401
        """The same with shapes in the place of parameters, to be predicted."""
        with torch.device("meta"):
            network = self.build(num_classes, **options)
        lighten(network)
        return network


class Sample(NamedTuple):
    """An architecture and its graph."""

    architecture: Architecture
    graph: Graph


def sample(
    split: Split,
    index: int,
    *,
    seed: int = 0,
    small: bool = False,
    dialect: Dialect = "ghn3",
    ve_cutoff: int = 50,
) -> Sample:
    """Draw the architecture with a number; every split, seed and number has a random stream of its own.

    (The published generator started the splits ``train``, ``test`` and ``wide`` with the same seed, so that the training
    data contained the test data.)

    Args:
        split: Which settings, and which random stream. ``wide`` has the stream of ``test``.
        index: Number of the architecture, from 0.
        seed: Any number from 0.
        small: Draw small networks instead, whatever the split: 3 or 4 cells of 8 channels and more.
        dialect: See :class:`Graph`, as the next.
        ve_cutoff: Longest virtual edge.

    Raises:
        ValueError: There is no such split, or a negative number.
    """
    if split not in FAMILIES:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(FAMILIES)}")
    if index < 0 or seed < 0:
        raise ValueError(f"number and seed of an architecture must be at least 0, got {index} and {seed}")
    family, stream = SMALL if small else FAMILIES[split], SPLITS.index("test" if split == "wide" else split)
    rng = np.random.default_rng([seed, stream, index])
    while True:
        drawn = draw(family, rng)
        if drawn is None:
            continue
        params = _parameters(drawn)
        large = 0 if small else _parameters(drawn, num_classes=1000, is_imagenet_input=True)
        if max(params, large) > family.max_params:
            continue
        if small:
            drawn = replace(drawn, C=8, fc_layers=1, glob_avg=True)
        elif split == "train":
            drawn = _with_train_width(drawn, params / 1e6, rng)
        else:
            drawn = _with_test_width(drawn, 4 if split == "wide" else 1)
        graph = _graph(drawn, dialect, ve_cutoff)
        if graph is not None:
            return Sample(drawn, graph)


def draw(family: Family, rng: np.random.Generator) -> Architecture | None:
    """One try, with 32 channels; None if the rules of DeepNets-1M reject the genotype."""
    fewest, medium, most = family.steps
    n_cells = _between(rng, *family.cells)
    threshold = _between(rng, *family.deep)
    steps = _between(rng, fewest, most if n_cells <= threshold else medium)
    only_pool, drop_concat = _coin(rng), steps > 1 and _coin(rng)
    genotype = draw_genotype(rng, steps, only_pool=only_pool, drop_concat=drop_concat, allow_none=steps > 1)
    ks = (3, 5, 7)[int(rng.integers(3))]
    if not _allowed(genotype):
        return None
    is_vit = "msa" in genotype.operations()
    c_mult = _between(rng, 1, 2)
    preproc = steps > 1 or c_mult > 1 or (family.always_preproc and not is_vit)
    preproc = preproc or bool(rng.random() > (0.8 if is_vit else 0.2))
    glob_avg = is_vit or n_cells > threshold or bool(rng.random() > 0.1)
    shallow = n_cells <= family.cells[0] + 1 and steps <= medium
    norm = family.norms[int(rng.integers(len(family.norms)))] if shallow else family.norms[0]
    stem_type = _between(rng, 0, 1)
    stem_pool = stem_type == 0 and (family.small or bool(rng.random() > 0.5))
    fc_layers = _between(rng, 1, 2)
    return Architecture(genotype, n_cells, ks, c_mult, preproc, glob_avg, norm, stem_type, stem_pool, fc_layers)


def draw_genotype(
    rng: np.random.Generator,
    steps: int = 1,
    *,
    only_pool: bool = False,
    drop_concat: bool = True,
    allow_none: bool = True,
    allow_transformer: bool = True,
) -> Genotype:
    """A random genotype; arguments as of :func:`decode_genotype`."""
    edges = sum(i + 2 for i in range(steps))
    normal, reduce = torch.from_numpy(1e-3 * rng.standard_normal((2, edges, len(OPERATIONS)))).float()
    uniforms = iter(rng.random, None) if drop_concat else None
    return decode_genotype(
        normal, reduce, uniforms, only_pool=only_pool, allow_none=allow_none, allow_transformer=allow_transformer
    )


def decode_genotype(
    normal: Tensor,
    reduce: Tensor,
    uniforms: Iterator[float] | None = None,
    *,
    only_pool: bool = False,
    allow_none: bool = True,
    allow_transformer: bool = True,
) -> Genotype:
    """The genotype that random scores stand for.

    Args:
        normal: Scores of the operations on all edges of a cell, ``(edges, operations)``; those of its first step come
            first. A step keeps two of its edges.
        reduce: The same for the cells that reduce the resolution.
        uniforms: Numbers from 0 to 1, one for each state but the last, which decide whether it is concatenated; None:
            all are.
        only_pool: Whether cells that reduce have only pooling and skip connections.
        allow_none: Whether edges may be absent.
        allow_transformer: Whether there may be attention.
    """
    normal, reduce = normal.clone(), reduce.clone()
    if only_pool:
        reduce[:, _POOLS:] = -1000
    if not allow_transformer:
        normal[:, OPERATIONS.index("msa")] = reduce[:, OPERATIONS.index("msa")] = -1000
    first = int(not allow_none)
    cells = [_decode_cell(torch.softmax(scores, 1)[:, first:].numpy(), first) for scores in (normal, reduce)]
    states = range(2, 2 + len(cells[0]) // 2)
    concat = tuple(state for state in states if uniforms is None or state == states[-1] or next(uniforms) > 0.5)
    return Genotype(cells[0], concat, cells[1], concat)


def _decode_cell(weights: np.ndarray, first: int) -> Edges:
    """The two best edges of each step and their operations; ``weights`` begin with operation number ``first``."""
    edges: list[tuple[str, int]] = []
    start, width = 0, 2
    while start < len(weights):
        block = weights[start : start + width]
        best = np.argsort(-block.max(1), kind="stable")[:2]
        edges += [(OPERATIONS[first + int(block[i].argmax())], int(i)) for i in best]
        start, width = start + width, width + 1
    return tuple(edges)


def _allowed(genotype: Genotype) -> bool:
    """Whether a genotype has something to learn, and not too much that is slow or unstable."""
    cells = [[name for name, _ in edges] for edges in (genotype.normal, genotype.reduce)]
    names = cells[0] + cells[1]
    convolves = any("conv" in name for name in names)
    if "cse" in names and not convolves:
        return False
    if any(cell.count("cse") > 1 or cell.count("conv_5x5") + cell.count("conv_7x7") > 1 for cell in cells):
        return False
    return convolves or "msa" in names


def _with_train_width(drawn: Architecture, millions: float, rng: np.random.Generator) -> Architecture:
    """Choose the channels: fewer for networks that have many parameters already (with 32 channels, in millions)."""
    dense = drawn.genotype.operations() & {"conv_5x5", "conv_7x7"}
    fc_dim = _FC_WIDTHS[int(rng.integers(4))]
    if millions > 0.8 or not drawn.glob_avg or dense or drawn.n_cells > 12:
        choices = 1
    elif millions > 0.4 or drawn.n_cells > 10:
        choices = 2
    elif millions > 0.2 or drawn.n_cells > 8:
        choices = 3
    else:
        choices = len(_WIDTHS)
    c = _WIDTHS[int(rng.integers(choices))]
    if choices == len(_WIDTHS) and c <= 64:
        fc_dim = _FC_WIDTHS[int(rng.integers(len(_FC_WIDTHS)))]
    return replace(drawn, C=c, fc_dim=fc_dim)


def _with_test_width(drawn: Architecture, factor: int) -> Architecture:
    """Fewest channels, in steps of 16, that give 2.5 million parameters; times a factor."""
    c = 32
    while _parameters(replace(drawn, C=c)) < _TEST_PARAMS:
        c += 16
    return replace(drawn, C=factor * c)


def _parameters(architecture: Architecture, **options: Any) -> int:  # noqa: ANN401
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in architecture.build(**options).parameters())


def _graph(architecture: Architecture, dialect: Dialect, ve_cutoff: int) -> Graph | None:
    """The graph; None if absent edges have cut the network apart."""
    with torch.device("meta"):
        network = architecture.build(keys="ghn2" if dialect == "ppuda" else "ghn3")
    try:
        graph = Graph(network, dialect=dialect, ve_cutoff=ve_cutoff)
    except ValueError:
        if "none" in architecture.genotype.operations():
            return None
        raise
    flow = graph.edges[graph.edges[:, 2] == 1]
    pairs = (np.ones(len(flow), bool), (flow[:, 0].numpy(), flow[:, 1].numpy()))
    parts, _ = connected_components(coo_array(pairs, shape=(graph.n_nodes, graph.n_nodes)), directed=False)
    return graph if parts == 1 and graph.node_types[0] == "input" else None


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def _coin(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)
