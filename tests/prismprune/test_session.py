"""Continuous batching: requests join, leave and share, and each is answered as if it were alone."""

from __future__ import annotations

import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import count, islice, pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.cache_utils import DynamicLayer

from prismprune import GenerationOptions, InvalidOptionError, TokenBudget, VisualRequest
from prismprune.batches import ROOM, Batch, Prefix, RoomyLayer, joined, roomy_cache
from prismprune.caching import EncodingCache
from prismprune.media import Picture
from prismprune.prefill import NOTED, Kept
from prismprune.session import Asked, Pending, Session, context_length
from tests.present import present
from tests.prismprune.tiny import picture

if TYPE_CHECKING:
    from prismprune import PrunedVLM
    from prismprune.encoding import EncodedMedia

QUESTIONS = ("What?", "And a question that is longer than the others?", "Why?")


def asked(vlm: PrunedVLM, noise: int, *questions: str, tokens: int = 5, **generation: Any) -> Asked:
    options = GenerationOptions(**{"max_new_tokens": 8} | generation)
    return Asked(vlm.encode(picture(noise), tokens), questions or QUESTIONS[:1], options)


def run(session: Session, requests: list[Pending]) -> dict[tuple[int, int], str]:
    """Step to the end; the text of each (request, question), pieced together from the events."""
    texts: dict[tuple[int, int], str] = {}
    while session.pending:
        for request, number, text in session.step():
            place = (requests.index(request), number)
            texts[place] = texts.get(place, "") + text
    return texts


def alone(vlm: PrunedVLM, one: Asked) -> list[tuple[int, ...]]:
    return [vlm.answer_encoded(one.encoded, [text], one.generation)[0].token_ids for text in one.questions]


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 16)),
        min_size=1,
        max_size=5,
    )
)
def test_requests_that_join_at_any_step_are_answered_as_alone(
    vlm: PrunedVLM, schedule: list[tuple[int, int, int, int]]
) -> None:
    """Whenever a request comes, with however many questions: the same tokens, and events that spell them."""
    waiting = [
        (step, asked(vlm, noise, *QUESTIONS[:questions], tokens=tokens, max_new_tokens=length))
        for noise, (step, questions, length, tokens) in enumerate(schedule)
    ]
    session, now = vlm.session(), 0
    requests: list[Pending] = []
    texts: dict[tuple[int, int], str] = {}
    while waiting or session.pending:
        if due := [one for step, one in waiting if step <= now]:
            waiting = [(step, one) for step, one in waiting if step > now]
            joining = [session.prepare(one) for one in due]
            session.join(joining)
            requests += joining
        for request, number, text in session.step():
            place = (requests.index(request), number)
            texts[place] = texts.get(place, "") + text
        now += 1
    for index, request in enumerate(requests):
        answers = session.answers(request)
        assert [answer.token_ids for answer in answers] == alone(vlm, request.asked)
        assert [texts[index, number] for number in range(len(answers))] == [each.text for each in answers]


def test_a_canceled_request_leaves_and_the_others_go_on(vlm: PrunedVLM) -> None:
    """Also one that has not had its first token."""
    session = vlm.session()
    requests = [session.prepare(asked(vlm, noise)) for noise in range(3)]
    session.join(requests[:2])
    session.step()
    session.step()
    session.join(requests[2:])
    requests[0].cancel()
    requests[2].cancel()
    run(session, requests)
    answers = [session.answers(request)[0] for request in requests]
    assert [answer.finish_reason for answer in answers] == ["canceled", "length", "canceled"]
    assert [len(answer.token_ids) for answer in answers] == [2, 8, 0]
    assert answers[1].token_ids == alone(vlm, requests[1].asked)[0]


def test_the_beginning_that_questions_share_is_computed_once(vlm: PrunedVLM) -> None:
    """The language model sees the visual tokens of one picture once, and each question's own tokens."""
    seen: list[int] = []
    embeddings = vlm.model.get_input_embeddings()
    one = asked(vlm, 1, *QUESTIONS, tokens=12)
    session = vlm.session()
    request = session.prepare(one)
    hook = embeddings.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].numel()))
    try:
        session.join([request])
    finally:
        hook.remove()
    lengths = [len(prompt.token_ids) for prompt in request.prompts]
    shared = seen[0]
    assert len(seen) == 2
    assert 12 < shared < min(lengths)
    assert seen[1] == len(lengths) * (max(lengths) - shared)


def test_requests_about_one_cached_encoding_share_its_beginning(vlm: PrunedVLM) -> None:
    """Two callers who ask about the same encoding: one prefill of the picture, each its own answer."""
    one = asked(vlm, 2, "What?")
    other = Asked(one.encoded, ("Is there anything red?",), GenerationOptions(max_new_tokens=5))
    session = vlm.session()
    requests = [session.prepare(one), session.prepare(other)]
    session.join(requests)
    run(session, requests)
    assert [session.answers(request)[0].token_ids for request in requests] == [
        alone(vlm, one)[0],
        alone(vlm, other)[0],
    ]


def test_a_session_says_what_room_may_be_taken_and_a_request_with_how_many_it_shared(vlm: PrunedVLM) -> None:
    """Room: each unfinished question as long as the longest of all, its longest answer included."""
    session = vlm.session()
    long, short = (session.prepare(asked(vlm, noise, *QUESTIONS[:2], tokens=7)) for noise in range(2))
    lengths = [len(prompt.token_ids) + 8 for prompt in long.prompts]
    assert long.lengths == short.lengths == lengths
    assert min(lengths) < max(lengths)
    assert session.tokens_with([long, short]) == 4 * max(lengths)
    session.join([long])
    assert session.tokens == 2 * max(lengths)
    assert session.tokens_with([short]) == 4 * max(lengths)
    session.join([short])
    session.step()
    short.rows[lengths.index(max(lengths))].cancel()
    assert short.lengths == [min(lengths)]
    assert session.tokens == 3 * max(lengths)
    run(session, [long, short])
    assert session.tokens == 0
    assert [request.shared_with for request in (long, short)] == [1, 1]
    assert all(request.done and request.peak_bytes > 0 for request in (long, short))


def test_what_the_models_context_does_not_hold_is_refused(
    vlm: PrunedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt with its longest answer, to the token."""
    one = asked(vlm, 0, "What?", tokens=7)
    (length,) = vlm.session().prepare(one).lengths
    for context in (length, length - 1):
        monkeypatch.setattr(vlm.model.config.get_text_config(), "max_position_embeddings", context)
        refused = pytest.raises(InvalidOptionError, match=f"may take {length} tokens, 7 of them visual")
        with nullcontext() if context == length else refused:
            vlm.session().prepare(one)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 8192),
        (
            {
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
    ],
)
def test_scaled_positions_reach_further(config: dict[str, Any], length: int) -> None:
    assert context_length(LlamaConfig(**config)) == length


def test_a_config_without_a_length_has_no_end() -> None:
    assert context_length(SimpleNamespace()) == math.inf


def request(
    noise: int, question: str = "What?", tokens: int = 5, key: str | None = None, system: str | None = None
) -> VisualRequest:
    options = GenerationOptions(max_new_tokens=4, system=system)
    media = (Picture(picture(noise)),)
    return VisualRequest(media, (question,), TokenBudget(tokens), generation=options, media_key=key)


def test_a_kept_encoding_holds_no_memory_of_its_neighbors(vlm: PrunedVLM) -> None:
    """They were projected together, and leave the cache one by one."""
    cache = EncodingCache(2**20)
    session = vlm.session(cache)
    asked = [request(number, key=str(number), tokens=1 + number) for number in range(3)]
    run(session, session.ask(asked))
    for one in asked:
        kept = cache.get(one.encoding_key)
        assert kept is not None
        assert sum(visual.features.untyped_storage().nbytes() for visual in kept.visuals) == kept.bytes


def test_a_prefix_is_read_where_it_is_and_left_as_it_is() -> None:
    """By every question about the same media, however many join at once."""
    held = torch.randn(2, 1, 2, 5, 4).unbind()
    prefix = Prefix(((held[0], held[1]),), None)
    before = [tensor.clone() for tensor in held]
    batch = prefix.batch(5)
    assert [tensor.data_ptr() for tensor in batch.layers[0].tensors] == [each.data_ptr() for each in held]
    new = torch.randn(1, 2, 3, 4)
    keys, values = batch.cache.update(new, -new, 0)
    assert torch.equal(keys, torch.cat([before[0], new], dim=2))
    assert torch.equal(values, torch.cat([before[1], -new], dim=2))
    assert all(map(torch.equal, held, before))


def test_media_asked_about_again_are_not_encoded_again(vlm: PrunedVLM) -> None:
    """Under the same key and budget, also within one call; the answers are those of a fresh encoding."""
    cache = EncodingCache(2**20)
    runs: list[int] = []
    hook = vlm.model.model.vision_tower.register_forward_pre_hook(
        lambda _, inputs: runs.append(len(inputs[0]))
    )
    batches = [
        [request(1, key="one"), request(1, "Why?", key="one"), request(2)],
        [request(1, "Who?", key="one"), request(1, tokens=6, key="one"), request(2)],
    ]
    cached, texts = [], []
    try:
        for batch in batches:
            session = vlm.session(cache)
            asked_now = session.ask(batch)
            run(session, asked_now)
            answers = [session.answers(one)[0] for one in asked_now]
            cached += [(answer.cached_tokens, answer.timings.vision_ms > 0) for answer in answers]
            texts += [answer.token_ids for answer in answers]
    finally:
        hook.remove()
    assert sum(runs) == 4  # two new ones each time
    assert cached == [(0, True), (5, False), (0, True), (5, False), (0, True), (0, True)]
    fresh = [vlm.answer_batch([one])[0][0].token_ids for batch in batches for one in batch]
    assert texts == fresh


def prefilled(
    vlm: PrunedVLM, session: Session, requests: list[VisualRequest]
) -> tuple[list[int], list[Pending]]:
    """How many tokens the language model was given at a time for the prompts, padding included."""
    seen: list[int] = []
    hook = vlm.model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].numel())
    )
    try:
        pending = session.ask(requests)
    finally:
        hook.remove()
    run(session, pending)
    return seen, pending


def words(vlm: PrunedVLM, pending: Pending) -> int:
    """Tokens behind the last visual one."""
    token_ids = pending.prompts[0].token_ids
    last = int((token_ids == vlm.model.config.image_token_id).nonzero()[-1])
    return len(token_ids) - last - 1


def test_a_further_question_has_only_its_own_words_prefilled(vlm: PrunedVLM) -> None:
    """Beside questions about other media, known or not; and it is answered as by itself."""
    session = vlm.session(EncodingCache(2**20, prefix_bytes=2**20))
    prefilled(vlm, session, [request(1, key="one", tokens=9), request(2, key="two", tokens=4)])
    further = [
        request(2, "Why?", key="two", tokens=4),
        request(1, QUESTIONS[1], key="one", tokens=9),
        request(1, "Who?", key="one", tokens=9),
        request(3),
    ]
    seen, pending = prefilled(vlm, session, further)
    longest = max(words(vlm, one) for one in pending[:3])
    assert seen == [len(pending[3].prompts[0].token_ids), 3 * longest]
    assert [session.answers(one)[0].token_ids for one in pending] == [
        vlm.answer_batch([one])[0][0].token_ids for one in further
    ]


def test_questions_that_share_a_beginning_leave_it_for_later_ones(vlm: PrunedVLM) -> None:
    """Several at once are as good as one."""
    session = vlm.session(EncodingCache(2**20, prefix_bytes=2**20))
    prefilled(vlm, session, [request(1, key="one"), request(1, "Why?", key="one")])
    seen, (pending,) = prefilled(vlm, session, [request(1, "Who?", key="one")])
    assert seen == [words(vlm, pending)]


@pytest.mark.parametrize("other", [{"tokens": 6}, {"key": "two"}, {"key": None}, {"system": "Be brief."}])
def test_a_prefix_serves_no_other_beginning(vlm: PrunedVLM, other: dict[str, Any]) -> None:
    """Another budget, other media, media without a name, another text before them: prefilled whole."""
    session = vlm.session(EncodingCache(2**20, prefix_bytes=2**20))
    prefilled(vlm, session, [request(1, key="one")])
    seen, (pending,) = prefilled(vlm, session, [request(1, **{"key": "one"} | other)])
    assert seen == [len(pending.prompts[0].token_ids)]


def test_prefixes_keep_to_their_bytes(vlm: PrunedVLM) -> None:
    """Room for one: the one before goes. `clear` drops it as well."""
    cache = EncodingCache(2**20, prefix_bytes=2**20)
    session = vlm.session(cache)
    encodings = [vlm.encode(picture(noise), 5).bytes for noise in (1, 2)]
    prefilled(vlm, session, [request(1, key="one")])
    one = cache.bytes - encodings[0]
    assert one > 0
    cache = EncodingCache(2**20, prefix_bytes=one)
    session = vlm.session(cache)
    for noise, key in ((1, "one"), (2, "two")):
        prefilled(vlm, session, [request(noise, key=key)])
    assert cache.bytes == sum(encodings) + one
    seen, (pending,) = prefilled(vlm, session, [request(2, "Why?", key="two")])
    assert seen == [words(vlm, pending)]
    cache.clear()
    assert cache.bytes == 0


def test_a_prefix_that_cannot_be_kept_is_not_copied(vlm: PrunedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy may be what memory is too short for."""
    copies = list[Prefix]()

    def copied(batch: Batch, row: int, *columns: slice) -> Prefix:
        copies.append(of(batch, row, *columns))
        return copies[-1]

    of = Prefix.of
    monkeypatch.setattr(Prefix, "of", copied)
    prefilled(vlm, vlm.session(EncodingCache(2**20, prefix_bytes=2**20)), [request(1, key="one")])
    (kept,) = copies
    prefilled(vlm, vlm.session(EncodingCache(2**20, prefix_bytes=kept.bytes - 1)), [request(1, key="one")])
    assert len(copies) == 1


SYSTEM = "Say what you see in as few words as you can, and nothing besides."


def opening(vlm: PrunedVLM, pending: Pending) -> int:
    """Tokens before the first visual one."""
    token_ids = pending.prompts[0].token_ids
    return int((token_ids == vlm.model.config.image_token_id).nonzero()[0])


def test_a_system_text_that_comes_again_is_prefilled_no_more(vlm: PrunedVLM) -> None:
    """Whatever media follow it, named or not; with the second request it is kept. Answers are as alone."""
    session = vlm.session(EncodingCache(2**20, prefix_bytes=2**20))
    requests = [
        request(noise, system=SYSTEM, key=key) for noise, key in enumerate(("one", None, "two", None))
    ]
    seen, answers = list[int](), list[tuple[int, ...]]()
    for one in requests:
        lengths, (pending,) = prefilled(vlm, session, [one])
        seen += lengths
        answers.append(session.answers(pending)[0].token_ids)
    whole = len(pending.prompts[0].token_ids)
    assert seen == [whole, whole, whole - opening(vlm, pending), whole - opening(vlm, pending)]
    assert answers == [vlm.answer_batch([one])[0][0].token_ids for one in requests]
    seen, (pending,) = prefilled(vlm, session, [request(2, "Why?", system=SYSTEM, key="two")])
    assert seen == [words(vlm, pending)]


def test_questions_about_new_media_begin_with_a_known_system_text(vlm: PrunedVLM) -> None:
    """Several about the same: what they share is run from there, once."""
    session = vlm.session(EncodingCache(2**20, prefix_bytes=2**20))
    for noise in (1, 2):
        prefilled(vlm, session, [request(noise, system=SYSTEM)])
    both = replace(request(3, system=SYSTEM), questions=QUESTIONS[:2])
    seen, (pending,) = prefilled(vlm, session, [both])
    assert seen[0] == 5
    fresh = vlm.answer_batch([both])[0]
    assert [answer.token_ids for answer in session.answers(pending)] == [one.token_ids for one in fresh]


@pytest.mark.parametrize(
    ("system", "bytes_", "question"),
    [(None, 2**20, "What?"), (SYSTEM, 1000, "What?"), (SYSTEM, 2**20, "And then? " * 200)],
)
def test_what_is_short_or_too_large_before_media_is_not_kept(
    vlm: PrunedVLM, system: str | None, bytes_: int, question: str
) -> None:
    """A template's own few tokens, more than the cache holds, or little of the prompt."""
    session = vlm.session(EncodingCache(2**20, prefix_bytes=bytes_))
    for noise in range(4):
        seen, (pending,) = prefilled(vlm, session, [request(noise, question, system=system)])
        assert seen == [len(pending.prompts[0].token_ids)]


def test_texts_of_one_request_each_keep_nothing(vlm: PrunedVLM) -> None:
    """However many come: what is known of them is bounded, too."""
    cache = EncodingCache(0, prefix_bytes=2**20)
    kept = Kept(present(cache.prefixes))
    assert not any(kept.again(number) for number in range(2 * NOTED))
    assert len(kept._noted) == NOTED
    assert kept.again(2 * NOTED - 1)
    assert not kept.again(0)
    session = vlm.session(cache)
    for noise in range(3):
        prefilled(vlm, session, [request(noise, system=f"{noise} {SYSTEM}")])
    assert cache.bytes == 0


def test_rows_that_leave_take_their_room_with_them() -> None:
    """Not only with the next token: until then every layer would hold it beside what stays."""
    layer = RoomyLayer()
    for tokens in (5, 1):
        layer.update(torch.rand(3, 2, tokens, 4), torch.rand(3, 2, tokens, 4))
    room = [weakref.ref(tensor.untyped_storage()) for tensor in layer.tensors]
    assert all(storage() is not None for storage in room)
    layer.batch_select_indices(torch.tensor([2, 0]))
    assert all(storage() is None for storage in room)


def test_the_peak_of_an_encoding_is_its_own_requests_too(
    vlm: PrunedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others that get tokens meanwhile see it first; what was before the encoding counts for them alone."""
    laps = iter([100, 900, 700, 200])
    session = vlm.session()
    monkeypatch.setattr(session, "_memory", SimpleNamespace(lap=lambda: next(laps)))
    (first,) = session.admit(session.encode([request(1, tokens=9)]))
    session.step()
    encoded = session.encode([request(2, tokens=9)])
    session.step()
    (second,) = session.admit(encoded)
    assert (first.peak_bytes, second.peak_bytes) == (900, 700)


def test_a_cache_keeps_nothing_alive_but_its_own() -> None:
    """What comes may be a view of queries, keys and values together, three times as large."""
    everything, layer = torch.rand(1, 6, 40, 4), RoomyLayer()
    layer.update(everything[:, 2:4], everything[:, 4:])
    for tokens, new in zip(layer.tensors, (everything[:, 2:4], everything[:, 4:]), strict=True):
        assert torch.equal(tokens, new)
        assert tokens.untyped_storage().nbytes() == 2 * (40 + ROOM) * 4 * 4


def test_a_cache_with_room_holds_what_one_without_does() -> None:
    """Token by token, past the room's end, and after rows and columns were dropped."""
    roomy, plain = RoomyLayer(), DynamicLayer()
    draw = torch.Generator().manual_seed(0)
    copies = 0
    for step in range(2 * ROOM + 10):
        new = torch.rand(3 - (step > 40), 2, 5 if step == 0 else 1, 4, generator=draw)
        before = None if step == 0 else roomy.tensors[0].data_ptr()
        roomy.update(new, -new)
        plain.update(new, -new)
        copies += before is not None and roomy.tensors[0].data_ptr() != before
        if step == 40:
            for layer in (roomy, plain):
                layer.batch_select_indices(torch.tensor([2, 0]))
                layer.keys, layer.values = present(layer.keys)[:, :, 3:], present(layer.values)[:, :, 3:]
    assert torch.equal(roomy.tensors[0], present(plain.keys))
    assert torch.equal(roomy.tensors[1], present(plain.values))
    assert copies == 2  # behind what was dropped, and where the room was used up


@given(
    rows=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4), data=st.data()
)
def test_joined_rows_keep_their_tokens_at_their_places(rows: list[list[int]], data: st.DataObject) -> None:
    """Each a number of its own in every cell of a batch as long as its longest row, padded on the left."""
    number = count(1)
    batches: list[Batch] = []
    wanted: list[tuple[int, int]] = []
    for own in rows:
        numbers = list(islice(number, len(own)))
        mask = torch.tensor([[0] * (max(own) - length) + [1] * length for length in own])
        tokens = torch.tensor(numbers)[:, None, None, None] * mask[:, None, :, None].expand(-1, 2, -1, 4)
        cache = roomy_cache([(tokens.float(), -tokens.float())])
        batches.append(Batch(cache, mask, torch.tensor(own), None))
        wanted += zip(numbers, own, strict=True)
    order = data.draw(st.permutations(range(len(wanted))))
    places = iter(order)
    together = joined(batches, [list(islice(places, len(own))) for own in rows])
    (layer,) = together.layers
    layer.update(new := torch.full((len(wanted), 2, 1, 4), 99.0), -new)
    keys, values = layer.tensors
    longest = max(map(max, rows))
    for (its, length), place in zip(wanted, order, strict=True):
        line = torch.tensor([0.0] * (longest - length) + [its] * length + [99.0])
        assert torch.equal(keys[place], line[:, None].expand(2, -1, 4))
        assert torch.equal(values[place], -keys[place])
        assert together.mask[place].tolist() == [0] * (longest - length) + [1] * length
        assert together.next_positions[place] == length


def test_one_thread_encodes_while_another_steps(vlm: PrunedVLM) -> None:
    """Neither changes what the other computes."""
    requests = [request(noise, tokens=6) for noise in range(12)]
    session = vlm.session()
    pending = session.ask([request(20, tokens=9)])
    with ThreadPoolExecutor(1) as encoder:
        encoding = encoder.submit(lambda: [session.encode([one])[0] for one in requests])
        while not encoding.done():
            session.step()
            if not session.pending:
                pending += session.ask([request(20, tokens=9)])
    pending += session.admit(encoding.result())
    while session.pending:
        session.step()
    fresh = [vlm.answer_batch([one])[0][0].token_ids for one in [request(20, tokens=9), *requests]]
    repeats = len(pending) - len(requests)
    assert [session.answers(one)[0].token_ids for one in pending] == [fresh[0]] * repeats + fresh[1:]


def test_an_encoding_that_is_there_needs_no_media(vlm: PrunedVLM) -> None:
    """Whoever holds it need not decode the picture again."""
    encoded = vlm.encode(picture(3), 4)
    options = GenerationOptions(max_new_tokens=3)
    session = vlm.session()
    (pending,) = session.ask([VisualRequest((), ("What?",), generation=options, encoded=encoded)])
    run(session, [pending])
    assert session.answers(pending)[0].cached_tokens == 4


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ((), "at least one"),
        ("What?", "not a text"),
        ((None,), "a text"),
        (("caf\udce9?",), "half a character"),
    ],
)
def test_what_cannot_be_asked_is_refused(vlm: PrunedVLM, questions: Any, message: str) -> None:
    """No question, one that would be asked letter by letter, and what no tokenizer takes."""
    with pytest.raises(InvalidOptionError, match=message):
        Asked(vlm.encode(picture(0), 4), questions)
    with pytest.raises(InvalidOptionError, match=message):
        VisualRequest((Picture(picture(0)),), questions)
    with pytest.raises(InvalidOptionError, match=message):
        vlm.answer_encoded(vlm.encode(picture(0), 4), questions)


@pytest.fixture(scope="module")
def encodings(vlm: PrunedVLM) -> list[EncodedMedia]:
    return [vlm.encode(picture(noise), 4) for noise in range(3)]


def test_the_cache_drops_what_was_unused_for_longest(encodings: list[EncodedMedia]) -> None:
    """Room for two of three: the one asked for last stays."""
    cache = EncodingCache(2 * encodings[0].bytes)
    cache.put("a", encodings[0])
    cache.put("b", encodings[1])
    assert cache.get("a") is encodings[0]
    cache.put("c", encodings[2])
    assert cache.get("b") is None
    assert cache.get("a") is encodings[0]
    assert cache.get("c") is encodings[2]
    assert cache.bytes == 2 * encodings[0].bytes


def test_the_cache_keeps_nothing_larger_than_itself(encodings: list[EncodedMedia]) -> None:
    """It would drop everything else, and then itself."""
    cache = EncodingCache(encodings[0].bytes - 1)
    cache.put("a", encodings[0])
    assert (cache.get("a"), cache.bytes) == (None, 0)


def test_a_key_that_is_put_again_counts_once(encodings: list[EncodedMedia]) -> None:
    """Two workers' threads may have encoded the same media at the same time."""
    cache = EncodingCache(10 * encodings[0].bytes)
    cache.put("a", encodings[0])
    cache.put("a", encodings[1])
    assert cache.get("a") is encodings[1]
    assert cache.bytes == encodings[1].bytes


def test_the_selection_of_prism_is_not_nested(vlm: PrunedVLM) -> None:
    """Why no budget answers for another: somewhere a token kept at a smaller one is not kept at a larger."""
    kept = [
        [set(vlm.encode(picture(noise), tokens).token_map[0].kept) for tokens in range(2, 14)]
        for noise in range(8)
    ]
    assert any(not one <= other for own in kept for one, other in pairwise(own))
