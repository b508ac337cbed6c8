"""Walks through the latent space: the published interpolation, and pictures of first layers."""

import re

import numpy as np
import pytest
import torch
from gpt_diffusion.walk import first_layer, frames, loop, slerp, write_movie, write_strip
from PIL import Image
from support.golden import assert_close, fill
from zoo_common.layout import ParameterLayout
from zoo_common.tasks import get_task


@pytest.mark.golden("latent_walk.json", cases="shapes")
def test_loops_are_the_published_ones(golden):
    videos, latents, points, size = golden.case
    tag = re.search(rf"{golden.name}: .*?fill\('([^']+)'", golden.document["recipe"])[1]
    found = loop(fill(tag, (videos, latents, size)), points)
    assert_close(found, golden.arrays[golden.name], what=golden.name)


def test_interpolation_keeps_the_length_and_survives_equal_ends():
    a, b = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = b / b.norm() * a.norm()
    path = slerp(a, b, torch.linspace(0, 1, 9, dtype=torch.float64)[:, None].squeeze())
    torch.testing.assert_close(path.norm(dim=1), a.norm().expand(9))
    torch.testing.assert_close(path[0], a)
    assert torch.equal(slerp(a, a, torch.tensor(0.5, dtype=torch.float64)), a)


@pytest.mark.parametrize(
    ("name", "shape"), [("digits", (10, 8, 8, 1)), ("mnist", (10, 28, 28, 1)), ("cifar10", (16, 3, 3, 3))]
)
def test_pictures_of_the_first_layer(name, shape):
    task = get_task(name)
    layout = ParameterLayout.from_module(task.constructor())
    pictures = first_layer(torch.randn(4, layout.size), layout, task.input_shape)
    assert pictures.shape == (4, *shape)
    images = frames(pictures, scale=2)
    assert images.dtype == np.uint8 and len(images) == 4
    assert images.min() == 0 and images.max() == 255


def test_a_layer_that_sees_no_images_is_named():
    layout = ParameterLayout.from_module(torch.nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"'weight' \(3, 5\) does not see images"):
        first_layer(torch.zeros(1, 18), layout, (5,))


def test_movies_and_strips(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 3), dtype=np.uint8)
    write_movie(tmp_path / "walk.gif", images)
    with Image.open(tmp_path / "walk.gif") as movie:
        assert movie.n_frames == 6 and movie.size == (30, 20)
    write_strip(tmp_path / "walk.png", images, count=3)
    with Image.open(tmp_path / "walk.png") as strip:
        np.testing.assert_array_equal(np.asarray(strip), np.concatenate(list(images[[0, 2, 5]])))
    with pytest.raises(ValueError, match=r"walk\.avi: a walk is written as \.gif or \.mp4"):
        write_movie(tmp_path / "walk.avi", images)
