import dataclasses
import math

import numpy as np
import pytest
import torch
from ghn.deepnets import sampling
from ghn.deepnets.sampling import FAMILIES, decode_genotype, sample
from ghn.matching import parameter_slots
from ghn.model import build
from support.golden import fill


@pytest.mark.golden("deepnets_sampler.json", cases="cases")
def test_genotypes_are_those_of_the_published_sampler(golden):
    case, tag = golden.case, golden.name
    shape = (sum(i + 2 for i in range(case["steps"])), 15)
    normal, reduce = (np.float32(1e-3) * fill(f"{tag}_{cell}", shape) for cell in ("normal", "reduce"))
    uniforms = iter((fill(f"{tag}_u", (64,)).abs() % 1).tolist()) if case["drop_concat"] else None
    options = {name: case[name] for name in ("only_pool", "allow_none", "allow_transformer")}
    genotype = decode_genotype(normal, reduce, uniforms, **options)
    assert [f"{name}:{state}" for name, state in genotype.normal] == case["normal"]
    assert [f"{name}:{state}" for name, state in genotype.reduce] == case["reduce"]
    assert list(genotype.normal_concat) == list(genotype.reduce_concat) == case["concat"]


def test_a_sample_depends_on_nothing_but_split_seed_and_number():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = [sample("train", i, seed=3, small=True).architecture for i in (0, 1)]
    assert [sample("train", i, seed=3, small=True).architecture for i in (1, 0)] == first[::-1]
    assert torch.equal(torch.get_rng_state(), before)
    assert sample("train", 0, seed=4, small=True).architecture != first[0]


def test_training_and_test_networks_are_different():
    drawn = {split: [sample(split, i, small=True).architecture for i in range(4)] for split in ("train", "test", "val")}
    assert all(one not in drawn["train"] for one in drawn["test"] + drawn["val"])


def test_wide_networks_are_test_networks_with_four_times_the_channels():
    test, wide = (sample(split, 1).architecture for split in ("test", "wide"))
    assert wide == dataclasses.replace(test, C=4 * test.C)


@pytest.mark.parametrize("index", range(2))
def test_test_networks_have_two_and_a_half_million_parameters(index):
    drawn = sample("test", index).architecture
    nets = [dataclasses.replace(drawn, C=c).build_light() for c in (drawn.C, drawn.C - 16)]
    sizes = [sum(math.prod(slot.shape) for slot in parameter_slots(net).values()) for net in nets]
    assert sizes[0] >= 2.5e6
    assert drawn.C == 32 or sizes[1] < 2.5e6


def test_networks_keep_the_ranges_of_their_split():
    for split, index in (("train", 0), ("deep", 1), ("bnfree", 2)):
        family, drawn = FAMILIES[split], sample(split, index).architecture
        assert family.cells[0] <= drawn.n_cells <= family.cells[1]
        assert len(drawn.genotype.normal) in {2 * n for n in range(family.steps[0], family.steps[2] + 1)}
        assert drawn.norm in family.norms


def test_small_networks_can_be_predicted_and_run():
    ghn = build({**_TINY, "max_shape": [4, 4, 3, 3]})
    for index in range(12):
        drawn = sample("train", index, small=True)
        assert drawn.architecture.C == 8 and 3 <= drawn.architecture.n_cells <= 4
        net = drawn.architecture.build_light()
        ghn(net, drawn.graph, keep_grads=True, bn_track_running_stats=True, reduce_graph=True)
        assert net(torch.randn(2, 3, 32, 32))[0].isfinite().all()


def test_a_stem_without_readers_is_left_out():
    """All edges to the second input of the first two cells can be absent; then its weights are taken out too."""
    drawn = sample("train", 0, small=True).architecture
    genotype = drawn.genotype._replace(
        normal=(("conv_3x3", 0), ("none", 0)), normal_concat=(2,), reduce=(("conv_3x3", 1), ("conv_3x3", 1)),
        reduce_concat=(2,),
    )  # fmt: skip
    net = dataclasses.replace(drawn, genotype=genotype, n_cells=9, stem_type=1, preproc=True).build()
    expected = net.eval()(torch.ones(2, 3, 32, 32))[0]
    for name in ("stem1.1", "cells.0.preprocess1.op.1"):
        net.get_submodule(name).weight = None
    assert expected.shape == net(torch.ones(2, 3, 32, 32))[0].shape


@pytest.mark.parametrize(("split", "index", "match"), [("tset", 0, "unknown split 'tset'"), ("test", -1, "got -1")])
def test_bad_requests_are_named(split, index, match):
    with pytest.raises(ValueError, match=match):
        sample(split, index)


@pytest.mark.parametrize("reduce", [(("cse", 0), ("cse", 1)), (("conv_5x5", 0), ("conv_7x7", 1)), (("none", 0),) * 2])
def test_genotypes_that_are_slow_or_cannot_learn_are_rejected(reduce):
    skip = (("skip_connect", 0), ("skip_connect", 1))
    assert not sampling._allowed(sampling.Genotype(skip, (2,), reduce, (2,)))


@pytest.mark.slow
def test_graphs_have_the_published_sizes():
    """Published over 1000 networks: 192.3 +- 94.9 nodes, degree 2.3, paths of 14.5 +- 4.8."""
    n, graphs = 120, [sample("train", i).graph for i in range(120)]
    properties = [graph.properties() for graph in graphs]
    assert abs(np.mean([graph.n_nodes for graph in graphs]) - 192.3) < 3 * 94.9 / n**0.5
    assert abs(np.mean([one["avg_path"] for one in properties]) - 14.5) < 3 * 4.8 / n**0.5
    assert np.mean([one["avg_degree"] for one in properties]) == pytest.approx(2.3, abs=0.05)


_TINY = {
    "num_classes": 10, "hypernet": "graphormer", "decoder": "conv", "weight_norm": True, "ve": True, "layernorm": True,
    "hid": 8, "heads": 2, "layers": 1, "dialect": "ghn3", "rank": 0,
}  # fmt: skip
