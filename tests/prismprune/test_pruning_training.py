"""Training a model while it is pruned: what of it gets gradients, and that these are the right ones."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import prismprune
from tests.prismprune.families import BY_CLS, CHECKPOINTS, MEDIA, Transformers, still

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

ANSWER = 5
"""Tokens at the end of the prompt that stand for the answer."""


@pytest.fixture
def trained(checkpoints: Callable[[str], Path]) -> Callable[[str], Transformers]:
    """A model in training whose projector, and newline, alone ask for gradients."""

    def made(name: str) -> Transformers:
        user = Transformers(checkpoints(name))
        user.model.train().requires_grad_(False)
        for _, parameter in projector(user):
            parameter.requires_grad_(True)
        return user

    return made


def projector(user: Transformers) -> Iterator[tuple[str, Any]]:
    for name, parameter in user.model.named_parameters():
        if "multi_modal_projector" in name or "image_newline" in name:
            yield name, parameter


def example(user: Transformers, media: str = "wide") -> dict[str, Any]:
    """Inputs with the answer as labels."""
    name = user.model.config.model_type
    inputs = user.inputs(next(own[media] for key, own in MEDIA.items() if key.startswith(name)), "What?")
    labels = inputs["input_ids"].clone()
    labels[:, :-ANSWER] = -100
    return inputs | {"labels": labels}


def gradients(user: Transformers, loss: Tensor) -> dict[str, Tensor]:
    user.model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in projector(user)}


@pytest.mark.parametrize(
    ("name", "media"),
    [
        (name, media)
        for name in BY_CLS
        for media in ("wide", "two", "picture and clip")
        if media in MEDIA[name]
    ],
)
def test_at_all_tokens_the_projector_has_the_gradients_of_transformers(
    trained: Callable[[str], Transformers], name: str, media: str
) -> None:
    """Each of its parameters, and LLaVA-NeXT's newline."""
    user = trained(name)
    inputs = example(user, media)
    expected = gradients(user, user.model(**inputs).loss)
    with prismprune.prune(user.model):
        found = gradients(user, user.model(**inputs).loss)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("name", ["llava", "video_llava"])
def test_the_projector_has_the_gradients_of_projecting_and_dropping(
    trained: Callable[[str], Transformers], name: str
) -> None:
    """By hand: every token projected, those kept put in place of placeholders, the language model's loss."""
    user = trained(name)
    inputs = example(user)
    model = user.model
    with prismprune.prune(model, 9) as pruning:
        found = gradients(user, model(**inputs).loss)
    kept = list(pruning.encoded[0].token_map[0].kept)
    projected = model.get_image_features(inputs["pixel_values"]).pooler_output[0].reshape(16, -1)
    ids = inputs["input_ids"][0]
    marks = (ids == model.config.image_token_id).nonzero().flatten()
    words = model.get_input_embeddings()(ids)
    embeds = torch.cat([words[: marks[0]], projected[kept], words[marks[-1] + 1 :]])
    logits = model(inputs_embeds=embeds[None]).logits[0, -ANSWER - 1 : -1]
    expected = gradients(user, cross_entropy(logits, ids[-ANSWER:]))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", BY_CLS)
def test_gradients_say_how_the_pruned_loss_changes(trained: Callable[[str], Transformers], name: str) -> None:
    """Each parameter a little along its gradient, the newline too: the loss rises by what that promises."""
    user = trained(name)
    inputs = example(user, "two")
    with prismprune.prune(user.model, 9), warnings.catch_warnings(action="error"):
        found = gradients(user, user.model(**inputs).loss)
        for own, parameter in projector(user):
            step = 5e-3 * found[own] / found[own].norm() ** 2  # by which the loss rises 5e-3
            losses = []
            for moved in (parameter + step, parameter - step):
                before = parameter.detach().clone()
                with torch.no_grad():
                    parameter.copy_(moved)
                    losses.append(user.model(**inputs).loss.item())
                    parameter.copy_(before)
            assert losses[0] - losses[1] == pytest.approx(2 * 5e-3, rel=1e-2)


@pytest.mark.parametrize("name", BY_CLS)
def test_a_step_along_the_gradient_lowers_the_loss(trained: Callable[[str], Transformers], name: str) -> None:
    """The projector alone is trained, under a budget, with checkpointed activations."""
    user = trained(name)
    inputs = example(user)
    user.model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD([parameter for _, parameter in projector(user)], lr=1e-3)
    with prismprune.prune(user.model, 9) as pruning:
        loss = user.model(**inputs).loss
        loss.backward()
        optimizer.step()
        assert user.model(**inputs).loss < loss
    # What is kept for its users keeps no graph alive.
    assert not any(visual.features.requires_grad for visual in pruning.encoded[0].visuals)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_that_ask_for_a_gradient_in_vain_are_named_once(
    checkpoints: Callable[[str], Path], name: str
) -> None:
    """Those of the tower, with Qwen2.5-VL's merger; without gradients there is nothing to say."""
    user = Transformers(checkpoints(name))
    inputs = user.inputs([still("wide")], "What?")
    with prismprune.prune(user.model, 4):
        with warnings.catch_warnings(action="error"), torch.no_grad():
            user.model(**inputs)
        with pytest.warns(UserWarning, match="No gradient reaches") as said:
            user.model(**inputs).logits.sum().backward()
        with warnings.catch_warnings(action="error"):
            user.model(**inputs)
    named = {own for own, parameter in user.model.named_parameters() if parameter.grad is not None}
    visual = ("vision_tower", "image_tower", "video_tower", "visual")
    assert not any(part in own for own in named for part in visual)
    assert ("merger" in str(said[0].message)) == (name == "qwen2_5_vl")
