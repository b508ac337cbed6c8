"""Small zoos and autoencoders for the tests of sane, and the weights of its goldens' recipe."""

import re
import zlib

import numpy as np
import torch

from support.golden import fill


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
