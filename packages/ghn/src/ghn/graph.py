"""Computational graphs: what a hypernetwork reads."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn

from ghn.build import Dialect, Nodes, class_weight, nodes_of
from ghn.distances import path_lengths
from ghn.primitives import PRIMITIVE_ID, PRIMITIVES
from ghn.trace import expected_input_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NodeInfo(NamedTuple):
    """A node that carries a parameter or pools, in the published layout."""

    node: int
    name: str
    primitive: str
    shape: tuple[int, ...] | None
    is_last_weight: bool
    is_last_bias: bool


class Graph:
    """A labelled directed graph: one node per parameter or kept operation.

    Traced from a model, or wrapped around stored arrays. ``Graph(model)`` runs the model's forward on meta tensors:
    nothing is computed, and neither its buffers nor the random state nor its training mode change.

    Attributes:
        node_types: Primitive of each of the n nodes, in order.
        node_params: The parameter that a node stands for, or None.
        node_shapes: Shape that a node records, or None.
        edges: (m, 3) int64: from, to, length of the shortest path (1: data flow; more: a virtual edge), row-major.
        node_feat: (n, 1) int64, positions in the table of primitives.
        node_info: For each cell (one, but for DeepNets networks) its nodes that carry a parameter or pool.
        expected_input_sz: Input the model was traced with: a side length or a shape; None for stored graphs.
        net_args: Arguments of a DeepNets network, if the graph came with them.
        net_idx: Index of a DeepNets network, if the graph came with it.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        example_inputs: Any = None,  # noqa: ANN401 (whatever the model takes)
        dialect: Dialect = "ghn3",
        compat: bool = False,
        extended: bool = False,
        ve_cutoff: int = 50,
        list_all_nodes: bool = False,
        node_feat: Tensor | None = None,
        node_info: Sequence[Sequence[Sequence[Any]]] | None = None,
        A: Tensor | np.ndarray | None = None,
        edges: Tensor | np.ndarray | None = None,
        net_args: Mapping[str, Any] | None = None,
        net_idx: int | None = None,
    ) -> None:
        """Trace a model, or wrap stored arrays.

        Args:
            model: What to trace; None to wrap ``node_feat``, ``node_info`` and ``A`` or ``edges``.
            example_inputs: Input for one call: a tensor, a tuple of arguments or a mapping of keyword arguments.
                Default: two images of the size that the model expects.
            dialect: ``"ghn3"`` (2023) or ``"ppuda"`` (2021): which published graph code decides on nodes and edges.
            compat: Keep what the published code got wrong (Swin v2, MaxViT, bias-free linear layers).
            extended: Give nodes to parameters of layers that the published code leaves out.
            ve_cutoff: Longest path that becomes a virtual edge; 1 for none.
            list_all_nodes: Put every node into ``node_info``.
            node_feat: (n, 1) int64 of a stored graph.
            node_info: Cells of a stored graph.
            A: (n, n) path lengths of a stored graph.
            edges: (m, 3) from, to, length of a stored graph.
            net_args: Kept as an attribute.
            net_idx: Kept as an attribute.

        Raises:
            ValueError: The model has no parameters, or cannot be run on the input; or the arrays do not fit together.
        """
        self.net_args, self.net_idx = net_args, net_idx
        self.expected_input_sz: Any = None
        if model is not None:
            if any(given is not None for given in (node_feat, node_info, A, edges)):
                raise ValueError("Graph takes a model or stored arrays, not both")
            found = nodes_of(model, example_inputs, dialect=dialect, compat=compat, extended=extended)
            self.expected_input_sz = expected_input_size(model)
            cells = getattr(model, "_n_cells", 1)
            self._fill(found, ve_cutoff, cells, list_all_nodes, dialect, compat)
            return
        if node_feat is None or (A is None) == (edges is None):
            raise ValueError("Graph needs a model, or node_feat together with one of A and edges")
        self.node_feat = torch.as_tensor(node_feat, dtype=torch.int64).reshape(-1, 1)
        self.node_types = [PRIMITIVES[i] for i in self.node_feat[:, 0].tolist()]
        self.node_info = [[NodeInfo(*entry) for entry in cell] for cell in node_info or [[]]]
        self.node_params: list[str | None] = [None] * self.n_nodes
        self.node_shapes: list[tuple[int, ...] | None] = [None] * self.n_nodes
        for entry in (entry for cell in self.node_info for entry in cell):
            self.node_shapes[entry.node] = None if entry.shape is None else tuple(entry.shape)
            if not entry.primitive.endswith("pool"):
                self.node_params[entry.node] = entry.name
        if A is not None:
            self._set_distances(torch.as_tensor(A))
        else:
            self.edges = torch.as_tensor(edges, dtype=torch.int64).reshape(-1, 3)
            if len(self.edges) and int(self.edges[:, :2].max()) >= self.n_nodes:
                raise ValueError(f"an edge ends at node {int(self.edges[:, :2].max())} of a graph of {self.n_nodes}")

    @classmethod
    def from_nodes(
        cls,
        types: Sequence[str],
        params: Sequence[str | None],
        shapes: Sequence[Sequence[int] | None],
        edges: Sequence[Sequence[int]] | np.ndarray,
        *,
        ve_cutoff: int = 50,
        n_cells: int = 1,
        list_all_nodes: bool = False,
        dialect: Dialect = "ghn3",
    ) -> Self:
        """A graph from its nodes and the edges of length 1, (m, 2).

        Raises:
            ValueError: A type is unknown, or the lists differ in length.
        """
        if not len(types) == len(params) == len(shapes):
            raise ValueError(f"{len(types)} types, {len(params)} parameters and {len(shapes)} shapes for one graph")
        unknown = sorted(set(types) - set(PRIMITIVES))
        if unknown:
            raise ValueError(f"unknown node type {unknown[0]!r}; known: {', '.join(PRIMITIVES)}")
        self = cls.__new__(cls)
        self.net_args = self.net_idx = self.expected_input_sz = None
        sizes = [None if shape is None else tuple(shape) for shape in shapes]
        nodes = Nodes(list(types), list(params), sizes, [(int(a), int(b)) for a, b in edges])
        self._fill(nodes, ve_cutoff, n_cells, list_all_nodes, dialect, compat=False)
        return self

    def _fill(
        self, nodes: Nodes, ve_cutoff: int, n_cells: int, list_all_nodes: bool, dialect: Dialect, compat: bool
    ) -> None:
        self.node_types, self.node_params, self.node_shapes = nodes.types, nodes.params, nodes.shapes
        self.node_feat = torch.tensor([[PRIMITIVE_ID[name]] for name in nodes.types])
        pairs = np.array(nodes.edges, dtype=np.int64).reshape(-1, 2)
        self._set_distances(torch.from_numpy(path_lengths(self.n_nodes, pairs, ve_cutoff)))
        self.node_info = describe(nodes, n_cells, list_all_nodes, dialect, compat)

    def _set_distances(self, lengths: Tensor) -> None:
        if lengths.shape != (self.n_nodes, self.n_nodes):
            raise ValueError(f"A has shape {tuple(lengths.shape)} for {self.n_nodes} nodes")
        at = lengths.nonzero()
        self.edges = torch.cat([at, lengths[at[:, 0], at[:, 1], None].to(torch.int64)], dim=1)

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.node_feat)

    @property
    def n_cells(self) -> int:
        """Number of cells; 1 for ordinary models."""
        return len(self.node_info)

    @property
    def distances(self) -> Tensor:
        """(n, n) int64 of path lengths, 0 where there is no edge."""
        dense = torch.zeros(self.n_nodes, self.n_nodes, dtype=torch.int64)
        dense[self.edges[:, 0], self.edges[:, 1]] = self.edges[:, 2]
        return dense

    @property
    def _Adj(self) -> Tensor:
        return self.distances

    def flow(self) -> nx.DiGraph:
        """The graph without virtual edges, for networkx."""
        flow = nx.DiGraph()
        flow.add_nodes_from(range(self.n_nodes))
        flow.add_edges_from(self.edges[self.edges[:, 2] == 1][:, :2].tolist())
        return flow

    def properties(self) -> dict[str, float]:
        """Average degree and average shortest path of the undirected graph without virtual edges.

        Pairs of nodes that are not connected do not count; a graph of one node has a path length of 0.
        """
        pairs = self.edges[self.edges[:, 2] == 1][:, :2].numpy()
        lengths = path_lengths(self.n_nodes, np.concatenate([pairs, pairs[:, ::-1]]), self.n_nodes)
        found = lengths[(lengths > 0) & ~np.eye(self.n_nodes, dtype=bool)]
        distinct = len(np.unique(np.sort(pairs, axis=1), axis=0))
        return {
            "avg_degree": 2 * distinct / self.n_nodes,
            "avg_path": float(found.mean()) if len(found) else 0.0,
        }

    def draw(
        self,
        path: str | Path | None = None,
        *,
        labels: bool = False,
        legend: bool = True,
        node_size: float = 60,
        figsize: tuple[float, float] | None = None,
    ) -> "Figure":
        """Draw the data flow from top to bottom; long graphs go on in further columns.

        Args:
            path: Picture to write (PNG, PDF, SVG by its suffix); None to return the figure alone.
            labels: Write names of parameters beside the nodes.
            legend: List the primitives.
            node_size: Area of a node in square points.
            figsize: Size in inches; default: by the size of the graph.

        Raises:
            ImportError: The extra ``plot`` is not installed.
        """
        from ghn.drawing import draw  # matplotlib and the layout are only for those who draw

        return draw(self, path, labels=labels, legend=legend, node_size=node_size, figsize=figsize)

    def __repr__(self) -> str:
        """The graph in numbers."""
        flow = int((self.edges[:, 2] == 1).sum())
        return f"Graph({self.n_nodes} nodes, {flow} edges, {len(self.edges) - flow} virtual edges)"


def describe(nodes: Nodes, n_cells: int, list_all_nodes: bool, dialect: Dialect, compat: bool) -> list[list[NodeInfo]]:
    """Sort the nodes that carry a parameter or pool into cells, with their names in the published spelling."""
    cells: list[list[NodeInfo]] = [[] for _ in range(n_cells)]
    cell, last = 0, len(nodes.types) - 1
    last_weight = class_weight(nodes.params, compat=compat or dialect == "ppuda")
    any_name = dialect == "ppuda"
    for i, (kind, param, shape) in enumerate(zip(nodes.types, nodes.params, nodes.shapes, strict=True)):
        name = kind if param is None else stored_name(param)
        cell = _cell_of(name, n_cells, cell)
        if param is not None or kind.endswith("pool") or list_all_nodes:
            is_weight = i == last_weight and (any_name or ".weight" in name)
            is_bias = i == last and (any_name or ".bias" in name)
            cells[cell].append(NodeInfo(i, name, kind, shape, is_weight, is_bias))
    return cells


def stored_name(param: str) -> str:
    """A parameter's name as graphs store it: stem and position names without prefix, ``op`` after an op's number."""
    for word in ("stem", "pos_enc"):
        if word in param:
            return param[param.index(word) :]
    parts = param.split(".")
    if "_ops" in parts:
        at = parts.index("_ops") + 2
        if at < len(parts) and parts[at].isdigit():
            parts.insert(at, "op")
    return ".".join(parts)


def _cell_of(name: str, n_cells: int, previous: int) -> int:
    """Cell of a node; that of the node before it if its name does not tell."""
    if n_cells == 1 or name.startswith(("stem", "pos_enc")):
        return 0
    if name.startswith(("classifier", "auxiliary")):
        return n_cells - 1
    parts = name.split(".")
    return int(parts[parts.index("cells") + 1]) if "cells" in parts else previous


class GraphBatch:
    """Several graphs as one batch.

    Sparse (for message passing): ``node_feat`` (sum n, 2) = primitive, graph; ``edges`` (sum m, 4) = from, to, length,
    graph, with node numbers local to the graph. Dense (for attention): ``node_feat`` (b, n_max, 1) zero-padded,
    ``edges`` (b, n_max, n_max) of lengths, ``mask`` (b, n_max, 1) bool, True at nodes.
    """

    def __init__(self, graphs: Sequence[Graph] = (), dense: bool = False) -> None:
        self.graphs: list[Graph] = []
        self.dense, self.device = dense, torch.device("cpu")
        self._tensors: dict[str, Tensor] | None = None
        for graph in graphs:
            self.append(graph)

    def append(self, graph: Graph) -> None:
        """Add a graph at the end."""
        self.graphs.append(graph)
        self._tensors = None

    def to_device(self, device: torch.device | str | int) -> Self:
        """Move the tensors; returns the batch."""
        self.device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self._tensors = None
        return self

    def on_device(self, device: torch.device | str) -> bool:
        """Whether the tensors are on this device."""
        return self.node_feat.device == torch.empty(0, device=device).device

    @property
    def n_nodes(self) -> Tensor:
        """(b,) int64: nodes of each graph."""
        return self._built["n_nodes"]

    @property
    def node_feat(self) -> Tensor:
        """Primitives of the nodes, see the class."""
        return self._built["node_feat"]

    @property
    def edges(self) -> Tensor:
        """Edges with their lengths, see the class."""
        return self._built["edges"]

    @property
    def mask(self) -> Tensor:
        """(b, n_max, 1) bool: True at nodes, False at padding."""
        return self._built["mask"]

    @property
    def node_info(self) -> list[list[list[NodeInfo]]]:
        """Cells of each graph."""
        return [graph.node_info for graph in self.graphs]

    @property
    def net_args(self) -> list[Mapping[str, Any] | None]:
        """Arguments of each DeepNets network."""
        return [graph.net_args for graph in self.graphs]

    @property
    def net_inds(self) -> list[int | None]:
        """Index of each DeepNets network."""
        return [graph.net_idx for graph in self.graphs]

    @property
    def _built(self) -> dict[str, Tensor]:
        if self._tensors is None:
            built = self._build_dense() if self.dense else self._build_sparse()
            counts = torch.tensor([graph.n_nodes for graph in self.graphs], dtype=torch.int64)
            built |= {"n_nodes": counts, "mask": (torch.arange(int(counts.max())) < counts[:, None])[..., None]}
            self._tensors = {name: tensor.to(self.device) for name, tensor in built.items()}
        return self._tensors

    def _build_sparse(self) -> dict[str, Tensor]:
        nodes = [nn.functional.pad(graph.node_feat, (0, 1), value=i) for i, graph in enumerate(self.graphs)]
        edges = [nn.functional.pad(graph.edges, (0, 1), value=i) for i, graph in enumerate(self.graphs)]
        return {"node_feat": torch.cat(nodes), "edges": torch.cat(edges)}

    def _build_dense(self) -> dict[str, Tensor]:
        b, n = len(self.graphs), max(graph.n_nodes for graph in self.graphs)
        nodes = torch.zeros(b, n, 1, dtype=torch.int64)
        edges = torch.zeros(b, n, n, dtype=torch.int64)
        for i, graph in enumerate(self.graphs):
            nodes[i, : graph.n_nodes] = graph.node_feat
            edges[i, graph.edges[:, 0], graph.edges[:, 1]] = graph.edges[:, 2]
        return {"node_feat": nodes, "edges": edges}

    def to_dense(self, x: Tensor) -> Tensor:
        """Values per node (sum n, c) as (b, n_max, c), zero at padding."""
        dense = x.new_zeros(*self.mask.shape[:2], x.shape[-1])
        dense[self.mask[..., 0]] = x
        return dense

    def to_sparse(self, x: Tensor) -> Tensor:
        """Values (b, n_max, c) without the padding, (sum n, c); the inverse of :meth:`to_dense`."""
        return x[self.mask[..., 0]]

    def scatter(
        self, devices: Sequence[torch.device | str | int], nets: Sequence[nn.Module] | None = None
    ) -> list[tuple[list[nn.Module] | None, "GraphBatch"]]:
        """Spread the graphs, and their networks, over devices so that each has about as many nodes.

        Larger graphs go first, each to the device with the fewest nodes so far among those with fewer than
        ceil(b / devices) graphs.

        Returns:
            For each device its networks and its graphs; devices that would stay empty are left out.
        """
        if nets is not None and len(nets) != len(self):
            raise ValueError(f"{len(nets)} networks for {len(self)} graphs")
        shares: list[list[int]] = [[] for _ in devices]
        room = -(-len(self) // len(devices))
        for i in sorted(range(len(self)), key=lambda i: -self.graphs[i].n_nodes):
            open_shares = [share for share in shares if len(share) < room]
            min(open_shares, key=lambda share: sum(self.graphs[j].n_nodes for j in share)).append(i)
        return [
            (
                None if nets is None else [nets[i] for i in share],
                GraphBatch([self.graphs[i] for i in share], self.dense).to_device(device),
            )
            for share, device in zip(shares, devices, strict=True)
            if share
        ]

    def __getitem__(self, i: int) -> Graph:
        """One graph."""
        return self.graphs[i]

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self.graphs)

    def __iter__(self) -> Iterator[Graph]:
        """The graphs in order."""
        return iter(self.graphs)
