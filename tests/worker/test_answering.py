"""Contract to library and back."""

from __future__ import annotations

import time
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from prismprune import MediaTooLargeError, TokenBudget
from prismprune.media import DEFAULT_LIMITS, Clip
from prismprune.results import PartMap
from tests.worker.conftest import answer, stored, video
from worker.answering import answer_result, decode, visual_request
from worker.contract import AnswerResult, FrameSampling, Generation, PrismOptions
from worker.engine import Answered
from worker.settings import WorkerSettings
from worker.store import MediaStore

if TYPE_CHECKING:
    from tests.worker.conftest import MakeJob
    from worker.contract import AnswerJob


def result_of(job: AnswerJob, *answers: Any) -> AnswerResult:
    """The result of answers that were given alone, without waiting."""
    now = time.monotonic()
    answered = Answered(list(answers), shared_with=0, began=now)
    return answer_result(job, answered, queued_s=0.5, claimed_at=now - 0.25)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, TokenBudget(tokens=64)),
        ({"token_budget": 32}, TokenBudget(tokens=32)),
        ({"token_budget": "all"}, TokenBudget.all()),
        ({"keep_ratio": 0.25}, TokenBudget(ratio=0.25)),
    ],
)
def test_the_default_budget_is_for_those_who_name_none(
    make_job: MakeJob, asked: dict[str, Any], expected: TokenBudget
) -> None:
    """A budget, a ratio or `all` is taken at its word."""
    assert visual_request(make_job(**asked), 64).budget == expected


def test_the_methods_own_options_go_to_that_method_only(make_job: MakeJob) -> None:
    """`prism` is tuned; another method has none of its options."""
    tuned = PrismOptions(salient_share=0.25, pool_factor=8)
    request = visual_request(make_job(prism=tuned), "all")
    assert request.method_options == {"salient_share": 0.25, "pool_factor": 8}
    assert visual_request(make_job(prism=tuned, method="uniform"), "all").method_options == {}


def test_an_encoding_is_kept_for_the_same_media_sampling_budget_and_method(make_job: MakeJob) -> None:
    """Whatever decides it tells encodings apart; the question and how it is answered do not."""
    plain = make_job("One?")
    same = make_job("Another?", generation=Generation(temperature=1.0))
    others = [
        make_job(token_budget=63),
        make_job(keep_ratio=0.5),
        make_job(method="uniform"),
        make_job(prism=PrismOptions(pool_factor=8)),
        make_job(sampling=FrameSampling(num_frames=4)),
        make_job(media=(plain.media[0].model_copy(update={"id": "1" * 64}),)),
        make_job(media=plain.media * 2),
    ]
    keys = [visual_request(job, 64).encoding_key for job in (plain, same, *others)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 1 + len(others)


def test_generation_is_passed_on_whole(make_job: MakeJob) -> None:
    """Every field of the contract has its place in the library."""
    asked = Generation(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=("\n",), system="Be brief.")
    generation = visual_request(make_job(generation=asked), "all").generation
    assert {name: getattr(generation, name) for name in type(asked).model_fields} == asked.model_dump()


def test_one_question_has_one_answer(make_job: MakeJob) -> None:
    """`answer`, `finish_reason` and `usage` stand at the top; the kept tokens are the image's."""
    result = result_of(make_job(), answer("red"))
    assert (result.answer, result.finish_reason, result.answers) == ("red", "stop", None)
    assert result.usage is not None
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.total_tokens) == (
        80,
        2,
        82,
    )
    assert result.usage.prompt_tokens_details.image_tokens == 64


def test_several_questions_have_answers(make_job: MakeJob) -> None:
    """A list, also of one; what each holds of the cache is added up, the peak is not."""
    job = make_job(questions=("a", "b"), several=True)
    result = result_of(job, answer("red"), answer("blue"))
    assert result.answer is None
    assert [item.answer for item in result.answers or ()] == ["red", "blue"]
    assert (result.memory.kv_cache_bytes, result.memory.peak_bytes) == (2000, 3 * 2**28)


def test_waiting_counts_and_decoding_counts_once(make_job: MakeJob) -> None:
    """Half a second in the queue, a quarter from claim to batch, of which one millisecond was decoding."""
    timings = result_of(make_job(), answer("red")).timings
    assert timings.decode_ms == 1
    assert timings.queue_ms == pytest.approx(749)
    assert timings.time_to_first_token_ms == pytest.approx(750 + 129)
    assert timings.total_ms >= 750


def test_the_token_map_comes_on_request(make_job: MakeJob) -> None:
    """Salient and diverse; the kept indices are given only where those two are not told apart."""
    assert result_of(make_job(), answer("red")).token_map is None
    (part,) = result_of(make_job(include=("token_map",)), answer("red")).token_map or ()
    assert (part.salient, part.diverse, part.kept) == ((1, 2), (7,), None)
    unsplit = PartMap(0, None, None, None, (24, 24), (0, 0, 8, 8), None, None, (1, 2, 7))
    other = replace(answer("red"), token_map=(unsplit,))
    (part,) = result_of(make_job(include=("token_map",)), other).token_map or ()
    assert (part.salient, part.kept) == (None, (1, 2, 7))


def test_the_same_warning_is_said_once(make_job: MakeJob) -> None:
    """Answers about the same media repeat it."""
    job = make_job(questions=("a", "b"), several=True)
    warned = answer("red", warnings=("kept all",))
    assert result_of(job, warned, warned).warnings == ("kept all",)


def test_media_are_held_to_the_workers_limits(make_job: MakeJob, media_url: str) -> None:
    """What the settings say about pixels, also where the front end let more through."""
    picture = BytesIO()
    Image.new("RGB", (40, 30)).save(picture, "PNG")
    job, store = make_job(media=(stored(media_url, picture.getvalue()),)), MediaStore(media_url)
    (decoded,) = decode(job, store, WorkerSettings(media_url=media_url, max_image_pixels=1200).media_limits)
    assert decoded.size == (40, 30)
    with pytest.raises(MediaTooLargeError, match="1199 pixels"):
        decode(job, store, WorkerSettings(media_url=media_url, max_image_pixels=1199).media_limits)


def test_a_video_is_decoded_with_the_jobs_sampling(make_job: MakeJob, media_url: str) -> None:
    """Four frames of a short clip; its visual tokens are the video's."""
    job = make_job(media=(video(media_url, 8),), sampling={"num_frames": 4})
    (clip,) = decode(job, MediaStore(media_url), DEFAULT_LIMITS)
    assert isinstance(clip, Clip)
    assert len(clip.frames) == 4
    usage = result_of(job, answer("red")).usage
    assert usage is not None
    assert (usage.prompt_tokens_details.image_tokens, usage.prompt_tokens_details.video_tokens) == (0, 64)
