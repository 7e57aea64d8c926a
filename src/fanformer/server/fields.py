"""Fields of requests: types and ranges, what each means, and which are refused rather than ignored.

A field that we do not honour is accepted where its value asks for nothing (routers and clients add such ones), and
refused where it would change the answer.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from fanformer.server.refusal import invalid

_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
"""Values of a field we do not know that ask for nothing."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "include_reasoning": (True,),
    "parallel_tool_calls": (True,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "length_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "num_beams": (1,),
    "truncate_prompt_tokens": (-1,),
}
"""Values of fields that we know and do not honour, besides those that always ask for nothing."""
_WITHOUT_EFFECT = frozenset(
    {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "metadata", "request_id", "priority"}
)
"""Fields that no answer depends on: they tell who asks, or how to plan."""
_MOST_WITHOUT_EFFECT = 4096
"""Characters of one of these: it is kept as long as its request, and as objects takes many times its length."""
_REASONS = {
    "tools": "the model does not call tools",
    "functions": "the model does not call functions",
    "response_format": "the format of an answer cannot be enforced; expected type text",
    "suffix": "the model only continues texts",
    "audio": "the model writes text only",
    "modalities": 'expected ["text"]: the model writes text only',
}

MAX_SEQUENCES = 2048
"""Most prompts of one request."""

TokenId = Annotated[int, Field(ge=0)]
Item = TypeVar("Item")
ListOf = Annotated[list[Item], Field(fail_fast=True)]
"""A list of which the first wrong item is told: of millions all errors would take gigabytes."""


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Fields):
    """How a stream is told."""

    include_usage: bool | None = None
    """A last chunk tells the numbers of tokens."""


class GenerationFields(_Fields):
    """What completions and chat completions have in common."""

    model: str
    """The name under which the model is served."""
    max_tokens: Annotated[int | None, Field(ge=0)] = None
    """Most new tokens."""
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    """Divides the logits; 0 takes the most likely token always; default 1."""
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    """Draw from the fewest likely tokens of this total probability; default 1."""
    top_k: Annotated[int | None, Field(ge=-1)] = None
    """Draw from this many most likely tokens; 0 and -1 are all."""
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    """Draw from tokens at least this share as likely as the likeliest."""
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    """Answers to each prompt; default 1."""
    stream: bool | None = None
    """Whether the answer comes piece by piece, as server-sent events."""
    stream_options: StreamOptions | None = None
    stop: str | Annotated[ListOf[str], Field(max_length=64)] | None = None
    """Strings that end the text and are left out of it."""
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**64)] = None
    """Makes the answer reproducible; answer i of the request has random numbers of its own."""
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=10)] = None
    """Divides positive logits, and multiplies negative ones, of tokens in the prompt or written; default 1."""
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(fail_fast=True)] | None = None
    """Added to the logits of token ids, which are written as strings."""
    min_tokens: Annotated[int | None, Field(ge=0)] = None
    """The end token is not drawn before; default 0."""
    num_steps: Annotated[int | None, Field(ge=1)] = None
    """How often a recurrent depth runs its core; default the mean of training."""


class CompletionFields(GenerationFields):
    """A request to /v1/completions."""

    prompt: str | ListOf[TokenId] | ListOf[str] | ListOf[ListOf[TokenId]] | None = None
    """A text, its token ids, or a list of either; an empty text begins a new one, and so does none."""
    best_of: Annotated[int | None, Field(ge=1, le=128)] = None
    """Answers of which the n with the highest log-probability per token are told."""
    echo: bool | None = None
    """Whether the prompt comes before the answer."""
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None
    """How many likeliest tokens to tell with each token's log-probability, which is that before sampling filters."""


class ImageURL(_Fields):
    """A picture."""

    url: str
    """`data:image/...;base64,...` of a PNG, JPEG or WebP; nothing is fetched."""
    detail: str | None = None
    """Only "auto": every picture is read at the size that the model takes."""


class InputAudio(_Fields):
    """A recording."""

    data: str
    """In base64."""
    format: Literal["wav", "mp3", "flac", "ogg"]


class ContentPart(_Fields):
    """A part of a message: of its `type` text, image_url or input_audio it has the field of that name, and no other."""

    type: str
    text: str | None = None
    image_url: ImageURL | None = None
    input_audio: InputAudio | None = None


class Message(_Fields):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | ListOf[ContentPart]


class ChatFields(GenerationFields):
    """A request to /v1/chat/completions."""

    messages: Annotated[ListOf[Message], Field(min_length=1, max_length=MAX_SEQUENCES)]
    max_completion_tokens: Annotated[int | None, Field(ge=0)] = None
    """Most new tokens; `max_tokens` is its older name."""
    logprobs: bool | None = None
    """Whether to tell log-probabilities, which are those before sampling filters."""
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    """How many likeliest tokens to tell with each; needs `logprobs`."""


class TokenizeFields(_Fields):
    """A request to /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[ListOf[Message], Field(min_length=1, max_length=MAX_SEQUENCES)] | None = None
    add_special_tokens: bool = True
    """Whether the start token comes first; for a text."""


class InsideFields(_Fields):
    """A request to /inside."""

    model: str | None = None
    prompt: str
    """The text to look at; its first tokens where it is long."""
    layer: Annotated[int | None, Field(ge=0)] = None
    """The block whose attention is told too."""


class DetokenizeFields(_Fields):
    """A request to /detokenize."""

    model: str | None = None
    tokens: ListOf[TokenId]


def refuse_what_is_not_honoured(fields: BaseModel, where: str = "") -> None:
    """Raise RefusalError for a field that we do not have and whose value asks for something.

    Args:
        fields: of the request, checked already.
        where: what comes before a field's name.
    """
    for name, value in (fields.model_extra or {}).items():
        shown = f"{where}{name}"[:64]
        if name in _WITHOUT_EFFECT:
            length = len(json.dumps(value))
            if length > _MOST_WITHOUT_EFFECT:
                most = f"may have {_MOST_WITHOUT_EFFECT} characters, got {length}"
                raise invalid(f"`{shown}` {most}: it changes no answer, leave it out.", shown, "invalid_value")
            continue
        if any(_equal(value, one) for one in (*_NOTHING, *_NEUTRAL.get(name, ()))):
            continue
        reason = _REASONS.get(name, "it is not supported; leave it out")
        raise invalid(f"`{shown}` cannot be honoured: {reason}.", shown, "unsupported_parameter")
    for name in type(fields).model_fields:
        value = getattr(fields, name)
        for index, one in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(one, BaseModel):
                place = f"{where}{name}[{index}]." if isinstance(value, list) else f"{where}{name}."
                refuse_what_is_not_honoured(one, place)


def _equal(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and value == neutral
