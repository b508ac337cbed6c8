"""Two plain implementations of a training step of an infinite layer, written from its formulas.

``Concatenating`` joins A and B with the new rows in every step and keeps all intermediates of the forward pass;
``Preallocated`` writes the new rows into room that is there, keeps the correlations, and uses plain matrix products.
"""

import math

import torch
from torch import Tensor


class Preallocated:
    """A layer with room for all atoms to come."""

    def __init__(self, a: Tensor, b: Tensor, amult: Tensor, room: int) -> None:
        self.size = len(a)
        self.a, self.b, self.amult = (torch.cat([t, t.new_empty(room, *t.shape[1:])]) for t in (a, b, amult))

    def forward(self, g: Tensor) -> Tensor:
        """Pre-activations of the next layer."""
        s = g.norm(dim=1, keepdim=True)
        gbar = g / s
        q = gbar @ self.b[: self.size].T
        root, angle = torch.sqrt((1 - q * q).clamp(min=1e-20)), torch.acos((-q).clamp(-1, 1))
        f00 = s / (2 * math.pi) * (root + q * angle)
        self.saved = g, s, gbar, q
        return (f00 * self.amult[: self.size]) @ self.a[: self.size]

    def backward(self, d: Tensor) -> Tensor:
        """Gradient of the pre-activations."""
        g, s, gbar, q = self.saved
        dgamma = (d @ self.a[: self.size].T) * self.amult[: self.size]
        f11 = torch.acos((-q).clamp(-1, 1)) / (2 * math.pi)
        f02 = torch.sqrt((1 - q * q).clamp(min=1e-20)) / (2 * math.pi * s)
        self.rows = d * s, gbar
        return (dgamma * f11) @ self.b[: self.size] + (dgamma * f02).sum(1, keepdim=True) * g

    def step(self, lr: float, decay: float) -> None:
        """Append the rows."""
        stop = self.size + len(self.rows[0])
        self.amult[: self.size] *= 1 - decay
        self.a[self.size : stop], self.b[self.size : stop] = self.rows
        self.amult[self.size : stop] = -lr
        self.size = stop


class Concatenating:
    """A layer whose tensors are made anew in every step."""

    def __init__(self, a: Tensor, b: Tensor, amult: Tensor) -> None:
        self.a, self.b, self.amult = a, b, amult

    def forward(self, g: Tensor) -> Tensor:
        """Pre-activations of the next layer."""
        s = g.norm(dim=1, keepdim=True)
        gbar = g / s
        q = gbar @ self.b.T
        root, angle = torch.sqrt((1 - q * q).clamp(min=1e-20)), torch.acos((-q).clamp(-1, 1))
        f00 = s / (2 * math.pi) * (root + q * angle)
        self.saved = g, s, gbar, q, root, angle, f00
        return f00 @ (self.a.T * self.amult).T

    def backward(self, d: Tensor) -> Tensor:
        """Gradient of the pre-activations."""
        g, s, gbar, _, root, angle, _ = self.saved
        dgamma = d @ (self.a.T * self.amult)
        f11, f02 = angle / (2 * math.pi), root / (2 * math.pi * s)
        self.rows = d * s, gbar
        return (dgamma * f11) @ self.b + (dgamma * f02).sum(1, keepdim=True) * g

    def step(self, lr: float, decay: float) -> None:
        """Append the rows."""
        a, b = self.rows
        self.a, self.b = torch.cat([self.a, a]), torch.cat([self.b, b])
        self.amult = torch.cat([self.amult * (1 - decay), self.amult.new_full((len(a),), -lr)])
