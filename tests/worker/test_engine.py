"""Batches, and who fails when one of them fails."""

from __future__ import annotations

import threading
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prismprune.caching import EncodingCache
from prismprune.errors import InvalidScoresError, UnknownModelError, UnsupportedMediaError
from tests.worker.conftest import Scripted, ScriptedSession
from worker.engine import Engine, _out_of_memory
from worker.errors import DeadlineExceededError, OutOfMemoryError, StoppedError
from worker.line import Limits

if TYPE_CHECKING:
    from prismprune.encoding import EncodedMedia
    from prismprune.vlm import VisualRequest
    from worker.engine import Ticket


def engine(
    model: Scripted, *, max_batch: int = 4, max_tokens: int = 10**6, max_wait_s: float = 0, **changes: Any
) -> Engine[Scripted]:
    """An engine around `model` that does not wait for neighbors."""
    limits = Limits(max_batch, max_tokens, max_wait_s)
    options = {"on_batch": lambda _: None, "on_death": lambda _: None} | changes
    return Engine(lambda: model, limits=limits, **options)


def ask(running: Engine[Scripted], question: str, deadline_s: float = 60) -> Ticket:
    """Submits one question; the engine looks at nothing else of a request."""
    request: Any = SimpleNamespace(questions=(question,))
    return running.submit(request, time.monotonic() + deadline_s)


def hold(model: Scripted, running: Engine[Scripted]) -> Ticket:
    """Keeps the engine busy with one request, so that what comes next gathers in the queue."""
    model.gate.clear()
    ticket = ask(running, "held")
    assert model.entered.wait(10)
    return ticket


@settings(max_examples=20)
@given(waiting=st.integers(1, 12), max_batch=st.integers(1, 5))
def test_requests_join_in_order_as_far_as_there_is_room(waiting: int, max_batch: int) -> None:
    """Never more than a batch at work, and each gets its own answer."""
    model, sizes = Scripted(), list[int]()
    with engine(model, max_batch=max_batch, on_batch=sizes.append) as running:
        hold(model, running)
        tickets = [ask(running, f"question {number}") for number in range(waiting)]
        model.gate.set()
        texts = [ticket.answered().answers[0].text for ticket in tickets]
    assert texts == [f"question {number}" for number in range(waiting)]
    assert [question for joined in model.batches for question in joined] == ["held", *texts]
    assert max(sizes) == min(max_batch, waiting)


def test_a_request_joins_one_that_is_being_answered() -> None:
    """It need not wait for the end of a long answer."""
    model = Scripted()
    with engine(model) as running:
        long = ask(running, "for ever")
        assert model.entered.wait(10)
        short = ask(running, "short").answered()
        assert short.answers[0].text == "short"
        assert short.joined == 1  # a prefill of its own
        assert not long.future.done()
        long.cancel()


def test_no_request_joins_while_the_cache_may_fill_up() -> None:
    """Room is counted in tokens: two of fifty fill a hundred, and the third waits for one to leave."""
    model, sizes = Scripted(), list[int]()
    model.tokens_each = 50
    with engine(model, max_tokens=100, on_batch=sizes.append) as running:
        tickets = [ask(running, "for ever"), ask(running, "for ever")]
        while sum(sizes[-1:]) < 2:
            time.sleep(0.001)
        waiting = ask(running, "waits")
        time.sleep(0.05)
        assert not waiting.future.done()
        tickets[0].cancel()
        assert waiting.answered().answers[0].text == "waits"
        tickets[1].cancel()


def test_those_who_come_together_join_as_far_as_there_is_room() -> None:
    """Though all are encoded at once; the others wait for it, in order, and nothing is encoded anew."""
    model, encoded = Scripted(), list[str]()
    model.tokens_each = 40
    model.on_encode = lambda request: encoded.append(request.questions[0])
    with engine(model, max_tokens=100) as running:
        hold(model, running)
        texts = [f"number {number}" for number in range(4)]
        tickets = [ask(running, text) for text in texts]
        model.gate.set()
        assert [ticket.answered().answers[0].text for ticket in tickets] == texts
    assert model.batches == [["held"], texts[:2], texts[2:]]
    assert encoded == ["held", *texts]


def test_a_long_neighbor_makes_room_scarce() -> None:
    """Each is padded to the longest: beside one of a hundred tokens two of one do not fit into 250."""
    model = Scripted()
    with engine(model, max_tokens=250) as running:
        hold(model, running)
        tickets = [ask(running, text) for text in ("a", "b", "a long one", "c")]
        model.gate.set()
        for ticket in tickets:
            ticket.answered()
    assert model.batches == [["held"], ["a", "b"], ["a long one", "c"]]


def test_one_that_waits_for_room_holds_up_nobody_once_its_caller_has_gone() -> None:
    """Whether canceled or late, it is told and never joins."""
    model = Scripted()
    model.tokens_each = 60
    with engine(model, max_tokens=100) as running:
        hold(model, running)
        endless, canceled = ask(running, "for ever"), ask(running, "canceled")
        late, last = ask(running, "late", deadline_s=0.3), ask(running, "last")
        model.gate.set()
        while len(model.batches) < 2:
            time.sleep(0.001)
        canceled.cancel()
        canceled.let_go()
        with pytest.raises(DeadlineExceededError):
            late.answered()
        endless.cancel()
        assert last.answered().answers[0].text == "last"
    assert model.batches == [["held"], ["for ever"], ["last"]]


def test_questions_of_one_request_that_differ_too_much_are_refused() -> None:
    """Six of which one is long would take six times its room; alike they may take as much alone."""
    model = Scripted()
    with engine(model, max_tokens=250) as running:
        for questions, fits in (("short", "a long one"), True), (("b",) * 5 + ("a long one",), False):
            request: Any = SimpleNamespace(questions=questions)
            ticket = running.submit(request, time.monotonic() + 60)
            with nullcontext() if fits else pytest.raises(OutOfMemoryError, match="room of 600 tokens"):
                ticket.answered()
        alike: Any = SimpleNamespace(questions=("a long one",) * 6)
        assert len(running.submit(alike, time.monotonic() + 60).answered().answers) == 6


def test_prompts_that_cannot_be_written_are_their_own_requests_fault() -> None:
    """Nobody is encoded again for it."""
    model, encoded = Scripted(), list[str]()
    model.on_encode = lambda request: encoded.append(request.questions[0])
    with engine(model) as running:
        hold(model, running)
        texts = ["before", "no template", "after"]
        before, culprit, after = (ask(running, text) for text in texts)
        model.gate.set()
        assert [one.answered().answers[0].text for one in (before, after)] == ["before", "after"]
        with pytest.raises(UnknownModelError):
            culprit.answered()
    assert encoded == ["held", *texts]


def test_who_is_gone_when_a_batch_fails_is_not_tried_again() -> None:
    """Only those whose callers wait are."""
    model = Scripted()
    with engine(model) as running:
        hold(model, running)
        gone, culprit = ask(running, "for ever"), ask(running, "raise in the end")

        def leaves() -> bool:
            if len(model.batches) == 2:
                gone.cancel()
            return False

        model.crowded = leaves
        model.gate.set()
        with pytest.raises(StoppedError):
            gone.answered()
        gone.let_go()
        with pytest.raises(RuntimeError):
            culprit.answered()
    assert model.batches == [["held"], ["for ever", "raise in the end"], ["raise in the end"]]


def test_a_prefill_is_no_time_in_the_line() -> None:
    """Nor is that of those before; the wait for room is."""
    model = Scripted()
    model.tokens_each = 60
    with engine(model, max_tokens=100) as running:
        before = hold(model, running)
        entered = time.monotonic()
        time.sleep(0.05)
        endless, waiting = ask(running, "for ever"), ask(running, "waits")
        model.gate.set()
        assert before.answered().began <= entered
        while len(model.batches) < 2:
            time.sleep(0.001)
        time.sleep(0.05)
        until = time.monotonic()
        endless.cancel()
        assert waiting.answered().began >= until


@pytest.mark.parametrize("stage", ["encode", "join"])
@pytest.mark.parametrize("end", ["late", "canceled"])
def test_what_nobody_waits_for_any_longer_is_not_computed_to_its_end(stage: str, end: str) -> None:
    """Between two layers; who shared it is answered, without those who left."""
    model = Scripted()
    with engine(model) as running:

        def layers(asked: Any) -> None:
            questions = asked if stage == "join" else list(asked.questions)
            while "endless" in questions and len(questions) == 1:
                time.sleep(0.001)
                running.progress()

        setattr(model, f"on_{stage}", layers)
        ticket = ask(running, "endless", deadline_s=0.1 if end == "late" else 60)
        if end == "canceled":
            time.sleep(0.05)
            ticket.cancel()
        with pytest.raises(DeadlineExceededError if end == "late" else StoppedError):
            ticket.answered()
        ticket.let_go()
        with pytest.raises(DeadlineExceededError if end == "late" else StoppedError):
            ticket.future.result(0)
        assert ask(running, "next").answered().answers[0].text == "next"


def test_what_somebody_waits_for_is_computed_to_its_end() -> None:
    """Of two that share a prefill one is canceled in the middle."""
    model = Scripted()
    with engine(model) as running:
        hold(model, running)
        gone, stays = ask(running, "gone"), ask(running, "stays")

        def layers(questions: list[str]) -> None:
            if "gone" in questions:
                gone.cancel()
                running.progress()

        model.on_join = layers
        model.gate.set()
        assert stays.answered().answers[0].text == "stays"
        with pytest.raises(StoppedError):
            gone.answered()
    assert model.batches == [["held"], ["gone", "stays"]]


def test_neighbors_are_counted() -> None:
    """Three that join together: each had two beside it."""
    model = Scripted()
    with engine(model) as running:
        hold(model, running)
        tickets = [ask(running, "together") for _ in range(3)]
        model.gate.set()
        assert [ticket.answered().shared_with for ticket in tickets] == [2, 2, 2]
        assert [ticket.answered().joined for ticket in tickets] == [3, 3, 3]


@pytest.mark.usefixtures("patient")
def test_a_request_waits_for_one_that_is_coming() -> None:
    """They share a batch."""
    with engine(Scripted(), max_wait_s=30) as running:
        with running.coming():
            first = ask(running, "first")
            assert still_waits(first)
            second = ask(running, "second")
        assert [ticket.answered().joined for ticket in (first, second)] == [2, 2]


@pytest.mark.usefixtures("patient")
def test_callers_that_had_their_answers_together_share_the_next_batch() -> None:
    """Whoever is first waits for the other; a caller by itself waits for nobody."""
    with engine(Scripted(), max_wait_s=30) as running:
        assert [ask(running, "alone").answered().joined for _ in range(3)] == [1, 1, 1]
        with running.coming():
            together = [ask(running, "first"), ask(running, "second")]
        assert [ticket.answered().joined for ticket in together] == [2, 2]
        first = ask(running, "again")
        assert still_waits(first)
        second = ask(running, "again")
        assert [ticket.answered().joined for ticket in (first, second)] == [2, 2]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short answers take, others are waited for as long as may be."""
    monkeypatch.setattr("worker.line.SHARE", 1e9)


def still_waits(ticket: Ticket) -> bool:
    """It is not answered within a moment."""
    with pytest.raises(FutureTimeoutError):
        ticket.future.result(timeout=0.05)
    return True


def test_only_the_culprit_fails() -> None:
    """An error in a batch of three is the error of the one that causes it."""
    model = Scripted()
    with engine(model) as running:
        hold(model, running)
        before, culprit, after = (ask(running, question) for question in ("before", "raise", "after"))
        model.gate.set()
        assert before.answered().answers[0].text == "before"
        assert after.answered().answers[0].text == "after"
        with pytest.raises(RuntimeError):
            culprit.answered()


def test_an_answer_without_an_outcome_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits were no numbers: its own error, and its neighbor is answered where it is, once."""
    model, answers = Scripted(), ScriptedSession.answers

    def spoiled(one: Any) -> Any:
        if "spoiled" in one.questions:
            raise InvalidScoresError("no numbers")
        return answers(one)

    monkeypatch.setattr(ScriptedSession, "answers", staticmethod(spoiled))
    with engine(model) as running:
        hold(model, running)
        culprit, neighbor = ask(running, "spoiled"), ask(running, "neighbor")
        model.gate.set()
        assert neighbor.answered().answers[0].text == "neighbor"
        with pytest.raises(InvalidScoresError):
            culprit.answered()
        assert ask(running, "later").answered().answers[0].text == "later"
    assert model.batches == [["held"], ["spoiled", "neighbor"], ["later"]]


def test_a_batch_too_large_is_answered_by_halves() -> None:
    """Memory for one: four requests come through in seven calls, and all of them succeed."""
    model, sizes = Scripted(), list[int]()
    with engine(model, on_batch=sizes.append) as running:
        hold(model, running)
        model.fits = lambda: 1
        tickets = [ask(running, f"number {number}") for number in range(4)]
        model.gate.set()
        texts = [ticket.answered().answers[0].text for ticket in tickets]
    assert texts == [f"number {number}" for number in range(4)]
    assert sizes == [1] * 5


def test_what_does_not_fit_by_itself_fails_alone() -> None:
    """With a clear problem; its neighbors are answered together as far as they fit."""
    model = Scripted()
    with engine(model) as running:
        hold(model, running)
        fitting = [ask(running, "fits"), ask(running, "fits")]
        culprit = ask(running, "too large")
        model.gate.set()
        assert [ticket.answered().shared_with for ticket in fitting] == [1, 1]
        with pytest.raises(OutOfMemoryError):
            culprit.answered()


def overlapping(model: Scripted, **changes: Any) -> Engine[Scripted]:
    return engine(model, overlap=lambda _: True, **changes)


def behind(model: Scripted, running: Engine[Scripted], *questions: str) -> tuple[Ticket, list[Ticket]]:
    """An endless answer at work, and others whose media nobody has seen yet."""
    endless = ask(running, "for ever")
    assert model.entered.wait(10)
    while model.steps == 0:
        time.sleep(0.001)
    model.sight.clear()
    return endless, [ask(running, question) for question in questions]


def test_tokens_go_on_while_others_media_are_encoded() -> None:
    """Where that overlaps; who was encoded joins as soon as that is done."""
    model = Scripted()
    with overlapping(model) as running:
        endless, (short,) = behind(model, running, "short")
        until = model.steps + 5
        while model.steps < until:
            time.sleep(0.001)
        assert model.batches == [["for ever"]]
        model.sight.set()
        assert short.answered().answers[0].text == "short"
        assert not endless.future.done()
        endless.cancel()


def test_who_is_left_alone_with_the_encoding_waits_for_it() -> None:
    """The last one at work has ended, and nothing is asked again."""
    model = Scripted()
    with overlapping(model) as running:
        endless, (short,) = behind(model, running, "short")
        endless.cancel()
        assert endless.future.result(10).answers[0].finish_reason == "canceled"
        model.sight.set()
        assert short.answered().answers[0].text == "short"
    assert model.batches == [["for ever"], ["short"]]


def test_media_that_cannot_be_encoded_fail_alone_beside_others() -> None:
    """The neighbor that came with them, and who was at work, are answered."""
    model = Scripted()
    with overlapping(model) as running:
        endless, (before, culprit, after) = behind(model, running, "before", "unreadable", "after")
        model.sight.set()
        with pytest.raises(UnsupportedMediaError):
            culprit.answered()
        assert [one.answered().answers[0].text for one in (before, after)] == ["before", "after"]
        assert not endless.future.done()
        endless.cancel()


def test_what_ends_while_it_is_encoded_gets_no_answer() -> None:
    """Canceled or late: it joins and leaves with the next step."""
    model = Scripted()
    with overlapping(model) as running:
        endless, (canceled,) = behind(model, running, "for ever")
        until = model.steps + 2
        while model.steps < until:
            time.sleep(0.001)
        canceled.cancel()
        model.sight.set()
        with pytest.raises(StoppedError):
            canceled.answered()
        endless.cancel()


def test_stopping_answers_what_is_being_encoded() -> None:
    """Leaving the block waits for it."""
    model = Scripted()
    with overlapping(model) as running:
        endless, (short,) = behind(model, running, "short")
        until = model.steps + 2
        while model.steps < until:
            time.sleep(0.001)

        def later() -> None:
            model.sight.set()
            endless.cancel()

        threading.Timer(0.05, later).start()
    assert short.future.result(0).answers[0].text == "short"


class Kept(NamedTuple):
    """What a cache holds."""

    bytes: int


def test_what_is_cached_makes_room_before_a_request_fails() -> None:
    """It was kept only to be faster."""
    model, cache = Scripted(), EncodingCache(100)
    cache.put("a picture", cast("EncodedMedia", Kept(60)))
    model.fits = lambda: 0 if cache.bytes else 1
    with engine(model, cache=cache) as running:
        assert ask(running, "fits now").answered().answers[0].text == "fits now"
    assert cache.bytes == 0


@pytest.mark.parametrize(("question", "fits"), [("does not fit", 0), ("too large", 1)])
def test_room_is_made_once_for_a_request(question: str, fits: int) -> None:
    """What it has encoded and cached itself does not count as room, or it would be tried for ever."""
    model, cache, encoded = Scripted(), EncodingCache(100), list[object]()
    model.fits = lambda: fits

    def encode(request: VisualRequest) -> None:
        encoded.append(request)
        cache.put("its picture", cast("EncodedMedia", Kept(60)))

    model.on_encode = encode
    with engine(model, cache=cache) as running, pytest.raises(OutOfMemoryError):
        ask(running, question).answered()
    assert len(encoded) == 2


def test_who_fails_while_being_answered_is_tried_again_with_all_the_room() -> None:
    """The caches are emptied before anybody is told to ask for less; a listener begins anew."""
    model, cache, heard = Scripted(), EncodingCache(100), list[str]()
    cache.put("a picture", cast("EncodedMedia", Kept(60)))
    model.crowded = lambda: model.steps > 1 and cache.bytes > 0
    listener: Any = SimpleNamespace(text=lambda _, text: heard.append(text), again=lambda: heard.append("|"))
    request: Any = SimpleNamespace(questions=("fits then",))
    with engine(model, cache=cache) as running:
        ticket = running.submit(request, time.monotonic() + 60, listener=listener)
        assert ticket.answered().answers[0].text == "fits then"
    assert heard == ["fits", "then", "|", "fits", "then"]


def test_the_encoder_is_waited_for_before_others_are_answered_anew() -> None:
    """Its memory may be why they failed, and two must not be in the tower at once."""
    model, sizes, asked = Scripted(), list[int](), list[str]()
    in_tower, most, beside_is_in, anew = set[str](), list[int](), threading.Event(), threading.Event()

    def encode(request: VisualRequest) -> None:
        (question,) = request.questions
        in_tower.add(question)
        most.append(len(in_tower))
        if question == "beside":
            beside_is_in.set()
            time.sleep(0.1)
        if question in asked:
            anew.set()
        asked.append(question)
        in_tower.remove(question)

    model.on_encode = encode
    with engine(model, overlap=lambda _: True, on_batch=sizes.append) as running:
        at_work = [ask(running, "for ever"), ask(running, "for ever")]
        while sum(sizes[-1:]) < 2:
            time.sleep(0.001)
        beside = ask(running, "beside")
        assert beside_is_in.wait(10)
        failures = [True]
        model.crowded = lambda: bool(failures and failures.pop())
        assert anew.wait(10)
        for ticket in at_work:
            ticket.cancel()
        assert beside.answered().answers[0].text == "beside"
    assert max(most) == 1


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError(), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes"), False),
    ],
)
def test_torch_says_in_several_ways_that_memory_is_short(error: Exception, *, short: bool) -> None:
    """By type on a GPU, in words on the CPU."""
    assert _out_of_memory(error) is short


def test_a_listener_hears_the_text_and_of_a_new_beginning() -> None:
    """What a failed batch has said does not count."""
    heard: list[tuple[int, str] | None] = []
    listener: Any = SimpleNamespace(
        text=lambda question, text: heard.append((question, text)), again=lambda: heard.append(None)
    )
    model = Scripted()
    with engine(model) as running:
        hold(model, running)
        request: Any = SimpleNamespace(questions=("two words",))
        ticket = running.submit(request, time.monotonic() + 60, listener=listener)
        ask(running, "raise")
        model.gate.set()
        ticket.answered()
    said = [(0, "two"), (0, "words")]
    assert heard == [*said, None, *said]


def test_an_engine_that_makes_no_progress_is_seen() -> None:
    """The time since the last step counts, of a batch at work; an idle engine never stalls."""
    model = Scripted()
    with engine(model) as running:
        assert running.stalled_s == 0
        ticket = hold(model, running)
        while running.stalled_s < 0.05:
            time.sleep(0.001)
        running.progress()
        assert running.stalled_s < 0.05
        model.gate.set()
        ticket.answered()
    assert running.stalled_s == 0


def test_what_is_past_its_deadline_is_not_begun() -> None:
    """A request whose time ran out in the queue never reaches the model."""
    model = Scripted()
    with engine(model) as running:
        held = hold(model, running)
        late = ask(running, "late", deadline_s=0)
        with pytest.raises(DeadlineExceededError):
            late.answered()
        model.gate.set()
        held.answered()
    assert model.batches == [["held"]]


def test_the_deadline_ends_a_generation() -> None:
    """A row that would go on for ever is stopped, and its neighbor still gets its answer."""
    model = Scripted()
    with engine(model) as running:
        hold(model, running)
        endless, neighbor = ask(running, "for ever", deadline_s=0.2), ask(running, "short")
        model.gate.set()
        with pytest.raises(DeadlineExceededError):
            endless.answered()
        assert neighbor.answered().answers[0].text == "short"


def test_a_canceled_ticket_ends_a_generation() -> None:
    """Canceling reaches the row at its next step."""
    model = Scripted()
    with engine(model) as running:
        endless = ask(running, "for ever")
        assert model.entered.wait(10)
        endless.cancel()
        assert endless.future.result(10).answers[0].finish_reason == "canceled"


def test_stopping_answers_what_was_submitted() -> None:
    """Leaving the block waits for the queue to empty."""
    model = Scripted()
    with engine(model, max_batch=2) as running:
        hold(model, running)
        tickets = [ask(running, "last words") for _ in range(3)]
        model.gate.set()
    assert all(ticket.future.done() for ticket in tickets)
    assert not running.warm


def test_a_model_that_does_not_load_says_why() -> None:
    """The error of loading reaches whoever waits for the model, and the engine is not warm."""

    def load() -> Scripted:
        raise UnknownModelError("no such model")

    broken = Engine(load, limits=Limits(1, 100, 0), on_batch=lambda _: None, on_death=lambda _: None)
    with broken, pytest.raises(UnknownModelError):
        broken.model()
    assert not broken.warm


def test_the_death_of_the_thread_is_reported() -> None:
    """An exit from inside the model ends the engine, and the watchdog hears of it."""
    deaths: list[BaseException] = []
    heard = threading.Event()

    def on_death(error: BaseException) -> None:
        deaths.append(error)
        heard.set()

    with engine(Scripted(), on_death=on_death) as running:
        ask(running, "exit")
        assert heard.wait(10)
    assert isinstance(deaths[0], SystemExit)
    assert not running.warm
