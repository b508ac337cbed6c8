"""Prediction as the papers and the specification tell it, step by step: slow, and obvious.

The reference of the benchmark and of the tests in float64. It works on the weights of a :class:`ghn.GHN`, but shares
only its tables of shapes: the edge network sees every pair of nodes, messages are computed for every edge, node after
node, the decoder computes all pixels of its image and all channels, and a parameter is repeated, scaled and cloned.
"""

import math
from collections import defaultdict

import torch
import torch.nn.functional as F
from ghn import GHN, Graph
from ghn.matching import Target, match
from ghn.shapes import canonical_shape, group_key
from torch import Tensor, nn


def predict(ghn: GHN, models: list[nn.Module], graphs: list[Graph], keep_grads: bool = False) -> list[nn.Module]:
    """Predict the parameters of several models and set them."""
    targets: list[Target] = []
    shapes: list[tuple[int, ...] | None] = []
    for graph, model in zip(graphs, models, strict=True):
        found, described = match(graph, model, len(shapes))
        targets, shapes = targets + found, shapes + described
    x = embeddings(ghn, graphs, shapes)
    groups: dict[tuple, list[Target]] = defaultdict(list)
    for target in targets:
        last = {"last_weight": target.kind == "class weight", "last_bias": target.kind == "class bias"}
        groups[group_key(target.shape, ghn.max_shape, **last)].append(target)
    for key, members in groups.items():
        nodes = x[[target.node for target in members]]
        decoded = decode(ghn, nodes, key, members)
        for target, source in zip(members, decoded, strict=True):
            value = normalised(ghn, tiled(source, target.shape), target)
            module, name, _ = target.slot
            if keep_grads:
                module._parameters[name] = value
            else:
                module._parameters[name].data = value.clone()
    return models


def embeddings(
    ghn: GHN, graphs: list[Graph], shapes: list[tuple[int, ...] | None], keep_padding: bool = False
) -> Tensor:
    """Node embeddings of all graphs, among them those of the padding."""
    types = torch.cat([graph.node_feat[:, 0] for graph in graphs])
    x = ghn.embed(types) + ghn.shape_enc(shapes)
    distances = [graph.distances for graph in graphs]
    if ghn.config["hypernet"] == "graphormer":
        x = graphormer(ghn.gnn, x, distances, keep_padding)
    elif ghn.config["hypernet"] == "gatedgnn":
        parts = x.split([len(matrix) for matrix in distances])
        x = torch.cat([gated(ghn.gnn, part, matrix) for part, matrix in zip(parts, distances, strict=True)])
    else:
        x = ghn.gnn(x)
    return x if ghn.ln is None else ghn.ln(x)


def graphormer(network: nn.Module, x: Tensor, distances: list[Tensor], keep_padding: bool = False) -> Tensor:
    """Padded to the largest graph; the edge network maps every pair of nodes."""
    sizes = [len(matrix) for matrix in distances]
    most, first = max(sizes), network[0]
    mask = torch.arange(most) < torch.tensor(sizes)[:, None]
    matrix = torch.stack([F.pad(m, (0, most - len(m), 0, most - len(m))) for m in distances])
    h = x.new_zeros(*mask.shape, x.shape[1])
    h[mask] = x
    h = h + first.centrality_embed_in((matrix == 1).sum(1).clamp(max=100))
    h = h + first.centrality_embed_out((matrix == 1).sum(2).clamp(max=100))
    h = (h + first.input_dist_embed(matrix[:, 0].clamp(max=1000))) * mask[..., None]
    embed = first.attn.edge_embed["embed"]
    pairs = torch.cat([embed(matrix + 2), embed(matrix.mT + 2)], dim=-1)
    bias = first.attn.proj_e(pairs).permute(0, 3, 1, 2)
    both = mask[:, None, :, None] & mask[:, None, None, :]
    for layer in network:
        heads = layer.attn.heads
        qkv = layer.attn.to_qkv(layer.ln1(h)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        logits = qkv[0] @ qkv[1].mT * qkv.shape[-1] ** -0.5 + bias
        attention = logits.masked_fill(~both, -(2.0**15)).softmax(-1)
        h = h + layer.attn.to_out((attention @ qkv[2]).transpose(1, 2).flatten(2))
        h = h + layer.ff["net"](layer.ln2(h))
    return h.flatten(0, 1) if keep_padding else h[mask]


def gated(network: nn.Module, x: Tensor, distance: Tensor) -> Tensor:
    """Node after node, there and back; both networks of messages map the sender of every edge."""
    h = list(x)
    for order, matrix in ((range(len(h)), distance), (reversed(range(len(h))), distance.T)):
        for k in order:
            message = torch.zeros_like(x[0])
            direct = torch.nonzero(matrix[:, k] == 1)[:, 0].tolist()
            if direct:
                message = message + network.mlp(torch.stack([h[u] for u in direct])).sum(0)
            heard = torch.nonzero(matrix[:, k])[:, 0].tolist()
            if network.mlp_ve is not None and heard:
                message = message + (network.mlp_ve(torch.stack([h[u] for u in heard])) / matrix[heard, k, None]).sum(0)
            h[k] = network.gru(message[None], h[k][None])[0]
    return torch.stack(h)


def decode(ghn: GHN, x: Tensor, key: tuple[int, ...], members: list[Target]) -> Tensor:
    """Blocks of one group."""
    if len(key) == 2 and key[1] <= 0:
        rows = ghn.decoder_1d(x)
        rows = ghn.bias_class(rows) if key[1] < 0 else rows
        return torch.stack([row[target.row] for row, target in zip(rows, members, strict=True)])
    if len(key) == 3:
        return ghn.decoder_1d(x).flatten(1)[..., None, None]
    is_class = len(key) == 2
    out, into, height, width = (*key, 1, 1)[:4]
    if ghn.config["decoder"] == "mlp":
        return mlp_decoder(ghn.decoder, x, is_class)[:, :, :into, :height, :width]
    kernel = canonical_shape(members[0].shape)[2:]
    image = conv_decoder(ghn, x, 1 if is_class else height, 1 if is_class else width)
    if is_class:
        last = ghn.decoder.class_layer_predictor[1]
        columns = image[:, :, :into, 0, 0].relu().mT
        return F.linear(columns, last.weight.flatten(1), last.bias).mT[..., None, None]
    assert kernel == (height, width)
    return image[:, :out, :into]


def conv_decoder(ghn: GHN, x: Tensor, height: int, width: int) -> Tensor:
    """All pixels of the first layer, those of the kernel of the others, all channels."""
    decoder = ghn.decoder
    most_out, most_into, size, _ = ghn.max_shape
    image = F.relu(decoder.fc[0](x)).view(len(x), -1, size, size)
    large = max(height, width) > size
    if not large:
        centre = size // 2
        top, left = (max(0, centre - n // 2) if decoder.centred else 0 for n in (height, width))
        bottom, right = (centre + math.ceil(n / 2) if decoder.centred else n for n in (height, width))
        image = image[:, :, top:bottom, left:right]
    image = image.permute(0, 2, 3, 1)
    image = F.relu(F.linear(image, decoder.conv[0].weight.flatten(1), decoder.conv[0].bias))
    image = F.linear(image, decoder.conv[2].weight.flatten(1), decoder.conv[2].bias)
    image = image.unflatten(-1, (most_out, most_into)).permute(0, 3, 4, 1, 2)
    if large and decoder.periodic:
        return image.repeat(1, 1, 1, 2, 2)[..., :height, :width]
    if large:
        flat = F.interpolate(image.flatten(0, 1), (height, width), mode="bilinear")
        return flat.view(*image.shape[:3], height, width)
    return image


def mlp_decoder(decoder: nn.Module, x: Tensor, is_class: bool) -> Tensor:
    """All channels and pixels."""
    first, relu, last = decoder.mlp["fc"]
    hidden = relu(first(x))
    if is_class:
        return decoder.class_layer_predictor(hidden).view(len(x), decoder.num_classes, -1)[..., None, None]
    return last(hidden).view(len(x), *decoder.max_shape)


def tiled(source: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A block repeated and cut to a shape, axis after axis."""
    if len(shape) == 3 and source.ndim == 4:
        flat = source[:1].flatten(2).mT[:, : shape[1], : shape[2]]
        source = torch.cat([0.02 * torch.randn_like(flat[:, :1]), flat], dim=1)
    while source.ndim > len(shape):
        source = source[..., 0]
    for axis, size in enumerate(shape):
        if size > source.shape[axis]:
            times = [1] * len(shape)
            times[axis] = math.ceil(size / source.shape[axis])
            source = source.repeat(times)
        source = source.narrow(axis, 0, size)
    return source


def normalised(ghn: GHN, value: Tensor, target: Target) -> Tensor:
    """Scaled by the fan-in, or bounded."""
    if not ghn.weight_norm:
        return value
    if value.ndim == 1:
        return torch.tanh(value / 5) if target.row else 2 * torch.sigmoid(value / 2)
    if value.ndim > 2 and value.shape[2] >= 11 and value.shape[0] == 1:
        return value
    narrow = value.ndim > 2 and (value.shape[1] == 1 or (value.ndim > 3 and value.shape[2] < value.shape[3]))
    return value * math.sqrt((1 if narrow else 2) / value[0].numel())
