"""Optimizers held against a prompt."""

import pytest
import torch
import torch.nn.functional as F
from gpt_diffusion.against import check_optimizers, hold_against, median_interval, model_steps
from gpt_diffusion.evaluation import batched_metric
from gpt_diffusion.generation import train_from, trajectories_from
from gpt_diffusion.generation.batches import Batches, derive_seed
from zoo_common.layout import ParameterLayout
from zoo_common.tasks import get_task

TASK = get_task("digits_loss")


@pytest.fixture(scope="module")
def starts():
    torch.manual_seed(0)
    networks = [TASK.constructor() for _ in range(3)]
    return ParameterLayout.from_module(networks[0]).stack(networks).detach()


def test_adam_is_torchs_adam_with_the_annealed_rate(starts):
    steps, lr, recipe, train = 8, 0.01, TASK.recipe, TASK.splits().train
    found = trajectories_from(TASK, starts, [0, 3, steps], seed=5, steps=steps, adam_lr=lr)
    assert torch.equal(found[:, 0], starts)
    layout = ParameterLayout.from_module(TASK.constructor())
    for run, start in enumerate(starts):
        network = TASK.constructor()
        layout.load_into(network, start)
        optimizer = torch.optim.Adam(network.parameters(), lr=lr)
        seeds = [derive_seed(5, "order", run)]
        stream = iter(Batches(train.images, train.labels, seeds, batch=recipe.batch, augmentation="none"))
        for rate, (x, y) in zip(recipe.learning_rates(len(train.images), steps), stream, strict=False):
            optimizer.param_groups[0]["lr"] = lr * rate / recipe.lr
            optimizer.zero_grad()
            F.cross_entropy(network(x[0]), y[0]).backward()
            optimizer.step()
        # Adam divides by the size of the gradient: rounding of tiny gradients moves a weight by up to the rate
        torch.testing.assert_close(found[run, 2], layout.flatten(network).detach(), rtol=0, atol=2e-3)


def test_the_last_point_is_what_train_from_gives(starts):
    ends = train_from(TASK, starts, seed=1, steps=5)
    assert torch.equal(trajectories_from(TASK, starts, [2, 5], seed=1, steps=5)[:, 1], ends)


def test_steps_needed_are_counted_at_the_first_point_that_is_as_good(starts):
    metric, steps = batched_metric(TASK, torch.device("cpu")), 40
    ends = metric(trajectories_from(TASK, starts, [10], seed=0, steps=steps)[:, 0])
    reached = torch.stack([ends[0], metric(starts)[1], torch.tensor(0.0)])
    rival = hold_against("sgd", TASK, starts, reached, starts, metric, steps=steps)
    assert rival.steps[0] == 0 and rival.steps[-1] == steps
    assert rival.needed == (10, 0, None)
    assert rival.median == 10 and rival.interval == (0, None)
    assert rival.words == "10 steps (95 % 0 to never; 1 of 3 never reach it)"
    assert rival.lr == TASK.recipe.lr


def test_a_goal_that_nothing_reaches(starts):
    metric = batched_metric(TASK, torch.device("cpu"))
    rival = hold_against("adam", TASK, starts, torch.zeros(3), starts, metric, steps=4)
    assert rival.median is None and rival.words.startswith("not reached in 4 steps")


def test_the_rate_of_adam_is_the_best_on_other_runs(starts):
    metric, steps = batched_metric(TASK, torch.device("cpu")), 20
    rival = hold_against("adam", TASK, starts, torch.zeros(3), starts[:2], metric, steps=steps)
    finals = {
        lr: metric(trajectories_from(TASK, starts[:2], [steps], seed=1, steps=steps, adam_lr=lr)[:, 0]).mean()
        for lr in (0.001, 0.003, 0.01, 0.03)
    }
    assert rival.lr == min(finals, key=finals.get)


def test_the_median_has_an_interval_of_order_statistics():
    values = [*range(1, 20), None]
    low, middle, high = median_interval(values)
    assert (low, middle, high) == (6, 11, 15)  # ranks 6 and 15 of 20: coverage 0.9586
    assert median_interval([None, None]) == (None, None, None)
    assert median_interval([4]) == (4, 4, 4)


def test_the_steps_of_all_trainings_are_counted(starts):
    metric, done = batched_metric(TASK, torch.device("cpu")), []
    for name in ("sgd", "adam"):
        hold_against(name, TASK, starts, torch.zeros(3), starts[:2], metric, steps=3, tick=done.append)
    assert sum(done) == model_steps(("sgd", "adam"), 3, 2, 3)


def test_unknown_optimizers_are_named():
    assert check_optimizers("SGD, adam") == ("sgd", "adam")
    with pytest.raises(ValueError, match="'rmsprop' is unknown; choose from sgd, adam"):
        check_optimizers("rmsprop")
