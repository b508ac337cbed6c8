"""Finite nets sampled with given omegas: weights, gradients before and after projection, trajectories."""

import re

import pytest
import torch
from pilimit import FinMLP, InfMLP, clip_grad_norm_
from pilimit.schedules import cosine, exponential, lagged, linear, multistep
from support.golden import assert_close, assert_stats, fill
from support.infinite import golden_loss, golden_net, golden_optimizer, golden_step, stats

RENAMED = {
    "fla": "first_layer_alpha", "lla": "last_layer_alpha", "d": "d_in", "dout": "d_out", "per_param": "gclip_per_param",
    "first_mult": "first_layer_lr_mult", "last_mult": "last_layer_lr_mult", "bias_mult": "bias_lr_mult",
}  # fmt: skip


def recipe(stored):
    return {RENAMED.get(key, key): value for key, value in stored.items()}


def twin(config, project=True):
    """The finite net of a case, and how many data steps its infinite net has seen."""
    net = golden_net(config)
    optimizer = golden_optimizer(config, net)
    for t in range(config["trained_first"]):
        golden_step(config, net, optimizer, t)
    shape = (config["width"], config["r"])
    omegas = [fill(f"{config['case']}:omega.{n}", shape).double() for n in range(config["L"] + 1)]
    return FinMLP.sample(net, config["width"], omegas=omegas, project=project)


@pytest.mark.golden("finite_nets.json", cases="cases")
def test_sampled_nets_and_their_gradients_are_the_published_ones(golden):
    case, config = golden.case, recipe(golden.case["config"])
    for project, key in ((False, "grad_before_projection"), (True, "grad_after_projection")):
        net = twin(config, project)
        loss, output = golden_loss(config, net, config["trained_first"])
        loss.backward()
        assert_close(output, case["step0_output"], "float64", "output")
        for name, p in net.named_parameters():
            assert_stats(p, stats(case["initial_weights"][name]), "float64", name)
            assert_stats(p.grad, stats(case[key][name]), "float64", f"{key} {name}")
        assert set(case[key]) == {name for name, _ in net.named_parameters()}


@pytest.mark.golden("finite_nets.json", cases="cases")
def test_finite_training_follows_the_published_trajectories(golden):
    case, config = golden.case, recipe(golden.case["config"])
    net = twin(config)
    optimizer, losses = golden_optimizer(config, net), []
    for t in range(config["trained_first"], config["trained_first"] + len(case["loss_trajectory"])):
        optimizer.zero_grad()
        loss, _ = golden_loss(config, net, t)
        loss.backward()
        clip_grad_norm_(net.parameters(), config["gclip"], per_param=config["gclip_per_param"], eps=1e-6)
        optimizer.step()
        losses.append(loss.item())
    assert_close(losses, case["loss_trajectory"], "float64", "losses")
    for name, p in net.named_parameters():
        assert_stats(p, stats(case["final_weights"][name]), "float64", name)

    infinite = golden_net(config)
    optimizer = golden_optimizer(config, infinite)
    count = config["trained_first"] + len(case["infinite_width_loss_trajectory"])
    losses = [golden_step(config, infinite, optimizer, t) for t in range(count)][config["trained_first"] :]
    assert_close(losses, case["infinite_width_loss_trajectory"], "pilimit/float64", "losses of the infinite net")


@pytest.mark.slow
@pytest.mark.golden("finite_nets.json", cases=None)
def test_wide_nets_approach_the_infinite_one_as_the_published_did(golden):
    stored = golden.case["width_convergence"]
    config = recipe(stored["config"])
    config["case"] = config["case"].removesuffix(":")
    losses = {width: [] for width in map(int, stored["relative_error_per_width"])}

    def train(net):
        optimizer = golden_optimizer(config, net)
        return torch.tensor([golden_step(config, net, optimizer, t) for t in range(config["nsteps"])])

    limit = train(golden_net(config))
    generator = torch.Generator().manual_seed(0)
    for width, errors in losses.items():
        for _ in range(4 if width < 4096 else 2):
            errors.append(
                (train(FinMLP.sample(golden_net(config), width, generator=generator)) - limit).norm() / limit.norm()
            )
    means = torch.tensor([torch.stack(errors).mean() for errors in losses.values()]).log()
    widths = torch.tensor([float(width) for width in losses]).log()
    slope = ((widths - widths.mean()) * (means - means.mean())).sum() / ((widths - widths.mean()) ** 2).sum()
    assert -0.8 < slope < -0.3
    for width, errors in losses.items():
        published = torch.tensor(stored["relative_error_per_width"][str(width)]).mean()
        assert published / 4 < torch.stack(errors).mean() < published * 4


@pytest.mark.golden("schedules.json")
def test_schedules_are_the_published_ones(golden):
    """The names of the entries say the arguments, as in ``InfMultiStep_milestones_3_7_gamma_0p5``."""
    made = {
        "InfMultiStep": lambda n: lagged(multistep(n[:-1], n[-1])),
        "InfCosine": lambda n: lagged(cosine(n[0])),
        "InfExp": lambda n: lagged(exponential(n[0])),
        "InfLinear": lambda n: lagged(linear(n[0])),
        "torch": lambda n: multistep(n[:-1], n[-1]),
        "gclip": lambda n: lambda step: n[0] * lagged(multistep(n[1:-1], n[-1]))(step),
    }
    stored = {name: values for name, values in golden.case.items() if name != "recipe"}
    for name, values in stored.items():
        numbers = [float(number.replace("p", ".")) for number in re.findall(r"\d+(?:p\d+)?", name)]
        factor = made[name.split("_")[0]](numbers)
        assert_close([factor(step) for step in range(len(values))], values, "float64", name)


def test_random_finite_nets_have_the_sizes_of_the_infinite_ones():
    net = FinMLP(6, 3, r=4, width=2048, depth=2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    limit = InfMLP(6, 3, r=4, depth=2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert [tuple(p.shape) for p in net.parameters()] == [(2048, 6), (2048,), (2048, 2048), (2048,), (3, 2048), (3,)]
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (net(x) - limit(x)).norm() < 0.2 * limit(x).norm()
