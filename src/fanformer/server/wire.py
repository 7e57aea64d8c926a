"""What OpenAI's clients read: objects of completions, chat completions, and their chunks."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fanformer.generation.decoding import TextDecoder
from fanformer.server.models import ServedModel
from fanformer.server.planning import Plan
from fanformer.server.scheduler import Finish
from fanformer.server.stopping import Token


@dataclass
class Answer:
    """One answer as it comes."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """In characters, where each token's text begins, behind the prompt's where that is echoed."""
    finish: Finish | None = None

    @property
    def mean_log_probability(self) -> float:
        """Of the new tokens."""
        assert self.finish is not None
        return self.finish.log_probability / max(self.finish.completion_tokens, 1)


class Wire:
    """The shapes of one response, of /v1/completions or of /v1/chat/completions."""

    def __init__(self, model: ServedModel, plan: Plan, is_chat: bool) -> None:
        """Begin a response.

        Args:
            model: that answers.
            plan: what was asked.
            is_chat: which of the two shapes.
        """
        self._model, self._plan, self._is_chat = model, plan, is_chat
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the response that is no stream."""
        choices = [
            self._choice(index, answer, self._finish_reason(answer), is_whole=True)
            for index, answer in enumerate(answers)
        ]
        return {**self._head("chat.completion" if self._is_chat else "text_completion"), "choices": choices} | {
            "usage": usage
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that begins an answer: in a chat, the role."""
        if not self._is_chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def piece(self, index: int, part: Answer) -> dict[str, Any]:
        """Return the chunk of what came since the last one."""
        return self._chunk([self._choice(index, part, self._finish_reason(part), is_whole=False)])

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the last chunk, of a stream that was to tell its usage."""
        return self._chunk([]) | {"usage": usage}

    def usage(self, finishes: Sequence[Finish]) -> dict[str, Any]:
        """Return the numbers of tokens."""
        prompt, completion = self._plan.prompt_tokens, sum(one.completion_tokens for one in finishes)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in finishes[:: self._plan.drawn])},
        }

    def prompt_offsets(self, text: str, ids: Sequence[int]) -> list[int]:
        """Return where each token of an echoed prompt begins in its text; one without text where the next does."""
        offsets, decoder = [], TextDecoder(self._model.reader, [])
        length = 0
        for number in ids:
            offsets.append(min(length, len(text)))
            length += len(decoder.push(number))
        return offsets

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = self._head("chat.completion.chunk" if self._is_chat else "text_completion")
        return {**head, "choices": choices} | ({"usage": None} if self._plan.include_usage else {})

    def _finish_reason(self, answer: Answer) -> str | None:
        return None if answer.finish is None else answer.finish.reason

    def _choice(self, index: int, answer: Answer, reason: str | None, is_whole: bool) -> dict[str, Any]:
        if not self._is_chat:
            scores = self._completion_logprobs(answer)
            return {"index": index, "text": answer.text, "logprobs": scores, "finish_reason": reason}
        if is_whole:
            content: dict[str, Any] = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        else:
            content = {"delta": {"content": answer.text} if answer.text else {}}
        return {"index": index, **content, "logprobs": self._chat_logprobs(answer), "finish_reason": reason}

    def _completion_logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if self._plan.likeliest is None:
            return None
        tops: list[dict[str, float] | None] = []
        for token in answer.tokens:
            if token.log_probability is None or not self._plan.likeliest:
                tops.append(None)
            else:
                # the token itself is always among them
                pairs = dict([(token.id, token.log_probability), *token.likeliest])
                tops.append({self._model.token_name(number): value for number, value in pairs.items()})
        return {
            "tokens": [self._model.token_name(token.id) for token in answer.tokens],
            "token_logprobs": [token.log_probability for token in answer.tokens],
            "top_logprobs": tops,
            "text_offset": answer.offsets,
        }

    def _chat_logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if self._plan.likeliest is None:
            return None
        content = [
            self._scored(token.id, token.log_probability)
            | {"top_logprobs": [self._scored(*pair) for pair in token.likeliest]}
            for token in answer.tokens
        ]
        return {"content": content, "refusal": None}

    def _scored(self, number: int, value: float | None) -> dict[str, Any]:
        name = self._model.token_bytes(number)
        return {"token": name.decode(errors="replace"), "logprob": value, "bytes": list(name)}


def event(data: dict[str, Any] | str) -> bytes:
    """Return a server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode(errors="replace") + b"\n\n"
