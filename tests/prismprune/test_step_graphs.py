"""Decoding steps on keys and values that stay in place: whoever comes and goes, plain steps say the same.

What CUDA would replay is called instead, once more for its recording, as it would be; on CUDA it is replayed.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prismprune import GenerationOptions, PrunedVLM, step_graphs
from prismprune.caching import EncodingCache
from prismprune.session import Asked, Session
from prismprune.step_graphs import LEAST_COLUMNS, StepGraphs
from tests.prismprune.families import CHECKPOINTS, MEDIA

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prismprune.session import Pending

ENOUGH = 2**30


@pytest.fixture(scope="module", params=CHECKPOINTS)
def vlm(request: pytest.FixtureRequest, checkpoints: Callable[[str], Path]) -> PrunedVLM:
    """Each family's."""
    return PrunedVLM.from_pretrained(checkpoints(request.param), device="cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few columns, so that short answers outgrow them."""
    monkeypatch.setattr(step_graphs, "LEAST_COLUMNS", 8)


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


def graphed(vlm: PrunedVLM, graphs: StepGraphs, cache: EncodingCache | None = None) -> Session:
    return Session(vlm._family, replace(vlm._decoder, graphs=graphs), cache)


def asked(vlm: PrunedVLM, media: str, *questions: str, tokens: int = 9, length: int = 8) -> Asked:
    name = vlm.family if vlm.family in MEDIA else "llava"
    encoded = vlm.encode(list(MEDIA[name][media]), tokens)
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
    graphs = StepGraphs(vlm.model, ENOUGH, recorder)
    recordings = []
    for _ in range(3):
        session, requests = graphed(vlm, graphs), list[Any]()
        for now in range(40):
            joining = [session.prepare(one) for at, one in plan if at == now]
            if joining:
                session.join(joining)
                requests += joining
            session.step()
        assert not session.pending
        assert said(session, requests) == [alone(vlm, one) for _, one in plan]
        recordings.append(recorder.recordings)
    assert recordings[1] == recordings[2] > 1  # the first time the room grew, and began anew


def test_sessions_in_turns_do_not_disturb_each_other(vlm: PrunedVLM) -> None:
    """There is one place for keys and values; whoever was there takes them along."""
    graphs = StepGraphs(vlm.model, ENOUGH, called)
    questions = [asked(vlm, "wide"), asked(vlm, "tall", "Why?", "Who?")]
    sessions = [graphed(vlm, graphs) for _ in questions]
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
    further = replace(first, questions=("Why is that so?",))
    session = graphed(vlm, StepGraphs(vlm.model, ENOUGH, called), EncodingCache(2**24, prefix_bytes=2**26))
    requests = session.admit([first])
    for _ in range(5):
        session.step()
    requests += session.admit([further])
    finish(session)
    assert said(session, requests) == [alone(vlm, first), alone(vlm, further)]


def test_what_is_dropped_while_somebody_is_at_work_is_copied_first(vlm: PrunedVLM) -> None:
    """`make_room` gives the memory up, and says whether there was any."""
    graphs = StepGraphs(vlm.model, ENOUGH, called)
    session = graphed(vlm, graphs)
    assert not session.make_room()
    one = asked(vlm, "wide", length=9)
    requests = session.admit([one])
    for _ in range(4):
        session.step()
    assert graphs.bytes > 0
    assert session.make_room()
    assert graphs.bytes == 0
    finish(session)
    assert said(session, requests) == [alone(vlm, one)]


def test_a_batch_that_is_too_large_takes_plain_steps(vlm: PrunedVLM) -> None:
    """Until it is small enough: the bytes are a bound."""
    recorder, one = Recorder(), asked(vlm, "wide", "Why?", "Who?", "What?", length=4)
    graphs = StepGraphs(vlm.model, 0, recorder)
    session = graphed(vlm, graphs)
    requests = session.admit([one])
    session.step()
    graphs.max_bytes = batch_bytes(session) // 4  # four rows: not even without what is rounded up
    session.step()
    assert recorder.recordings == graphs.bytes == 0
    graphs.max_bytes = ENOUGH
    session.step()
    assert recorder.recordings > 0
    assert 0 < graphs.bytes <= ENOUGH
    finish(session)
    assert said(session, requests) == [alone(vlm, one)]


def batch_bytes(session: Session) -> int:
    batch = session._running._batch
    assert batch is not None
    return batch.mask.numel() * batch.token_bytes


@pytest.mark.parametrize("failure", [RuntimeError("capture failed"), torch.OutOfMemoryError()])
def test_a_recording_that_fails_leaves_plain_steps(
    vlm: PrunedVLM, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning, and without trying the same again."""
    recorder = Recorder(failure)
    one = asked(vlm, "wide", length=6)
    graphs = StepGraphs(vlm.model, ENOUGH, recorder)
    for _ in range(2):
        session = graphed(vlm, graphs)
        requests = session.admit([one])
        finish(session)
        assert said(session, requests) == [alone(vlm, one)]
    assert recorder.recordings == 1
    assert graphs.bytes == 0
    assert "CUDA graphs" in caplog.text


def test_after_a_shortage_smaller_batches_are_still_replayed(vlm: PrunedVLM) -> None:
    """Only what did not fit is not tried again."""
    recorder = Recorder(torch.OutOfMemoryError())
    graphs = StepGraphs(vlm.model, ENOUGH, recorder)
    session = graphed(vlm, graphs)
    session.admit([asked(vlm, "wide", *["What is there to see?"] * 5, length=3)])
    finish(session)
    recorder.failure = None
    session.admit([asked(vlm, "wide", "?", length=3)])
    finish(session)
    assert recorder.recordings == 2
    assert graphs.bytes > 0


@given(st.integers(1, 64), st.integers(0, 5000))
def test_a_size_holds_the_batch_and_little_more(rows: int, length: int) -> None:
    """A row and a column for each, less than twice the rows, and at most half the columns again."""
    size = step_graphs._Size.of(rows, length)
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
    model = SimpleNamespace(device=torch.device(device), config=config)
    assert (step_graphs.step_graphs(model, quantization, max_bytes) is not None) is there
