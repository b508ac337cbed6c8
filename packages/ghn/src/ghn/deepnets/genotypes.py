"""Genotypes: what the cells of a DeepNets network consist of."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

#: Names of operations in genotypes, in the published order.
OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "conv_1x1",
    "conv_7x1_1x7",
    "conv_3x3",
    "conv_5x5",
    "conv_7x7",
    "msa",
    "cse",
)

Edges = tuple[tuple[str, int], ...]


class Genotype(NamedTuple):
    """A pair of cells.

    Edges are (operation, state it reads); step i adds edges 2 i and 2 i + 1 and becomes state i + 2, states 0 and 1
    being the inputs of the cell. The output of a cell is the concatenation of the states in ``concat``.
    """

    normal: Edges
    normal_concat: tuple[int, ...]
    reduce: Edges
    reduce_concat: tuple[int, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read the four lists of a stored genotype.

        Raises:
            ValueError: One is missing, or an operation is unknown, or a state is read before it is made.
        """
        missing = [name for name in cls._fields if name not in value]
        if missing:
            raise ValueError(f"genotype without {missing[0]!r}")
        for cell in ("normal", "reduce"):
            for i, (operation, state) in enumerate(value[cell]):
                if operation not in OPERATIONS:
                    raise ValueError(f"unknown operation {operation!r} in a genotype; known: {', '.join(OPERATIONS)}")
                if not 0 <= state < i // 2 + 2:
                    raise ValueError(f"edge {i} of the {cell} cell reads state {state} before it is made")
        return cls(
            tuple((str(name), int(state)) for name, state in value["normal"]),
            tuple(map(int, value["normal_concat"])),
            tuple((str(name), int(state)) for name, state in value["reduce"]),
            tuple(map(int, value["reduce_concat"])),
        )

    def operations(self) -> set[str]:
        """Names of all operations in both cells."""
        return {name for name, _ in self.normal + self.reduce}


def parse_operation(name: str) -> tuple[str, int]:
    """Family and kernel size of an operation: ``sep_conv_5x5`` is ("sep_conv", 5), ``conv_7x1_1x7`` ("conv2", 7)."""
    words = name.split("_")
    kernels = [[int(n) for n in word.split("x")] for word in words if word[0].isdigit() and "x" in word]
    family = "_".join(word for word in words if not word[0].isdigit())
    return family + ("2" if len(kernels) == 2 else ""), max(max(kernel) for kernel in kernels) if kernels else 0


def _edges(text: str) -> Edges:
    words: Sequence[str] = text.split()
    return tuple((name, int(state)) for name, state in zip(words[::2], words[1::2], strict=True))


DARTS = Genotype(
    _edges(
        "sep_conv_3x3 0 sep_conv_3x3 1 sep_conv_3x3 0 sep_conv_3x3 1 "
        "sep_conv_3x3 1 skip_connect 0 skip_connect 0 dil_conv_3x3 2"
    ),
    (2, 3, 4, 5),
    _edges(
        "max_pool_3x3 0 max_pool_3x3 1 skip_connect 2 max_pool_3x3 1 "
        "max_pool_3x3 0 skip_connect 2 skip_connect 2 max_pool_3x3 1"
    ),
    (2, 3, 4, 5),
)

PDARTS = Genotype(
    _edges(
        "skip_connect 0 dil_conv_3x3 1 skip_connect 0 sep_conv_3x3 1 "
        "sep_conv_3x3 1 sep_conv_3x3 3 sep_conv_3x3 0 dil_conv_5x5 4"
    ),
    (2, 3, 4, 5),
    _edges(
        "avg_pool_3x3 0 sep_conv_5x5 1 sep_conv_3x3 0 dil_conv_5x5 2 "
        "max_pool_3x3 0 dil_conv_3x3 1 dil_conv_3x3 1 dil_conv_5x5 3"
    ),
    (2, 3, 4, 5),
)

ViT = Genotype(_edges("none 0 msa 1"), (2,), _edges("none 0 avg_pool_3x3 1"), (2,))

#: Predefined genotypes by name.
GENOTYPES = {"DARTS": DARTS, "PDARTS": PDARTS, "ViT": ViT}
