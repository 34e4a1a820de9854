"""The command line, on a tiny random checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from prismprune.cli import app
from prismprune.errors import InvalidOptionError, PartsUnavailableError
from tests.prismprune.tiny import PATCHES, picture, save_tiny_llava, save_tiny_llava_next

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

run = CliRunner().invoke


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llava(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "noise.png"
    picture().save(path)
    return str(path)


@pytest.fixture
def command(checkpoint: str, image: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that answers, on a machine that reaches no hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return ["answer", image, "What is it?", "--model", checkpoint]


def test_json_is_one_object_with_the_service_s_names(checkpoint: str, image: str) -> None:
    """Standard output holds the answer as the HTTP service words it, and nothing else."""
    options = ["--model", checkpoint, "--token-budget", "5", "--max-new-tokens", "4", "--json"]
    result = run(app, ["answer", image, "What is it?", *options])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["visual_tokens"] == {
        "original": PATCHES,
        "kept": 5,
        "salient": 2,
        "diverse": 3,
        "budget": 5,
        "method": "prism",
        "newlines": 0,
    }
    assert found["usage"]["completion_tokens"] <= 4
    assert found["timings"]["decode_ms"] > 0
    assert len(found["token_map"][0]["salient"]) == 2
    assert found["memory"]["device"] == "cpu"


def test_people_get_the_answer_first_then_its_costs(checkpoint: str, image: str) -> None:
    """Without --json: the answer, then tokens, times and memory."""
    options = ["--model", checkpoint, "--keep-ratio", "0.5", "--method", "uniform", "--max-new-tokens", "3"]
    result = run(app, ["answer", image, "What is it?", *options])
    assert result.exit_code == 0, result.stderr
    costs = result.stdout.index("visual tokens")
    assert f"8 of {PATCHES} kept, method uniform" in result.stdout[costs:]
    assert "first token" in result.stdout[costs:]
    assert "key-value cache" in result.stdout[costs:]


def test_several_pictures_share_a_question(checkpoint: str, image: str) -> None:
    """All arguments but the last are media."""
    options = ["--model", checkpoint, "-b", "7", "--max-new-tokens", "2", "--json"]
    result = run(app, ["answer", image, image, "Which is brighter?", *options])
    tokens = json.loads(result.stdout)["visual_tokens"]
    assert (tokens["original"], tokens["kept"]) == (2 * PATCHES, 7)


def test_a_gif_becomes_a_clip_when_frames_are_asked_for(checkpoint: str, tmp_path: Path) -> None:
    """--num-frames makes an animated GIF a video."""
    frames = [picture(seed) for seed in range(4)]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    options = ["--model", checkpoint, "--num-frames", "4", "--max-new-tokens", "2", "--json"]
    result = run(app, ["answer", str(path), "What moves?", *options])
    assert json.loads(result.stdout)["visual_tokens"]["original"] == 4 * PATCHES


def test_how_weights_are_stored_is_said_in_options(checkpoint: str, image: str) -> None:
    """A kind, and what differs from its defaults: the model that answers is loaded so, and planned so."""
    options = ["--quantization", "nf4", "--compute-dtype", "float32", "--no-double-quant"]
    options += ["--quantize-also", "vision", "--quantize-also", "head"]
    asked = ["answer", image, "What is it?", "--model", checkpoint, "--max-new-tokens", "2", "--json"]
    result = run(app, [*asked, *options])
    assert result.exit_code == 0, result.stderr
    planned = json.loads(run(app, ["plan", checkpoint, "--json", *options]).stdout)
    assert planned["quantization"] == "nf4 float32 single +vision +head"
    smaller = json.loads(run(app, ["plan", checkpoint, "--json", "--quantization", "nf4"]).stdout)
    assert smaller["quantization"] == "nf4"
    assert smaller["budget"]["weight_bytes"] != planned["budget"]["weight_bytes"]


def test_crops_can_be_packed_as_the_paper_does(tmp_path: Path, image: str) -> None:
    """LLaVA-NeXT's other layout has no newline tokens."""
    model = str(save_tiny_llava_next(tmp_path / "next"))
    asked = ["answer", image, "What is it?", "--model", model, "--max-new-tokens", "2", "--json"]
    native = json.loads(run(app, asked).stdout)["visual_tokens"]
    paper = json.loads(run(app, [*asked, "--layout", "paper"]).stdout)["visual_tokens"]
    assert native["newlines"] > 0
    assert paper["newlines"] == 0
    assert paper["original"] % PATCHES == 0


def test_the_kept_tokens_can_be_drawn(checkpoint: str, image: str, tmp_path: Path) -> None:
    """--save-map writes a PNG."""
    drawn = tmp_path / "kept.png"
    options = ["--model", checkpoint, "-b", "6", "--max-new-tokens", "2", "--save-map", str(drawn)]
    result = run(app, ["answer", image, "What is it?", *options])
    assert result.exit_code == 0, result.stderr
    assert Image.open(drawn).format == "PNG"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["-b", "0"], 2, "token budget"),
        (["-b", "many"], 2, "token budget"),
        (["-b", "4", "--keep-ratio", "0.5"], 2, "not both"),
        (["--method", "best"], 2, "Unknown method"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens"),
        (["--num-frames", "0"], 2, "num_frames"),
        (["--dtype", "float8"], 2, "dtype"),
        (["--layout", "spiral"], 2, "layout"),
        (["--quantize-also", "vision"], 2, "quantization"),
        (["--quantization", "int8", "--no-double-quant"], 2, "nf4"),
        (["--model", "no/such-model-anywhere"], 1, "No model"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(
    options: list[str], status: int, message: str, command: list[str]
) -> None:
    """Wrong options end with 2, what is missing with 1, both with one line and no traceback."""
    result = run(app, [*command, *options])
    complaints = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == status
    assert len(complaints) == 1
    assert message in complaints[0]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_bad_media_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    """A text called .png ends the command at once."""
    path = tmp_path / "text.png"
    path.write_text("not a picture")
    result = run(app, ["answer", str(path), "What is it?", "--model", "no/such-model-anywhere"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: The file is none of PNG")


def test_a_file_that_is_not_there_is_a_usage_error() -> None:
    """The missing file is named."""
    result = run(app, ["answer", "nowhere.png", "What is it?"])
    assert result.exit_code == 2
    assert "nowhere.png" in result.stderr


def test_a_map_that_cannot_be_written_is_one_line(checkpoint: str, image: str, tmp_path: Path) -> None:
    """The answer is printed; the file that could not be written is named."""
    drawn = tmp_path / "missing" / "kept.png"
    options = ["--model", checkpoint, "-b", "6", "--max-new-tokens", "2", "--save-map", str(drawn)]
    result = run(app, ["answer", image, "What is it?", *options])
    assert result.exit_code == 1
    assert f"error: {drawn}: No such file or directory" in result.stderr
    assert "visual tokens" in result.stdout


def test_models_lists_demo_families_and_methods(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One JSON object: whether the demo is here, what can be loaded, how tokens are chosen."""
    monkeypatch.setenv("PRISM_CACHE_DIR", str(tmp_path))
    listed = json.loads(run(app, ["models", "--json"]).stdout)
    assert listed["demo"] == {"name": "prism-demo", "fetched": False, "cache": str(tmp_path)}
    assert {
        "name": "llava",
        "example": "llava-hf/llava-1.5-7b-hf",
        "modalities": ["image", "video"],
    } in listed["families"]
    assert listed["methods"][0] == "prism"
    people = run(app, ["models"])
    assert "prism-demo, not fetched yet" in people.stdout
    assert "llava-hf/llava-1.5-7b-hf" in people.stdout


def test_demo_commands_come_from_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prismprune demo` runs and lists the demo's own commands, and its errors are one line too."""
    demo = typer.Typer()

    @demo.command()
    def fetch() -> None:
        """Fetch the parts."""
        raise PartsUnavailableError("The index is away.")

    @demo.command()
    def train() -> None:
        raise InvalidOptionError("Never mind.")

    module = ModuleType("prismprune.demo.cli")
    module.app = demo  # type: ignore[attr-defined] # a stand-in for the real module
    monkeypatch.setitem(sys.modules, "prismprune.demo.cli", module)
    fetched = run(app, ["demo", "fetch"])
    assert (fetched.exit_code, fetched.stderr) == (1, "error: The index is away.\n")
    assert run(app, ["demo", "train"]).exit_code == 2
    assert "Fetch the parts." in run(app, ["demo", "--help"]).stdout


def test_help_comes_without_torch() -> None:
    """Help, also of `python -m prismprune`, loads neither torch nor transformers."""
    probe = (
        "import sys, runpy\n"
        "sys.argv = ['prismprune', '--help']\n"
        "try:\n    runpy.run_module('prismprune', run_name='__main__')\n"
        "except SystemExit as done:\n    assert not done.code\n"
        "print({'torch', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "answer" in done.stdout


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    context = typer.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_says_all_that_is_written(words: tuple[str, ...]) -> None:
    """What a terminal takes for markup would be missing: square brackets with a default in them."""
    shown = run(app, [*words, "--help"], env={"COLUMNS": "300"}).stdout
    lines = [line.rstrip("│ ").rstrip() for line in shown.splitlines()]
    assert not [line for line in lines if line.endswith(" .")]
    for option in COMMANDS[words].params:
        assert (option.help or "") in shown


@pytest.mark.parametrize(
    ("words", "default"),
    [
        ("compare", "default: every method"),
        ("compare", "default: 128, 64, 32"),
        ("compare", "default: that of the model"),
        ("answer", "default: 8"),
        ("plan", "default: those of one picture or clip"),
        ("demo draw", "default: one to six"),
        ("demo train", "default: the recipe's"),
        ("demo evaluate", "default: the demo's own"),
    ],
)
def test_help_tells_defaults_that_are_no_value(words: str, default: str) -> None:
    """Those that documentation gives, too."""
    assert f"({default})" in run(app, [*words.split(), "--help"], env={"COLUMNS": "300"}).stdout


def test_the_version_is_printed() -> None:
    """`--version` prints the package's version."""
    from prismprune import __version__

    assert run(app, ["--version"]).stdout.strip() == __version__
