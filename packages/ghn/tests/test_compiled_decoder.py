"""The decoder keeps the published numbers when it is compiled or exported."""

import pytest
import torch
from ghn.decoders import ConvDecoder
from support.golden import assert_close, fill
from support.hypernetworks import filled

pytestmark = pytest.mark.slow


def cases(golden):
    for name in golden.case["decoders"]["convdecoder3"]:
        out, into, height, width = (int(n) for n in name.split("/")[-1].split("x"))
        is_class = "/class/" in name
        arrays = golden.tensors()[name]
        if "single" not in name:
            yield (
                (8 if is_class else out, into, height, width),
                is_class,
                arrays[..., None, None] if is_class else arrays,
            )


def decoder_and_input(golden):
    case = golden.case["decoders"]
    decoder = filled(ConvDecoder(case["hid"], tuple(case["max_shape"]), case["num_classes"]).double())
    return decoder, fill("unit.pub.dec.x", (2, case["hid"])).double()


@pytest.mark.golden("models_units.json")
def test_exported_decoders_give_the_published_weights(golden):
    decoder, x = decoder_and_input(golden)
    for shape, is_class, expected in cases(golden):
        program = torch.export.export(decoder, (x, shape, is_class))
        assert_close(program.module()(x, shape, is_class), expected, "float32", str(shape))


@pytest.mark.golden("models_units.json")
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_decoders_give_the_published_weights(golden):
    decoder, x = decoder_and_input(golden)
    compiled = torch.compile(decoder, fullgraph=True)
    with torch.no_grad():
        for shape, is_class, expected in list(cases(golden))[::3]:  # each is compiled anew
            assert_close(compiled(x, shape, is_class), expected, "float32", str(shape))
