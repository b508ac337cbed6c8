import re

import numpy as np
import pytest
import torch
from gpt_diffusion.diffusion import (
    Diffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    Schedule,
    betas_between,
    create_diffusion,
    named_betas,
    space_timesteps,
)
from support.golden import assert_close, assert_stats, fill


@pytest.mark.golden("diffusion_schedule.json", cases="cases")
def test_constants_are_the_published_ones(golden):
    case, arrays = golden.case, golden.arrays
    diffusion = create_diffusion(**case["args"])
    assert diffusion.num_timesteps == case["num_timesteps"]
    kept = case["timestep_map"]
    if isinstance(kept, dict):
        assert diffusion.timestep_map[: len(kept["first"])] == kept["first"]
        assert diffusion.timestep_map[-len(kept["last"]) :] == kept["last"]
    else:
        assert diffusion.timestep_map == kept
    kinds = {"mean_type": diffusion.mean_type, "var_type": diffusion.var_type, "loss_type": diffusion.loss_type}
    assert {k: v.name for k, v in kinds.items()} == {k: case[k] for k in kinds}
    for name, stats in case["stats"].items():
        ours = getattr(diffusion.schedule, name)
        assert ours.dtype == np.float64
        assert_stats(torch.from_numpy(ours), stats, "gpt-diffusion/schedule", name)
        if f"{case['name']}/{name}" in arrays:
            assert_close(ours, arrays[f"{case['name']}/{name}"], "gpt-diffusion/schedule", name)


@pytest.mark.golden("respacing.json", cases="cases")
def test_kept_steps_are_the_published_ones(golden):
    case = golden.case
    assert sorted(space_timesteps(case["num_timesteps"], case["section_counts"])) == case["steps"]


@pytest.mark.golden("respacing.json", cases="errors")
def test_impossible_respacing_is_refused(golden):
    assert golden.case["raises"] == "ValueError"
    with pytest.raises(ValueError, match="respacing"):
        space_timesteps(golden.case["num_timesteps"], golden.case["section_counts"])


def stub(learned, x_prev, seen=None):
    def denoise(x, t):
        if seen is not None:
            seen.append(t.tolist())
        s = t[:, None].float()
        out = 0.9 * torch.tanh(0.8 * x + 0.05 * torch.cos(0.01 * s)) + 0.1 * x_prev
        return torch.cat([out, torch.sin(x + 0.02 * s)], 1) if learned else out

    return denoise


@pytest.mark.golden("diffusion_ops.json", cases="cases")
def test_operations_are_the_published_ones(golden):
    case, tag = golden.case, golden.document["tag"]
    shape = (golden.document["B"], golden.document["D"])
    stored = {
        k.removeprefix(case["name"] + "/"): v for k, v in golden.tensors().items() if k.startswith(case["name"] + "/")
    }
    diffusion = create_diffusion(**case["args"])
    assert diffusion.num_timesteps == case["num_timesteps"]
    x_start, x_t = fill(f"{tag}/x_start", shape, 0.7), fill(f"{tag}/x_t", shape, 1.1)
    noise, x_prev, t = fill(f"{tag}/noise", shape), fill(f"{tag}/x_prev", shape, 0.5), torch.tensor(case["t"])
    draw = fill(f"{tag}/noise0", shape)
    seen = []
    denoise = stub(diffusion.var_type is ModelVarType.LEARNED_RANGE, x_prev, seen)
    guide = lambda x, t: -0.3 * x
    ours = {}

    def add(prefix, values):
        ours.update({f"{prefix}.{k}" if prefix else k: v for k, v in values._asdict().items()})

    add("q_mean_variance", diffusion.q_mean_variance(x_start, t))
    q = diffusion.q_posterior(x_start, x_t, t)
    ours |= {"q_posterior.mean": q.mean, "q_posterior.variance": q.variance}
    ours["q_posterior.log_variance_clipped"] = q.log_variance
    ours["q_sample"] = diffusion.q_sample(x_start, t, noise)
    for clip in (0, 1):
        add(f"p_mean_variance.clip{clip}", diffusion.p_mean_variance(denoise, x_t, t, clip_denoised=bool(clip)))
    assert seen[0] == case["t_seen_by_model"]
    limits = re.search(r"clamp to \[([-\d.]+), ([-\d.]+)\]", golden.document["recipe"])
    low, high = (float(limit) for limit in limits.groups())
    static = diffusion.p_mean_variance(denoise, x_t, t, clip_denoised=False, denoised_fn=lambda x: x.clamp(low, high))
    ours["p_mean_variance.static.mean"] = static.mean
    ours["p_sample"] = diffusion.p_sample(denoise, x_t, t, draw, clip_denoised=False).sample
    ours["p_sample.cond_mean"] = diffusion.p_sample(denoise, x_t, t, draw, clip_denoised=False, guide=guide).sample
    for key in (key for key in stored if key.startswith("ddim_sample.eta")):
        eta = float(key.removeprefix("ddim_sample.eta"))
        ours[key] = diffusion.ddim_sample(denoise, x_t, t, draw, eta=eta, clip_denoised=False).sample
    ours["ddim_sample.cond_score"] = diffusion.ddim_sample(
        denoise, x_t, t, draw, clip_denoised=False, guide=guide
    ).sample
    ours["ddim_reverse_sample"] = diffusion.ddim_reverse_sample(denoise, x_t, t, clip_denoised=False).sample
    ours["prior_bpd"] = diffusion.prior_bpd(x_start)
    noised = ours["q_sample"]
    ours["vb_terms_bpd"] = diffusion.vb_terms_bpd(denoise, x_start, noised, t, clip_denoised=False)[0]
    losses = diffusion.training_losses(
        lambda x, t, loss_target, *, loss_prev, x_prev: denoise(x, t),
        x_start,
        t,
        loss_target=t,
        loss_prev=t,
        x_prev=x_prev,
        noise=noise,
    )
    ours |= {f"training_losses.{k}": v for k, v in losses._asdict().items() if k != "pred_xstart"}
    if "calc_bpd_loop.vb" in stored:
        draws = [fill(f"{tag}/bpd/noise{i}", shape) for i in range(diffusion.num_timesteps)]
        bound = diffusion.calc_bpd_loop(denoise, x_start, draws, clip_denoised=False)
        add("calc_bpd_loop", bound)
        ours["calc_bpd_loop.total_bpd"], ours["calc_bpd_loop.prior_bpd"] = bound.total, bound.prior
    missing = set(stored) - set(ours)
    assert not missing
    for key, expected in stored.items():
        if key.startswith("ddim"):
            row = "gpt-diffusion/ddim"
        elif "bpd" in key or key.startswith("training_losses"):
            row = "gpt-diffusion/loss"
        else:
            row = "gpt-diffusion/process"
        assert_close(ours[key], expected, row, key)


def process(**kwargs):
    return Diffusion("squaredcos_cap_v2", 50, **kwargs)


def pair(n=49, d=3):
    return torch.randn(2, n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_posterior_agrees_with_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): two Gaussians."""
    diffusion, t = process(), torch.arange(1, 50)
    x0, xt = pair()
    q = diffusion.q_posterior(x0, xt, t)
    betas, abar = (torch.from_numpy(a) for a in (diffusion.schedule.betas, diffusion.schedule.alphas_cumprod))
    beta, prior = betas[t, None], abar[t - 1, None]
    precision = (1 - beta) / beta + 1 / (1 - prior)
    torch.testing.assert_close(q.variance, (1 / precision).expand(-1, 3))
    torch.testing.assert_close(q.log_variance, q.variance.log())
    expected = (1 - beta).sqrt() / beta * xt + prior.sqrt() / (1 - prior) * x0
    torch.testing.assert_close(q.mean * precision, expected)


def test_respacing_keeps_the_marginals_of_the_original_process():
    original, respaced = Diffusion(), Diffusion(respacing="7,3")
    kept = original.schedule.alphas_cumprod[respaced.timestep_map]
    np.testing.assert_allclose(respaced.schedule.alphas_cumprod, kept, rtol=1e-12)
    assert respaced.original_steps(torch.tensor([0, 9])).tolist() == [0, 999]


@pytest.mark.parametrize("mean_type", [ModelMeanType.START_X, ModelMeanType.EPSILON])
@pytest.mark.parametrize("var_type", ModelVarType)
def test_a_perfect_model_has_no_loss_and_the_predicted_start_is_the_start(mean_type, var_type):
    diffusion = process(mean_type=mean_type, var_type=var_type)
    x0, noise = pair()
    t = torch.arange(1, 50)
    v = -torch.ones_like(x0)  # learned range: the posterior's variance

    def model(x, steps, loss_target, *, loss_prev, x_prev):
        out = x0 if mean_type is ModelMeanType.START_X else noise
        return torch.cat([out, v], 1) if var_type is ModelVarType.LEARNED_RANGE else out

    losses = diffusion.training_losses(model, x0, t, loss_target=t, loss_prev=t, x_prev=x0, noise=noise)
    torch.testing.assert_close(losses.loss, torch.zeros(49, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(losses.pred_xstart, x0, rtol=0, atol=1e-9)
    assert (losses.vb is not None) == (var_type is ModelVarType.LEARNED_RANGE)


def test_the_previous_x_has_a_loss_but_no_sampling():
    diffusion = process(mean_type=ModelMeanType.PREVIOUS_X)
    x0, noise = pair()
    t = torch.arange(1, 50)
    target = diffusion.q_posterior(x0, diffusion.q_sample(x0, t, noise), t).mean
    losses = diffusion.training_losses(
        lambda *a, **k: target + 2, x0, t, loss_target=t, loss_prev=t, x_prev=x0, noise=noise
    )
    torch.testing.assert_close(losses.mse, torch.full((49,), 4.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="no predicted x_0: use START_X or EPSILON"):
        diffusion.p_sample(lambda x, t: x, x0, t, noise)


@pytest.mark.parametrize("loss_type", [LossType.KL, LossType.RESCALED_KL])
def test_variational_loss_is_the_bound_and_gradients_reach_the_prediction(loss_type):
    diffusion = process(loss_type=loss_type)
    x0, noise = pair()
    t = torch.arange(49)
    guess = (x0 + 1).requires_grad_()
    losses = diffusion.training_losses(lambda *a, **k: guess, x0, t, loss_target=t, loss_prev=t, x_prev=x0, noise=noise)
    x_t = diffusion.q_sample(x0, t, noise)
    term, _ = diffusion.vb_terms_bpd(lambda x, t: guess, x0, x_t, t, clip_denoised=False)
    torch.testing.assert_close(losses.loss, term * (50 if loss_type is LossType.RESCALED_KL else 1))
    assert losses.mse is None and losses.pred_xstart is guess
    losses.loss.sum().backward()
    assert (guess.grad.abs().sum(1) > 0).all()


def test_learned_variance_is_taught_without_moving_the_mean():
    diffusion = process(var_type=ModelVarType.LEARNED_RANGE)
    x0, noise = pair()
    t = torch.arange(1, 50)
    mean, v = (x0 + 1).requires_grad_(), torch.zeros_like(x0, requires_grad=True)
    losses = diffusion.training_losses(
        lambda *a, **k: torch.cat([mean, v], 1), x0, t, loss_target=t, loss_prev=t, x_prev=x0, noise=noise
    )
    losses.vb.sum().backward()
    assert v.grad.abs().min() > 0
    assert not mean.grad.any()


def test_exact_likelihood_of_the_last_step_is_that_of_the_normal_density():
    diffusion = process()
    x0, x_t = pair()
    t = torch.zeros(49, dtype=torch.int64)
    denoise = lambda x, t: 0.5 * x
    exact, _ = diffusion.vb_terms_bpd(denoise, x0, x_t, t, clip_denoised=False, exact_nll=True)
    p = diffusion.p_mean_variance(denoise, x_t, t, clip_denoised=False)
    density = torch.distributions.Normal(p.mean, p.variance.sqrt()).log_prob(x0)
    torch.testing.assert_close(exact, -density.mean(1) / np.log(2))


def test_ddim_reverse_undoes_ddim():
    diffusion = process()
    x0, x_t = pair(n=4)
    t = torch.tensor([5, 10, 20, 30])
    there = diffusion.ddim_sample(lambda x, t: x0, x_t, t, clip_denoised=False).sample
    back = diffusion.ddim_reverse_sample(lambda x, t: x0, there, t - 1, clip_denoised=False).sample
    torch.testing.assert_close(back, x_t)


def test_noise_of_a_training_loss_comes_from_the_generator():
    diffusion = process()
    x0, _ = pair()
    t = torch.arange(49)
    call = lambda seed: (
        diffusion.training_losses(
            lambda x, *a, **k: x,
            x0,
            t,
            loss_target=t,
            loss_prev=t,
            x_prev=x0,
            generator=torch.Generator().manual_seed(seed),
        ).loss
    )
    assert torch.equal(call(1), call(1)) and not torch.equal(call(1), call(2))


def test_extra_output_of_a_model_is_passed_on():
    diffusion = process()
    x0, x_t = pair()
    p = diffusion.p_mean_variance(lambda x, t: (x0, "extra"), x_t, torch.arange(49), clip_denoised=False)
    assert p.extra == "extra" and p.pred_xstart is x0


def test_a_process_of_one_step_samples_its_prediction():
    diffusion = Diffusion(respacing=[1])
    x0, x_t = pair()
    t = torch.zeros(49, dtype=torch.int64)
    step = diffusion.p_sample(lambda x, t: x0, x_t, t, torch.ones_like(x0), clip_denoised=False)
    torch.testing.assert_close(step.sample, x0)


def test_betas_between_two_values():
    kinds = {k: betas_between(k, 20, beta_start=0.01, beta_end=0.09) for k in ("linear", "quad", "const")}
    assert kinds["linear"][[0, -1]].tolist() == [0.01, 0.09] and np.ptp(np.diff(kinds["linear"])) < 1e-15
    np.testing.assert_allclose(np.sqrt(kinds["quad"]), np.linspace(0.1, 0.3, 20))
    assert (kinds["const"] == 0.09).all()
    for kind, ramp in (("warmup10", 2), ("warmup50", 10)):
        betas = betas_between(kind, 20, beta_start=0.01, beta_end=0.09)
        np.testing.assert_allclose(betas[:ramp], np.linspace(0.01, 0.09, ramp))
        assert (betas[ramp:] == 0.09).all()
    np.testing.assert_allclose(betas_between("jsd", 4, beta_start=0, beta_end=0), [1 / 4, 1 / 3, 1 / 2, 1])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Diffusion("linear", 19), "needs at least 20 steps .beta would reach 1.05., got 19; use squaredcos"),
        (lambda: Diffusion("cosine"), "noise schedule 'cosine' is unknown; use one of linear, squaredcos_cap_v2"),
        (lambda: Diffusion("squaredcos_cap_v2", 0), "at least 1 step, got 0"),
        (lambda: betas_between("cubic", 3, beta_start=0, beta_end=1), "'cubic' is unknown; use linear, quad"),
        (lambda: Schedule(np.array([0.1, 1.5])), r"betas must be .*\(0, 1\]"),
        (lambda: space_timesteps(10, "4,20"), "section 1 has 5 of 10 steps, cannot keep 20"),
        (lambda: space_timesteps(10, "ddimx"), "'x' is not a positive number"),
        (lambda: Diffusion(respacing="snr0"), "'0' is not a positive number"),
        (lambda: Diffusion(respacing="snr1001"), "cannot keep 1001 of 1000 steps"),
        (lambda: space_timesteps(10, "3,"), "'' is not a positive number"),
        (lambda: space_timesteps(10, []), "at least one section"),
        (
            lambda: process().p_mean_variance(lambda x, t: x[:, :2], *pair()[:1], torch.arange(49)),
            r"model output: expected \(49, 3\) for FIXED_LARGE, got \(49, 2\)",
        ),
        (
            lambda: process().ddim_sample(lambda x, t: x, pair()[0], torch.arange(49), eta=0.5),
            "DDIM with eta 0.5 needs noise",
        ),
        (lambda: process().calc_bpd_loop(lambda x, t: x, pair()[0], []), "50 steps need as many draws of noise, got 0"),
    ],
)
def test_bad_settings_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("count", [1, 2, 20, 50, 500, 999, 1000])
def test_steps_even_in_log_snr_are_distinct_and_even_where_there_are_enough(count):
    kept = Diffusion(respacing=f"snr{count}").timestep_map
    assert len(set(kept)) == count and kept == sorted(kept) and kept[-1] == 999 and kept[0] in (0, 999)
    if count == 20:
        abar = Diffusion().schedule.alphas_cumprod[kept]
        distances = -np.diff(np.log(abar / (1 - abar)))
        assert np.ptp(distances[4:]) < 0.15 * distances.mean()


def test_linear_schedule_needs_no_more_than_20_steps():
    assert named_betas("linear", 20)[-1] == 1.0
