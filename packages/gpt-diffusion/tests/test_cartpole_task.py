"""The registered task, its zoos, and the cart-pole as an environment of Gymnasium."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gpt_diffusion import generate
from gpt_diffusion.cartpole import gym
from gpt_diffusion.cartpole.gym import CartPoleVectorEnv, GymSimulator, from_gym
from gpt_diffusion.cartpole.policy import Actor, initial_weights
from gpt_diffusion.cartpole.ppo import PpoConfig
from gpt_diffusion.cartpole.simulator import CartPoles
from gpt_diffusion.cartpole.training import mean_returns, train_actors
from gpt_diffusion.evaluation import batched_metric
from gpt_diffusion.generation.batches import derive_seed
from gpt_diffusion.generation.schedule import random_save_points
from gymnasium.vector import AutoresetMode
from zoo_common import Zoo, get_task
from zoo_common.layout import ParameterLayout
from zoo_common.tasks import task_names

SMALL = {"steps": 6, "envs": 16, "save_count": 4, "chunk": 2, "progress": False, "device": "cpu"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_task_is_registered_as_published():
    task = get_task("cartpole")
    assert "cartpole" in task_names()
    assert (task.minimize, task.best_prompt, task.recursive_prompt, task.metric_name) == (False, 500, 500, "train_ret")
    assert ParameterLayout.from_module(task.constructor()).size == 1250


def test_hidden_units_are_permuted_and_the_actor_stays_the_same():
    task, nets = get_task("cartpole"), [Actor() for _ in range(3)]
    layout = ParameterLayout.from_module(nets[0])
    vectors = layout.stack(nets).detach()
    vectors[:, 0] = torch.tensor([0.5, -0.5, 0.1])
    moved = task.symmetry().permute(vectors, seeded())
    assert ((moved != vectors).float().mean(1) > 0.8).all()
    assert torch.equal(moved[:, 0], vectors[:, 0])
    observations = torch.randn(50, 4, generator=seeded())
    net = Actor()
    for before, after in zip(vectors, moved, strict=True):
        layout.load_into(net, before)
        expected = net(observations)
        layout.load_into(net, after)
        torch.testing.assert_close(net(observations), expected)


def test_the_metric_of_many_actors_is_that_of_each_alone():
    task = get_task("cartpole")
    config = PpoConfig(envs=32, iterations=12)
    saves = torch.tensor([0, 6, 12]).expand(2, -1)
    vectors = train_actors([1, 2], saves, config, seeded())[0].flatten(0, 1)
    together = batched_metric(task, torch.device("cpu"))(vectors)
    layout, net, alone = ParameterLayout.from_module(Actor()), Actor(), []
    for vector in vectors:
        layout.load_into(net, vector)
        alone.append(task.test_fn(*task.data_fn(), net))
    torch.testing.assert_close(together, torch.tensor(alone), rtol=0.01, atol=0.05)  # rounding, grown by the dynamics
    assert together.max() > 2 * together.min()


def test_common_numbers_are_the_same_for_all_actors():
    one = initial_weights([5])
    twice = {name: torch.cat([x, x]) for name, x in one.items()}
    a, b = mean_returns(twice, seeded(), envs=32, episodes=20, common=True)
    c, d = mean_returns(twice, seeded(), envs=32, episodes=20)
    assert a == b
    assert c != d


def test_a_zoo_of_actors(tmp_path):
    report = generate("cartpole", tmp_path / "zoo", runs=3, seed=7, **SMALL)
    assert (report.runs, report.dropped, report.remaining, report.model_steps) == (3, 0, 0, 18)
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.verify().problems == ()
    assert (zoo.task, zoo.layout.size, list(zoo.metrics)) == ("cartpole", 1250, ["train_ret"])
    assert zoo.attributes["generate"]["envs"] == 16
    for run in range(3):
        assert zoo.steps[run].tolist() == random_save_points(4, 6, derive_seed(7, "save", run))
    get_task(zoo.task).constructor().load_state_dict(zoo.weights(0, -1))
    seeds, chunk = [derive_seed(7, "init", run) for run in (0, 1)], derive_seed(7, "chunk", 0)
    saves = torch.tensor(np.stack([zoo.steps[0], zoo.steps[1]]))
    vectors, returns = train_actors(seeds, saves, PpoConfig(envs=16, iterations=6), seeded(chunk))
    assert torch.equal(zoo.params[1], vectors[1])
    np.testing.assert_allclose(zoo.metrics["train_ret"][1], returns[1].numpy())


def test_a_forecast_of_actors(tmp_path):
    forecast = generate("cartpole", tmp_path / "zoo", runs=5, dry_run=True, **SMALL)
    assert (forecast.runs, forecast.model_steps, forecast.strategy) == (5, 30, "stacked")
    assert forecast.seconds > 0
    assert not (tmp_path / "zoo").exists()
    generate("cartpole", tmp_path / "zoo", runs=5, **SMALL)
    payload = sum(f.stat().st_size for f in (tmp_path / "zoo" / "shards").iterdir())
    assert 0.7 < forecast.bytes / payload < 1.1


@pytest.mark.parametrize(
    ("task", "options", "match"),
    [
        ("cartpole", {"envs": 0}, "envs must be at least 1, got 0"),
        ("cartpole", {"envs": 1, "steps": 1, "save_count": 3}, r"save_count must be 2 to steps \+ 1 = 2, got 3"),
        ("cartpole", {"share_batches": 2}, "share_batches must be 1 for cartpole, got 2"),
        ("cartpole", {"dtype": "float64"}, "dtype must be float32 for cartpole, got float64"),
        ("cartpole", {"strategy": "vmap"}, "strategy must be one of auto, stacked for cartpole, got 'vmap'"),
        ("digits", {"envs": 3}, "envs is for cartpole: task 'digits_loss' has no environments"),
    ],
)
def test_wrong_options_are_named(task, options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        generate(task, tmp_path / "zoo", runs=2, progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_the_environment_is_the_simulator():
    env, poles = CartPoleVectorEnv(5, seed=3), CartPoles(1, 5, seeded(3))
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    observation, _ = env.reset()
    assert env.observation_space.contains(observation)
    np.testing.assert_array_equal(observation, poles.reset()[0].numpy())
    env.action_space.seed(0)
    ends = 0
    for _ in range(60):
        actions = env.action_space.sample()
        observation, reward, terminated, truncated, _ = env.step(actions)
        expected = poles.step(torch.from_numpy(actions)[None, :, 0])
        for found, wanted in zip((observation, reward, terminated | truncated), expected, strict=True):
            np.testing.assert_array_equal(found, wanted[0].numpy())
        ends += terminated.sum()
    assert ends > 5
    first = env.reset(seed=9)[0]
    np.testing.assert_array_equal(first, env.reset(seed=9)[0])
    assert (first != env.reset()[0]).any()


def test_long_episodes_are_truncated_and_fallen_poles_terminated():
    env = CartPoleVectorEnv(2)
    env.reset()
    env._poles.progress.fill_(498)
    env._poles.state.copy_(torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]]]))
    _, reward, terminated, truncated, _ = env.step(np.zeros((2, 1), np.float32))
    assert (terminated.tolist(), truncated.tolist()) == ([False, True], [True, False])
    assert reward[1] == -2
    observation, _, terminated, truncated, _ = env.step(np.zeros((2, 1), np.float32))
    assert not (terminated | truncated).any() and (abs(observation) <= 0.25).all()


def test_actors_train_in_environments_of_gymnasium():
    """In our own ones behind the adapter, as in the simulator itself with other random numbers."""
    config, saves = PpoConfig(envs=24, iterations=25, epochs=4), torch.tensor([[0, 25]]).expand(2, -1)
    vectors, returns = train_actors([1, 2], saves, config, seeded(), simulator=from_gym(CartPoleVectorEnv))
    assert vectors.shape == (2, 2, 1250)
    assert (returns[:, 1] > 1.5 * returns[:, 0]).all()
    again, _ = train_actors([1, 2], saves, config, seeded(), simulator=from_gym(CartPoleVectorEnv))
    assert torch.equal(vectors, again)


class Other(gymnasium.Env):
    """Somebody else's environment: the sum of the observations is the reward."""

    observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 4
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.full(4, action[0], np.float32), 4.0 * action[0], self.left == 0, False, {}


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_any_vector_environment_can_be_used(mode):
    env = gymnasium.vector.SyncVectorEnv([Other] * 6, autoreset_mode=mode)
    simulator = GymSimulator(env, 2, seeded())
    assert simulator.reset().shape == (2, 3, 4)
    actions = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 9.0]])
    observation, reward, ended = simulator.step(actions)
    torch.testing.assert_close(observation[..., 0], actions.clamp(max=1))
    torch.testing.assert_close(reward, 4 * actions.clamp(max=1))
    assert ended.shape == (2, 3) and not ended.any()
    for _ in range(3):
        ended = simulator.step(actions)[2]
    assert ended.all()


def test_environments_that_do_not_fit_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("Pendulum-v1")] * 4)
        still = gymnasium.vector.SyncVectorEnv([Other] * 4, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(ValueError, match=r"observations must have shape \(4,\), got \(3,\)"):
        GymSimulator(wrong, 2, seeded())
    with pytest.raises(ValueError, match="episodes must begin anew by themselves"):
        GymSimulator(still, 2, seeded())
    with pytest.raises(ValueError, match="4 environments cannot be shared by 3 actors"):
        GymSimulator(gymnasium.vector.SyncVectorEnv([Other] * 4), 3, seeded())
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        CartPoleVectorEnv(0)
    env = CartPoleVectorEnv(2)
    with pytest.raises(ValueError, match=r"actions must have shape \(2, 1\), got \(2,\)"):
        env.step(np.zeros(2))
    with pytest.raises(ValueError, match="one seed for all environments"):
        env.reset(seed=[1, 2])


def test_without_gymnasium_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(gym, "VectorEnv", object)
    for use in (CartPoleVectorEnv, lambda: from_gym(CartPoleVectorEnv)):
        with pytest.raises(ImportError, match=r"gpt-diffusion\[rl\]"):
            use()
