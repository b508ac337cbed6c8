"""Graphs as the papers and the specification tell it, step by step: slow, and obvious.

The reference of the benchmark and of the tests: a real forward pass of two images, a recursive walk over what autograd
has recorded, a dense matrix that is changed entry by entry, and networkx for the order and the shortest paths. It
shares only the tables of node types with the package.
"""

import sys

import networkx as nx
import numpy as np
import torch
from ghn.draft import Record
from ghn.support import OPERATIONS, published
from torch import nn
from torchvision.models import SqueezeNet, SwinTransformer, VisionTransformer


class PlainGraph:
    """The published graph of a model: ``types``, ``params`` and the matrix ``distances`` (n, n)."""

    def __init__(self, model: nn.Module, cutoff: int = 50) -> None:
        """Trace a model on two images of 224 (Inception: 299) pixels."""
        self.model, self.records, self.pairs = model, [], []
        self.owners = {
            p: Record(f"{path}.{name}", module, tuple(p.shape))
            for path, module in model.named_modules()
            for name, p in module.named_parameters(recurse=False)
        }
        self.trace()
        self.matrix = np.zeros((len(self.records),) * 2)
        for a, b in self.pairs:
            self.matrix[a, b] = 1
        self.first_pass()
        self.repair_weights()
        self.repair_softmax()
        if isinstance(model, SwinTransformer):
            self.repair_swin()
        counts = [int(self.matrix[:, i].sum()) for i in range(len(self.records))]
        counts = dict(zip(self.records, counts, strict=True))
        for pattern in ("Add", "Cat"):
            self.keep_where(lambda i, p=pattern: not self.has(i, p) or counts[self.records[i]] > 1)
        self.add_input()
        self.sort()
        self.relabel()
        self.types = [self.type_of(record) for record in self.records]
        self.params = [None if record.is_op else record.name for record in self.records]
        self.distances = self.virtual_edges(cutoff)

    def trace(self) -> None:
        """Run the model and walk over its outputs."""
        size = 299 if type(self.model).__name__ == "Inception3" else 224
        outputs = self.model(torch.randn(2, 3, size, size))
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else [x for x in outputs if x is not None]
        self.seen: dict[object, tuple[int, int]] = {}
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(20_000)
        try:
            for output in outputs:
                self.visit(output.grad_fn)
        finally:
            sys.setrecursionlimit(limit)

    def visit(self, function: object) -> int:
        """Give a function and all before it their nodes and edges; returns where its value leaves."""
        if function in self.seen:
            return self.seen[function][1]
        below = [child for child, _ in function.next_functions if child is not None]
        leaves = [child for child in below if hasattr(child, "variable")]
        for leaf in leaves:
            if leaf not in self.seen:
                self.records.append(self.owners[leaf.variable])
                self.seen[leaf] = (len(self.records) - 1,) * 2
        if leaves:
            self.seen[function] = self.seen[leaves[0]][0], self.seen[leaves[-1]][1]
        else:
            name = function.name()
            fused = name.startswith(("ScaledDotProduct", "SafeSoftmax"))
            self.records.append(Record("SoftmaxBackward0" if fused else name, function=function))
            self.seen[function] = (len(self.records) - 1,) * 2
        entry, leaving = self.seen[function]
        for child in below:
            end = self.visit(child)
            label = self.owners[child.variable].name if hasattr(child, "variable") else child.name()
            if end != entry:
                self.pairs.append((entry, end) if "bias" in label else (end, entry))
        return leaving

    def has(self, i: int, pattern: str) -> bool:
        """Whether a node's name contains a pattern."""
        return pattern in self.records[i].name

    def keep_where(self, stays: object) -> None:
        """Remove nodes, joining what is before with what is after them."""
        kept = []
        for i in range(len(self.records)):
            if stays(i):
                kept.append(i)
                continue
            for a in np.flatnonzero(self.matrix[:, i]):
                for b in np.flatnonzero(self.matrix[i]):
                    if a != b:
                        self.matrix[a, b] = 1
        self.matrix = self.matrix[np.ix_(kept, kept)]
        self.records = [self.records[i] for i in kept]

    def first_pass(self) -> None:
        """The first filtering pass, one pattern after the other."""
        lower = [record.name.lower() for record in self.records]
        cse = any("sigmoid" in name or "swish" in name for name in lower)
        counts = [int(self.matrix[:, i].sum()) for i in range(len(self.records))]
        counts = dict(zip(self.records, counts, strict=True))
        unsupported = []
        for record in self.records:
            known = record.name.partition("Backward")[0] in OPERATIONS if record.is_op else published(record)
            if not known and record.name not in unsupported:
                unsupported.append(record.name)
        for pattern in ["Mul", *unsupported, "Mean", "Add", "Cat"]:
            names = [record.name.lower() for record in self.records]

            def stays(i: int, pattern: str = pattern, names: list[str] = names) -> bool:
                if not self.has(i, pattern):
                    return True
                heads = ("classifier", "fc", "head")
                out = i + 1 >= len(names)
                head = out or names[i - 1].startswith(heads) or names[i - 2].startswith(heads)
                name = self.records[i].name
                if name.startswith("Mean"):
                    return not cse or head
                if name.startswith("Mul"):
                    gate = names[i - 2].startswith(("hard", "sigmoid")) or names[i - 3].startswith(("relu", "mean"))
                    return cse and not head and (gate or names[i + 1].startswith(("hard", "sigmoid", "relu")))
                return name.startswith(("Add", "Cat")) and counts[self.records[i]] > 1

            self.keep_where(stays)

    def repair_weights(self) -> None:
        """Data enters linear layers at the weight."""
        m, r = self.matrix, self.records
        for i in range(len(r)):
            if "weight" not in r[i].name or m[:, i].any():
                continue
            module, after = r[i].module, np.flatnonzero(m[i])
            for o in after:
                others = [a for a in np.flatnonzero(m[:, o]) if a != i]
                softmax = not m[:, i].any() and "softmax" in r[o].name.lower()
                if others and (r[o].module is module or softmax):
                    r[i], r[o] = r[o], r[i]
                    m[i, o] = 0
                    if len(after) == 1:
                        m[i] += m[o]
                        m[o] = 0
                    m[o, i] = 1

    def repair_softmax(self) -> None:
        """Values enter attention at the softmax."""
        frozen = self.matrix.copy()
        graph = nx.from_numpy_array(frozen, create_using=nx.DiGraph)
        for i, record in enumerate(self.records):
            if "softmax" not in record.name.lower():
                continue
            for o in np.flatnonzero(frozen[i]):
                for j in np.flatnonzero(frozen[:, o]):
                    if j == i:
                        continue
                    paths = 0
                    for _ in nx.all_simple_paths(graph, j, o):
                        paths += 1
                        if paths > 1:
                            break
                    if paths > 1 or not frozen[i, j]:
                        self.matrix[j, o] = 0
                    if paths == 1 and not frozen[i, j]:
                        self.matrix[j, i] = 1

    def repair_swin(self) -> None:
        """Both inputs of a stage go through the patch merging."""
        names = [record.name for record in self.records]
        for i, name in enumerate(names):
            if name.endswith("norm.weight"):
                for o in np.flatnonzero(self.matrix[i]):
                    if names[o].endswith("norm1.weight") or "Add" in names[o]:
                        self.matrix[i, o] = 0
                        merged = name.replace("norm", "reduction")
                        self.matrix[i, next(j for j, other in enumerate(names) if merged in other)] = 1
        for i, name in enumerate(names):
            if name.endswith("attn.proj.bias"):
                for o in np.flatnonzero(self.matrix[i]):
                    if names[o].endswith("reduction.weight"):
                        self.matrix[i, o] = 0
                        for join in np.flatnonzero(self.matrix[o]):
                            if names[join].startswith("AddBackward"):
                                self.matrix[i, join] = 1

    def add_input(self) -> None:
        """The input node, at the end of the list."""
        n = len(self.records)
        self.records.append(Record("input"))
        self.matrix = np.pad(self.matrix, (0, 1))
        for i in range(n):
            if not self.matrix[:, i].any() and "weight" in self.records[i].name:
                self.matrix[n, i] = 1
        np.fill_diagonal(self.matrix, 0)

    def sort(self) -> None:
        """Topological order, if there is one."""
        try:
            order = list(nx.topological_sort(nx.from_numpy_array(self.matrix, create_using=nx.DiGraph)))
        except nx.NetworkXUnfeasible:
            return
        self.matrix = self.matrix[np.ix_(order, order)]
        self.records = [self.records[i] for i in order]

    def relabel(self) -> None:
        """The labels of vision transformers and SqueezeNets."""
        if isinstance(self.model, VisionTransformer):
            i = next(i for i, record in enumerate(self.records) if record.name.endswith("pos_embedding"))
            self.records.insert(i + 1, Record("AddBackward0"))
            self.matrix = np.insert(np.insert(self.matrix, i, 0, axis=0), i, 0, axis=1)
            self.matrix[i, i + 1] = 1
        if isinstance(self.model, SqueezeNet):
            self.records.insert(-2, self.records.pop())

    def type_of(self, record: Record) -> str:
        """Type of a node."""
        if record.name == "input":
            return "input"
        return OPERATIONS.get(record.name.partition("Backward")[0], "sum") if record.is_op else published(record)

    def virtual_edges(self, cutoff: int) -> np.ndarray:
        """The matrix with shortest path lengths."""
        lengths = self.matrix.copy()
        graph = nx.from_numpy_array(self.matrix, create_using=nx.DiGraph)
        for a, found in nx.all_pairs_shortest_path_length(graph, cutoff=cutoff):
            for b, length in found.items():
                if length > 0 and lengths[a, b] == 0:
                    lengths[a, b] = length
        return lengths
