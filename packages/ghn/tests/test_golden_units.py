"""Parts of the hypernetworks give the published numbers, in float64."""

import numpy as np
import pytest
import torch
from ghn.decoders import ConvDecoder, MlpDecoder
from ghn.gnn import GatedGNN
from ghn.graphormer import Graphormer
from ghn.shapes import ShapeEncoder, canonical_shape, channel_vocabulary, group_key, kernel_vocabulary
from ghn.tiling import crop, fan_scale, normalise_vectors, tile_into, tiled
from support.golden import assert_close, fill
from support.hypernetworks import filled

UNITS = "models_units.json"


def values(name, shape):
    return fill(name, shape).double()


@pytest.mark.golden(UNITS, cases="shape_encoder")
def test_shapes_have_the_published_codes(golden):
    settings = dict(part.split("=") for part in golden.name.split(","))
    classes, kernel, case = int(settings["num_classes"]), int(settings["s"]), golden.case
    channels = channel_vocabulary(classes)
    assert (len(channels), channels[: len(case["channels_head"])]) == (case["n_channel_entries"], case["channels_head"])
    assert kernel_vocabulary(kernel) == case["spatial"] and len(case["spatial"]) == case["n_spatial_entries"]
    encoder = ShapeEncoder(8, classes, kernel)
    assert encoder.indices([None])[0].tolist() == case["dummy"]
    for shape in case["cases"]:
        assert list(canonical_shape(shape["shape"])) == shape["as_4d"]
        assert encoder.indices([shape["shape"]])[0].tolist() == shape["indices"], shape


@pytest.mark.golden(UNITS, cases="group_keys")
def test_groups_have_the_published_keys(golden):
    case = golden.case
    for key, options in (
        ("key", {}),
        ("key_if_last_weight", {"last_weight": True}),
        ("key_if_last_bias", {"last_bias": True}),
    ):
        assert list(group_key(case["shape"], tuple(case["max_shape"]), **options)) == case[key]


DECODERS = {
    "convdecoder3": lambda *sizes: ConvDecoder(*sizes),
    "convdecoder3_ghn2": lambda *sizes: ConvDecoder(*sizes, centred=False),
    "convdecoder_ppuda": lambda *sizes: ConvDecoder(*sizes, linear=False, centred=False, periodic=True),
    "mlpdecoder": MlpDecoder,
}


@pytest.mark.golden(UNITS)
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_give_the_published_weights(golden, kind):
    """The part that the target takes: the original's decoders give more channels or pixels, which are cut later."""
    case, arrays = golden.case["decoders"], golden.tensors()
    decoder = filled(DECODERS[kind](case["hid"], tuple(case["max_shape"]), case["num_classes"]).double())
    x = values("unit.pub.dec.x", (2, case["hid"]))
    for name in case[kind]:
        out, into, height, width = (int(n) for n in name.split("/")[-1].split("x"))
        nodes, is_class = x[:1] if "single" in name else x, "/class/" in name
        shape = (case["max_shape"][0] if is_class else out, into, height, width)
        made = decoder(nodes, shape, is_class=is_class)
        golden_part = arrays[name][..., None, None] if is_class else arrays[name]
        common = golden_part[:, : made.shape[1], :into, :height, :width]
        assert_close(made[..., : common.shape[-2], : common.shape[-1]], common, "float32", name)
        for members, images in decoder.decode(nodes, [shape] * len(nodes), [is_class] * len(nodes)):
            torch.testing.assert_close(images, made[members], rtol=1e-12, atol=1e-12)


@pytest.mark.golden(UNITS, cases="tiling.cases")
@pytest.mark.parametrize("mode", ["ghn3", "ghn3_ghn2mode", "ppuda"])
def test_tiling_is_the_published_one(golden, mode):
    case = golden.case[mode]
    source, shape = golden.case["source"], tuple(golden.case["target"])
    block = crop(
        torch.arange(float(np.prod(source))).view(source), shape, centred=mode == "ghn3", first_pixel=mode == "ppuda"
    )
    out = torch.full(shape, torch.nan)
    tile_into(out, block)
    assert torch.equal(tiled(block, shape), out)
    if "error" in case:
        assert not out.isnan().any()
        return
    assert list(out.shape) == case["shape"]
    if "values" in case:
        assert out.flatten().tolist() == case["values"]
    else:
        assert [out.flatten()[:8].tolist(), out.flatten()[-8:].tolist(), out.sum().item()] == case["first8_last8_sum"]


@pytest.mark.golden(UNITS, cases="normalisation")
def test_normalisation_is_the_published_one(golden):
    case = golden.case
    if "ratio" in case:
        assert_close(fan_scale(case["shape"]), case["ratio"], "float64")
        return
    vector = values(case["input"].removeprefix("fill "), case["shape"])
    rows = normalise_vectors(torch.stack([vector, vector])[None])[0]
    assert_close(rows[0 if case["is_weight"] else 1], case["values"], "float64")


def graphs_of(golden):
    return [golden.tensors()[f"graph{i}/adjacency_with_virtual"] for i in (0, 1)]


@pytest.mark.golden(UNITS)
@pytest.mark.parametrize("ve", [False, True])
def test_the_gated_network_gives_the_published_embeddings(golden, ve):
    case, graphs = golden.case["gatedgnn"], graphs_of(golden)
    network = filled(GatedGNN(case["in_features"], ve).double())
    x = values("unit.pub.gnn.x", (sum(map(len, graphs)), case["in_features"]))
    arrays = golden.tensors()
    assert_close(network(x, graphs), arrays[f"gatedgnn/ve={ve}"], "float32")
    assert_close(network(x[: len(graphs[0])], graphs[:1]), arrays[f"gatedgnn/ve={ve}/graph0_alone"], "float32")


@pytest.mark.golden(UNITS)
def test_the_graphormer_gives_the_published_embeddings(golden):
    case, graphs = golden.case["graphormer"], graphs_of(golden)
    network = filled(Graphormer(case["dim"], case["heads"], case["layers"]).double())
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == case["state_dict_keys"]
    mask = golden.tensors()["graphormer/mask"].bool()
    x = values("unit.pub.graphormer.x", (*mask.shape, case["dim"]))[mask]
    assert_close(network(x, graphs), golden.tensors()["graphormer/out"][mask], "float32")


def test_a_number_of_classes_in_the_vocabulary_adds_no_entry():
    assert (len(channel_vocabulary(10)), len(channel_vocabulary(96))) == (391, 390)
