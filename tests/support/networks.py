"""The task networks of the published models, with the weights of the goldens' recipe."""

import torch
from torch import Tensor, nn
from zoo_common.tasks import get_task

from support.golden import fill


class CartpoleActor(nn.Module):
    """The published actor; ``log_std`` comes first in the state dict and takes no part in the mean action."""

    def __init__(self) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(1))
        self.actor = nn.Sequential(nn.Linear(4, 32), nn.SELU(), nn.Linear(32, 32), nn.SELU(), nn.Linear(32, 1))

    def forward(self, observation: Tensor) -> Tensor:
        return self.actor(observation)


#: Task to the name of its golden inputs and the shape of one.
INPUTS = {"mnist": ("mnist_x", (1, 28, 28)), "cifar10": ("cifar_x", (3, 32, 32)), "cartpole": ("cart_obs", (4,))}


def network(task: str) -> nn.Module:
    """A freshly initialised network of a task."""
    return CartpoleActor() if task == "cartpole" else get_task(task).constructor()


def filled(task: str) -> nn.Module:
    """The network with the golden weights: fill('<task>/<key>', shape, 0.1)."""
    net = network(task)
    net.load_state_dict({key: fill(f"{task}/{key}", value.shape, 0.1) for key, value in net.state_dict().items()})
    return net
