"""A package that someone else has written and installed adds a task; every method can use it."""

import json
import subprocess
import sys
import zipfile

import pytest
import torch
from support.reliability import assert_one_error_line
from zoo_common import Population, Zoo, get_task

pytestmark = pytest.mark.slow

MODULE = '''
import torch
from torch import nn
from zoo_common.datasets import Part, Splits
from zoo_common.tasks import Task, TrainingRecipe, classification_error


class Deep(nn.Module):
    """Three layers; nothing that zoo_common knows beforehand."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3))

    def forward(self, x):
        return self.layers(x)


def splits():
    points = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    labels = (points[:, 0] > 0).long() + (points[:, 1] > 0).long()
    parts = [Part(points[i : i + 100], labels[i : i + 100]) for i in (200, 300)]
    return Splits(Part(points[:200], labels[:200]), *parts)


def quadrants(data_dir):
    return Task(
        name="quadrants",
        constructor=Deep,
        data_fn=lambda: tuple(splits().test),
        test_fn=classification_error,
        minimize=True,
        best_prompt=5.0,
        recursive_prompt=5.0,
        metric_name="test_error",
        input_shape=(2,),
        recipe=TrainingRecipe(batch=20, lr=0.1, steps=60, save_count=5),
        splits=splits,
    )


def six_keys(data_dir):
    return {
        "task_test_fn": classification_error,
        "constructor": Deep,
        "data_fn": lambda: tuple(splits().test),
        "minimize": True,
        "best_prompt": 5.0,
        "recursive_prompt": 5.0,
    }


def broken(data_dir):
    raise RuntimeError("out of order")
'''
WHEEL = {
    "outside_tasks.py": MODULE,
    "outside_tasks-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: outside-tasks\nVersion: 1.0\n",
    "outside_tasks-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "outside_tasks-1.0.dist-info/entry_points.txt": (
        "[zoo_common.tasks]\nquadrants = outside_tasks:quadrants\nsix-keys = outside_tasks:six_keys\nbroken = outside_tasks:broken\n"
    ),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder with the package, installed from a wheel without a network."""
    folder = tmp_path_factory.mktemp("outside")
    wheel = folder / "outside_tasks-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in WHEEL.items():
            archive.writestr(name, text)
        rows = [f"{name},," for name in [*WHEEL, "outside_tasks-1.0.dist-info/RECORD"]]
        archive.writestr("outside_tasks-1.0.dist-info/RECORD", "\n".join(rows) + "\n")
    target = folder / "site"
    command = ["uv", "pip", "install", "--offline", "--no-index", "--no-deps", "--python", sys.executable]
    subprocess.run([*command, "--target", target, wheel], check=True, capture_output=True)
    return target


def test_a_zoo_of_a_task_from_outside(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    folder = tmp_path / "zoo"
    command = ["gpt-diffusion", "generate", "quadrants", folder, "--runs", "24", "--json"]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(made.stdout)["runs"] == 24

    zoo = Zoo.open(folder)
    assert (zoo.task, len(zoo)) == ("quadrants", 24)
    errors = zoo.metrics["test_error"].padded()
    assert errors.shape == (24, 5) and errors[:, 0].mean() > 40 and errors[:, -1].mean() < 20
    assert not zoo.verify().problems

    monkeypatch.syspath_prepend(installed)
    task = get_task(zoo.task)
    images, labels = task.data_fn()
    symmetry, population = task.symmetry(), Population(task.constructor())
    vectors = zoo.params.gather(range(24), [-1] * 24)
    permuted = symmetry.permute(vectors, torch.Generator().manual_seed(0))
    logits = population(vectors, images)
    assert (permuted != vectors).any(dim=1).all()
    torch.testing.assert_close(population(permuted, images), logits, rtol=1e-5, atol=1e-5)
    wrong = 100 * (logits.argmax(-1) != labels).double().mean(1)
    torch.testing.assert_close(wrong.numpy(), errors[:, -1])
    task.constructor().load_state_dict(zoo.weights(0, -1))


@pytest.mark.parametrize(("task", "tokens"), [("quadrants", "layers"), ("six-keys", "units")])
def test_a_diffusion_model_is_trained_on_a_task_from_outside(installed, tmp_path, monkeypatch, task, tokens):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    monkeypatch.chdir(tmp_path)
    subprocess.run(["gpt-diffusion", "generate", "quadrants", "zoo", "--runs", "24", "--json"], check=True)
    settings = [f"dataset.name={task}", "dataset.train_metric=test_error", f"transformer.tokens={tokens}"]
    settings += ["train.behaviour_weight=0", "train.max_steps=60", "train.mb_size=16", "dataset.target_epoch_size=128"]
    settings += ["transformer.n_embd=16", "transformer.n_layer=1", "transformer.n_head=2", "train.log_freq=20"]
    command = ["gpt-diffusion", "train", "digits_loss", *settings, "--json"]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(made.stdout)["finished"]
    lines = [json.loads(line) for line in (tmp_path / "results/digits_loss/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]  # hidden units are permuted at random by what was found of them
    command = ["gpt-diffusion", "sample", "results/digits_loss", "--prompt", "5", "-o", "new.safetensors", "--json"]
    sampled = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 0 <= json.loads(sampled.stdout)["reached"] <= 100


def test_a_task_from_outside_that_does_not_work_is_one_line(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    command = ["gpt-diffusion", "generate", "broken", tmp_path / "zoo"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_one_error_line(
        result, "task 'broken': the entry point 'outside_tasks:broken' of outside-tasks 1.0 fails", "out of order"
    )
    assert not (tmp_path / "zoo").exists()
