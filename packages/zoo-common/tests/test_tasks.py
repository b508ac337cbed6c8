import sys
from functools import partial

import pytest
import torch
from torch import nn
from zoo_common.symmetry import Symmetry
from zoo_common.tasks import (
    Mlp,
    TrainingRecipe,
    classification_error,
    classification_loss,
    get_task,
    register_task,
    task_names,
)


def test_every_built_in_task_is_complete():
    names = [name for name in task_names() if name.endswith(("_loss", "_error"))]
    assert len(names) >= 8
    for name in names:
        task = get_task(name)
        assert task.name == name
        assert task.minimize
        assert task.recipe is not None
        assert task.metric_name.endswith(name.rsplit("_", 1)[1])
        assert Symmetry.from_module(
            task.constructor(),
            torch.randn(2, 3, 32, 32) if "cifar" in name else torch.randn(2, 1, *SIZE[name.split("_")[0]]),
        ).groups


SIZE = {"digits": (8, 8), "mnist": (28, 28), "fashion": (28, 28)}


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("digits", "digits_loss"),
        ("fashion-mnist", "fashion_mnist_loss"),
        ("MNIST-error", "mnist_error"),
        ("cifar10", "cifar10_loss"),
    ],
)
def test_aliases(alias, name):
    assert get_task(alias).name == name


@pytest.mark.parametrize(
    ("wrong", "near"), [("mnist_lose", "mnist_loss"), ("digit", "digits"), ("cifar", "cifar10"), ("", "")]
)
def test_an_unknown_task_is_answered_with_the_nearest_name(wrong, near):
    with pytest.raises(ValueError, match=f"unknown task {wrong!r}; did you mean '{near}"):
        get_task(wrong)


def test_digits_metric_is_that_of_the_validation_images():
    task = get_task("digits_error")
    net = task.constructor()
    images, labels = task.splits().validation
    with torch.no_grad():
        expected = 100 * (net(images).argmax(1) != labels).double().mean().item()
    assert task.test_fn(*task.data_fn(), net) == pytest.approx(expected)


def test_metrics_of_known_logits():
    logits = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert classification_error(logits, labels, nn.Identity()) == 25
    expected = (torch.tensor(2.0).log() + 2 * torch.tensor(-9.0).exp().log1p() + torch.tensor(9.0).exp().log1p()) / 4
    assert classification_loss(logits, labels, nn.Identity()) == pytest.approx(expected.item(), rel=1e-6)


def test_published_step_counts_and_rates():
    mnist, cifar = get_task("mnist").recipe, get_task("cifar10").recipe
    assert (mnist.total_steps(60_000), cifar.total_steps(50_000)) == (11_700, 19_500)
    rates = mnist.learning_rates(60_000, 11_700)
    assert rates[:468] == [0.1] * 468
    assert rates[468] == pytest.approx(0.1 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi / 25)).item()))
    assert rates[-1] == pytest.approx(0.1 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 24 / 25)).item()), rel=1e-4)
    digits = get_task("digits").recipe.learning_rates(1000, 1000)
    assert digits[0] == 0.05
    assert digits[500] == pytest.approx(0.025)
    assert len(digits) == 1000


MODULE = """
import torch
from torch import nn
from zoo_common.tasks import Task

made = Task("my-task", nn.Identity, lambda: (1,), lambda x, net: 1.0, False, 1.0, 1.0, "return", (4,))

def good(folder):
    return made

def nothing(folder):
    return None

def broken(folder):
    raise FileNotFoundError(f"no data in {folder}")
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a package with one entry point importable."""

    def make(name, value):
        (tmp_path / "outside.py").write_text(MODULE)
        info = tmp_path / "outside_tasks-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-tasks\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[zoo_common.tasks]\n{name} = {value}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    sys.modules.pop("outside", None)


def test_a_package_adds_a_task_through_its_entry_point(install):
    install("my-task", "outside:good")
    assert "my-task" in task_names()
    assert get_task("my_task") is get_task("My-Task") and get_task("my-task").metric_name == "return"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("absent:good", "fails .ModuleNotFoundError: No module named 'absent'."),
        ("outside:absent", "fails .AttributeError: .*'absent'"),
        ("outside:made", "fails .TypeError: 'Task' object is not callable"),
        ("outside:broken", "fails .FileNotFoundError: no data in folder"),
        ("outside:nothing", "returns NoneType, not a Task"),
        ("outside:good", "returns a Task named 'my-task', not"),
    ],
)
def test_an_entry_point_that_does_not_work_is_named(install, value, reason):
    install("theirs", value)
    with pytest.raises(ValueError, match=rf"^task 'theirs': the entry point '{value}' of outside-tasks 1.0 {reason}"):
        get_task("theirs", "folder")


@pytest.fixture
def points(monkeypatch):
    """The six keys of a task, and how often its data were asked for."""
    monkeypatch.setattr("zoo_common.tasks._registered", {})
    asked = []

    def data():
        asked.append(1)
        return torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)

    keys = {"task_test_fn": classification_error, "constructor": partial(Mlp, 3, 4, 2), "data_fn": data}
    return keys | {"minimize": True, "best_prompt": 5.0, "recursive_prompt": 6}, asked


def test_six_keys_make_a_task_whose_symmetry_is_found(points):
    keys, asked = points
    register_task("my-points", keys)
    task = get_task("My_Points")
    assert "my-points" in task_names() and task.name == "my-points"
    assert [group.size for group in task.symmetry().groups] == [4]
    assert task.test_fn(*task.data_fn(), task.constructor()) in (0.0, 100.0)
    assert (task.best_prompt, task.recursive_prompt, task.input_shape, len(asked)) == (5.0, 6, (3,), 1)
    register_task("my-points", keys | {"aug_fn": print, "metric_name": "error", "data_fn": tuple})
    assert (get_task("my-points").aug_fn, get_task("my-points").metric_name) == (print, "error")


def test_keys_that_do_not_make_a_task_are_named(points):
    keys, _ = points
    with pytest.raises(ValueError, match="task 'mnist' is built in"):
        register_task("mnist", keys)
    with pytest.raises(ValueError, match=r"task 'x' lacks constructor, best_prompt"):
        register_task("x", {k: v for k, v in keys.items() if k not in ("constructor", "best_prompt")})
    with pytest.raises(ValueError, match=r"task 'x': unknown key 'aug_fun'; did you mean 'aug_fn'"):
        register_task("x", keys | {"aug_fun": print})
    register_task("x", keys | {"data_fn": tuple})
    with pytest.raises(ValueError, match=r"task 'x': data_fn returns no tensor .* give aug_fn or input_shape"):
        get_task("x")


def test_recipe_counts_epochs_or_steps():
    assert TrainingRecipe(batch=10, lr=1.0, epochs=3).total_steps(25) == 6
    assert TrainingRecipe(batch=10, lr=1.0, steps=7).total_steps(25) == 7
