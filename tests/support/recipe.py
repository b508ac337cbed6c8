"""What golden files say only in the words of their recipes: inputs, numbers, lists."""

import re

import torch

from support.golden import fill


def recipe_inputs(recipe: str, t: int = 0, **sizes: int) -> dict[str, torch.Tensor]:
    """Float64 tensors of all ``fill('CASE:NAME',(a,b))`` in a recipe, under NAME; a last part ``:t`` is the step."""
    found = {}
    for key, shape in re.findall(r"fill\('([^']+)',\s*\(([^)]*)\)", recipe):
        dims = [sizes[size] if size in sizes else int(size) for size in re.findall(r"\w+", shape)]
        found[key.split(":")[1]] = fill(re.sub(r":t$", f":{t}", key), dims).double()
    return found


def recipe_number(recipe: str, words: str, default: float | None = None) -> float:
    """The number after some words (a regular expression), with or without ``=``."""
    match = re.search(rf"\b{words}\s*=?\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)", recipe)
    if match is None and default is None:
        raise KeyError(f"the recipe has no number after {words!r}: {recipe}")
    return default if match is None else float(match[1])


def recipe_list(recipe: str, name: str) -> list[float]:
    """The numbers of ``NAME=[a,b,...]``."""
    match = re.search(rf"\b{name}=\[([^\]]*)\]", recipe)
    if match is None:
        raise KeyError(f"the recipe has no list {name!r}: {recipe}")
    return [float(word) for word in match[1].split(",")]


def recipe_net(recipe: str) -> dict[str, float]:
    """The configuration of an infinite net ``(case 'NAME', d_in=.., r=.., ...)``."""
    names = ("bias_alpha", "last_bias_alpha", "first_layer_alpha", "last_layer_alpha")
    config = {name: int(recipe_number(recipe, name)) for name in ("d_in", "r", "d_out", "L")}
    config |= {name: recipe_number(recipe, name) for name in names if f" {name}=" in recipe}
    return config | {"case": re.search(r"case '([^']+)'", recipe)[1]}
