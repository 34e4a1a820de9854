"""`PrunedVLM` as its user meets it."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
import torch

from prismprune import (
    GenerationOptions,
    InvalidBudgetError,
    InvalidOptionError,
    PrismError,
    TokenBudget,
    UndecodableMediaError,
    UnknownMethodError,
    UnsupportedMediaError,
    VisualRequest,
)
from prismprune.media import Picture
from prismprune.meters import PeakMemory
from tests.prismprune.tiny import PATCHES, picture

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from prismprune import Answer, PrunedVLM


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def request(noise: int, *questions: str, tokens: int | None = None, **generation: Any) -> VisualRequest:
    return VisualRequest(
        (Picture(picture(noise)),),
        questions or ("What?",),
        TokenBudget(tokens),
        generation=GenerationOptions(**{"max_new_tokens": 10} | generation),
    )


def told(answer: Answer) -> tuple[Any, ...]:
    """What of an answer does not depend on the clock."""
    return answer.text, answer.token_ids, answer.finish_reason, answer.visual_tokens, answer.token_map


def test_a_file_its_bytes_and_its_image_are_the_same_picture(vlm: PrunedVLM, tmp_path: Path) -> None:
    """Path, string, bytes, Pillow image and Picture give one answer."""
    path = tmp_path / "noise.png"
    path.write_bytes(png(picture(1)))
    media: list[Any] = [path, str(path), path.read_bytes(), picture(1), Picture(picture(1))]
    answers = {told(vlm.answer(one, "What?", 5, max_new_tokens=6)) for one in media}
    assert len(answers) == 1


def test_an_image_is_turned_upright_and_its_alpha_put_on_white(vlm: PrunedVLM) -> None:
    """A Pillow image is treated as its file would be."""
    image = picture(1)
    image.putalpha(100)
    exif = image.getexif()
    exif[0x0112] = 6
    held = image.copy()
    held.getexif()[0x0112] = 6
    assert told(vlm.answer(held, "?", 5, max_new_tokens=4)) == told(
        vlm.answer(png(image, exif=exif), "?", 5, max_new_tokens=4)
    )


def test_several_questions_get_an_answer_each_from_one_encoding(vlm: PrunedVLM) -> None:
    """A list of questions gives a list of answers, those that each would get alone; the tower runs once."""
    runs = []
    tower = vlm._family.model.model.vision_tower
    hook = tower.embeddings.register_forward_hook(lambda *_: runs.append(1))
    answers = vlm.answer(picture(2), ["What?", "And why is that so?"], 6, max_new_tokens=8)
    hook.remove()
    assert len(runs) == 1
    assert [told(answer) for answer in answers] == [
        told(vlm.answer(picture(2), question, 6, max_new_tokens=8))
        for question in ("What?", "And why is that so?")
    ]


def test_a_batch_answers_each_request_as_alone(vlm: PrunedVLM) -> None:
    """Budgets, questions, limits and seeds of a request are its own."""
    requests = [
        request(1, tokens=4),
        request(2, "One?", "Or two of them?", tokens=9, temperature=1.0, seed=5),
        request(3),
        request(4, tokens=600, max_new_tokens=3),
    ]
    together = vlm.answer_batch(requests)
    assert [[told(answer) for answer in own] for own in together] == [
        [told(answer) for answer in vlm.answer_batch([one])[0]] for one in requests
    ]


def test_an_empty_batch_has_no_answers(vlm: PrunedVLM) -> None:
    """Nothing asked, nothing run."""
    assert vlm.answer_batch([]) == []


def test_text_comes_piece_by_piece_with_its_request_and_question(vlm: PrunedVLM) -> None:
    """The pieces of each question add up to its answer."""
    pieces: dict[tuple[int, int], str] = {}

    def note(place: int, question: int, text: str) -> None:
        assert text
        pieces[place, question] = pieces.get((place, question), "") + text

    answers = vlm.answer_batch([request(1, "A?", "B?", tokens=5), request(2)], on_token=note)
    assert {
        (place, question): answer.text
        for place, own in enumerate(answers)
        for question, answer in enumerate(own)
        if answer.text
    } == pieces


def test_a_request_can_be_canceled_without_its_neighbors(vlm: PrunedVLM) -> None:
    """All questions of the canceled request end; the other request goes on to its limit."""
    asked = []

    def stop(place: int) -> bool:
        asked.append(place)
        return place == 0 and asked.count(0) > 2

    canceled, other = vlm.answer_batch([request(1, "A?", "B?"), request(2)], should_stop=stop)
    assert {answer.finish_reason for answer in canceled} == {"canceled"}
    assert [len(answer.token_ids) for answer in canceled] == [2, 2]
    assert other[0].finish_reason == "length"


def test_a_stream_is_the_answer_in_pieces(vlm: PrunedVLM) -> None:
    """Iterating gives the text; `.answer` is there afterwards."""
    stream = vlm.stream(picture(3), "What?", 5, max_new_tokens=12)
    with pytest.raises(InvalidOptionError):
        _ = stream.answer
    text = "".join(stream)
    assert text == stream.answer.text
    assert told(stream.answer) == told(vlm.answer(picture(3), "What?", 5, max_new_tokens=12))
    assert list(stream) == []


def test_a_stream_can_be_left(vlm: PrunedVLM) -> None:
    """Closing it ends the generation; there is no answer then."""
    stream = vlm.stream(picture(3), "What?", max_new_tokens=500, temperature=1.0, seed=2)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    with pytest.raises(InvalidOptionError):
        _ = stream.answer


def test_encoded_media_can_be_asked_later(vlm: PrunedVLM) -> None:
    """Encoding and answering apart give what they give together."""
    encoded = vlm.encode(picture(4), 6, method="saliency")
    generation = GenerationOptions(max_new_tokens=7)
    answers = vlm.answer_encoded(encoded, ["A?", "B?"], generation)
    together = vlm.answer(picture(4), ["A?", "B?"], 6, method="saliency", max_new_tokens=7)
    assert [told(answer) for answer in answers] == [told(answer) for answer in together]
    assert answers[0].timings.vision_ms == encoded.timings.vision_ms


def test_the_times_of_the_stages_add_up(vlm: PrunedVLM) -> None:
    """The whole is the sum of its stages, decoding included, and the first token comes before generation."""
    times = vlm.answer(Picture(picture(), decode_ms=5.0), "?", 4, max_new_tokens=3).timings
    stages = (times.decode_ms, times.preprocess_ms, times.vision_ms, times.select_ms, times.prefill_ms)
    assert all(stage > 0 for stage in stages)
    assert times.decode_ms == 5.0
    assert times.time_to_first_token_ms == pytest.approx(sum(stages))
    assert times.total_ms == pytest.approx(sum(stages) + times.generate_ms)


def test_memory_is_reported(vlm: PrunedVLM) -> None:
    """Resident bytes at the highest, and the cache of the answer's own tokens."""
    answer = vlm.answer(picture(), "?", 4, max_new_tokens=1)
    assert answer.memory.device == "cpu"
    assert answer.memory.peak_bytes >= vlm.memory_bytes() // 2 > 0
    # 2 (keys, values) x 2 layers x 2 heads x 8 x 4 bytes
    assert answer.memory.kv_cache_bytes == answer.prompt_tokens * 256


def test_resident_memory_is_the_highest_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later, lower sample does not lower the peak."""
    seen = iter([10, 30, 20])
    monkeypatch.setattr("prismprune.meters.memory_bytes", lambda _device: next(seen))
    peak = PeakMemory(torch.device("cpu"))
    assert [peak.sample(), peak.sample()] == [30, 30]


def test_what_is_loaded_can_be_asked_for(vlm: PrunedVLM, tiny_llava: Path) -> None:
    """Name, family, device, number format, modalities, tokens of a picture."""
    assert (vlm.name, vlm.family, vlm.quantization) == (str(tiny_llava), "llava", None)
    assert (str(vlm.device), vlm.dtype) == ("cpu", torch.float32)
    assert (vlm.modalities, vlm.layout) == (("image", "video"), "native")
    assert vlm.visual_tokens_per_image == PATCHES


def test_a_stop_string_alone_is_as_good_as_a_list_of_one(vlm: PrunedVLM) -> None:
    """`stop="x"` is not a list of letters."""
    free = vlm.answer(picture(1), "?", max_new_tokens=20, temperature=1.0, seed=1).text
    stop = free[3:5]
    one, several = (
        vlm.answer(picture(1), "?", max_new_tokens=20, temperature=1.0, seed=1, stop=stops)
        for stops in (stop, [stop])
    )
    assert told(one) == told(several)
    assert one.text == free[: free.index(stop)].strip()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"token_budget": 0}, InvalidBudgetError),
        ({"token_budget": "many"}, InvalidBudgetError),
        ({"token_budget": 4, "keep_ratio": 0.5}, InvalidBudgetError),
        ({"method": "guess"}, UnknownMethodError),
        ({"method_options": {"salient_share": 2}}, InvalidOptionError),
        ({"max_tokens": 5}, InvalidOptionError),
        ({"max_new_tokens": 0}, InvalidOptionError),
        ({"question": []}, InvalidOptionError),
        ({"media": []}, InvalidOptionError),
        ({"media": b"just text"}, UnsupportedMediaError),
        ({"media": png(picture())[:200]}, UndecodableMediaError),
    ],
    ids=str,
)
def test_bad_input_is_refused_with_an_error_of_ours(
    vlm: PrunedVLM, arguments: dict[str, Any], error: type[PrismError]
) -> None:
    """Each kind of bad input has its error, before the model runs."""
    usual: dict[str, Any] = {"media": picture(), "question": "?"}
    with pytest.raises(error):
        vlm.answer(**(usual | arguments))
