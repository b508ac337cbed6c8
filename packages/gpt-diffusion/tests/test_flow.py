"""Flow matching and guidance behind the prompt interface."""

import pytest
import torch
from gpt_diffusion import load_pretrained, train
from gpt_diffusion.diffusion import Flow
from gpt_diffusion.sampling import sample


class Known:
    """A denoiser that knows the data: x_0 depends on the prompt and the start alone."""

    def condition(self, prompt, start_metric, start):
        return lambda x, t: start + prompt[:, None].to(start) * (prompt != start_metric)[:, None]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_a_perfect_prediction_is_reached_in_any_number_of_steps(steps):
    start, prompt = draw(4, 6), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    found = sample(
        Known(), Flow(steps), start=start, prompt=prompt, start_metric=torch.zeros(4), noise=[draw(4, 6, seed=1)]
    )
    torch.testing.assert_close(found, start + prompt[:, None])


def test_euler_steps_converge_to_the_flow_of_a_gaussian():
    """Data N(0, 1/4): the exact x_0 is linear in x, and noise e flows to e / 2; the error falls with the step size."""

    class Posterior:
        def condition(self, prompt, start_metric, start):
            def denoise(x, t):
                s = ((t + 1) / 1000)[:, None].double()
                return 0.25 * (1 - s) / (0.25 * (1 - s) ** 2 + s**2) * x

            return denoise

    noise, zeros = draw(50, 1), torch.zeros(50, dtype=torch.float64)
    errors = []
    for steps in (10, 100, 1000):
        found = sample(Posterior(), Flow(steps), start=zeros[:, None], prompt=zeros, start_metric=zeros, noise=[noise])
        errors.append((found - noise / 2).abs().mean().item())
    assert errors[1] < 0.2 * errors[0] and errors[2] < 0.2 * errors[1] and errors[2] < 1e-2


def test_training_loss_is_the_error_of_the_predicted_data():
    flow, x0, noise = Flow(), draw(5, 3), draw(5, 3, seed=1)
    t = torch.tensor([0, 99, 499, 899, 999])
    seen = {}

    def model(x, t, prompt, *, loss_prev, x_prev):
        seen.update(x=x, t=t)
        return x

    zeros = torch.zeros(5)
    terms = flow.training_losses(model, x0, t, loss_target=zeros, loss_prev=zeros, x_prev=x0, noise=noise)
    s = ((t + 1) / 1000)[:, None]
    torch.testing.assert_close(seen["x"], (1 - s) * x0 + s * noise)
    assert torch.equal(seen["t"], t)
    torch.testing.assert_close(terms.loss, (s * (noise - x0)).square().mean(1))
    assert Flow(20).original_steps(torch.tensor([0, 19])).tolist() == [49, 999]
    with pytest.raises(ValueError, match="a flow has 1 to 1000 steps, got 0"):
        Flow(0)


def test_guidance_exaggerates_what_the_prompt_changes():
    start, prompt = draw(2, 3), torch.tensor([1.0, 2.0], dtype=torch.float64)
    noise = [draw(2, 3, seed=1)]
    found = sample(Known(), Flow(4), start=start, prompt=prompt, start_metric=torch.zeros(2), guidance=2.5, noise=noise)
    torch.testing.assert_close(found, start + 2.5 * prompt[:, None])


def test_a_flow_is_trained_resumed_and_sampled(tiny_config):
    config = tiny_config(
        "train.objective=flow", "train.prompt_dropout=0.2", "sampling.guidance=1.5", "train.max_steps=40"
    )
    first = train(config, quiet=True, limit_seconds=0.0)
    assert not first.finished
    report = train(config, quiet=True, resume=True)
    model = load_pretrained(report.folder)
    start = torch.zeros(3, model.info.layout.size)
    found = model.sample(start, prompt=0.5, start_metric=torch.ones(3))
    assert found.shape == start.shape and found.isfinite().all()


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["sampling.guidance=2"], r"sampling\.guidance needs a model trained with train\.prompt_dropout above 0"),
        (["train.prompt_dropout=1"], r"train\.prompt_dropout must be at least 0 and below 1, got 1\.0"),
        (["train.objective=flow", "transformer.predict_xstart=false"], r"needs transformer\.predict_xstart=true"),
        (["train.objective=floww"], "expected one of diffusion, flow, got 'floww'"),
    ],
)
def test_settings_that_do_not_fit_are_named(tiny_config, overrides, match):
    with pytest.raises(ValueError, match=match):
        tiny_config(*overrides)
