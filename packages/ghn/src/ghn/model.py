"""Graph hypernetworks: GHN-1, GHN-2, the MLP baseline and GHN-3."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ghn.batchnorm import use_batch_statistics
from ghn.checking import CheckReport, check
from ghn.decoders import ConvDecoder, Decoder1d, MlpDecoder
from ghn.gnn import GatedGNN, NodeMlp
from ghn.graph import Dialect, Graph, GraphBatch
from ghn.graphormer import Graphormer
from ghn.matching import Slot, Target, match, parameter_slots
from ghn.primitives import PRIMITIVES
from ghn.shapes import Shape, Shape4, ShapeEncoder, canonical_shape
from ghn.tiling import crop, fan_scale, normalise_vectors, tile_into, tiled

_VIRTUAL_EDGES = 50


class GHN(nn.Module):
    """A network that maps the graph of a model to all parameters of the model, in one forward pass.

    The constructor's defaults are those of GHN-1 (Zhang et al. 2019); GHN-2 (Knyazev et al. 2021) has ``weight_norm``,
    ``ve`` and ``layernorm``. :class:`GHN3` makes the later ones.

    Args:
        max_shape: ``(O, I, S, S)``: the largest tensor that is decoded; larger ones repeat it.
        num_classes: Classes of the data that it is trained on.
        hypernet: Node network.
        decoder: Convolutional or fully connected.
        weight_norm: Scale predicted weights by their fan-in, and bound those of norm layers and biases.
        ve: Look at virtual edges of the graph.
        layernorm: Normalise node embeddings before they are decoded.
        hid: Width of node embeddings, a multiple of 4.
        heads: Attention heads, for ``graphormer``.
        layers: Layers, for ``graphormer``.
        dialect: Which published code decides on graphs, kernels and crops: ``"ppuda"`` (2021) or ``"ghn3"`` (2023).
        rank: Rank of the matrices that the convolutional decoder makes; 0: full, as published. With a rank, the number
            of weights grows with the square of ``hid``, not with its cube.

    Raises:
        ValueError: A size is out of range.
    """

    def __init__(
        self,
        max_shape: Sequence[int],
        num_classes: int,
        hypernet: Literal["gatedgnn", "mlp", "graphormer"] = "gatedgnn",
        decoder: Literal["conv", "mlp"] = "conv",
        weight_norm: bool = False,
        ve: bool = False,
        layernorm: bool = False,
        hid: int = 32,
        *,
        heads: int = 8,
        layers: int = 3,
        dialect: Dialect = "ppuda",
        rank: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "hid": hid, "heads": heads, "layers": layers}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if hid % 4 or rank < 0:
            raise ValueError(f"hid must be a multiple of 4, and rank not negative, got {hid} and {rank}")
        self.max_shape = largest = _max_shape(max_shape)
        self.num_classes, self.dialect, self.weight_norm, self.ve = num_classes, dialect, weight_norm, ve
        self.config: dict[str, Any] = {
            "max_shape": list(largest),
            "num_classes": num_classes,
            "hypernet": hypernet,
            "decoder": decoder,
            "weight_norm": weight_norm,
            "ve": ve,
            "layernorm": layernorm,
            "hid": hid,
            "heads": heads,
            "layers": layers,
            "dialect": dialect,
            "rank": rank,
        }
        self.centred = hypernet == "graphormer"
        self.ln = nn.LayerNorm(hid) if layernorm else None
        self.embed = nn.Embedding(len(PRIMITIVES), hid)
        self.shape_enc = ShapeEncoder(hid, num_classes, largest[2])
        self.gnn = _node_network(hypernet, hid, ve, heads, layers)
        if decoder == "mlp":
            self.decoder: ConvDecoder | MlpDecoder = MlpDecoder(hid, largest, num_classes)
        elif decoder == "conv":
            published = dialect == "ppuda"
            self.decoder = ConvDecoder(
                hid, largest, num_classes, linear=not published, centred=self.centred, periodic=published, rank=rank
            )
        else:
            raise ValueError(f"decoder must be conv or mlp, got {decoder!r}")
        self.decoder_1d = Decoder1d(hid, max(largest[:2]))
        self.bias_class = nn.Sequential(nn.ReLU(), nn.Linear(max(largest[:2]), num_classes))

    @property
    def device(self) -> torch.device:
        """Where the hypernetwork is."""
        return self.embed.weight.device

    def forward(
        self,
        nets: nn.Module | Sequence[nn.Module],
        graphs: Graph | GraphBatch | Sequence[Graph] | None = None,
        return_embeddings: bool = False,
        predict_class_layers: bool = True,
        bn_track_running_stats: bool | None = None,
        keep_grads: bool | None = None,
        reduce_graph: bool = False,
        *,
        example_inputs: Any = None,  # noqa: ANN401 (whatever the model takes)
        extended: bool = False,
        generator: torch.Generator | None = None,
    ) -> Any:  # noqa: ANN401 (one model or a list, as given; with embeddings a tuple)
        """Predict the parameters of one model or several, and set them.

        Args:
            nets: The model or models; changed in place, whatever their device and dtype.
            graphs: Their graphs, if there are any already; else they are traced.
            return_embeddings: Also return the node embeddings of all graphs, ``(nodes, hid)``.
            predict_class_layers: Whether the last layer is predicted too; if not, it is kept.
            bn_track_running_stats: If False, BatchNorm layers normalise by the statistics of each batch from now on,
                in evaluation too: running statistics are not predicted. None: as the hypernetwork's training flag.
            keep_grads: If True, gradients of the models reach the hypernetwork: parameters become the predicted
                tensors. If False, the parameters stay and get new values. None: as the hypernetwork's training flag.
            reduce_graph: Set weight and bias of all layers that are not predicted to None.
            example_inputs: Input for one call of a model that takes no images, see :class:`ghn.Graph`.
            extended: Also predict parameters of layers that the published code leaves out.
            generator: Draws the class token's row of positional embeddings, which is not predicted.

        Returns:
            The same model or list of models; with ``return_embeddings`` a pair of it and the embeddings.

        Raises:
            ValueError: Graphs and models do not fit together, the model cannot be traced, or has another number of
                classes; no parameter has been changed.
        """
        models = [nets] if isinstance(nets, nn.Module) else list(nets)
        keep = self.training if keep_grads is None else keep_grads
        batch = self.graphs_of(models, graphs, example_inputs=example_inputs, extended=extended)
        targets, shapes = self.plan(models, batch, predict_class_layers)
        _check_devices(targets)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (keep or return_embeddings)):
            x = self.embeddings(batch, shapes)
        with nullcontext() if keep else torch.no_grad():
            for target, block in self.blocks(targets, x, generator):
                _replace(target, block) if keep else _overwrite(target, block)
        tracks = self.training if bn_track_running_stats is None else bn_track_running_stats
        for model in models:
            if reduce_graph:
                _remove_others(model, {(target.slot.module, target.slot.attribute) for target in targets})
            if not tracks:
                use_batch_statistics(model)
        result = models[0] if isinstance(nets, nn.Module) else models
        return (result, x) if return_embeddings else result

    def check(self, model: nn.Module, *, example_inputs: Any = None) -> CheckReport:  # noqa: ANN401
        """Which parameters this hypernetwork would predict; nothing is computed (:func:`ghn.check`)."""
        return check(model, example_inputs=example_inputs, dialect=self.dialect)

    def graphs_of(
        self,
        models: Sequence[nn.Module],
        graphs: Graph | GraphBatch | Sequence[Graph] | None = None,
        *,
        example_inputs: Any = None,  # noqa: ANN401
        extended: bool = False,
    ) -> list[Graph]:
        """Graphs of models in the dialect that this hypernetwork was trained on, unless they are given.

        Raises:
            ValueError: There are as many graphs as models not, or a model cannot be traced.
        """
        if graphs is None:
            cutoff = _VIRTUAL_EDGES if self.ve else 1
            for model in models:
                _detach(model)
            options: dict[str, Any] = {"dialect": self.dialect, "ve_cutoff": cutoff, "extended": extended}
            # Casts would be nodes of the trace.
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return [Graph(model, example_inputs=example_inputs, **options) for model in models]
        given = [graphs] if isinstance(graphs, Graph) else list(graphs)
        if len(given) != len(models):
            raise ValueError(f"{len(given)} graphs for {len(models)} models: give one for each")
        return given

    def plan(
        self, models: Sequence[nn.Module], graphs: Sequence[Graph], predict_class_layers: bool = True
    ) -> tuple[list[Target], list[Shape | None]]:
        """Parameters that will be predicted, and the shapes of all nodes; nothing is computed.

        Raises:
            ValueError: A model has another number of classes than the hypernetwork, or its graph does not fit.
        """
        targets: list[Target] = []
        shapes: list[Shape | None] = []
        for graph, model in zip(graphs, models, strict=True):
            found, described = match(graph, model, len(shapes))
            targets += found
            shapes += described
        if not predict_class_layers:
            targets = [target for target in targets if not target.kind.startswith("class")]
        for target in targets:
            if target.kind.startswith("class") and target.is_last and target.shape[0] != self.num_classes:
                raise ValueError(
                    f"{target.name.removeprefix('.')} has {target.shape[0]} outputs, this hypernetwork predicts "
                    f"{self.num_classes} classes: build the model for these, or keep its last layer "
                    "(predict_class_layers=False, --keep-class-layer)"
                )
        return targets, shapes

    def embeddings(self, graphs: Sequence[Graph], shapes: Sequence[Shape | None]) -> Tensor:
        """Embeddings ``(nodes of all graphs, hid)`` that the decoders read."""
        types = torch.cat([graph.node_feat for graph in graphs])[:, 0].to(self.device)
        x = self.embed(types) + self.shape_enc(shapes)
        x = self.gnn(x, [graph.distances for graph in graphs])
        return x if self.ln is None else self.ln(x)

    def blocks(
        self, targets: Iterable[Target], x: Tensor, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Target, Tensor]]:
        """Decode parameters, in any order.

        Args:
            targets: Parameters, as of :meth:`plan`.
            x: Embeddings of the nodes, ``(nodes, hid)``.
            generator: Draws what is not decoded.

        Yields:
            A parameter and the tensor that makes it when repeated along all axes. They share memory.
        """
        kinds: dict[str, list[Target]] = {}
        for target in targets:
            kinds.setdefault(target.kind, []).append(target)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.embed.weight.dtype)
            yield from self._vectors(kinds.get("vector", []), x)
            yield from self._class_biases(kinds.get("class bias", []), x)
            weights = kinds.get("weight", []) + kinds.get("class weight", [])
            shapes = [canonical_shape(target.shape) for target in weights]
            of_class = [target.kind == "class weight" for target in weights]
            rows = x[[target.node for target in weights]]
            for members, images in self.decoder.decode(rows, shapes, of_class) if weights else ():
                found = [weights[i] for i in members]
                for target, image in zip(found, self._scaled(images, found).unbind(), strict=True):
                    yield target, self._cropped(image, target.shape, generator)

    def _scaled(self, images: Tensor, targets: Sequence[Target]) -> Tensor:
        """Decoded images ``(n, ...)``, times the factors of their targets."""
        images = images.contiguous()
        if not self.weight_norm:
            return images
        factors = torch.tensor([fan_scale(target.shape) for target in targets], dtype=images.dtype)
        factors = factors.view(-1, *[1] * (images.ndim - 1)).to(images.device)
        return images * factors if images.requires_grad else images.mul_(factors)

    def _cropped(self, image: Tensor, shape: Shape, generator: torch.Generator | None) -> Tensor:
        first_pixel = self.dialect == "ppuda"
        return crop(image, shape, centred=self.centred, generator=generator, first_pixel=first_pixel)

    def _vectors(self, targets: list[Target], x: Tensor) -> Iterator[tuple[Target, Tensor]]:
        nodes = list(dict.fromkeys(target.node for target in targets))
        values = self.decoder_1d(x[nodes])
        values = normalise_vectors(values) if self.weight_norm else values
        place, rows = {node: 2 * i for i, node in enumerate(nodes)}, values.flatten(0, 1).unbind()
        for target in targets:
            yield target, crop(rows[place[target.node] + target.row], target.shape)

    def _class_biases(self, targets: list[Target], x: Tensor) -> Iterator[tuple[Target, Tensor]]:
        if targets:
            values = self.bias_class(self.decoder_1d(x[[target.node for target in targets]]))
            values = normalise_vectors(values) if self.weight_norm else values
            for target, value in zip(targets, values[:, 1], strict=True):
                yield target, crop(value, target.shape)


class GHN3(GHN):
    """GHN-3 (Knyazev et al. 2023): a Graphormer and a decoder of linear layers; or GHN-2 with such a decoder.

    Args:
        max_shape: ``(O, I, S, S)``: the largest tensor that is decoded; larger ones repeat it.
        num_classes: Classes of the data that it is trained on.
        hid: Width of node embeddings.
        heads: Attention heads.
        layers: Layers of the Graphormer.
        is_ghn2: Whether it is GHN-2: a gated graph network, and kernels cut from the corner.
        weight_norm: See :class:`GHN`, as the following.
        ve: Look at virtual edges.
        layernorm: Normalise node embeddings.
        rank: Rank of what the decoder makes; 0: full.
    """

    def __init__(
        self,
        max_shape: Sequence[int],
        num_classes: int,
        hid: int,
        heads: int = 8,
        layers: int = 3,
        is_ghn2: bool = False,
        *,
        weight_norm: bool = False,
        ve: bool = False,
        layernorm: bool = False,
        rank: int = 0,
    ) -> None:
        super().__init__(
            max_shape,
            num_classes,
            "gatedgnn" if is_ghn2 else "graphormer",
            weight_norm=weight_norm,
            ve=ve,
            layernorm=layernorm,
            hid=hid,
            heads=heads,
            layers=layers,
            dialect="ghn3",
            rank=rank,
        )
        if not is_ghn2:
            self._initialise()

    def _initialise(self) -> None:
        """Small first predictions, and embeddings of unit norm."""
        assert isinstance(self.decoder, ConvDecoder)
        lasts: list[Any] = [self.decoder_1d.fc[2], self.decoder.conv[2], self.decoder.class_layer_predictor[1]]
        with torch.no_grad():
            for last in lasts:
                last.weight.div_(5)
                last.bias.zero_()
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=module.embedding_dim**-0.5)

    def forward(  # noqa: D102 (that of GHN, with the published defaults)
        self,
        nets: nn.Module | Sequence[nn.Module],
        graphs: Graph | GraphBatch | Sequence[Graph] | None = None,
        return_embeddings: bool = False,
        predict_class_layers: bool = True,
        bn_track_running_stats: bool | None = True,
        keep_grads: bool | None = False,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        given = (nets, graphs, return_embeddings, predict_class_layers, bn_track_running_stats, keep_grads)
        return super().forward(*given, *args, **kwargs)


def build(config: Mapping[str, Any]) -> GHN:
    """A new hypernetwork from a configuration (:attr:`GHN.config`)."""
    options = dict(config)
    if options.get("dialect") != "ghn3":
        return GHN(**options)
    kind, decoder, _ = (options.pop(name) for name in ("hypernet", "decoder", "dialect"))
    if kind == "mlp" or decoder != "conv":
        raise ValueError(f"GHN-3 has no {'MLP for nodes' if kind == 'mlp' else decoder + ' decoder'}")
    return GHN3(**options, is_ghn2=kind == "gatedgnn")


def _max_shape(values: Sequence[int]) -> Shape4:
    if len(values) != 4 or min(values) < 1 or values[2] != values[3]:
        raise ValueError(f"max_shape must be four positive numbers (O, I, S, S), got {tuple(values)}")
    out, into, height, width = values
    return out, into, height, width


def _node_network(kind: str, hid: int, ve: bool, heads: int, layers: int) -> nn.Module:
    if kind == "graphormer":
        return Graphormer(hid, heads, layers)
    if kind == "gatedgnn":
        return GatedGNN(hid, ve)
    if kind == "mlp":
        return NodeMlp(hid, hid)
    raise ValueError(f"hypernet must be gatedgnn, mlp or graphormer, got {kind!r}")


def _check_devices(targets: Sequence[Target]) -> None:
    for target in targets:
        if isinstance(target.slot.content, Tensor) and target.slot.content.is_meta:
            raise ValueError(
                f"{target.name.removeprefix('.')} is on the meta device, which holds no values: use predict_to, or "
                "model.to_empty(device='cpu') first"
            )


def _detach(model: nn.Module) -> None:
    """Make parameters of what an earlier prediction with gradients left, so that the model can be traced."""
    for slot in parameter_slots(model).values():
        if isinstance(slot.content, Tensor) and not isinstance(slot.content, nn.Parameter):
            slot.module._parameters[slot.attribute] = nn.Parameter(slot.content.detach())


def _overwrite(target: Target, block: Tensor) -> None:
    """Set the values of a parameter that stays the same object."""
    parameter = target.slot.content
    if not isinstance(parameter, nn.Parameter):  # a light-weight network, or an earlier prediction with gradients
        like = parameter if isinstance(parameter, Tensor) else block
        parameter = nn.Parameter(torch.empty(target.shape, dtype=like.dtype, device=like.device))
        _set(target.slot, parameter)
    tile_into(parameter.data, block)


def _replace(target: Target, block: Tensor) -> None:
    """Put a predicted tensor, through which gradients flow, in the place of a parameter."""
    old = target.slot.content
    new = tiled(block, target.shape)
    _set(target.slot, new.to(old) if isinstance(old, Tensor) else new)


def _set(slot: Slot, value: Tensor) -> None:
    vars(slot.module).pop(slot.attribute, None)
    slot.module._parameters[slot.attribute] = value  # type: ignore[assignment]


def _remove_others(model: nn.Module, predicted: set[tuple[nn.Module, str]]) -> None:
    for module in model.modules():
        if getattr(module, "weight", None) is not None and (module, "weight") not in predicted:
            module.weight = None  # type: ignore[assignment]
            if hasattr(module, "bias"):
                module.bias = None  # type: ignore[assignment]
