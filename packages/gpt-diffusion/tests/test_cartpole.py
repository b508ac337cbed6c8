"""The cart-pole, its actors and their training, against the published numbers and against plain loops."""

import math
import re

import pytest
import torch
from gpt_diffusion.cartpole import simulator
from gpt_diffusion.cartpole.policy import Actor, forward, initial_weights, standard_deviation
from gpt_diffusion.cartpole.ppo import PpoConfig, Rollout, Trainer, advantages, log_probability
from gpt_diffusion.cartpole.simulator import CartPoles, accelerations, move, reward_and_reset
from gpt_diffusion.cartpole.training import WINDOW, Returns, mean_returns, train_actors
from support.golden import assert_close, assert_stats, fill


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.golden("cartpole_dynamics.json", cases="cases")
def test_accelerations_are_those_of_two_rigid_bodies(golden):
    case = golden.case
    state = torch.tensor([case[name] for name in ("y", "y_dot", "a", "a_dot")], dtype=torch.float64)
    found = accelerations(state, torch.tensor(case["force"], dtype=torch.float64))
    assert_close(found, [case["y_acc"], case["a_acc"]], "float64")


@pytest.mark.golden("cartpole_reward.json")
def test_rewards_and_resets_are_the_published_ones(golden):
    case = golden.case["case"]
    state = torch.tensor(case["obs"])
    reset, progress = torch.tensor(case["reset_in"]).bool(), torch.tensor(case["progress"])
    reward, flags = reward_and_reset(state, reset, progress)
    assert_close(reward, case["reward"], "float32")
    assert flags.int().tolist() == case["reset_out"]


@pytest.mark.golden("ppo.json")
def test_an_iteration_of_ppo_is_the_published_one(golden):
    """Alone, and between two other actors that see other numbers."""
    case = golden.case["case"]
    tag, envs, steps = case["tag"], case["num_envs"], case["num_steps"]
    words = {"gamma": "gamma", "lam": "lambda", "clip": "clip", "value_coefficient": "value coefficient"}
    words |= {"max_grad_norm": "gradient norm limit", "lr": "lr"}
    stated = {key: float(re.search(rf"\b{word} ([\d.e-]*\d)", golden.case["recipe"])[1]) for key, word in words.items()}
    config = PpoConfig(
        **stated,
        envs=envs,
        steps=steps,
        epochs=case["epochs"],
        minibatches=case["minibatches"],
        iterations=case["max_iterations"],
        clip_values=case["clipped_value_loss"],
        entropy_coefficient=case["entropy_coef"],
    )
    own = {name: fill(f"{tag}/{name}", tuple(x.shape[1:]), 0.3) for name, x in initial_weights([0]).items()}
    others = initial_weights([1, 2])
    weights = {name: torch.stack([others[name][0], own[name], others[name][1]]) for name in own}

    def stacked(name, shape, scale=1.0):
        rows = torch.stack([fill(f"{tag}/{name}{step}", shape, scale) for step in range(steps)])
        noise = torch.randn(steps, 2, *shape, generator=seeded())
        return torch.stack([noise[:, 0], rows, noise[:, 1]], 1)

    with torch.no_grad():
        observations = stacked("obs", (envs, 4))
        mean, std = torch.stack([forward(weights, "actor", x) for x in observations]), standard_deviation(weights)
        actions = mean + std * stacked("eps", (envs, 1))[..., 0]
        values = torch.stack([forward(weights, "critic", x) for x in observations])
        end = fill(f"{tag}/obs_last", (envs, 4))
        last = forward(weights, "critic", torch.stack([end, end, end]))
    rewards, dones = 1 + stacked("rew", (envs,), 0.5), stacked("done", (envs,)) > 1
    rollout = Rollout(observations, actions, log_probability(actions, mean, std), values, rewards, dones)
    assert dones[:, 1].int().tolist() == case["dones"]
    for name, found in (("values", values), ("log_probs", rollout.log_probs)):
        assert_close(found[:, 1], case[name], what=name)
    assert_close(last[1], case["last_values"])
    returns, advantage = advantages(rollout, last, config)
    assert_close(returns[:, 1], case["returns"])
    assert_close(advantage[:, 1], case["advantages"])
    trainer = Trainer(weights, config)
    losses = trainer.update(rollout, returns, advantage, case["iteration"])
    assert_close(losses.value[1], case["mean_value_loss"])
    assert_close(losses.surrogate[1], case["mean_surrogate_loss"])
    assert_close(trainer.lr, case["last_lr"], "float64")
    for name, stats in case["after"].items():
        assert_stats(trainer.weights[name][1], stats, what=name)
        assert_close((trainer.weights[name][1] - own[name]).norm(), stats["delta_l2"], what=f"change of {name}")


def test_energy_is_kept_without_force():
    """Until the pole meets its speed limit."""
    state = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)

    def energy(s):
        arm = simulator.MASS_POLE * simulator.LENGTH
        inertia = simulator.INERTIA + arm * simulator.LENGTH
        kinetic = s[1] ** 2 + 0.5 * inertia * s[3] ** 2 - arm * s[2].cos() * s[1] * s[3]
        return kinetic + arm * simulator.GRAVITY * s[2].cos()

    start = energy(state)
    for _ in range(15):
        state = move(state, torch.zeros((), dtype=torch.float64))
    assert 1 < abs(state[3]) < simulator.MAX_POLE_SPEED  # it is falling
    assert abs(energy(state) - start) < 0.05 * abs(start)


def test_limits_of_the_rail_and_of_the_pole():
    state = torch.tensor([[3.9, 50.0, 0.0, 7.9]])
    after = move(state, torch.tensor([5.0]))
    assert after[0, 0] == simulator.RAIL and after[0, 1] == 0
    assert after[0, 3].abs() <= simulator.MAX_POLE_SPEED
    assert torch.equal(after, move(state, torch.tensor([1.0])))


def test_episodes_start_afresh_one_step_after_their_end_and_last_500_steps():
    world = CartPoles(2, 50, seeded())
    first = world.reset()
    assert (first[..., [0, 2]].abs() <= 0.1).all() and (first[..., [1, 3]].abs() <= 0.25).all()
    world.state[0, 0, 2] = 2.0  # fallen
    _, reward, ended = world.step(torch.zeros(2, 50))
    assert ended[0, 0] and reward[0, 0] == -2 and not ended[1].any()
    observation, reward, ended = world.step(torch.zeros(2, 50))
    assert observation[0, 0, 2].abs() <= 0.1 and reward[0, 0] > 0.9 and not ended[0, 0]
    world.progress[1, 3] = 497
    world.state[1, 3] = 0
    assert not world.step(torch.zeros(2, 50))[2][1, 3]
    world.state[1, 3] = 0
    assert world.step(torch.zeros(2, 50))[2][1, 3]


def test_stacked_actors_compute_what_each_computes_alone():
    weights = initial_weights([3, 4, 5])
    observations = torch.randn(3, 7, 4, generator=seeded())
    stacked = forward(weights, "actor", observations)
    for i in range(3):
        actor = Actor()
        actor.load_state_dict({name: x[i] for name, x in weights.items() if not name.startswith("critic")})
        torch.testing.assert_close(actor(observations[i])[:, 0], stacked[i])
    weights["log_std"].fill_(math.log(2))
    assert standard_deviation(weights)[0].item() == pytest.approx(4)
    assert standard_deviation(weights, "exp")[0].item() == pytest.approx(2)


@pytest.mark.parametrize("reference", [True, False])
def test_returns_are_averaged_as_by_lists(reference):
    generator, actors, envs = seeded(), 3, 40
    ours = Returns(actors, torch.device("cpu"), reference=reference)
    everything, window = [[] for _ in range(actors)], [[] for _ in range(actors)]
    for _ in range(12):
        for _ in range(4):
            values = torch.rand(actors, envs, generator=generator)
            ended = torch.rand(actors, envs, generator=generator) < torch.tensor([[0.1], [0.3], [0.0]])
            ours.add(values, ended)
            for i in range(actors):
                everything[i] += values[i][ended[i]].tolist()
        for i in range(actors):
            window[i] = window[i] + everything[i] if reference else everything[i]
        means = [sum(w[-WINDOW:]) / max(1, len(w[-WINDOW:])) for w in window]
        torch.testing.assert_close(ours.mean(), torch.tensor(means))


def test_training_raises_the_return_and_is_reproducible():
    config = PpoConfig(envs=32, iterations=30, steps=16, epochs=4)
    saves = torch.tensor([0, 15, 30]).expand(3, -1)
    vectors, returns = train_actors([1, 2, 3], saves, config, seeded())
    assert vectors.shape == (3, 3, 1250) and (returns[:, 2] > 2 * returns[:, 0]).all()
    again, _ = train_actors([1, 2, 3], saves, config, seeded())
    assert torch.equal(vectors, again)
    first = initial_weights([1, 2, 3])
    assert torch.equal(vectors[:, 0, 0], first["log_std"][:, 0])


def test_protocols_of_judging():
    weights = initial_weights([1, 2])
    some = mean_returns(weights, seeded(), envs=64, episodes=40)
    each = mean_returns(weights, seeded(), envs=64, protocol="one_each")
    assert some.shape == each.shape == (2,) and (some > 0).all()
    assert (some <= each + 1e-6).all()  # short episodes end first


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="envs must be at least 1, got 0"):
        PpoConfig(envs=0)
    with pytest.raises(ValueError, match=r"minibatches \(3\) must divide"):
        PpoConfig(envs=2, minibatches=3)
    with pytest.raises(ValueError, match="std_mode must be reference or exp, got 'x'"):
        PpoConfig(std_mode="x")
