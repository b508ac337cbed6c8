"""Networks of DeepNets-1M: a stem, cells as a genotype tells, and a classifier."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ghn.deepnets.genotypes import Genotype
from ghn.deepnets.operations import FactorizedReduce, Keys, PosEnc, Stride, make_norm, make_operation, relu_conv


class Cell(nn.Module):
    """A block of operations between states, the repeated part of a network."""

    def __init__(
        self,
        genotype: Genotype,
        c_prev_prev: int,
        c_prev: int,
        c_in: int,
        c_out: int,
        *,
        reduction: bool,
        reduction_prev: bool,
        norm: str | None,
        preproc: bool,
        is_vit: bool,
        index: int,
        keys: Keys,
    ) -> None:
        super().__init__()
        self._cell_ind = index
        self.edges, self.concat = genotype[2:] if reduction else genotype[:2]
        self.zeros_allowed = "none" in genotype.operations()
        shrink = reduction_prev and not is_vit
        if preproc:
            self.preprocess0: nn.Module = (
                FactorizedReduce(c_prev_prev, c_out, norm) if shrink else relu_conv(c_prev_prev, c_out, 1, 1, norm)
            )
            self.preprocess1: nn.Module = relu_conv(c_prev, c_out, 1, 1, norm)
        else:
            self.preprocess0 = Stride(2 if shrink else 1)
            self.preprocess1 = Stride(1)
        self._ops = nn.ModuleList(
            make_operation(
                name,
                c_in if state < 2 else c_out,
                c_out,
                2 if reduction and state < 2 and not is_vit else 1,
                norm,
                keys,
            )
            for name, state in self.edges
        )

    def forward(self, s0: Tensor | None, s1: Tensor | None, drop_path_prob: float = 0.0) -> Tensor | None:
        """Outputs of the last two cells to the output of this one; None if no operation is left."""
        states = [_apply(self.preprocess0, s0), _apply(self.preprocess1, s1)]
        for i in range(0, len(self.edges), 2):
            states.append(_add(self._edge(i, states, drop_path_prob), self._edge(i + 1, states, drop_path_prob)))
        chosen = [states[i] for i in self.concat]
        known = [state for state in chosen if state is not None]
        if not known:
            return None
        if len(known) < len(chosen) and not self.zeros_allowed:
            raise AssertionError("a state is missing in a cell without none")
        filled = [torch.zeros_like(known[0]) if state is None else state for state in chosen]
        return filled[0] if len(filled) == 1 else torch.cat(filled, dim=1)

    def _edge(self, i: int, states: Sequence[Tensor | None], drop_path_prob: float) -> Tensor | None:
        name, state = self.edges[i]
        value = None if name == "none" else _apply(self._ops[i], states[state])
        if value is None or not self.training or drop_path_prob <= 0 or isinstance(self._ops[i], nn.Identity):
            return value
        keep = 1 - drop_path_prob
        return value / keep * value.new_empty(len(value), 1, 1, 1).bernoulli_(keep)


def _apply(operation: nn.Module, x: Tensor | None) -> Tensor | None:
    """The operation on a state; None if there is no state, or the weights of the operation were taken out."""
    if x is None or any(getattr(module, "weight", x) is None for module in _parameterised(operation)):
        return None
    return operation(x)


def _parameterised(operation: nn.Module) -> list[nn.Module]:
    return [module for module in operation.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


class Network(nn.Module):
    """A network of the DeepNets-1M family, with published names, shapes and function.

    Args:
        C: Channels of the first cell, before ``C_mult``.
        num_classes: Outputs of the classifier.
        genotype: The two cells.
        n_cells: Number of cells; those at one and two thirds reduce the resolution.
        ks: Kernel size of the stem.
        is_imagenet_input: Inputs of 224 x 224 pixels, else 32 x 32.
        stem_pool: Pool after the stem of type 0.
        stem_type: 0: one convolution; 1: three, with the first two cells at different resolutions.
        imagenet_stride: Stride of the stem of type 0 for 224 x 224 pixels.
        is_vit: Cut the image into patches and do not reduce by striding; default: whether the genotype has ``msa``.
        norm: None, ``"bnorm"`` (batch statistics) or ``"bn-track"``.
        preproc: Convolve the inputs of each cell.
        C_mult: Factor of the channels at each reduction.
        fc_layers: Layers of the classifier.
        fc_dim: Width between them.
        glob_avg: Average the pixels before the classifier.
        auxiliary: Add a second classifier after two thirds of the cells, used in training mode.
        keys: Names of attention weights: ``"ghn2"`` (also in DeepNets-1M files) or ``"ghn3"``.
    """

    def __init__(
        self,
        C: int,
        num_classes: int,
        genotype: Genotype,
        n_cells: int,
        ks: int = 3,
        is_imagenet_input: bool = True,
        stem_pool: bool = False,
        stem_type: int = 0,
        imagenet_stride: int = 4,
        is_vit: bool | None = None,
        norm: str | None = "bn-track",
        preproc: bool = True,
        C_mult: int = 2,
        fc_layers: int = 0,
        fc_dim: int = 0,
        glob_avg: bool = True,
        auxiliary: bool = False,
        keys: Keys = "ghn2",
    ) -> None:
        super().__init__()
        genotype = Genotype(*genotype)
        concat = max(len(genotype.normal_concat), len(genotype.reduce_concat))
        if not preproc and (concat > 1 or C_mult > 1):
            raise ValueError(f"preproc=False needs one concatenated state and C_mult=1, got {concat} and {C_mult}")
        self.genotype, self.drop_path_prob = genotype, 0.0
        self._n_cells = n_cells
        self._is_vit = is_vit = "msa" in genotype.operations() if is_vit is None else is_vit
        self.expected_input_sz = 224 if is_imagenet_input else 32
        small_map = stem_type == 1 or stem_pool
        self._two_stems = stem_type == 1 and not is_vit
        c_prev_prev = c_prev = self._make_stem(
            C, ks, is_imagenet_input, stem_pool, stem_type, imagenet_stride, norm, preproc
        )
        reductions = {n_cells // 3, 2 * n_cells // 3} - {0}
        self._auxiliary_after = 2 * n_cells // 3
        self.cells = nn.ModuleList()
        c, reduction_prev = C, stem_type == 1
        for i in range(n_cells):
            reduction = i in reductions
            c *= C_mult if reduction else 1
            cell = Cell(
                genotype,
                c_prev_prev,
                c_prev,
                c if preproc else c_prev,
                c,
                reduction=reduction,
                reduction_prev=reduction_prev,
                norm=norm,
                preproc=preproc,
                is_vit=is_vit,
                index=i,
                keys=keys,
            )
            self.cells.append(cell)
            reduction_prev = reduction
            c_prev_prev, c_prev = c_prev, len(cell.concat) * c
            if auxiliary and i == self._auxiliary_after:
                pool = 2 if small_map else 5
                self.auxiliary_head = AuxiliaryHead(c_prev, num_classes, norm, is_imagenet_input, pool, is_vit)
        self.global_pooling: nn.Module = nn.AdaptiveAvgPool2d(1) if glob_avg else nn.Identity()
        side = 1 if glob_avg else {True: (14, 7), False: (8, 4)}[is_imagenet_input][small_map]
        layers: list[nn.Module] = [nn.Linear(c_prev * side**2, fc_dim if fc_layers > 1 else num_classes)]
        for i in range(2, fc_layers + 1):
            layers += [nn.ReLU(), nn.Dropout(0.5), nn.Linear(fc_dim, fc_dim if i < fc_layers else num_classes)]
        self.classifier = nn.Sequential(*layers)

    def _make_stem(
        self, c: int, ks: int, imagenet: bool, pool: bool, kind: int, stride: int, norm: str | None, preproc: bool
    ) -> int:
        """Make the layers before the first cell; returns their channels."""
        if self._is_vit:
            patch, side = (16, 14) if imagenet else (3, 11)
            self.stem0: nn.Module = nn.Conv2d(3, c, patch, patch, 1 if patch < 4 else 0, bias=False)
            self.pos_enc = PosEnc(c, side)
            return c
        if kind == 0:
            c = 3 * c if preproc and not imagenet else c
            conv = nn.Conv2d(3, c, ks, stride if imagenet else 1, ks // 2, bias=False)
            self.stem = nn.Sequential(conv, make_norm(norm, c), nn.MaxPool2d(3, 2, 1) if pool else nn.Identity())
            return c
        step = 2 if imagenet else 1
        first = nn.Conv2d(3, c // 2, ks, step, ks // 2, bias=False)
        second = nn.Conv2d(c // 2, c, 3, step, 1, bias=False)
        self.stem0 = nn.Sequential(first, make_norm(norm, c // 2), nn.ReLU(), second, make_norm(norm, c))
        self.stem1 = nn.Sequential(nn.ReLU(), nn.Conv2d(c, c, 3, 2, 1, bias=False), make_norm(norm, c))
        return c

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (b, 3, h, w) to logits (b, classes), and the auxiliary ones or None."""
        s0: Tensor | None
        s1: Tensor | None
        if self._is_vit:
            s0 = s1 = self.pos_enc(self.stem0(x))
        elif self._two_stems:
            s0 = self.stem0(x)
            s1 = _apply(self.stem1, s0)
        else:
            s0 = s1 = self.stem(x)
        auxiliary = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            if i == self._auxiliary_after and self.training and hasattr(self, "auxiliary_head"):
                auxiliary = self.auxiliary_head(s1)
        if s1 is None:
            raise ValueError("the last cell has no operation left: the network has no output")
        return self.classifier(self.global_pooling(s1).flatten(1)), auxiliary


class AuxiliaryHead(nn.Module):
    """The second classifier; that for large images has no norm after its second convolution (published)."""

    def __init__(self, c: int, num_classes: int, norm: str | None, imagenet: bool, pool: int, is_vit: bool) -> None:
        super().__init__()
        self.shrink: nn.Module = nn.AdaptiveAvgPool2d(8) if is_vit and not imagenet else nn.Identity()
        average = nn.AvgPool2d(5, 2) if imagenet else nn.AvgPool2d(pool, min(pool, 3), count_include_pad=False)
        layers = [nn.ReLU(), average, nn.Conv2d(c, 128, 1, bias=False), make_norm(norm, 128), nn.ReLU()]
        layers += [nn.Conv2d(128, 768, 2, bias=False), nn.Identity() if imagenet else make_norm(norm, 768), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to logits (b, classes)."""
        return self.classifier(self.features(self.shrink(x)).flatten(1))
