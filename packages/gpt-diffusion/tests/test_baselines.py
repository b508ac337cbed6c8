import torch
from gpt_diffusion.baselines import aligned_mean, best_ridge, line_to, nearest_by_metric, ridge
from torch import nn
from zoo_common.symmetry import Symmetry

NET = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
SYMMETRY = Symmetry.from_module(NET, torch.zeros(2, 5))
D = SYMMETRY.layout.size


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nearest_by_metric_is_the_nearest():
    stored, prompts = noise(50), 2 * noise(3, 7, seed=1)
    chosen = stored[nearest_by_metric(stored, prompts)]
    expected = (stored - prompts[..., None]).abs().amin(-1)
    torch.testing.assert_close((chosen - prompts).abs(), expected)


def test_the_mean_of_permuted_copies_is_the_network():
    network = noise(D)
    copies = SYMMETRY.permute(network.expand(20, -1), torch.Generator().manual_seed(1))
    mean = aligned_mean(copies, SYMMETRY)
    torch.testing.assert_close(SYMMETRY.align(mean[None], network)[0], network, rtol=1e-5, atol=1e-5)
    assert (copies.mean(0) - network).norm() > 1  # without alignment it is another network


def test_lines_lead_from_the_start_to_the_permuted_goal():
    goal, starts = noise(D), noise(3, D, seed=1)
    lines = line_to(goal, starts, SYMMETRY, points=5)
    torch.testing.assert_close(lines[:, 0], starts)
    torch.testing.assert_close(lines[:, 2], (lines[:, 0] + lines[:, 4]) / 2)
    for start, end in zip(starts, lines[:, -1], strict=True):
        torch.testing.assert_close(end, SYMMETRY.align(goal[None], start)[0], rtol=1e-5, atol=1e-5)


def test_ridge_finds_a_linear_map_and_its_penalty_shrinks_to_the_mean():
    starts, matrix = noise(200, 6).double(), noise(6, 6, seed=1).double()
    ends = starts @ matrix + 3
    torch.testing.assert_close(ridge(starts, ends, 1e-9)(starts), ends)
    shrunk = ridge(starts, ends, 1e12)(starts)
    torch.testing.assert_close(shrunk, ends.mean(0).expand_as(ends), rtol=1e-6, atol=1e-6)


def test_the_penalty_is_chosen_on_other_runs():
    """Ends that have nothing to do with the starts are predicted best by their mean."""
    fit, judge = (noise(30, 6), noise(30, 6, seed=1)), (noise(500, 6, seed=2), noise(500, 6, seed=3))
    error = {p: (ridge(*fit, p)(judge[0]) - judge[1]).square().mean().item() for p in (0.1, 1000)}
    assert error[1000] < error[0.1]
    chosen = best_ridge(fit, judge, penalties=(0.1, 1000))
    torch.testing.assert_close(chosen(judge[0]), ridge(*fit, 1000)(judge[0]))
