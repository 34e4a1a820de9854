"""Where training starts: a projector that already says, in word embeddings, what each patch shows.

From a random projector nothing is learned in thousands of questions. So the start is solved for, not learned:
a ridge regression from patch features to the summed embeddings of the words for what the patch shows (color,
shape, size, character, or background) and for where it lies. Since GELU(z) - GELU(-z) = z, a two-layer
projector with rows V and -V, and columns US and -US, begins exactly as the linear map USV.

Characters need a regression of their own (`teach_characters`): the scenes of the first show two or three of
each, too few to tell 33 apart, though a linear probe reads two of three off an object's middle patches.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prismprune.demo.assemble import IMAGE_MEAN, IMAGE_STD
from prismprune.demo.scenes import CHARACTERS, Scene, Thing, draw_scene, draw_written_scene
from prismprune.demo.subsets import shown

if TYPE_CHECKING:
    from PIL import Image

SCENES = 140
RIDGE = 1e-3
MIDDLE = 1.6
"""How many patches from an object's center its character can still be read, in Chebyshev distance."""
PLAIN = 24
"""Patches of a picture that carry no character, beside those that do."""
CHARACTER_RIDGE = 3e-3
CHARACTER_NORM = 7.0
"""Characters' embeddings have much in common: where they differ says which it is, and that must be loud."""

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
    weights, bias, explained = _ridge((features - mean) / spread, targets, RIDGE)
    # Fold the standardisation in: y = f @ W + b.
    weights = weights / spread[:, None]
    _split(projector, weights.float(), (bias - mean @ weights).float())
    return explained


def teach_characters(
    projector: Any, encode: Encode, embed: Embed, size: int, *, scenes: int, seed: int
) -> float:
    """Add to `projector` what is written on an object, on its middle patches.

    Only linear_2 changes: a ridge regression from its inputs [., hidden] to where the character's embedding
    lies from the mean of all characters', or to zero on patches without one. `size` is the pictures' side
    in pixels. Returns its R^2.
    """
    rng = random.Random(seed)
    said = _apart(torch.stack([embed(character) for character in CHARACTERS]))
    inputs, targets = [], []
    for _ in range(scenes):
        scene = draw_written_scene(rng)
        encoded = encode([scene.image], size)[0]
        with torch.no_grad():
            hidden = torch.nn.functional.gelu(projector.linear_1(encoded)).double()
        chosen, written = _written_patches(rng, scene, round(len(encoded) ** 0.5), said)
        inputs.append(hidden[chosen])
        targets.append(written.double())
    weights, bias, explained = _ridge(torch.cat(inputs), torch.cat(targets), CHARACTER_RIDGE)
    with torch.no_grad():
        projector.linear_2.weight += weights.T.float()
        projector.linear_2.bias += bias.float()
    return explained


def _ridge(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor, float]:
    """Weights [in, out] and bias [out] of y = x @ weights + bias, and its R^2.

    strength: of the penalty on squared weights, as a share of the inputs' mean sum of squares.
    """
    mean, spoken = x.mean(0), y.mean(0)
    inputs, outputs = x - mean, y - spoken
    penalty = strength * len(x) * inputs.var(0).mean() * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ outputs)
    residual = outputs - inputs @ weights
    explained = 1 - float(residual.square().sum() / outputs.square().sum())
    return weights, spoken - mean @ weights, explained


def _apart(words: Tensor) -> Tensor:
    """What tells each of `words` [C, d] from their mean, at one norm."""
    return torch.nn.functional.normalize(words - words.mean(0), dim=1) * CHARACTER_NORM


def _written_patches(rng: random.Random, scene: Scene, side: int, said: Tensor) -> tuple[list[int], Tensor]:
    """Raster indices of patches to learn from, and what each is to say, [., d].

    `said` [C, d] is that of every character.
    """
    chosen: list[int] = []
    targets: list[Tensor] = []
    carrying = torch.zeros(side * side, dtype=torch.bool)
    numbers = shown(scene.things, side)
    for number, thing in enumerate(scene.things, start=1):
        if thing.written:
            middle = _middle(thing, side)
            chosen += middle
            targets += [said[CHARACTERS.index(thing.written)]] * len(middle)
            carrying |= numbers == number
    without = (~carrying).nonzero().flatten().tolist()
    plain = rng.sample(without, min(PLAIN, len(without)))
    return chosen + plain, torch.stack(targets + [torch.zeros_like(said[0])] * len(plain))


def _middle(thing: Thing, side: int) -> list[int]:
    """Raster indices of the patches in the middle of `thing`."""
    return [
        row * side + column
        for row in range(side)
        for column in range(side)
        if max(abs(row + 0.5 - thing.y * side), abs(column + 0.5 - thing.x * side)) < MIDDLE
    ]


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
