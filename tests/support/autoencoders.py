"""Small zoos and autoencoders for the tests of sane, and the weights of its goldens' recipe."""

import re
import zlib

import numpy as np
import torch
from sane.autoencoder import Autoencoder, AutoencoderConfig
from sane.model import SaneModel
from sane.networks import build_network
from sane.preparation import PrepareConfig, facts_of, prepare
from zoo_common import ParameterLayout, Run, Zoo

from support.golden import fill

#: Settings of a pretraining that takes a moment.
SIZES = ["model.d_model=16", "model.heads=2", "model.layers=1", "model.latent=4", "model.window=12"]
TRAINING = ["training.batch=8", "training.epochs=2", "training.test_every=1", "training.log_every=2", "device=cpu"]


def filled_state(state, tag, scale=0.1):
    """The recipe for networks: fill(tag + key), positive running variances, 100 batches tracked."""

    def value(name, shape):
        if name.endswith("num_batches_tracked"):
            return torch.tensor(100)
        values = fill(tag + name, tuple(shape), scale)
        return values.abs() + 0.5 if name.endswith("running_var") else values

    return {name: value(name, getattr(tensor, "shape", tensor)) for name, tensor in state.items()}


def filled_autoencoder_state(model, tag, scale):
    """The recipe for autoencoders: layer norms are 1 plus the value."""
    norms = re.compile(r"ln_.*\.weight$|head\.[14]\.weight$|norm.*\.weight$")
    state = {}
    for name, tensor in model.state_dict().items():
        values = fill(tag + name, tuple(tensor.shape), scale)
        state[name] = values + 1 if norms.search(name) else values
    return state


def recipe_positions(name, max_positions, shape):
    """Positions (b, t, columns) drawn from one generator, column by column."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    columns = [random.randint(0, high, size=shape) for high in max_positions]
    return torch.from_numpy(np.stack(columns, -1))


def recipe_input(text):
    """The tensor of a written recipe: fill('name', [shape], scale)."""
    name, shape, scale = re.fullmatch(r"fill\('(.*)', \[(.*)\], (.*)\)", text).groups()
    return fill(name, [int(size) for size in shape.split(",")], float(scale))


def zoo_of_networks(path, config, runs=12, checkpoints=3, seed=0, drift=0.1):
    """A zoo of random networks of a published type, whose metrics follow from their weights."""
    torch.manual_seed(seed)
    layout = ParameterLayout.from_module(build_network(config))
    zoo = Zoo.create(path, layout=layout, split=(0.6, 0.2, 0.2))
    made = []
    for run in range(runs):
        network = build_network(config)
        start = layout.flatten(network).detach()
        step = torch.randn(layout.size) * drift * start.std() + drift * start
        params = torch.stack([start + k * step for k in range(checkpoints)])
        norm = params.norm(dim=1)
        accuracy = 1 / (1 + norm / norm.mean())
        metrics = {"test_acc": accuracy.numpy(), "train_acc": (accuracy + 0.01 * norm).numpy()}
        buffers = {name: b.expand(checkpoints, *b.shape).clone() for name, b in layout.buffers_of(network).items()}
        made.append(Run(f"run{run:03d}", params, range(checkpoints), metrics, {**config, "lr": 0.1}, buffers))
    zoo.append(made)
    return zoo


CNN = {"model::type": "CNN", "model::channels_in": 1, "model::o_dim": 10}


def small_model(path, seed=0, **options):
    """An untrained model of a zoo of random networks, and the prepared zoo."""
    prepared = prepare(zoo_of_networks(path, CNN, runs=10), PrepareConfig(token_size=40, **options))
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "heads": 2, "layers": 1, "latent": 8, "window": 16}
    config = AutoencoderConfig(token_size=40, max_positions=prepared.max_positions, **sizes)
    facts = {**facts_of(prepared.zoo), "align": prepared.config.align}
    model = SaneModel(Autoencoder(config), prepared.tokenizer, prepared.normalization, prepared.reference, facts)
    return model, prepared
