"""Prompts, steps and towers on tensors that stay in place: whoever comes and goes, the answers are the same.

What CUDA would replay is called instead, once more for its recording, as it would be; on CUDA it is replayed.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prismprune import GenerationOptions, PrunedVLM, batches
from prismprune.attention import BlockReading
from prismprune.caching import EncodingCache
from prismprune.replay import (
    GraphBytes,
    Replay,
    TowerReplay,
    granted,
    prompts,
    recording,
    replay_of,
    steps,
    tower_replay_of,
)
from prismprune.replay.recording import Recordings
from prismprune.replay.steps import LEAST_COLUMNS
from prismprune.session import Asked, Session
from tests.prismprune.families import CHECKPOINTS, MEDIA

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prismprune.batches import Batch
    from prismprune.session import Pending

ENOUGH = 2**30


@pytest.fixture(scope="module", params=CHECKPOINTS)
def vlm(request: pytest.FixtureRequest, checkpoints: Callable[[str], Path]) -> PrunedVLM:
    """Each family's."""
    return PrunedVLM.from_pretrained(checkpoints(request.param), device="cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few columns, so that short answers outgrow them."""
    monkeypatch.setattr(steps, "LEAST_COLUMNS", 8)


def called(run: Callable[[], None], _pool: Any) -> Callable[[], None]:
    run()
    return run


class Recorder:
    """Counts recordings, and may fail them."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.recordings = 0
        self.failure = failure

    def __call__(self, run: Callable[[], None], pool: Any) -> Callable[[], None]:
        self.recordings += 1
        if self.failure is not None:
            raise self.failure
        return called(run, pool)


def replaying(vlm: PrunedVLM, replay: Replay, cache: EncodingCache | None = None) -> Session:
    return Session(vlm._family, replace(vlm._decoder, replay=replay), cache)


def asked(vlm: PrunedVLM, media: str, *questions: str, tokens: int = 9, length: int = 8) -> Asked:
    encoded = vlm.encode(list(MEDIA[names(vlm)][media]), tokens)
    return Asked(encoded, questions or ("What?",), GenerationOptions(max_new_tokens=length))


def alone(vlm: PrunedVLM, one: Asked) -> list[tuple[int, ...]]:
    return [vlm.answer_encoded(one.encoded, [text], one.generation)[0].token_ids for text in one.questions]


def finish(session: Session) -> None:
    while session.pending:
        session.step()


def said(session: Session, requests: list[Pending]) -> list[list[tuple[int, ...]]]:
    return [[answer.token_ids for answer in session.answers(request)] for request in requests]


def test_requests_that_join_and_leave_are_answered_as_alone(vlm: PrunedVLM) -> None:
    """One row, then four, then fewer, over sizes of several columns; each size is recorded once."""
    plan = [
        (0, asked(vlm, "wide", length=20)),
        (3, asked(vlm, "two", "Why?", "And a question that is longer than the others?", length=5)),
        (4, asked(vlm, "square", tokens=1, length=9)),
        (11, asked(vlm, "tall", "Who?", tokens=12, length=3)),
    ]
    recorder = Recorder()
    replay = Replay(vlm.model, ENOUGH, recorder)
    recordings = []
    for _ in range(3):
        session, requests = replaying(vlm, replay), list[Any]()
        for now in range(40):
            joining = [session.prepare(one) for at, one in plan if at == now]
            if joining:
                session.join(joining)
                requests += joining
            session.step()
        assert not session.pending
        assert said(session, requests) == [alone(vlm, one) for _, one in plan]
        recordings.append(recorder.recordings)
    assert len(replay.steps.recordings) > 1
    assert len(replay.prompts.recordings) > 1
    assert recordings[1] == recordings[2]  # the first time the room grew, and began anew


def test_every_token_sees_something_while_it_is_recorded(vlm: PrunedVLM) -> None:
    """What comes of nothing need not be a number, and would lie where others' keys and values come to."""
    seen: list[bool] = []

    def watched(run: Any, pool: Any) -> Callable[[], None]:
        replay = called(run, pool)
        seen.append(bool(run.__self__.mask.any(3).all()))
        return replay

    replay = Replay(vlm.model, ENOUGH, watched)
    for _ in range(2):
        session = replaying(vlm, replay)
        session.admit([asked(vlm, "wide", "What?", "Why is it like that?", "Who?")])
        finish(session)
    assert len(replay.prompts.recordings) > 0
    assert seen == [True] * len(seen)


def test_sessions_in_turns_do_not_disturb_each_other(vlm: PrunedVLM) -> None:
    """There is one place for keys and values; whoever was there takes them along."""
    replay = Replay(vlm.model, ENOUGH, called)
    questions = [asked(vlm, "wide"), asked(vlm, "tall", "Why?", "Who?")]
    sessions = [replaying(vlm, replay) for _ in questions]
    requests = [session.prepare(one) for session, one in zip(sessions, questions, strict=True)]
    for session, request in zip(sessions, requests, strict=True):
        session.join([request])
    while any(session.pending for session in sessions):
        for session in sessions:
            session.step()
    for session, request, one in zip(sessions, requests, questions, strict=True):
        assert said(session, [request]) == [alone(vlm, one)]


def test_a_prefix_is_kept_of_a_batch_that_was_replayed(vlm: PrunedVLM) -> None:
    """A further question begins with it, while the first one's answer still grows."""
    one = asked(vlm, "wide", length=12)
    first = Asked(one.encoded, one.questions, one.generation, media_key="wide")
    further = [replace(first, questions=(f"Why is that so, {number}?",)) for number in range(3)]
    replay = Replay(vlm.model, ENOUGH, called)
    session = replaying(vlm, replay, EncodingCache(2**24, prefix_bytes=2**26))
    requests = session.admit([first])
    for _ in range(5):
        session.step()
    for question in further:
        requests += session.admit([question])
    finish(session)
    assert said(session, requests) == [alone(vlm, each) for each in (first, *further)]
    assert {size.known > 0 for size in prompts_of(replay)} == {True}


def prompts_of(replay: Replay) -> list[prompts.PromptSize]:
    """The sizes that were recorded."""
    return list(replay.prompts.recordings._made)


def test_what_is_dropped_while_somebody_is_at_work_is_copied_first(vlm: PrunedVLM) -> None:
    """`make_room` gives the memory up, and says whether there was any."""
    replay = Replay(vlm.model, ENOUGH, called)
    session = replaying(vlm, replay)
    assert not session.make_room()
    one = asked(vlm, "wide", length=9)
    requests = session.admit([one])
    for _ in range(4):
        session.step()
    assert replay.bytes > 0
    assert session.make_room()
    assert replay.bytes == 0
    finish(session)
    assert said(session, requests) == [alone(vlm, one)]


def test_the_memory_of_recorded_towers_is_room_too(vlm: PrunedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make_room` drops them, and they may be all that there is."""
    replay = TowerReplay(called)
    monkeypatch.setattr(vlm._family, "tower_replay", replay)
    session = vlm.session()
    for _ in range(2):
        vlm.encode(list(MEDIA[names(vlm)]["wide"]))
    there = vlm.family != "qwen2_5_vl"  # whose towers are not recorded
    assert (replay.bytes > 0) is there
    assert session.make_room() is there
    assert len(replay.recordings) == replay.bytes == 0
    assert not session.make_room()


class Copies:
    """Counts keys and values that are copied into a room of their own, with `_roomy` and `_placed`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        for name in ("_roomy", "_placed"):
            monkeypatch.setattr(batches, name, partial(self._counted, getattr(batches, name)))

    def _counted(self, make: Callable[..., torch.Tensor], *given: Any) -> torch.Tensor:
        self.made += 1
        return make(*given)


def seated(vlm: PrunedVLM, replay: Replay, *questions: str) -> tuple[Session, list[Pending], Batch]:
    """A session whose batch has taken two steps in its place."""
    session = replaying(vlm, replay)
    requests = session.admit([asked(vlm, "wide", *questions, length=9)])
    for _ in range(3):
        session.step()
    batch = session._running._batch
    assert batch is not None
    assert not batch.layers
    return session, requests, batch


def test_a_batch_that_leaves_its_place_is_copied_once(
    vlm: PrunedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To where a plain step has room already."""
    replay = Replay(vlm.model, ENOUGH, called)
    session, requests, batch = seated(vlm, replay)
    copies = Copies(monkeypatch)
    replay.steps.clear()
    assert copies.made == 2 * len(batch.layers) > 0
    replay.steps.max_bytes = 0
    session.step()
    assert copies.made == 2 * len(batch.layers)
    finish(session)
    assert said(session, requests) == [alone(vlm, request.asked) for request in requests]


def test_a_batch_that_others_join_is_copied_once(vlm: PrunedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its place to beside them."""
    replay = Replay(vlm.model, ENOUGH, called)
    session, requests, _ = seated(vlm, replay)
    requests += session.admit([asked(vlm, "tall", "Why?")])
    copies = Copies(monkeypatch)
    session.step()
    batch = session._running._batch
    assert batch is not None
    assert copies.made == 2 * len(batch.layers) > 0
    finish(session)
    assert said(session, requests) == [alone(vlm, request.asked) for request in requests]


@pytest.mark.parametrize("plain", [False, True])
def test_a_released_batch_is_as_it_was_when_others_take_its_place(vlm: PrunedVLM, *, plain: bool) -> None:
    """Its keys and values are views of the place, until somebody writes there; it goes on either way."""
    replay = Replay(vlm.model, ENOUGH, called)
    session, requests, batch = seated(vlm, replay, "What?", "And a longer question?")
    replay.release(batch)
    arena = replay.steps._arena
    assert arena is not None
    assert arena.lent_to(batch)
    held = [[tensor.clone() for tensor in layer.tensors] for layer in batch.layers]
    other, others, _ = seated(vlm, replay, "Who?")
    assert not arena.lent_to(batch)
    for layer, expected in zip(batch.layers, held, strict=True):
        for tensor, same in zip(layer.tensors, expected, strict=True):
            assert torch.equal(tensor, same)
    if plain:
        replay.clear()
        replay.steps.max_bytes = 0
    while session.pending or other.pending:
        session.step()
        other.step()
    for one, asking in ((session, requests), (other, others)):
        assert said(one, asking) == [alone(vlm, request.asked) for request in asking]


def test_a_released_batch_goes_on_where_it_was(vlm: PrunedVLM) -> None:
    """Also where what it has become needs more columns, which lie elsewhere in the same memory."""
    replay = Replay(vlm.model, ENOUGH, called)
    session = replaying(vlm, replay)
    requests = session.admit([asked(vlm, "wide", "What?", "Why is it like that?", "Who?", length=30)])
    while session.pending:
        session.step()
        if (batch := session._running._batch) is not None:
            replay.release(batch)
    assert len({size.columns for size in replay.steps.recordings._made}) > 1
    assert said(session, requests) == [alone(vlm, request.asked) for request in requests]


def test_a_batch_that_is_too_large_takes_plain_steps(vlm: PrunedVLM) -> None:
    """Until it is small enough: the bytes are a bound."""
    one = asked(vlm, "wide", "Why?", "Who?", "What?", length=4)
    replay = Replay(vlm.model, 0, called)
    session = replaying(vlm, replay)
    requests = session.admit([one])
    session.step()
    replay.steps.max_bytes = batch_bytes(session) // 4  # four rows: not even without what is rounded up
    session.step()
    assert len(replay.steps.recordings) == replay.bytes == 0
    replay.steps.max_bytes = ENOUGH
    session.step()
    assert len(replay.steps.recordings) == 1
    assert 0 < replay.bytes <= ENOUGH
    finish(session)
    assert said(session, requests) == [alone(vlm, one)]


def batch_bytes(session: Session) -> int:
    batch = session._running._batch
    assert batch is not None
    return batch.mask.numel() * batch.token_bytes


def test_a_model_that_cannot_be_recorded_goes_on_without(
    vlm: PrunedVLM, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning for prompts and one for steps, no second try, and no memory kept for it."""
    recorder = Recorder(RuntimeError("operation not permitted when stream is capturing"))
    one = asked(vlm, "wide", length=6)
    replay = Replay(vlm.model, ENOUGH, recorder)
    for _ in range(3):
        session = replaying(vlm, replay)
        requests = session.admit([one])
        finish(session)
        assert said(session, requests) == [alone(vlm, one)]
    assert recorder.recordings == caplog.text.count("is not recorded") == 2
    assert replay.bytes == 0


def test_what_memory_was_too_short_for_is_tried_again_much_later(
    vlm: PrunedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other sizes meanwhile."""
    monkeypatch.setattr(recording, "LATER", 10)
    recorder = Recorder(torch.OutOfMemoryError())
    replay = Replay(vlm.model, ENOUGH, recorder)
    session = replaying(vlm, replay)
    session.admit([asked(vlm, "wide", *["What is there to see?"] * 5, length=3)])
    finish(session)
    assert recorder.recordings == 1  # of the two steps that came behind the first token
    recorder.failure = None
    session.admit([asked(vlm, "wide", "?", length=3)])
    finish(session)
    assert recorder.recordings == 2
    session.admit([asked(vlm, "wide", *["What is there to see?"] * 5, length=16)])
    finish(session)
    assert {size.rows for size in replay.steps.recordings._made} == {1, 8}


@pytest.mark.parametrize("media", MEDIA["video_llava"])
def test_what_a_language_model_is_given_is_known_without_running_it(vlm: PrunedVLM, media: str) -> None:
    """Words and visuals as the model's own forward puts them together, pruned or not."""
    if media not in MEDIA[names(vlm)]:
        assert vlm.family not in ("video_llava", "qwen2_5_vl")
        return
    encoded = vlm.encode(list(MEDIA[names(vlm)][media]), 9)
    prompt = vlm._family.prompt("What is it?", None, encoded.visuals)
    given: list[torch.Tensor] = []
    language_model = vlm.model.model.language_model
    ids, positions = prompt.token_ids[None], prompt.positions[..., None, :]
    visual_inputs = vlm._decoder.visual_inputs(prompt.visuals)
    hook = language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.inference_mode():
        try:
            vlm.model(input_ids=ids, position_ids=positions, **visual_inputs)
        finally:
            hook.remove()
        found = prompts.embedded(vlm.model, ids, positions, visual_inputs)
    assert torch.equal(found, given[0])


def names(vlm: PrunedVLM) -> str:
    return next(
        name for name in MEDIA if name.startswith(vlm.family) and name.partition("-")[0] == vlm.family
    )


def test_a_tower_that_is_replayed_reads_what_it_would(
    vlm: PrunedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other pictures of one shape, and several at once; what was read before stays as it was."""
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    replay = TowerReplay(called)
    own = [vlm._family.preprocess(vlm._family.views(media)) for media in pictures(vlm)]
    with torch.inference_mode():
        plain = [[vlm._family.read(pixels) for pixels in groups] for groups in own]
        monkeypatch.setattr(vlm._family, "tower_replay", replay)
        for _ in range(3):
            read = [[vlm._family.read(pixels) for pixels in groups] for groups in own]
            for groups, expected in zip(read, plain, strict=True):
                for reading, other in zip(groups, expected, strict=True):
                    # Views that are read side by side have other threads each, and so other rounding.
                    close(reading.tokens, other.tokens)
                    close(reading.attention(), other.attention())
                    close(reading.keys(), other.keys())
    assert (len(replay.recordings) > 0) is (vlm.family != "qwen2_5_vl")  # whose kernels depend on the grid


def pictures(vlm: PrunedVLM) -> list[Any]:
    own = MEDIA[names(vlm)]
    return [list(own[size]) for size in ("wide", "tall", "square", "two")]


def test_many_views_are_read_as_ever() -> None:
    """They keep a device busy by themselves."""
    replay = TowerReplay(called)
    seen: list[int] = []

    def read(values: torch.Tensor) -> BlockReading:
        seen.append(len(values))
        reading = BlockReading(1, 1.0)
        reading.hidden = reading.query = reading.keys = values
        return reading

    for views in (8, 9, 8, 9, 8, 9):
        assert len(replay.read("tower", torch.rand(views, 3), read).hidden) == views
    assert len(replay.recordings) == 1
    assert seen.count(9) == 3


@given(st.integers(1, 100), st.integers(0, 2000), st.integers(1, 2000))
def test_a_prompts_size_holds_it_and_little_more(rows: int, known: int, queries: int) -> None:
    """At most half the rows again, and less than 32 tokens more, or than a quarter more."""
    size = prompts.PromptSize.of(rows, known, queries)
    assert rows <= size.rows <= rows * 3 / 2
    for tokens, place in ((known, size.known), (queries, size.queries)):
        assert tokens <= place < tokens + max(32, tokens / 4)


class Work:
    """None."""

    def __init__(self) -> None:
        self.replay = self.run

    def run(self) -> None:
        """Nothing."""


def test_two_threads_never_record_at_once() -> None:
    """CUDA would end either's recording, and the work be taken for one that cannot be recorded."""
    begun, made, inside = threading.Event(), threading.Event(), threading.Event()

    def first(run: Callable[[], None], pool: Any) -> Callable[[], None]:
        begun.set()
        assert made.wait(10)
        assert not inside.wait(0.05)
        return called(run, pool)

    def second(run: Callable[[], None], pool: Any) -> Callable[[], None]:
        inside.set()
        return called(run, pool)

    def make() -> Work:
        made.set()
        return Work()

    one: Recordings[int, Work] = Recordings(first, most=2, patience=1)
    other: Recordings[int, Work] = Recordings(second, most=2, patience=1)
    with ThreadPoolExecutor() as threads:
        recorded = threads.submit(one.find, 1, Work)
        assert begun.wait(10)
        assert threads.submit(other.find, 1, make).result(10) is not None
        assert recorded.result(10) is not None


def test_the_recording_unused_for_longest_goes_first() -> None:
    """At most as many as there may be."""
    kept: Recordings[int, Work] = Recordings(called, most=2, patience=1)
    first, second = kept.find(1, Work), kept.find(2, Work)
    assert kept.find(1, Work) is first
    kept.find(3, Work)
    assert kept.find(1, Work) is first
    assert second is not None
    assert [kept.find(2, Work) for _ in range(3)] == [None] * 3  # nor is it made again at once
    assert len(kept) == 2


@given(st.integers(1, 64), st.integers(0, 5000))
def test_a_size_holds_the_batch_and_little_more(rows: int, length: int) -> None:
    """A row and a column for each, less than twice the rows, and at most half the columns again."""
    size = steps.StepSize.of(rows, length)
    assert rows <= size.rows < 2 * rows or size.rows == 1
    assert length < size.columns
    assert size.columns <= max(LEAST_COLUMNS, 3 * (length + 1) // 2)


@pytest.mark.parametrize(
    ("device", "quantization", "max_bytes", "text", "there"),
    [
        ("cuda", None, 1, {}, True),
        ("cuda", "nf4 float16", 1, {"sliding_window": None}, True),
        ("cuda", None, 1, {"sliding_window": 4096, "use_sliding_window": False}, True),
        ("cuda", None, 1, {"sliding_window": 4096}, False),
        ("cuda", "int8 +head", 1, {}, False),
        ("cuda", None, 0, {}, False),
        ("cpu", None, 1, {}, False),
    ],
)
def test_steps_are_recorded_where_they_can_be(
    device: str, quantization: str | None, max_bytes: int, text: dict[str, Any], *, there: bool
) -> None:
    """On CUDA, if memory is granted, where a step's kernels do not depend on values and one mask will do."""
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**text))
    model = SimpleNamespace(
        device=torch.device(device), config=config, get_input_embeddings=lambda: torch.nn.Embedding(1, 1)
    )
    assert (replay_of(model, quantization, max_bytes) is not None) is there
    assert (tower_replay_of(model, max_bytes) is not None) is (device == "cuda" and max_bytes > 0)


@pytest.mark.parametrize(
    ("wanted", "device", "expected"),
    [("auto", "cpu", 0), (7, "cpu", 0), (7, "cuda", 7), (0, "cuda", 0), ("auto", "cuda", 10)],
)
def test_recorded_work_gets_a_quarter_of_what_the_model_leaves(
    monkeypatch: pytest.MonkeyPatch, wanted: GraphBytes, device: str, expected: int
) -> None:
    """Or what it was told; and nothing where nothing can be recorded."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (40, 80))
    assert granted(wanted, torch.device(device)) == expected
