import copy
import math

import pytest
import torch
from gpt_diffusion.diffusion import create_diffusion
from gpt_diffusion.optim import (
    apply_gradients,
    averaged_copy,
    clip_gradients,
    learning_rate,
    make_optimizer,
    param_groups,
    update_average,
)
from support.golden import assert_close, fill


@pytest.mark.golden("lr_schedule.json", cases="cases")
def test_learning_rates_are_the_published_ones(golden):
    case = golden.case
    lengths = {"num_epochs": case["num_ep"], "warmup_epochs": case["warmup_epochs"]}
    settings = {key: case[key] for key in ("base_lr", "warmup_factor")} | lengths
    settings |= {"schedule": case["lr_sch"]} if "lr_sch" in case else {}
    for epoch, expected in zip(case["epochs"], case["lr"], strict=True):
        assert_close(learning_rate(epoch, **settings), expected, "float64", f"lr at {epoch}")


@pytest.mark.golden("train_steps.json", having="training")
def test_training_steps_are_the_published_ones(golden, filled_model):
    case = golden.case
    training, tag = case["training"], case["tag"]
    model = filled_model(case["config"])
    average = averaged_copy(model)
    diffusion = create_diffusion(**training["diffusion"])
    optimizer = make_optimizer(model, lr=training["lr"], weight_decay=training["wd"], beta2=training["beta2"])
    target, prev = (torch.tensor(case[k], dtype=torch.float64) for k in ("loss_target", "loss_prev"))
    shape = (case["B"], model.num_weights)
    assert len(case["steps"]) == training["steps"]
    for step in case["steps"]:
        name = f"{tag}/step{step['step']}"
        losses = diffusion.training_losses(
            model,
            fill(f"{name}/w1", shape, 0.5),
            torch.tensor(step["t"]),
            loss_target=target,
            loss_prev=prev,
            x_prev=fill(f"{name}/w0", shape, 0.5),
            noise=fill(f"{name}/noise", shape, 1),
        )
        loss = losses.loss.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = apply_gradients(
            model,
            optimizer,
            lr=training["lr"],
            grad_clip=training["grad_clip"],
            average=average,
            decay=training["ema_decay"],
        )
        assert_close(losses.loss, step["per_sample_loss"], "gpt-diffusion/loss", "loss per sample")
        assert_close(loss, step["loss"], "gpt-diffusion/loss", "loss")
        assert_close(norm, step["grad_norm_before_clip"], "float32", "gradient norm")
        for key, m in (("param_l2", model), ("ema_l2", average)):
            total = math.sqrt(sum(p.double().square().sum().item() for p in m.parameters()))
            assert_close(total, step[key], "gpt-diffusion/loss", key)
        parameters, averages = dict(model.named_parameters()), dict(average.named_parameters())
        for key, stats in step["tensors"].items():
            p = parameters[key].detach().double()
            assert_close(p.norm(), stats["l2"], "gpt-diffusion/loss", key)
            assert_close(averages[key].double().norm(), stats["ema_l2"], "gpt-diffusion/loss", key)
            # the mean cancels, so its scale is that of the values
            assert abs(p.mean().item() - stats["mean"]) <= 1e-5 * p.abs().max().item(), key


def test_average_equals_the_formula_and_leaves_buffers_alone():
    g = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    average = averaged_copy(model)
    expected = [p.detach().clone() for p in model.parameters()]
    for _ in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype))
        model[1].running_mean += 1
        update_average(average, model, 0.9)
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    for e, a in zip(expected, average.parameters(), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-14)
    assert not average[1].running_mean.any()
    assert not any(p.requires_grad for p in average.parameters()) and not average.training


def test_clipping_scales_the_global_norm_and_zero_means_no_limit():
    p = torch.nn.Parameter(torch.zeros(2))
    for limit, expected in ((1.0, [0.6, 0.8]), (0.0, [3.0, 4.0]), (10.0, [3.0, 4.0])):
        p.grad = torch.tensor([3.0, 4.0])
        assert clip_gradients([p], limit).item() == 5
        torch.testing.assert_close(p.grad, torch.tensor(expected), rtol=1e-5, atol=0)


def test_only_linear_weights_decay_also_of_a_bare_layer():
    for model in (torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))):
        decayed, rest = param_groups(model, 0.3)
        assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.3
        assert {p.ndim for p in rest["params"]} == {1} and rest["weight_decay"] == 0


def test_a_step_uses_the_learning_rate_it_is_given():
    model = torch.nn.Linear(2, 1)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, lr=1.0)
    model(torch.ones(1, 2)).sum().backward()
    apply_gradients(model, optimizer, lr=0.0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    apply_gradients(model, optimizer, lr=0.01)
    assert not any(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_fixed_schedule_and_unknown_schedule():
    assert learning_rate(5, base_lr=0.3, num_epochs=10, schedule="fixed") == 0.3
    with pytest.raises(ValueError, match="schedule 'step' is unknown; use cos or fixed"):
        learning_rate(5, base_lr=0.3, num_epochs=10, schedule="step")
