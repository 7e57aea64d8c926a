"""From the fields of a request to what the scheduler is asked: prompts, sampling, stops, lengths."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fanformer.errors import ConfigError
from fanformer.generation.sampling import Sampling
from fanformer.generation.text_model import row_seed
from fanformer.server.fields import (
    MAX_SEQUENCES,
    ChatFields,
    CompletionFields,
    GenerationFields,
    Message,
    refuse_what_is_not_honoured,
)
from fanformer.server.messages import read_messages
from fanformer.server.models import ServedModel
from fanformer.server.refusal import RefusalError, invalid
from fanformer.server.scheduler import Request
from fanformer.server.slots import Conversation

_MAX_STOP_CHARACTERS = 1024
_DEFAULT_TOKENS = 16


@dataclass(frozen=True)
class Plan:
    """What one HTTP request asks of a model."""

    requests: list[Request]
    """For each prompt, `drawn` in a row."""
    prompts: list[str]
    """The text of each prompt where it is to be told; else empty."""
    drawn: int
    """Answers that are written for each prompt."""
    told: int
    """Answers that are told of these."""
    stream: bool
    include_usage: bool
    echo: bool = False
    likeliest: int | None = None
    """What was asked for of log-probabilities; None is none."""
    prompt_tokens: int = field(init=False)
    """Tokens of all prompts."""

    def __post_init__(self) -> None:
        total = sum(len(request.ids) for request in self.requests[:: self.drawn])
        object.__setattr__(self, "prompt_tokens", total)


def plan_completion(fields: CompletionFields, model: ServedModel) -> Plan:
    """Return what a request to /v1/completions asks.

    Raises:
        RefusalError: if a field cannot be honoured.
    """
    refuse_what_is_not_honoured(fields)
    _check_steps(fields, model)
    told = fields.n or 1
    drawn = fields.best_of or told
    if drawn < told:
        raise invalid(f"`best_of` must be at least n ({told}), got {drawn}.", "best_of")
    if fields.stream and drawn > told:
        raise invalid(f"`best_of` must be n ({told}) in a stream, got {drawn}: answers are compared whole.", "best_of")
    echo, likeliest = bool(fields.echo), fields.logprobs
    max_tokens = _DEFAULT_TOKENS if fields.max_tokens is None else fields.max_tokens
    if max_tokens == 0 and not echo:
        raise invalid("`max_tokens` must be at least 1 without `echo`, got 0: nothing would be told.", "max_tokens")
    prompts = _prompts(fields.prompt)
    _check_number(len(prompts), drawn)
    # what is scored or echoed stays as it was cut: only a text to continue lends its spaces to the next token
    encoded = [_encode(model, prompt, moves_spaces=not echo) for prompt in prompts]
    sampling, stops = _sampling(fields, model), _stops(fields)
    requests = [
        Request(
            ids,
            max_tokens,
            replace(sampling, seed=row_seed(sampling.seed, index)),
            stops,
            beginning,
            likeliest if likeliest is not None else 0 if drawn > told else None,
            scores_prompt=echo and likeliest is not None,
            num_steps=fields.num_steps,
        )
        for index, (ids, beginning) in enumerate(one for one in encoded for _ in range(drawn))
    ]
    _check_lengths(model, requests, "prompt")
    texts = ["" if not echo else prompt if isinstance(prompt, str) else model.decode(prompt) for prompt in prompts]
    return Plan(requests, texts, drawn, told, bool(fields.stream), _usage(fields), echo, likeliest)


def plan_chat(fields: ChatFields, model: ServedModel) -> Plan:
    """Return what a request to /v1/chat/completions asks.

    Raises:
        RefusalError: if a field cannot be honoured, or the model has no chat template.
    """
    refuse_what_is_not_honoured(fields)
    _check_steps(fields, model)
    told = fields.n or 1
    _check_number(1, told)
    if fields.top_logprobs and not fields.logprobs:
        raise invalid(f"`top_logprobs` needs `logprobs` true, got {fields.top_logprobs} without.", "top_logprobs")
    given = {one for one in (fields.max_tokens, fields.max_completion_tokens) if one is not None}
    if len(given) > 1:
        raise invalid("`max_tokens` and `max_completion_tokens` differ: give one of them.", "max_completion_tokens")
    conversation = encode_conversation(model, fields.messages)
    # what is shown stands at its places in any case: the id there is one that a text may have
    ids = [conversation.ids[0] if number in model.places else number for number in conversation.ids]
    room = model.positions - len(ids)
    max_tokens = given.pop() if given else max(room, 1)
    if max_tokens == 0:
        raise invalid("`max_tokens` must be at least 1, got 0: nothing would be told.", "max_tokens")
    likeliest = (fields.top_logprobs or 0) if fields.logprobs else None
    sampling, stops = _sampling(fields, model), _stops(fields)
    requests = [
        Request(
            ids,
            max_tokens,
            replace(sampling, seed=row_seed(sampling.seed, index)),
            stops,
            likeliest=likeliest,
            num_steps=fields.num_steps,
        )
        for index in range(told)
    ]
    _check_lengths(model, requests, "messages")
    if conversation.look is not None:
        shown = conversation.look()
        requests = [replace(request, shown=shown) for request in requests]
    return Plan(requests, [""], told, told, bool(fields.stream), _usage(fields), likeliest=likeliest)


def encode_conversation(model: ServedModel, messages: Sequence[Message]) -> Conversation:
    """Return a conversation up to where the answer begins.

    Raises:
        RefusalError: if the model has no chat template, or it refuses the messages or what they show.
    """
    read = read_messages(messages, model.kinds)
    contents = [[one["content"]] if isinstance(one["content"], str) else one["content"] for one in read]
    said = [part for parts in contents for part in parts if isinstance(part, str)]
    _check_characters(model, sum(map(len, said)), "messages")
    try:
        return model.encode_conversation(read)
    except ConfigError as error:
        is_base = model.chat_template is None
        raise invalid(
            str(error), "model" if is_base else "messages", "no_chat_template" if is_base else None
        ) from error


def _prompts(prompt: str | list[int] | list[str] | list[list[int]] | None) -> list[str] | list[list[int]]:
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if not prompt:
        raise invalid("`prompt` must be a text, token ids, or a list of either, got an empty list.", "prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _encode(model: ServedModel, prompt: str | list[int], moves_spaces: bool) -> tuple[list[int], str]:
    if isinstance(prompt, str):
        _check_characters(model, len(prompt), "prompt")
    try:
        if isinstance(prompt, str):
            return model.encode_to_continue(prompt) if moves_spaces else (model.encode(prompt), "")
    except ConfigError as error:
        raise invalid(str(error), "prompt") from error
    if not prompt:
        raise invalid("`prompt` has a list of no token ids: expected at least one.", "prompt")
    if max(prompt) >= model.known:
        raise invalid(f"`prompt` has the id {max(prompt)}, expected ids below {model.known}.", "prompt")
    if places := set(prompt).intersection(model.places):
        raise invalid(
            f"`prompt` has the id {min(places)}, which stands for a picture or recording: show it in a message of "
            "/v1/chat/completions.",
            "prompt",
        )
    return prompt, ""


def _check_number(prompts: int, answers: int) -> None:
    if prompts * answers > MAX_SEQUENCES:
        raise invalid(f"a request may have {MAX_SEQUENCES} answers, got {prompts} prompts times {answers}.", "n")


def _sampling(fields: GenerationFields, model: ServedModel) -> Sampling:
    """Return what all answers of a request share; each draws by a seed of its own, made of this one."""
    return Sampling(
        temperature=_given(fields.temperature, 1.0),
        top_k=max(fields.top_k or 0, 0),
        top_p=_given(fields.top_p, 1.0),
        min_p=fields.min_p or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=_given(fields.repetition_penalty, 1.0),
        logit_bias=_bias(fields.logit_bias or {}, model),
        min_tokens=fields.min_tokens or 0,
        seed=secrets.randbits(48) if fields.seed is None else fields.seed,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _bias(bias: dict[str, float], model: ServedModel) -> dict[int, float]:
    found: dict[int, float] = {}
    for name, value in bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < model.known):
            raise invalid(f"`logit_bias` has the key {name[:16]!r}, expected ids in [0, {model.known}).", "logit_bias")
        if int(name) in model.places:
            raise invalid(f"`logit_bias` has the key {name}, which is never written: leave it out.", "logit_bias")
        found[int(name)] = value
    return found


def _stops(fields: GenerationFields) -> tuple[str, ...]:
    stop = fields.stop
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if isinstance(stop, str) and not stop:
        return ()  # what some clients send for none
    for one in stops:
        if not 1 <= len(one) <= _MAX_STOP_CHARACTERS:
            raise invalid(f"`stop` strings must have 1 to {_MAX_STOP_CHARACTERS} characters, got {len(one)}.", "stop")
    return stops


def _check_steps(fields: GenerationFields, model: ServedModel) -> None:
    """Raise RefusalError where a request names steps that the model cannot take."""
    if fields.num_steps is None:
        return
    steps = model.slots.steps
    if steps is None:
        reason = "the model has no latent steps, or this engine has a fixed number of them; leave it out"
        raise invalid(f"`num_steps` cannot be honoured: {reason}.", "num_steps", "unsupported_parameter")
    if fields.num_steps > steps.most:
        raise invalid(f"`num_steps` must be in [1, {steps.most}], got {fields.num_steps}.", "num_steps")


def _usage(fields: GenerationFields) -> bool:
    options = fields.stream_options
    if options is not None and not fields.stream:
        raise invalid("`stream_options` is for streams, got it without `stream`: leave it out.", "stream_options")
    return bool(options and options.include_usage)


def _check_characters(model: ServedModel, length: int, param: str) -> None:
    """Raise RefusalError where a text is too long before it is made tokens."""
    if model.surely_exceeds(length):
        raise RefusalError(
            400,
            f"this model has {model.positions} positions, and a text of {length} characters more tokens: shorten it.",
            param,
            "context_length_exceeded",
        )


def _check_lengths(model: ServedModel, requests: Sequence[Request], param: str) -> None:
    """Raise RefusalError where a prompt and its answer are longer than a slot, or than the least asked for."""
    for request in requests:
        total = len(request.ids) + request.max_tokens
        if total > model.positions:
            raise RefusalError(
                400,
                f"this model has {model.positions} positions, and the prompt has {len(request.ids)} tokens with "
                f"{request.max_tokens} more for the answer: shorten the prompt or lower max_tokens.",
                param,
                "context_length_exceeded",
            )
        if request.sampling.min_tokens > request.max_tokens:
            raise invalid(
                f"`min_tokens` must be at most max_tokens ({request.max_tokens}), got {request.sampling.min_tokens}.",
                "min_tokens",
            )
