"""The whole stack in real processes over real HTTP, with a tiny random model in place of the demo's."""

from __future__ import annotations

import io
import json
import signal
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.e2e.conftest import Tree, serving, wait_until
from tests.prismprune.tiny import PATCHES, picture
from tests.service.conftest import data_uri, problem
from tests.service.test_refusals import png_header

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BODY_LIMIT = 100_000
QUESTION = {"question": "What is this?", "max_new_tokens": 4}


def encoded(image_format: str = "PNG", frames: int = 1) -> bytes:
    first, *others = [picture(seed) for seed in range(frames)]
    buffer = io.BytesIO()
    first.save(buffer, image_format, **({"save_all": True, "append_images": others} if others else {}))
    return buffer.getvalue()


IMAGE = data_uri(encoded())


@pytest.fixture(scope="module")
def tree(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    with serving(
        tmp_path_factory.mktemp("serve"),
        PRISM_MODEL=checkpoint,
        PRISM_MAX_JSON_BYTES=str(BODY_LIMIT),
        PRISM_MAX_MULTIPART_BYTES=str(BODY_LIMIT),
    ) as running:
        yield running


@pytest.fixture
def client(tree: Tree) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tree.url, timeout=60, trust_env=False) as connected:
        yield connected


def test_it_is_healthy_when_it_says_so(client: httpx.Client) -> None:
    """`/healthz` is 200 at the moment the address is printed: broker up, worker warm."""
    response = client.get("/healthz")
    assert response.status_code == 200
    assert response.json()["worker"]["state"] == "warm"


@pytest.mark.parametrize("form", [False, True])
def test_a_picture_is_answered_within_its_budget(client: httpx.Client, form: bool) -> None:
    """JSON and multipart: 8 of 16 tokens are kept, half of them salient, and every stage has its time."""
    if form:
        # Another picture than the JSON's, which the worker has encoded before: a stage left out has no time.
        files = {"image": ("p.webp", encoded("WEBP"), "image/webp")}
        response = client.post("/v1/answer", data={**QUESTION, "token_budget": "8"}, files=files)
    else:
        response = client.post("/v1/answer", json={**QUESTION, "image": IMAGE, "token_budget": 8})
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["visual_tokens"] == {
        "original": PATCHES,
        "kept": 8,
        "salient": 4,
        "diverse": 4,
        "budget": 8,
        "method": "prism",
        "newlines": 0,
    }
    assert body["usage"]["prompt_tokens_details"]["image_tokens"] == 8
    assert all(milliseconds > 0 for milliseconds in body["timings"].values())
    assert body["memory"]["peak_bytes"] > 0
    assert body["memory"]["kv_cache_bytes"] > 0


def test_a_video_is_answered_within_its_budget(client: httpx.Client) -> None:
    """Four frames of an animation share a budget of 12 tokens."""
    video = data_uri(encoded("GIF", frames=4), "image/gif")
    sent = {**QUESTION, "video": video, "token_budget": 12, "sampling": {"num_frames": 4}}
    response = client.post("/v1/answer", json=sent)
    assert response.status_code == 200, response.text
    assert response.json()["visual_tokens"]["original"] == 4 * PATCHES
    assert response.json()["visual_tokens"]["kept"] == 12
    assert response.json()["usage"]["prompt_tokens_details"]["video_tokens"] == 12


def test_several_questions_share_one_encoding(client: httpx.Client) -> None:
    """Two questions, two answers, one set of kept tokens."""
    sent = {"questions": ["What?", "Where?"], "image": IMAGE, "token_budget": 8, "max_new_tokens": 2}
    body = client.post("/v1/answer", json=sent).json()
    assert len(body["answers"]) == 2
    assert body["visual_tokens"]["kept"] == 8


def test_a_caller_may_come_back_for_the_answer(client: httpx.Client) -> None:
    """`Prefer: respond-async` gives 202 and a place to look, where the result appears."""
    accepted = client.post(
        "/v1/answer", json={**QUESTION, "image": IMAGE}, headers={"Prefer": "respond-async"}
    )
    assert accepted.status_code == 202
    place = accepted.headers["location"]
    wait_until(lambda: client.get(place).json()["state"] == "succeeded")
    assert client.get(place).json()["result"]["visual_tokens"]["original"] == PATCHES


def test_one_scrape_shows_latency_tokens_and_memory(client: httpx.Client) -> None:
    """`/metrics` of the front end carries the worker's: one observation a request."""
    client.post("/v1/answer", json={**QUESTION, "image": IMAGE, "token_budget": 8})
    text = client.get("/metrics").text
    for name in ("request_latency_seconds", "visual_tokens_kept", "device_memory_peak_bytes"):
        counts = [line for line in text.splitlines() if line.startswith(f"prismprune_{name}_count{{")]
        assert counts, name
        assert all(float(line.rpartition(" ")[2]) > 0 for line in counts)
    assert "prismprune_http_request_duration_seconds_count{" in text


PICTURE_FILE = ("p.png", encoded(), "image/png")
FORMS: list[tuple[str, dict[str, str], dict[str, Any], int, str]] = [
    ("no file", {}, {}, 422, "invalid-request"),
    ("text called .png", {}, {"image": ("a.png", b"just text", "image/png")}, 415, "unsupported-media-type"),
    ("huge header", {}, {"image": ("a.png", png_header(50_000, 50_000))}, 413, "media-too-large"),
    ("truncated", {}, {"image": ("a.jpg", encoded("JPEG")[:-600])}, 422, "undecodable-media"),
    ("budget 0", {"token_budget": "0"}, {"image": PICTURE_FILE}, 422, "invalid-budget"),
    ("budget -1", {"token_budget": "-1"}, {"image": PICTURE_FILE}, 422, "invalid-budget"),
    ("budget 1e9", {"token_budget": "1e9"}, {"image": PICTURE_FILE}, 422, "invalid-budget"),
    ("budget many", {"token_budget": "many"}, {"image": PICTURE_FILE}, 422, "invalid-budget"),
    ("both", {"token_budget": "8", "keep_ratio": "0.5"}, {"image": PICTURE_FILE}, 422, "invalid-budget"),
    ("method", {"method": "magic"}, {"image": PICTURE_FILE}, 422, "unknown-method"),
    ("field", {"tokenbudget": "8"}, {"image": PICTURE_FILE}, 422, "invalid-request"),
]


@pytest.mark.parametrize(
    ("fields", "files", "status", "slug"), [each[1:] for each in FORMS], ids=[each[0] for each in FORMS]
)
def test_bad_input_gets_its_status(
    client: httpx.Client, fields: dict[str, str], files: dict[str, Any], status: int, slug: str
) -> None:
    """The same problem, whether the front end sees it or a worker finds it while decoding."""
    # `files` is never empty, so that httpx sends a multipart form also where the picture is missing.
    parts = {**files, **{name: (None, value) for name, value in {**QUESTION, **fields}.items()}}
    parts["max_new_tokens"] = (None, "4")
    problem(client.post("/v1/answer", files=parts), status, slug)


def test_broken_json_is_400(client: httpx.Client) -> None:
    """A body that is cut off."""
    response = client.post(
        "/v1/answer", content=json.dumps(QUESTION)[:-1], headers={"Content-Type": "application/json"}
    )
    problem(response, 400, "malformed-body")


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=b"])
@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
def test_a_body_over_the_limit_is_413(client: httpx.Client, content_type: str, chunked: bool) -> None:
    """Declared in the header or found out while reading."""
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="p.png"\r\n\r\n'
    body = head + b"x" * (BODY_LIMIT + 1)
    content = iter([body[:1000], body[1000:]]) if chunked else body
    response = client.post("/v1/answer", content=content, headers={"Content-Type": content_type})
    problem(response, 413, "body-too-large")


def test_an_interrupt_ends_everything(checkpoint: str, tmp_path: Path) -> None:
    """Ctrl-C: exit code 0, it says so, nothing left running."""
    with serving(tmp_path, PRISM_MODEL=checkpoint) as tree:
        assert tree.end(signal.SIGINT) == 0
    assert tree.printed.rstrip().endswith("Stopped, nothing is left running.")


def test_an_interrupt_while_the_model_loads_ends_everything(checkpoint: str, tmp_path: Path) -> None:
    """Nobody has to wait for a start that is no longer wanted."""
    with serving(tmp_path, until="[4/4]", PRISM_MODEL=checkpoint) as tree:
        assert tree.end(signal.SIGINT) == 0
    assert "Ready" not in tree.printed


def test_the_tree_ends_with_the_make_that_started_it(checkpoint: str, tmp_path: Path) -> None:
    """`make serve` asks for it, so that killing `make` leaves nothing running either."""
    shell = ["sh", "-c", '"$@"; exit $?', "make"]  # a parent that waits, as `make` does
    options = ["--end-with-parent"]
    with serving(tmp_path, until="[4/4]", wrapper=shell, options=options, PRISM_MODEL=checkpoint) as tree:
        assert tree.end(signal.SIGKILL) == -signal.SIGKILL


@pytest.mark.parametrize("words", ["-m worker ", "-m service ", "valkey-server"])
def test_the_death_of_one_process_ends_the_tree(checkpoint: str, tmp_path: Path, words: str) -> None:
    """Whichever dies: the others go too, the exit code is not 0, and the message says who it was."""
    with serving(tmp_path, PRISM_MODEL=checkpoint) as tree:
        family = tree.family
        tree.member(words).kill()
        assert tree.ended(family) == 1
    assert "was killed by signal 9, so everything is stopped" in tree.printed


def test_an_accepted_job_survives_the_death_of_everything(checkpoint: str, tmp_path: Path) -> None:
    """After kill -9 of the supervisor nothing is left running, and the next start still knows the answer."""
    with serving(tmp_path, PRISM_MODEL=checkpoint) as tree:
        answered = httpx.post(
            f"{tree.url}/v1/answer", json={**QUESTION, "image": IMAGE}, trust_env=False, timeout=60
        )
        tree.end(signal.SIGKILL)
    with serving(tmp_path, PRISM_MODEL=checkpoint) as tree:
        job = httpx.get(f"{tree.url}/v1/jobs/{answered.json()['id']}", trust_env=False).json()
    assert job["state"] == "succeeded"
    assert job["result"]["answer"] == answered.json()["answer"]


def test_a_model_that_cannot_be_loaded_is_a_clear_end(tmp_path: Path) -> None:
    """The worker's own last line is shown, and the exit code is 1."""
    (tmp_path / "nothing").mkdir()
    with (
        pytest.raises(AssertionError, match="worker ended with code 1"),
        serving(tmp_path, PRISM_MODEL=str(tmp_path / "nothing")),
    ):
        pass
