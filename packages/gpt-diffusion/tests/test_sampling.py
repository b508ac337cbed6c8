import pytest
import torch
from gpt_diffusion.diffusion import Diffusion, create_diffusion
from gpt_diffusion.model import GptModel
from gpt_diffusion.sampling import sample
from support.golden import assert_close, assert_stats, fill


def recorded(diffusion):
    """The process, keeping the result of every sampling step."""
    steps = []
    for name in ("p_sample", "ddim_sample"):
        original = getattr(diffusion, name)

        def call(*args, original=original, **kwargs):
            steps.append(original(*args, **kwargs))
            return steps[-1]

        setattr(diffusion, name, call)
    return steps


@pytest.mark.golden("sampling_trajectory.json", cases="runs")
def test_trajectories_are_the_published_ones(golden, filled_model):
    run, document, arrays = golden.case, golden.document, golden.tensors()
    model = filled_model(document["config"])
    shape = (document["B"], model.num_weights)
    diffusion = create_diffusion(**run["args"])
    steps = recorded(diffusion)
    name = f"{document['tag']}/{run['name']}"
    final = sample(
        model,
        diffusion,
        start=fill(f"{document['tag']}/x_prev", shape, 0.5),
        prompt=torch.tensor(document["loss_target"]),
        start_metric=torch.tensor(document["loss_prev"]),
        sampler=run["kind"],
        eta=run["options"].get("eta", 0.0),
        clip=run["options"].get("clamp"),
        noise=(fill(f"{name}/noise{i}", shape) for i in range(diffusion.num_timesteps + 1)),
    )
    row = "gpt-diffusion/ddim" if run["kind"] == "ddim" else "gpt-diffusion/process"
    assert diffusion.num_timesteps == run["n_steps"] == len(steps)
    for stored in run["steps"]:
        step = steps[stored["step"]]
        for key, value in (("sample", step.sample), ("pred_xstart", step.pred_xstart)):
            assert_close(value.double().mean(), stored[f"{key}_mean"], row, f"mean of {key} {stored['step']}")
            assert_close(value.double().std(correction=0), stored[f"{key}_std"], row, f"std of {key} {stored['step']}")
    assert_close(steps[0].sample, arrays[f"{run['name']}/first_sample"], row, "first sample")
    assert_close(final, arrays[f"{run['name']}/final"], row, "final")
    assert_stats(final, run["final"], row, "final")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GptModel([12, 4, 8, 2], split_policy="layer_by_layer", n_layer=2, n_head=2, n_embd=16, max_freq_log2=6)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.double()


def conditions(n=5):
    g = torch.Generator().manual_seed(1)
    start = torch.randn(n, 26, generator=g, dtype=torch.float64)
    return {"start": start, "prompt": torch.linspace(0.1, 1, n), "start_metric": torch.linspace(2, 3, n)}


def test_ddim_with_all_steps_and_eta_0_does_not_depend_on_any_generator_after_the_first_draw(model):
    diffusion, given = Diffusion(), conditions(2)
    x_T = torch.randn(2, 26, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    finals = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        noise = (x_T if i == 0 else torch.randn(2, 26, dtype=torch.float64) for i in range(1001))
        finals.append(sample(model, diffusion, **given, sampler="ddim", noise=noise))
    assert torch.equal(*finals)
    state = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(2)
    torch.testing.assert_close(
        sample(model, diffusion, **given, sampler="ddim", generator=generator), finals[0], rtol=0, atol=0
    )
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("dpm++", 0.0)])
def test_result_does_not_depend_on_the_batch_size(model, sampler, eta):
    runs = [
        sample(
            model,
            Diffusion(respacing="10"),
            **conditions(),
            sampler=sampler,
            eta=eta,
            generator=torch.Generator().manual_seed(0),
            batch_size=size,
        )
        for size in (None, 1, 2, 5, 100)
    ]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=1e-12)


MEAN, STD = 0.7, 0.3


class Gaussian:
    """The best denoiser of x_0 ~ N(MEAN, STD^2)."""

    alphas_cumprod = torch.from_numpy(Diffusion().schedule.alphas_cumprod)

    def condition(self, loss_target, loss_prev, x_prev):
        def denoise(x, t):
            abar = self.alphas_cumprod[t][:, None]
            gain = abar.sqrt() * STD**2 / (abar * STD**2 + 1 - abar)
            return MEAN + gain * (x - abar.sqrt() * MEAN)

        return denoise


def of_gaussian(process, n=2000, **kwargs):
    zeros = torch.zeros(n)
    start = torch.zeros(n, 4, dtype=torch.float64)
    return sample(Gaussian(), process, start=start, prompt=zeros, start_metric=zeros, **kwargs)


def test_ancestral_sampling_of_a_perfect_denoiser_of_a_gaussian_gives_its_moments():
    """For x_0 ~ N(m, s^2) the best prediction is known, and the samples must have mean m and deviation s."""
    for sampler, eta in (("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm++", 0.0)):
        out = of_gaussian(Diffusion(), sampler=sampler, eta=eta, generator=torch.Generator().manual_seed(0))
        assert abs(out.mean().item() - MEAN) < 4 * STD / 8000**0.5  # four standard errors
        assert abs(out.std().item() - STD) < 4 * STD / 16000**0.5


def test_dpm_solver_is_of_second_order():
    """With a Gaussian the end of a path is known: each number keeps its quantile."""
    noise = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    abar = Gaussian.alphas_cumprod[-1]
    exact = MEAN + STD * (noise - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar).sqrt()
    errors = {
        (sampler, steps): (
            of_gaussian(Diffusion(respacing=f"snr{steps}"), 50, sampler=sampler, noise=[noise] * (steps + 1)) - exact
        )
        .abs()
        .max()
        .item()
        for sampler in ("ddim", "dpm++")
        for steps in (20, 80)
    }
    assert 3.5 < errors["ddim", 20] / errors["ddim", 80] < 4.5
    assert errors["dpm++", 20] / errors["dpm++", 80] > 10
    assert errors["ddim", 20] / errors["dpm++", 20] > 5


def test_the_first_step_of_dpm_solver_and_its_last_are_those_of_ddim(model):
    of_two = Diffusion(respacing="snr2")
    runs = [
        sample(model, of_two, **conditions(), sampler=sampler, generator=torch.Generator().manual_seed(0))
        for sampler in ("ddim", "dpm++")
    ]
    assert torch.equal(*runs)


def test_clip_bounds_the_result_and_progress_counts_the_steps(model):
    seen = []
    out = sample(
        model,
        Diffusion(respacing="ddim10"),
        **conditions(),
        sampler="ddim",
        clip=(-0.2, 0.1),
        progress=lambda done, of: seen.append((done, of)),
    )
    assert out.min() == -0.2 and out.max() == 0.1
    assert seen == [(i, 10) for i in range(1, 11)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sampler": "euler"}, "sampler 'euler' is unknown; use ddpm, ddim or dpm\\+\\+"),
        ({"prompt": torch.ones(3)}, r"prompt: expected \(5,\), one per start, got \(3,\)"),
        ({"start_metric": torch.ones(5, 1)}, r"start_metric: expected \(5,\), one per start, got \(5, 1\)"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"noise": [torch.zeros(5, 26)] * 4}, "noise: 11 draws needed"),
    ],
)
def test_bad_input_is_named(model, change, match):
    with pytest.raises(ValueError, match=match):
        sample(model, Diffusion(respacing="10"), **conditions() | change)
