import hashlib

import pytest
import torch
from gpt_diffusion.embedding import ScalarEmbedding
from gpt_diffusion.model import GptModel
from support.golden import assert_close


@pytest.mark.golden("frequency_embedding.json")
def test_frequencies_and_embeddings_are_the_published_ones(golden):
    scalars, arrays = torch.tensor(golden.case["inputs"], dtype=torch.float64), golden.tensors()
    sizes = [key.removesuffix("/embedding") for key in arrays if key.endswith("/embedding")]
    assert sizes
    for size in sizes:
        count, largest = (int(part[1:]) for part in size.split("_"))
        embedding = ScalarEmbedding(count, largest)
        assert torch.equal(embedding.frequencies, arrays[f"{size}/frequencies"])
        # sine and cosine of equal arguments: a few units in the last place
        assert_close(embedding(scalars), arrays[f"{size}/embedding"], "gpt-diffusion/forward", size)


@pytest.mark.golden("frequency_embedding.json", cases="builds")
def test_loaded_frequencies_are_used_as_they_are(golden):
    build, arrays = golden.case, golden.tensors()
    (key,) = [k for k in arrays if k.endswith(f"/frequencies_{build['build']}")]
    count, largest = (int(part[1:]) for part in key.split("/")[0].split("_"))
    recipe, loaded = ScalarEmbedding(count, largest), ScalarEmbedding(count, largest)
    loaded.load_state_dict({"frequencies": arrays[key]})
    digest = hashlib.sha256(loaded.frequencies.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == build["sha256"]
    assert (loaded.frequencies != recipe.frequencies).sum() == build["entries_different_from_float64_recipe"]
    for name, expected in build["max_abs_embedding_difference"].items():
        scalar = torch.tensor([float(name.removeprefix("x="))])
        difference = (loaded(scalar) - recipe(scalar)).abs().max()
        assert_close(difference, expected, "gpt-diffusion/forward", name)


CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.bfloat16),
    "to float64 and back": lambda m: m.double().float(),
    "type": lambda m: m.type(torch.float16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casting_a_model_leaves_frequencies_and_embedding_bit_equal(cast):
    model = GptModel([4], split_policy="layer_by_layer", n_layer=1, n_head=1, n_embd=4, max_freq_log2=14)
    steps = torch.arange(1000)
    before, embedded = model.scalar_embedder.frequencies.clone(), model.scalar_embedder(steps)
    cast(model)
    assert model.scalar_embedder.frequencies.dtype == torch.float32
    assert torch.equal(model.scalar_embedder.frequencies, before)
    assert torch.equal(model.scalar_embedder(steps), embedded)
    assert torch.equal(model.state_dict()["scalar_embedder.frequencies"], before)


def test_autocast_leaves_the_embedding_bit_equal():
    embedding, steps = ScalarEmbedding(128, 14), torch.arange(1000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embedding(steps), ScalarEmbedding(128, 14)(steps))
        inside = embedding(steps)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, embedding(steps))


def test_a_compiled_graph_keeps_the_embedding_as_one_opaque_call():
    """No compiler may fuse or replace the sines: the whole graph holds this one operator and no sin."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    embedding, steps = ScalarEmbedding(128, 14), torch.arange(1000)
    compiled = torch.compile(embedding, backend=record, fullgraph=True)
    assert torch.equal(compiled(steps), embedding(steps))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("sin_cos" in target for target in targets) == 1
    assert not {"sin", "cos"} & set(targets)


def test_one_row_of_the_table_equals_the_embedding_of_its_step_alone():
    embedding = ScalarEmbedding(128, 14)
    table = embedding(torch.arange(1000))
    for t in (0, 1, 333, 999):
        assert torch.equal(table[t], embedding(torch.tensor([t]))[0])


def test_doubles_are_rounded_to_float32_first():
    embedding = ScalarEmbedding(8, 6)
    s = torch.tensor([0.1], dtype=torch.float64)
    assert torch.equal(embedding(s), embedding(s.float()))
