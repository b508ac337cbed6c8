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
    stored = {k.removeprefix(case["name"] + "/"): v for k, v in golden.tensors().items() if k.startswith(case["name"] + "/")}
    diffusion = create_diffusion(**case["args"])
    assert diffusion.num_timesteps == case["num_timesteps"]
    x_start, x_t = fill(f"{tag}/x_start", shape, 0.7), fill(f"{tag}/x_t", shape, 1.1)
    noise, x_prev, t = fill(f"{tag}/noise", shape), fill(f"{tag}/x_prev", shape, 0.5), torch.tensor(case["t"])
    draw = fill(f"{tag}/noise0", shape)
    seen = []
    denoise = stub(diffusion.var_type is ModelVarType.LEARNED_RANGE, x_prev, seen)
    guide = lambda x, t: -0.3 * x  # noqa: E731
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
    static = diffusion.p_mean_variance(
        denoise, x_t, t, clip_denoised=False, denoised_fn=lambda x: x.clamp(-0.3, 0.4)
    )
    ours["p_mean_variance.static.mean"] = static.mean
    ours["p_sample"] = diffusion.p_sample(denoise, x_t, t, draw, clip_denoised=False).sample
    ours["p_sample.cond_mean"] = diffusion.p_sample(denoise, x_t, t, draw, clip_denoised=False, guide=guide).sample
    for eta in (0.0, 0.5, 1.0):
        ours[f"ddim_sample.eta{eta}"] = diffusion.ddim_sample(
            denoise, x_t, t, draw, eta=eta, clip_denoised=False
        ).sample
    ours["ddim_sample.cond_score"] = diffusion.ddim_sample(denoise, x_t, t, draw, clip_denoised=False, guide=guide).sample
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
