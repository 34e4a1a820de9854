"""Where training starts: a projector that already says, in word embeddings, what each patch shows.

From a random projector nothing is learned in thousands of questions. So the start is solved for, not learned:
a ridge regression from patch features to the summed embeddings of the words for what the patch shows (color,
shape, size, character, or background) and for where it lies. Since GELU(z) - GELU(-z) = z, a two-layer
projector with rows V and -V, and columns US and -US, begins exactly as the linear map USV.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prismprune.demo.assemble import IMAGE_MEAN, IMAGE_STD
from prismprune.demo.scenes import Scene, Thing, draw_scene
from prismprune.demo.subsets import shown

if TYPE_CHECKING:
    from PIL import Image

SCENES = 140

Embed = Callable[[str], Tensor]
"""A word's embedding [d]."""
Encode = Callable[[list["Image.Image"], int], Tensor]
"""Pictures and their side in pixels -> patch features [B, N, d_vision], raster order."""


def closed_form_start(
    projector: Any, encode: Encode, embed: Embed, sizes: tuple[int, ...], seed: int
) -> float:
    """Overwrite `projector` (linear_1, GELU, linear_2) with the regression's solution; return its R^2."""
    features, targets = _pairs(encode, embed, sizes, seed)
    mean, spread = features.mean(0), features.std(0) + 1e-6
    x = (features - mean) / spread
    y_mean = targets.mean(0)
    gram = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ (targets - y_mean))
    residual = targets - y_mean - x @ weights
    share = 1 - float(residual.square().sum() / (targets - y_mean).square().sum())
    # Fold the standardisation in: y = f @ W + b.
    weights = weights / spread[:, None]
    bias = y_mean - mean @ weights
    _split(projector, weights.float(), bias.float())
    return share


def _split(projector: Any, weights: Tensor, bias: Tensor) -> None:
    """Write y = x @ weights + bias, of rank at most half the hidden width, as linear_2(GELU(linear_1(x)))."""
    u, s, vh = torch.linalg.svd(weights, full_matrices=False)
    first, second = projector.linear_1, projector.linear_2
    rank = min(int((s > 1e-4 * s[0]).sum()), first.out_features // 2)
    scale = s[:rank].sqrt()
    inward, outward = (u[:, :rank] * scale).T, (scale[:, None] * vh[:rank]).T
    with torch.no_grad():
        # Units beyond twice the rank stay as initialised but silent: room for what training finds.
        first.weight[: 2 * rank] = torch.cat([inward, -inward])
        first.bias.zero_()
        second.weight.zero_()
        second.weight[:, : 2 * rank] = torch.cat([outward, -outward], dim=1)
        second.bias.copy_(bias)


def _pairs(encode: Encode, embed: Embed, sizes: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    rng = random.Random(seed)
    features, targets = [], []
    for index in range(SCENES):
        scene = draw_scene(rng)
        size = sizes[index % len(sizes)]
        encoded = encode([scene.image], size)[0].double()
        features.append(encoded)
        targets.append(_targets(scene, round(len(encoded) ** 0.5), embed).double())
    return torch.cat(features), torch.cat(targets)


def _targets(scene: Scene, side: int, embed: Embed) -> Tensor:
    """What each of side x side patches shows and where it lies, as summed word embeddings [side^2, d]."""
    centres = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    across, down = embed("right") - embed("left"), embed("bottom") - embed("top")
    target = (x.reshape(-1, 1) - 0.5) * across + (y.reshape(-1, 1) - 0.5) * down
    seen = embed("background").repeat(side * side, 1)
    numbers = shown(scene.things, side)
    for number, thing in enumerate(scene.things, start=1):
        words = sum((embed(word) for word in _words(thing)), torch.zeros_like(across))
        seen[numbers == number] = words
    return target + seen


def _words(thing: Thing) -> list[str]:
    return [thing.color, thing.shape, thing.size, *([thing.written] if thing.written else [])]


def picture_array(image: Image.Image, size: int) -> np.ndarray:
    """RGB resized to size x size as the demo's processor does it, ImageNet-normalised, [3, size, size]."""
    resized = np.asarray(image.resize((size, size), resample=3), dtype=np.float32) / 255
    normalised = (resized - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)
