"""Requests and replies as callers write and read them; what crosses the queue is in `worker.contract`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    InstanceOf,
    StringConstraints,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from starlette.datastructures import UploadFile

from service.long_texts import DataUri
from worker.contract import (
    MAX_TOKEN_BUDGET,
    METHODS,
    AnswerResult,
    FrameSampling,
    Generation,
    JobState,
    Method,
    PrismOptions,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_TEXT = 16_384
"""Characters of a question or a system prompt; a model's own context ends long before."""
MAX_QUESTIONS, MAX_IMAGES = 32, 8
"""The most that the settings of those names may allow; for the document alone, which knows no settings."""


class MediaById(BaseModel):
    """Media that the store already holds, by the SHA-256 of its bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class MediaByUrl(BaseModel):
    """Media to fetch; refused unless the operator allows the domain."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: str


def _media_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "data-uri"
    if isinstance(value, DataUri):
        return "long-data-uri"
    if isinstance(value, UploadFile):
        return "upload"
    if isinstance(value, (MediaById, MediaByUrl)):
        return "by-id" if isinstance(value, MediaById) else "by-url"
    if isinstance(value, dict):
        return "by-url" if "url" in value else "by-id" if "id" in value else None
    return None


MEDIA_KINDS = ("data-uri", "long-data-uri", "upload", "by-id", "by-url")
"""Tags of `Media`; see `TAGS`."""
Media = Annotated[
    Annotated[str, Tag("data-uri"), Field(description="A data URI: `data:image/png;base64,...`")]
    | Annotated[MediaById, Tag("by-id")]
    | Annotated[MediaByUrl, Tag("by-url")]
    | Annotated[SkipJsonSchema[InstanceOf[DataUri]], Tag("long-data-uri")]
    | Annotated[SkipJsonSchema[InstanceOf[UploadFile]], Tag("upload")],
    Discriminator(
        _media_kind,
        custom_error_type="media",
        custom_error_message='must be a data URI, {"id": "..."} or {"url": "..."}',
    ),
]


def _token_budget(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is None or value == "all" or (whole and 1 <= value <= MAX_TOKEN_BUDGET):
        return value
    raise PydanticCustomError(
        "token_budget", 'must be a whole number from 1 to {most}, or "all"', {"most": MAX_TOKEN_BUDGET}
    )


def _method(value: Any) -> Any:
    if value in METHODS:
        return value
    raise PydanticCustomError("method", "must be one of {methods}", {"methods": ", ".join(METHODS)})


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_TEXT)]
TokenBudget = Annotated[
    Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] | Literal["all"] | None, BeforeValidator(_token_budget)
]


class AnswerRequest(Generation):
    """A question, or several, about one image, several images or one video."""

    model_config = ConfigDict(strict=True)

    model: Annotated[str | None, Field(max_length=256, description="The server's default unless given.")] = (
        None
    )
    question: Annotated[Text | None, Field(description="What to ask; or `questions`.")] = None
    questions: Annotated[
        Annotated[tuple[Text, ...], Field(json_schema_extra={"maxItems": MAX_QUESTIONS})] | None,
        Field(min_length=1, description="Several answers for one encoding of the media."),
    ] = None
    image: Annotated[Media | None, Field(description="One picture; or `images`, or `video`.")] = None
    images: Annotated[
        Annotated[tuple[Media, ...], Field(json_schema_extra={"maxItems": MAX_IMAGES})] | None,
        Field(min_length=1, description="Several pictures, which share the budget."),
    ] = None
    video: Annotated[Media | None, Field(description="A clip; `sampling` says which frames of it.")] = None
    token_budget: Annotated[
        TokenBudget,
        Field(description='Visual tokens of the whole request, or "all". The server\'s default if absent.'),
    ] = None
    keep_ratio: Annotated[
        float | None,
        Field(gt=0, le=1, description="The budget as a part of the visual tokens; not with token_budget."),
    ] = None
    method: Annotated[
        Method,
        BeforeValidator(_method),
        Field(description="How the tokens that stay are chosen; `GET /v1/models` lists what a model has."),
    ] = "prism"
    prism: Annotated[PrismOptions, Field(description="Tunes the method `prism`.")] = PrismOptions()
    sampling: Annotated[FrameSampling, Field(description="Which frames of a `video`.")] = FrameSampling()
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    """Makes draws repeatable."""
    stop: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...], Field(max_length=16)
    ] = ()
    """Texts at which the answer ends; they are not part of it."""
    system: Annotated[str | None, StringConstraints(max_length=MAX_TEXT)] = None
    """A system prompt before the media."""
    timeout_s: Annotated[
        float | None,
        Field(ge=0, description="Bounds the wait of this call, in seconds: then 202, and the job goes on."),
    ] = None
    deadline_s: Annotated[
        float | None, Field(gt=0, description="Bounds the job, in seconds: then it is expired.")
    ] = None
    stream: Annotated[bool, Field(description="Server-sent events instead of one answer.")] = False
    include: Annotated[
        tuple[Literal["token_map"], ...],
        Field(description="What the result has beside: `token_map`, which tokens were kept."),
    ] = ()

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.question is None) == (self.questions is None):
            raise PydanticCustomError("question", "give either question or questions")
        if sum(each is not None for each in (self.image, self.images, self.video)) != 1:
            raise PydanticCustomError("media", "give exactly one of image, images or video")
        if self.token_budget is not None and self.keep_ratio is not None:
            raise PydanticCustomError("token_budget", "give either token_budget or keep_ratio, not both")
        if self.sampling.end_s is not None and self.sampling.end_s <= self.sampling.start_s:
            raise PydanticCustomError("sampling", "sampling.end_s must be after sampling.start_s")
        if self.method != "prism" and self.prism != PrismOptions():
            raise PydanticCustomError("prism", "prism tunes the method prism, and no other")
        return self

    def with_media(self, texts: Mapping[str, DataUri]) -> Self:
        """With what its media stand for, where they are stand-ins of `texts`."""

        def meant(media: Media | None) -> Media | None:
            return texts.get(media, media) if isinstance(media, str) else media

        images = None if self.images is None else tuple(map(meant, self.images))
        return self.model_copy(
            update={"image": meant(self.image), "images": images, "video": meant(self.video)}
        )

    @property
    def all_questions(self) -> tuple[str, ...]:
        return self.questions or (self.question or "",)

    @property
    def generation(self) -> Generation:
        return Generation(**{name: getattr(self, name) for name in Generation.model_fields})


class ProblemDetails(BaseModel):
    """RFC 9457. `type` ends in a stable slug."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str
    """A URI that names the kind of problem, and does not change."""
    title: str
    """The kind in words."""
    status: int
    """The HTTP status."""
    detail: str
    """What is wrong with this request."""
    request_id: str
    """Finds the request in the logs; the reply's `X-Request-Id`, too."""


class JobView(BaseModel):
    """A job as `GET /v1/jobs/{id}` shows it. Times are Unix seconds."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """The job's, as in `Location`."""
    state: JobState
    """`queued` and `running` go on; each of the others is the end."""
    created_at: float
    """When it was accepted, in Unix seconds."""
    started_at: float | None
    """When the last attempt began, in Unix seconds."""
    finished_at: float | None
    """When it ended, in Unix seconds."""
    attempts: int
    """How often a worker has begun it: more than once, where one was lost."""
    result: Annotated[AnswerResult | None, Field(description="Of a job that succeeded.")]
    error: Annotated[ProblemDetails | None, Field(description="Of a job that did not.")]


class OpenAIErrorBody(BaseModel):
    """`code` is the slug of the problem."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """An error as OpenAI's clients read it."""

    error: OpenAIErrorBody


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Url(_Strict):
    """A data URI, or an https URL of a domain that the operator allows."""

    url: str
    detail: str | None = None


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: Url


class VideoPart(_Strict):
    type: Literal["video_url"]
    video_url: Url


def _part_tag(part: Any) -> str:
    """One of `PART_KINDS`, or what is none of them."""
    return f"{part.get('type') if isinstance(part, dict) else getattr(part, 'type', None)}-part"


def _one_or_several(value: Any) -> str | None:
    return "as-text" if isinstance(value, str) else "as-list" if isinstance(value, (list, tuple)) else None


PART_KINDS = ("text-part", "image_url-part", "video_url-part")
SHAPES = ("as-text", "as-list")
TAGS = frozenset((*MEDIA_KINDS, *PART_KINDS, *SHAPES))
"""Pydantic puts them into the place of an error, where a caller has no use for them."""
Part = Annotated[
    Annotated[TextPart, Tag("text-part")]
    | Annotated[ImagePart, Tag("image_url-part")]
    | Annotated[VideoPart, Tag("video_url-part")],
    Discriminator(
        _part_tag,
        custom_error_type="part",
        custom_error_message="must be of type text, image_url or video_url",
    ),
]


class Message(_Strict):
    """One `user` message shows media and asks; `system` and `developer` messages may come before it."""

    role: Literal["system", "developer", "user"]
    content: Annotated[
        Annotated[str, Tag("as-text")] | Annotated[tuple[Part, ...], Tag("as-list")],
        Discriminator(
            _one_or_several,
            custom_error_type="content",
            custom_error_message="must be a text or a list of parts",
        ),
    ]
    name: str | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        if isinstance(self.content, str):
            return (TextPart(type="text", text=self.content),)
        return self.content

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.parts if isinstance(part, TextPart))


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(_Strict):
    type: Literal["text"]


def _as_answer(name: str) -> WithJsonSchema:
    """Taken as it comes, and checked with the rest of the `AnswerRequest`, whose schema it has."""
    schema = AnswerRequest.model_json_schema()["properties"][name]
    return WithJsonSchema({key: value for key, value in schema.items() if key != "default"})


class _Neutral:
    """Of a field that asks for what is not here: null, or one of `values`, which ask for nothing."""

    def __init__(self, *values: Any) -> None:
        self._values = (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": list(self._values)}

    def _checked(self, value: Any) -> Any:
        if value not in self._values:
            raise PydanticCustomError("unsupported", "is not supported here")
        return value


class ChatRequest(_Strict):
    """OpenAI's request as far as it means something here; the three last are this service's own.

    What has no effect is taken where it asks for nothing, and refused where it asks for something.
    """

    model: Annotated[str, Field(max_length=256)]
    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, description="0, the likeliest, if absent.")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    stop: (
        Annotated[
            Annotated[str, Tag("as-text")] | Annotated[tuple[str, ...], Tag("as-list")],
            Discriminator(
                _one_or_several,
                custom_error_type="stop",
                custom_error_message="must be a text or a list of texts",
            ),
        ]
        | None
    ) = None
    seed: int | None = None
    n: Literal[1] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    frequency_penalty: Annotated[float | None, Field(ge=0, le=0)] = None
    presence_penalty: Annotated[float | None, Field(ge=0, le=0)] = None
    logprobs: Literal[False] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=0)] = None
    tools: Annotated[Any, _Neutral([])] = None
    tool_choice: Annotated[Any, _Neutral("none", "auto")] = None
    functions: Annotated[Any, _Neutral([])] = None
    function_call: Annotated[Any, _Neutral("none", "auto")] = None
    logit_bias: Annotated[Any, _Neutral({})] = None
    modalities: Annotated[Any, _Neutral(["text"])] = None
    reasoning_effort: Annotated[Any, _Neutral("none")] = None
    audio: Annotated[Any, _Neutral()] = None
    prediction: Annotated[Any, _Neutral()] = None
    verbosity: Annotated[Any, _Neutral()] = None
    web_search_options: Annotated[Any, _Neutral()] = None
    moderation: Annotated[Any, _Neutral()] = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    token_budget: Annotated[Any, _as_answer("token_budget")] = None
    keep_ratio: Annotated[Any, _as_answer("keep_ratio")] = None
    method: Annotated[Any, _as_answer("method")] = None

    @model_validator(mode="after")
    def _one_turn(self) -> Self:
        *before, last = self.messages
        if last.role != "user" or any(message.role == "user" for message in before):
            raise PydanticCustomError(
                "messages",
                "messages: system messages, then one user message; earlier turns are not supported",
            )
        if any(not isinstance(part, TextPart) for message in before for part in message.parts):
            raise PydanticCustomError(
                "messages", "messages: pictures and videos belong into the user message, none before it"
            )
        if not last.text.strip():
            raise PydanticCustomError("messages", "messages: the user message has no text")
        kinds = [part.type for part in last.parts]
        if not {"image_url", "video_url"} & set(kinds):
            raise PydanticCustomError("messages", "messages: the user message has no picture and no video")
        if kinds.count("video_url") > ("image_url" not in kinds):
            raise PydanticCustomError("messages", "messages: several images or one video")
        return self

    def asked(self) -> AnswerRequest:
        """The same in this service's own words. Raises `ValidationError`."""
        *before, last = self.messages
        fields = {
            "model": self.model,
            "question": last.text,
            "system": "\n".join(message.text for message in before) or None,
            **_media(last),
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
            "stream": self.stream,
            "token_budget": self.token_budget,
            "keep_ratio": self.keep_ratio,
            "method": self.method,
        }
        return AnswerRequest.model_validate({name: each for name, each in fields.items() if each is not None})


def _media(message: Message) -> dict[str, Any]:
    images = tuple(_source(part.image_url) for part in message.parts if isinstance(part, ImagePart))
    videos = tuple(_source(part.video_url) for part in message.parts if isinstance(part, VideoPart))
    if videos:
        return {"video": videos[0]}
    return {"image": images[0]} if len(images) == 1 else {"images": images or None}


def _source(link: Url) -> str | dict[str, str]:
    return link.url if link.url[:5].lower() == "data:" else {"url": link.url}
