import re
import zlib

import numpy as np
import pytest
import torch
from gpt_diffusion.diffusion import LossSecondMomentSampler, UniformSampler, create_sampler
from support.golden import assert_close


def number(pattern, recipe):
    """A number that this file states only in the words of its recipe."""
    return int(re.search(pattern, recipe)[1])


@pytest.mark.golden("timestep_samplers.json")
def test_uniform_steps_are_the_published_ones(golden):
    expected, recipe = golden.case["uniform"], golden.case["recipe"]
    seed, count = number(r"seed\((\d+)\)", recipe), len(expected["indices"])
    uniforms = torch.from_numpy(np.random.RandomState(seed).random_sample(count))
    t, weights = UniformSampler(number(r"(\d+)-step", recipe)).sample(count, uniforms=uniforms)
    assert t.tolist() == expected["indices"]
    assert_close(weights, expected["weights"], "float32", "weights")


@pytest.mark.golden("timestep_samplers.json")
def test_second_moment_weights_are_the_published_ones(golden):
    expected, recipe = golden.case["second_moment"], golden.case["recipe"]
    steps, history, count = (
        len(expected["before"]),
        number(r"history_per_term=(\d+)", recipe),
        number(r"size=(\d+)", recipe),
    )
    mixed = float(re.search(r"uniform_prob=([\d.]+\d)", recipe)[1])
    sampler = LossSecondMomentSampler(steps, history_per_term=history, uniform_prob=mixed)
    assert_close(sampler.weights(), expected["before"], "float64", "before")
    random = np.random.RandomState(zlib.crc32(re.search(r"crc32\('(\w+)'\)", recipe)[1].encode()))
    t, losses = random.randint(0, steps, size=count), abs(random.standard_normal(count))
    sampler.update(torch.from_numpy(t), torch.from_numpy(losses))
    assert_close(sampler.weights(), expected["after"], "float32", "after")


def test_importance_weights_keep_the_mean_unbiased():
    """sum_t p_t w_t f(t) is the mean of f for every f, so w_t p_t = 1/T."""
    sampler = LossSecondMomentSampler(4, history_per_term=1)
    sampler.update(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 10.0]))
    uniforms = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    t, weights = sampler.sample(len(uniforms), uniforms=uniforms)
    counts = torch.bincount(t, minlength=4) / len(t)
    torch.testing.assert_close(counts.double(), sampler.weights() / sampler.weights().sum(), rtol=0, atol=1e-4)
    for step in range(4):
        assert abs((weights * (t == step)).double().mean().item() - 0.25) < 1e-3


def test_the_oldest_loss_is_forgotten_and_the_history_is_saved():
    sampler = LossSecondMomentSampler(2, history_per_term=2)
    sampler.update(torch.tensor([0, 0, 1, 0, 1]), torch.tensor([9.0, 1.0, 3.0, 2.0, 4.0]))
    assert sampler.history.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    other = LossSecondMomentSampler(2, history_per_term=2)
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.weights(), sampler.weights()) and not torch.equal(other.weights(), torch.ones(2))


def test_a_process_group_shares_the_losses(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sampler = LossSecondMomentSampler(2, history_per_term=1)
        sampler.update(torch.tensor([1, 0]), torch.tensor([5.0, 3.0], requires_grad=True))
    finally:
        torch.distributed.destroy_process_group()
    assert sampler.history.flatten().tolist() == [3.0, 5.0]


def test_a_uniform_number_on_the_border_belongs_to_the_next_step():
    """As in numpy.random.choice: step t has the half-open interval from sum_{s<t} p_s to sum_{s<=t} p_s."""
    uniforms = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    assert UniformSampler(4).sample(4, uniforms=uniforms)[0].tolist() == [0, 1, 2, 3]


def test_same_generator_same_steps_and_names_are_checked():
    draws = [create_sampler("uniform", 50).sample(9, generator=torch.Generator().manual_seed(1))[0] for _ in range(2)]
    assert torch.equal(*draws) and draws[0].dtype == torch.int64
    assert isinstance(create_sampler("loss-second-moment", 5), LossSecondMomentSampler)
    with pytest.raises(ValueError, match="'all' is unknown; use one of uniform, loss-second-moment"):
        create_sampler("all", 5)
