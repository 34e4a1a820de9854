"""From the contract to the library and back: job to `VisualRequest`, answers to `AnswerResult`."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Literal

from prismprune import GenerationOptions, TokenBudget, VisualRequest
from prismprune.media import FrameSampling, decode_image, decode_video
from worker.contract import (
    AnswerItem,
    AnswerJob,
    AnswerResult,
    Memory,
    PromptTokensDetails,
    Timings,
    TokenMapPart,
    Usage,
    VisualTokens,
)

if TYPE_CHECKING:
    from prismprune.media import Clip, MediaLimits, Picture
    from prismprune.results import Answer
    from worker.contract import MediaRef
    from worker.engine import Answered
    from worker.store import MediaStore


def decode(job: AnswerJob, store: MediaStore, limits: MediaLimits) -> tuple[Picture | Clip, ...]:
    """The job's media out of the store, decoded. Raises what the store and decoding raise."""
    sampling = FrameSampling(**job.sampling.model_dump())

    def medium(ref: MediaRef) -> Picture | Clip:
        if ref.modality == "image":
            return decode_image(store.read(ref), limits)
        with store.file(ref) as path:
            return decode_video(path, sampling, limits)

    return tuple(map(medium, job.media))


def visual_request(job: AnswerJob, default_budget: int | Literal["all"]) -> VisualRequest:
    """What the library is asked, still without its media; `default_budget` where the job names none."""
    unbudgeted = job.token_budget is None and job.keep_ratio is None
    budget = default_budget if unbudgeted else job.token_budget
    return VisualRequest(
        media=(),
        questions=job.questions,
        budget=TokenBudget.parse(budget, keep_ratio=job.keep_ratio),
        method=job.method,
        method_options=job.prism.model_dump() if job.method == "prism" else {},
        generation=GenerationOptions(**job.generation.model_dump()),
        media_key=(*((ref.id, ref.modality) for ref in job.media), tuple(job.sampling.model_dump().values())),
    )


def answer_result(job: AnswerJob, answered: Answered, *, queued_s: float, claimed_at: float) -> AnswerResult:
    """The body of the response.

    `queued_s`: seconds from acceptance to the claim; `claimed_at`: when that was, monotonic.
    """
    items = tuple(_item(job, answer) for answer in answered.answers)
    first = answered.answers[0]
    return AnswerResult(
        id=job.id,
        model=job.model,
        **({"answers": items} if job.several else dict(items[0])),
        visual_tokens=VisualTokens(**dataclasses.asdict(first.visual_tokens)),
        timings=_timings(answered, queued_s=queued_s, claimed_at=claimed_at),
        memory=_memory(answered),
        warnings=tuple(dict.fromkeys(warning for answer in answered.answers for warning in answer.warnings)),
        token_map=_token_map(first) if "token_map" in job.include else None,
    )


def _item(job: AnswerJob, answer: Answer) -> AnswerItem:
    visual = answer.visual_tokens.kept + answer.visual_tokens.newlines
    video = job.modality == "video"
    usage = Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=len(answer.token_ids),
        total_tokens=answer.prompt_tokens + len(answer.token_ids),
        prompt_tokens_details=PromptTokensDetails(
            image_tokens=0 if video else visual,
            video_tokens=visual if video else 0,
            cached_tokens=answer.cached_tokens,
        ),
    )
    return AnswerItem(answer=answer.text, finish_reason=answer.finish_reason, usage=usage)


def _timings(answered: Answered, *, queued_s: float, claimed_at: float) -> Timings:
    """Several questions share every stage: the longest counts. Waiting for a batch is queueing too."""
    stages = [answer.timings for answer in answered.answers]
    to_batch_ms = (queued_s + answered.began - claimed_at) * 1e3
    decode_ms = stages[0].decode_ms
    return Timings(
        queue_ms=max(0.0, to_batch_ms - decode_ms),
        decode_ms=decode_ms,
        preprocess_ms=max(t.preprocess_ms for t in stages),
        vision_ms=max(t.vision_ms for t in stages),
        select_ms=max(t.select_ms for t in stages),
        prefill_ms=max(t.prefill_ms for t in stages),
        generate_ms=max(t.generate_ms for t in stages),
        total_ms=(queued_s + time.monotonic() - claimed_at) * 1e3,
        time_to_first_token_ms=to_batch_ms - decode_ms + min(t.time_to_first_token_ms for t in stages),
    )


def _memory(answered: Answered) -> Memory:
    memories = [answer.memory for answer in answered.answers]
    return Memory(
        device=memories[0].device,
        peak_bytes=max(memory.peak_bytes for memory in memories),
        shared_with=answered.shared_with,
        kv_cache_bytes=sum(memory.kv_cache_bytes for memory in memories),
    )


def _token_map(answer: Answer) -> tuple[TokenMapPart, ...]:
    parts = [TokenMapPart(**dataclasses.asdict(part)) for part in answer.token_map]
    return tuple(part if part.salient is None else part.model_copy(update={"kept": None}) for part in parts)
