import pytest
import torch
from gpt_diffusion.prompting import (
    one_by_one,
    one_step_prompting,
    prompt_alignment,
    recursive_prompting,
    spread_losses,
)
from support.golden import assert_close, fill


def stub_metric(w):
    return (2 * w.double().square().mean(dim=1) + 0.05).float()


def stub_sampler(target, start, w):
    return 0.97 * w * (target.clamp(min=0.06) / start).sqrt()[:, None] + 0.01


@pytest.mark.golden("prompting.json", cases="cases")
def test_curves_are_the_published_ones(golden):
    case = golden.case
    starts = fill(f"{case['tag']}/nets", (case["n"], case["D"]))
    task = case["metadata"]
    one = one_step_prompting(
        stub_sampler,
        stub_metric,
        starts,
        minimize=task["minimize"],
        best_prompt=task["best_prompt"],
        prompt_start_coeff=case["prompt_start_coeff"],
        steps=case["dvo_steps"],
    )
    assert_close(one.desired, case["one_step"]["desired"], "float32", "desired")
    assert_close(one.observed, case["one_step"]["observed"], "float32", "observed")
    score = prompt_alignment(one.desired, one.observed[:, 1:]).mean()
    assert_close(score, case["one_step"]["score"], "float32", "score")
    recursive = [key for key in case if key.startswith("recursive_")]
    assert recursive
    for key in recursive:
        _, mode, steps, _ = key.split("_")
        curves = recursive_prompting(stub_sampler, stub_metric, starts, mode=mode, steps=int(steps), **task)
        assert_close(curves.desired, case[key]["desired"], "float32", f"{key} desired")
        assert_close(curves.observed, case[key]["observed"], "float32", f"{key} observed")


@pytest.mark.golden("prompt_alignment.json", cases="cases")
def test_scores_are_the_published_ones(golden):
    case = golden.case
    scores = prompt_alignment(torch.tensor(case["desired"]), torch.tensor(case["observed"]))
    assert scores.shape == (case["n"],)
    assert_close(scores, case["per_curve"], "float32", "per curve")
    assert_close(scores.mean(), case["score"], "float32", "score")


@pytest.mark.golden("prompt_alignment.json")
def test_score_of_equal_prompts_and_of_a_perfect_curve_are_the_published_ones(golden):
    constant = golden.case["constant"]
    score = prompt_alignment(torch.tensor(constant["desired"]), torch.tensor(constant["observed"]))
    assert_close(score, constant["score"], "float32", "constant")
    curve = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    assert_close(prompt_alignment(curve, curve).mean(), golden.case["perfect"], "exact", "perfect")


@pytest.mark.golden("spread_losses.json", cases="cases")
def test_spread_losses_are_the_published_ones(golden):
    case = golden.case
    losses = fill(case["tag"], case["shape"]).abs()
    assert_close(spread_losses(losses, case["steps"], case["minimize"]), case["result"], "exact", "losses")


def test_of_two_equally_near_losses_the_first_is_taken():
    losses = torch.tensor([[4.0, 3.0, 1.0, 0.0]])
    assert spread_losses(losses, 3, minimize=True).tolist() == [[4.0, 3.0, 0.0]]


def test_given_prompts_are_cut_and_their_first_column_passes_for_the_start():
    calls = []

    def sampler(target, start, w):
        calls.append((target.tolist(), start.tolist()))
        return w

    prompts = torch.tensor([[3.0, 2.0, 1.0], [6.0, 5.0, 4.0]])
    curves = one_step_prompting(
        sampler, stub_metric, torch.ones(2, 4), minimize=True, best_prompt=0.0, steps=2, prompts=prompts
    )
    assert calls == [([3.0, 2.0, 6.0, 5.0], [3.0, 3.0, 6.0, 6.0])]
    assert curves.desired.tolist() == [[3.0, 2.0], [6.0, 5.0]]


def test_single_network_metric_equals_the_batched_one():
    vectors = fill("vectors", (3, 8))
    for metric in (lambda v: stub_metric(v[None])[0], lambda v: (stub_metric(v[None])[0].item(), "more")):
        torch.testing.assert_close(one_by_one(metric)(vectors), stub_metric(vectors), rtol=0, atol=0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"desired \(3,\) and observed \(4,\)"):
        prompt_alignment(torch.ones(3), torch.ones(4))
    task = {"minimize": True, "best_prompt": 0.0, "recursive_prompt": 0.0}
    with pytest.raises(ValueError, match="'half' is unknown; use zero or step"):
        recursive_prompting(stub_sampler, stub_metric, torch.ones(1, 2), mode="half", **task)
