"""`make serve` as a newcomer meets it: the demo model, the printed `curl`, true answers."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest

from prismprune.demo import parts
from tests.e2e.conftest import ROOT, Tree, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]

EXAMPLE_ANSWER = "red"
"""The colour of the one star in `examples/scene.png`."""
QUESTIONS_A_BUDGET = 40
CLIENTS = 4
LEAST_ACCURACY = 0.7
"""The model card's figure less the spread of so few questions; raise it with the weights."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    with serving(tmp_path_factory.mktemp("serve"), within_s=540, PRISM_MODEL="prism-demo") as running:
        yield running


def printed_curl(tree: Tree) -> str:
    """The command as a user would copy it out of the terminal."""
    lines = tree.printed.splitlines()
    first = next(index for index, line in enumerate(lines) if line.lstrip().startswith("curl "))
    last = next(index for index in range(first, len(lines)) if not lines[index].endswith("\\"))
    return "\n".join(lines[first : last + 1])


def test_the_printed_curl_gives_the_right_answer_for_64_of_576_tokens(tree: Tree) -> None:
    """Pasted into a shell in the repository, it answers rightly from half salient, half diverse tokens."""
    command = ["bash", "-c", printed_curl(tree)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    body = json.loads(done.stdout)
    assert body["answer"].strip(" .").lower() == EXAMPLE_ANSWER
    kept = body["visual_tokens"]
    assert (kept["original"], kept["kept"], kept["salient"], kept["diverse"]) == (576, 64, 32, 32)
    assert all(milliseconds > 0 for milliseconds in body["timings"].values())
    assert body["memory"]["peak_bytes"] > 0


@pytest.mark.parametrize("budget", [576, 64, 32])
def test_easy_vqa_is_answered_over_http(tree: Tree, budget: int) -> None:
    """Test pictures that the model was not trained on, posted by several clients at once."""
    data = parts.fetch(parts.EASY_VQA) / "test"
    questions = json.loads((data / "questions.json").read_text())
    sample = questions[:: len(questions) // QUESTIONS_A_BUDGET][:QUESTIONS_A_BUDGET]

    def right(entry: tuple[str, str, int]) -> bool:
        question, answer, picture = entry
        response = client.post(
            "/v1/answer",
            data={"question": question, "token_budget": str(budget), "max_new_tokens": "8"},
            files={"image": (data / "images" / f"{picture}.png").read_bytes()},
        )
        assert response.status_code == 200, response.text
        assert response.json()["visual_tokens"]["kept"] == budget
        return response.json()["answer"].strip(" .").lower() == answer

    with (
        httpx.Client(base_url=tree.url, timeout=120, trust_env=False) as client,
        ThreadPoolExecutor(CLIENTS) as clients,
    ):
        marks = list(clients.map(right, sample))
    assert sum(marks) / len(marks) >= LEAST_ACCURACY
