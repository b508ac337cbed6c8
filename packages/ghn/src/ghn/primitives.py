"""The table of primitives (node types). A node's feature is the position of its type in it."""

from typing import Literal, get_args

Primitive = Literal[
    "max_pool",
    "avg_pool",
    "sep_conv",
    "dil_conv",
    "conv",
    "msa",
    "cse",
    "sum",
    "concat",
    "input",
    "bias",
    "bn",
    "ln",
    "pos_enc",
    "glob_avg",
]

#: Names in the order of the embedding rows of every published hypernetwork.
PRIMITIVES: tuple[str, ...] = get_args(Primitive)

#: Position of each name.
PRIMITIVE_ID: dict[str, int] = {name: i for i, name in enumerate(PRIMITIVES)}
