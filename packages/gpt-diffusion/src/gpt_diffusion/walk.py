"""Walks through the latent space of a model: how sampled weights change while the noise turns.

Shapes: ``w`` walks, ``s`` latents on a loop, ``p`` points of each segment, ``d`` weights of the task network.
"""

import itertools
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from zoo_common.files import atomic_write
from zoo_common.layout import ParameterLayout

from gpt_diffusion.pretrained import Pretrained, make_diffusion
from gpt_diffusion.sampling import sample


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Spherical interpolation between vectors (..., d) (Shoemake 1985); ``weight`` (...,) is 0 at a and 1 at b."""
    cosine = (a / a.norm(dim=-1, keepdim=True) * (b / b.norm(dim=-1, keepdim=True))).sum(-1)
    angle, weight = cosine.clamp(-1, 1).acos()[..., None], weight[..., None]
    between = (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)
    return torch.where(torch.sin(angle).abs() < 1e-6, torch.lerp(a, b, weight), between)


def loop(latents: Tensor, points: int) -> Tensor:
    """From each of the latents (w, s, d) to the next, and from the last to the first: (w, s, p, d), both ends included."""
    weight = torch.linspace(0, 1, points, dtype=latents.dtype, device=latents.device)
    following = latents.roll(-1, dims=1)
    return slerp(latents[:, :, None], following[:, :, None], weight.expand(*latents.shape[:2], -1))


def walk(
    pretrained: Pretrained,
    start: Tensor,
    *,
    prompt: float,
    start_metric: float,
    latents: int = 16,
    points: int = 120,
    seed: int = 0,
    batch_size: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Networks along a closed walk, all from one start and with one prompt.

    Args:
        pretrained: The model; it samples by deterministic DDIM with its configured number of steps.
        start: Starting weights (d,), raw.
        prompt: Metric asked for.
        start_metric: Metric of the start.
        latents: s, normal vectors to walk between.
        points: p, networks of each segment.
        seed: Of the latents.
        batch_size: Networks in one pass through the model.
        progress: Called with (steps done, steps in all).

    Returns:
        Weights (s p, d), raw.
    """
    if latents < 2 or points < 2:
        raise ValueError(f"a walk needs at least 2 latents and 2 points, got {latents} and {points}")
    device, size = pretrained.device, pretrained.info.layout.size
    corners = torch.randn(1, latents, size, generator=torch.Generator(device).manual_seed(seed), device=device)
    noise = loop(corners, points).reshape(-1, size)
    known = pretrained.normalizer.normalize(start.to(device, torch.float32)).expand(len(noise), -1)
    found = sample(
        pretrained.model,
        make_diffusion(pretrained.config, pretrained.config.sampling.steps),
        start=known,
        prompt=torch.full((len(noise),), float(prompt), device=device),
        start_metric=torch.full((len(noise),), float(start_metric), device=device),
        sampler="ddim",
        noise=itertools.chain([noise], itertools.repeat(torch.zeros_like(noise))),
        batch_size=batch_size,
        progress=progress,
    )
    return pretrained.normalizer.unnormalize(found)


def first_layer(weights: Tensor, layout: ParameterLayout, input_shape: Sequence[int]) -> Tensor:
    """What the first layer of networks (n, d) looks for, as pictures (n, units, height, width, 1 or 3).

    Filters of a convolution on three channels are coloured; the units of a dense layer on images have their shape.

    Raises:
        ValueError: The first weight is neither.
    """
    name, shape = next((name, shape) for name, shape in zip(layout.names, layout.shapes, strict=True) if len(shape) > 1)
    filters = weights[:, layout.slices[name]].reshape(len(weights), *shape)
    if len(shape) == 2 and len(input_shape) == 3 and shape[1] == np.prod(input_shape):
        filters = filters.reshape(*filters.shape[:2], *input_shape)
    if filters.ndim != 5 or filters.shape[2] not in (1, 3):
        raise ValueError(f"{name!r} {shape} does not see images of 1 or 3 channels: there is no picture of its units")
    return filters.movedim(2, -1)


def frames(pictures: Tensor, *, scale: int = 8, columns: int = 8) -> np.ndarray:
    """One image per network: its pictures (n, units, h, w, c) in a grid, each between its own minimum and maximum.

    Returns:
        (n, height, width, 3) uint8.
    """
    flat = pictures.flatten(2)
    low, high = flat.amin(2), flat.amax(2)
    unit = (pictures - low[..., None, None, None]) / (high - low).clamp(min=1e-12)[..., None, None, None]
    pixels = (unit * 255).round().to(torch.uint8).expand(*unit.shape[:-1], 3)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).cpu()
    n, units, h, w, _ = pixels.shape
    pad, columns = 2 * scale, min(columns, units)
    rows = -(-units // columns)
    image = torch.full((n, pad + rows * (h + pad), pad + columns * (w + pad), 3), 255, dtype=torch.uint8)
    for unit_index in range(units):  # places on the grid, not networks
        y, x = (pad + (unit_index // columns) * (h + pad), pad + (unit_index % columns) * (w + pad))
        image[:, y : y + h, x : x + w] = pixels[:, unit_index]
    return image.numpy()


def write_movie(path: Path, images: np.ndarray, *, rate: int = 60) -> None:
    """Write images (n, h, w, 3) as GIF, or as MP4 (H.264); atomically.

    Raises:
        ValueError: Another suffix.
        ImportError: MP4 without the extra ``video``, GIF without Pillow.
    """
    if path.suffix == ".gif":
        from PIL import Image

        pictures = [Image.fromarray(image) for image in images]
        with atomic_write(path) as temporary:
            pictures[0].save(
                temporary, save_all=True, append_images=pictures[1:], duration=max(20, 1000 // rate), loop=0
            )
    elif path.suffix == ".mp4":
        try:
            import imageio.v3 as imageio

            import_module("imageio_ffmpeg")  # what writes MP4
        except ImportError as error:
            raise ImportError(f"{path}: MP4 needs imageio, pip install 'gpt-diffusion[video]'; GIF does not") from error
        even = images[:, : images.shape[1] // 2 * 2, : images.shape[2] // 2 * 2]
        with atomic_write(path) as temporary:
            imageio.imwrite(temporary, even, fps=rate, codec="libx264", macro_block_size=2)
    else:
        raise ValueError(f"{path}: a walk is written as .gif or .mp4")


def write_strip(path: Path, images: np.ndarray, *, count: int = 8) -> None:
    """Write ``count`` of the images (n, h, w, 3), evenly spaced, below each other as PNG; atomically."""
    from PIL import Image

    chosen = images[np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)]
    with atomic_write(path) as temporary:
        Image.fromarray(np.concatenate(list(chosen), axis=0)).save(temporary)
