"""The examples of `/docs` and of the playground on the whole service with the demo model: true answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from tests.e2e.conftest import ROOT, Tree
from tests.e2e.conftest import serving as serving_all

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]

ANSWERS = {
    "one question": ["red"],
    "several questions": ["red", "blue", "2"],
    "several pictures": ["red"],
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    directory = tmp_path_factory.mktemp("serve")
    with serving_all(directory, within_s=540, PRISM_MODEL="prism-demo") as running:
        yield running


def test_every_documented_example_is_answered_rightly(tree: Tree) -> None:
    """As a reader sends them from the page: one question, three, two pictures, a chat and a stream of it."""
    with httpx.Client(base_url=tree.url, timeout=240, trust_env=False) as client:
        paths = client.get("/openapi.json").json()["paths"]

        def examples(path: str) -> dict[str, dict[str, object]]:
            content = paths[path]["post"]["requestBody"]["content"]["application/json"]
            return {name: each["value"] for name, each in content["examples"].items()}

        answered = {}
        for name, asked in examples("/v1/answer").items():
            reply = client.post("/v1/answer", json=asked).json()
            items = reply.get("answers", [reply])
            answered[name] = [item["answer"].strip(" .").lower() for item in items]
        assert answered == ANSWERS
        chats = examples("/v1/chat/completions")
        reply = client.post("/v1/chat/completions", json=chats["one question"]).json()
        assert reply["choices"][0]["message"]["content"].strip(" .").lower() == "red"
        streamed = client.post("/v1/chat/completions", json=chats["streamed"]).text
        assert '"content": "red"' in streamed


def test_the_playgrounds_scene_is_answered_rightly(tree: Tree) -> None:
    """At each budget that it compares."""
    scene = (ROOT / "service" / "playground" / "static" / "scene.jpg").read_bytes()
    with httpx.Client(base_url=tree.url, timeout=240, trust_env=False) as client:
        for budget in ("32", "64", "128", "all"):
            fields = {"question": "What color is the star?", "token_budget": budget}
            reply = client.post("/v1/answer", data=fields, files={"image": scene}).json()
            assert reply["answer"].strip(" .").lower() == "red", budget
