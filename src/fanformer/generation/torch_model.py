"""Text by a model of `transformers`: sampling that a seed reproduces, batches, streaming."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from fanformer.data.multimodal import placeholder_ids
from fanformer.data.tokenizer import encode_documents, start_token_id
from fanformer.errors import ConfigError, NotANumberError
from fanformer.generation.decoding import TextWriter
from fanformer.generation.fast_decoding import fast_decoding
from fanformer.generation.interruption import Interruption
from fanformer.generation.settings import own_sampling
from fanformer.generation.text_model import Batch, Remembered, TextModel, check_text, depth_note, excluded_first
from fanformer.model.recurrence_fanformer import CACHE

if TYPE_CHECKING:
    from fanformer.generation.speculation import SelfSpeculation


class KnownTokensOnly(LogitsProcessor):
    """Makes ids impossible that the tokenizer does not have, padding of the vocabulary to a round size, and some more.

    These are placeholders: no text holds a picture.
    """

    def __init__(self, known: int, placeholders: Sequence[int] = ()):
        self._known, self._placeholders = known, placeholders

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` (B, V) with minus infinity from id `known` on, and at placeholders.

        Raises:
            NotANumberError: if a score is no number.
        """
        if scores.isnan().any():
            raise NotANumberError
        vocabulary = scores.shape[-1]
        never = [*range(self._known, vocabulary), *(number for number in self._placeholders if number < vocabulary)]
        return scores.index_fill(-1, torch.tensor(never, dtype=torch.int64, device=scores.device), -torch.inf)


class BeginsWith(LogitsProcessor):
    """Lets the first new token of a row be only one whose text begins with the row's own beginning."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, beginnings: Sequence[str], known: int, width: int):
        self._width = width
        found = {beginning: excluded_first(tokenizer, beginning, known) for beginning in set(beginnings)}
        rows = [np.zeros(known, bool) if (row := found[beginning]) is None else row for beginning in beginnings]
        self._excluded = torch.from_numpy(np.stack(rows))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` (B, V), at the first new position with minus infinity for all other tokens."""
        if input_ids.shape[1] != self._width:
            return scores
        excluded = torch.ones_like(scores, dtype=torch.bool)
        both = min(self._excluded.shape[1], scores.shape[1])  # placeholders may have ids that the model does not score
        excluded[:, :both] = self._excluded[:, :both].to(scores.device)
        return scores.masked_fill(excluded, -torch.inf)


class Temperature(LogitsProcessor):
    """Divides scores, after the row's largest is taken from all: only what is as good as impossible overflows."""

    def __init__(self, temperature: float):
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` (B, V) less their row's largest, over the temperature."""
        return (scores - scores.amax(dim=-1, keepdim=True)) / self._temperature


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise, so that the largest score is a sample of the softmax; each row has its own random stream.

    So the text of a prompt does not depend on which others share its batch, and no global random state is touched.

    Source: the Gumbel-max trick, arXiv:1611.00712, section 2.
    """

    def __init__(self, seeds: Sequence[int]):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` (B, V) plus noise, in float32."""
        # The noise is drawn on the CPU, where a seed means the same on every machine.
        noise = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=g) for g in self._generators])
        return scores.float() - noise.clamp_min(torch.finfo(torch.float32).tiny).log().to(scores.device)


class TextStreamer(BaseStreamer):
    """Hands the tokens of one sequence to a TextWriter while `generate` makes them."""

    def __init__(self, writer: TextWriter):
        self._writer = writer

    def put(self, value: Tensor) -> None:
        """Take the next token (1,); the prompt (1, T), which comes first, is the writer's already."""
        for token_id in value.tolist() if value.dim() == 1 else ():
            self._writer.push(token_id)

    def end(self) -> None:
        """Hand over what was held back."""
        self._writer.finish()


class StopWhenInterrupted(StoppingCriteria):
    """Ends every sequence of a batch once an interruption is requested."""

    def __init__(self, interruption: Interruption):
        self._interruption = interruption

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return for each row of `input_ids` (B, T) whether it ends here."""
        return torch.full((input_ids.shape[0],), self._interruption.requested, device=input_ids.device)


class TorchModel(TextModel):
    """A causal language model of `transformers` that writes and scores text."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        compiled: bool = False,
        join: bool = True,
        draft_tokens: int | None = None,
    ) -> None:
        """Take a model in evaluation mode and its tokenizer.

        Args:
            model: where it is and in its dtype.
            tokenizer: the one that it was trained with.
            compiled: compile the step from token to token: some ten seconds, or a minute the first time, and faster
                then. What is remembered of a conversation is not used then.
            join: compute what reads one input as one product, for which the weights are moved in memory.
            draft_tokens: tokens that one step of a recurrent depth drafts before all steps verify them, one text at a
                time; for greedy decoding. None drafts none.

        Raises:
            ConfigError: if compiled code cannot do the model's depth, or it cannot draft.
        """
        super().__init__()
        depth = getattr(model.get_decoder(), "depth", None) if compiled else None
        if depth is not None and depth.is_adaptive:
            raise ConfigError(
                f"`compile` needs a fixed number of steps, got exit_threshold {depth.exit_threshold}: leave one out."
            )
        self.speculation = None if draft_tokens is None else _speculation(model, draft_tokens, compiled)
        self.model, self.tokenizer, self.compiled, self.join = model, tokenizer, compiled, join
        self.positions = getattr(model.config, "max_position_embeddings", None)
        self.end_ids = end_token_ids(model, tokenizer)
        self.own_sampling = sampling_of(model)

    @property
    def num_steps(self) -> int | None:
        """Do what `TextModel.num_steps` says."""
        recurrent = getattr(self.model.config, "recurrence", None) is not None
        return int(self.model.get_decoder().depth.largest) if recurrent else None

    @property
    def depth_note(self) -> str | None:
        """Do what `TextModel.depth_note` says."""
        recurrence = getattr(self.model.config, "recurrence", None)
        return None if recurrence is None else depth_note(recurrence.mean_steps, recurrence.largest_steps)

    def encode(self, prompt: str) -> list[int]:
        """Do what `TextModel.encode` says."""
        return encode_prompt(self.tokenizer, prompt)

    @torch.inference_mode()
    def continue_batch(self, batch: Batch) -> list[list[int]]:
        """Do what `TextModel.continue_batch` says."""
        with self.turn():  # for the time of a text the modules compute otherwise, see `fast_decoding`
            return self._continue(batch) if self.speculation is None else self._speculate(self.speculation, batch)

    def _continue(self, batch: Batch) -> list[list[int]]:
        model, tokenizer, rows, settings, compiling = self.model, self.tokenizer, batch.rows, batch.settings, {}
        inputs = self.media_inputs(batch)
        on_text, remembered = batch.on_text, batch.remembered
        writer = TextWriter(tokenizer, rows[0], on_text, len(batch.beginnings[0])) if on_text is not None else None
        width = max(map(len, rows))
        cache: Cache | None = None
        if self.compiled:
            from fanformer.machine.compiling import compiled_decoding, fixed_cache

            cache = fixed_cache(model, width + settings.max_length)
            compiling = compiled_decoding(model.device.type)
        elif remembered is not None:
            cache = _cache_of(model, rows[0], remembered)
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else [*self.end_ids, 0][0]
        input_ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=model.device)
        present = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        with fast_decoding(model, self.join), own_settings_aside(model):
            output = model.generate(
                input_ids=input_ids,
                attention_mask=present,
                generation_config=GenerationConfig(
                    max_new_tokens=settings.max_length,
                    min_new_tokens=settings.min_length,
                    do_sample=False,  # the noise that _processors adds makes the most likely token a sample
                    num_beams=1,
                    use_cache=True,
                    pad_token_id=padding,
                    eos_token_id=list(self.end_ids) or None,
                    **compiling,
                ),
                logits_processor=_processors(tokenizer, batch, width),
                stopping_criteria=StoppingCriteriaList([StopWhenInterrupted(batch.interruption)]),
                streamer=TextStreamer(writer) if writer is not None else None,
                **{CACHE: cache},
                **inputs,
            )
        found = []
        for new_ids in output[:, width:].tolist():
            end = next((index for index, token_id in enumerate(new_ids) if token_id in self.end_ids), len(new_ids))
            found.append(new_ids[: end + 1])
        if remembered is not None and isinstance(cache, DynamicCache):
            remembered.keep(rows[0], found[0], cache.get_seq_length(), cache)
        return found

    def media_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the model is given beside tokens: nothing, where there are no towers."""
        assert not any(batch.media), "a model without towers was asked about media"
        return {}

    def _speculate(self, speculation: "SelfSpeculation", batch: Batch) -> list[list[int]]:
        """Continue the rows of a batch one after the other by drafts that are verified."""
        if not batch.settings.is_greedy:
            raise ConfigError(
                f"`draft_tokens` needs greedy decoding, got temperature {batch.settings.temperature}: set it to 0."
            )
        with fast_decoding(self.model, self.join):
            return [
                self._speculate_row(speculation, replace(batch, rows=[row], beginnings=[beginning]))
                for row, beginning in zip(batch.rows, batch.beginnings, strict=True)
            ]

    def _speculate_row(self, speculation: "SelfSpeculation", batch: Batch) -> list[int]:
        (row,), (beginning,), settings = batch.rows, batch.beginnings, batch.settings
        writer = None
        if batch.on_text is not None:
            writer = TextWriter(self.tokenizer, row, batch.on_text, len(beginning))
        processors = _processors(self.tokenizer, batch, len(row))
        ends = torch.tensor(list(self.end_ids), dtype=torch.int64, device=self.model.device)

        def choose(ids: Tensor, logits: Tensor) -> int:
            scores = processors(ids, logits)
            if ids.shape[1] < len(row) + settings.min_length:
                scores = scores.index_fill(-1, ends, -torch.inf)
            return int(scores.argmax(-1))

        def on_token(token: int) -> bool:
            if writer is not None:
                writer.push(token)
            return token in self.end_ids or batch.interruption.requested

        found = speculation.continue_ids(row, settings.max_length, choose, on_token)
        if writer is not None:
            writer.finish()
        return found

    @torch.inference_mode()
    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        """Do what `TextModel.log_likelihoods` says, in float32."""
        tokens = torch.tensor([ids], device=self.model.device)
        with self.turn():
            logits = self.model(tokens[:, :-1]).logits[0].float()  # (T - 1, V)
        return logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].tolist()


def _speculation(model: PreTrainedModel, draft_tokens: int, compiled: bool) -> "SelfSpeculation":
    if compiled:
        raise ConfigError(f"`draft_tokens` does not go with `compile`, got {draft_tokens}: leave one out.")
    from fanformer.generation.speculation import SelfSpeculation

    return SelfSpeculation(model, draft_tokens)


@contextmanager
def own_settings_aside(model: PreTrainedModel) -> Iterator[None]:
    """Let `generate` do within the `with` block what it is told, and nothing else that the model's folder asks for.

    It fills in what it is not told from `model.generation_config`: with a penalty there, greedy would not be greedy.
    Of that only the end tokens count, as `end_token_ids` reads them, and what `own_sampling` takes.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Return the token ids of `prompt`, the start token in front; what looks like a special token is plain text.

    Raises:
        ConfigError: if the prompt is not valid Unicode, or the tokenizer has no token to start a text with.
    """
    check_text(prompt)
    return [start_token_id(tokenizer), *encode_documents(tokenizer, [prompt])[0]]


def _cache_of(model: PreTrainedModel, ids: list[int], remembered: Remembered) -> DynamicCache:
    """Return a cache with the keys and values of the beginning that `ids` shares with what is remembered."""
    shared, cache = remembered.take(ids)
    # layers of another kind keep less than the whole text, and cannot be cut
    if not shared or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return DynamicCache(config=model.config)
    excess = cache.get_seq_length() - shared
    if excess:
        cache.crop(-excess)
    return cache


def _processors(tokenizer: PreTrainedTokenizerFast, batch: Batch, width: int) -> LogitsProcessorList:
    settings = batch.settings
    known = max(tokenizer.get_vocab().values()) + 1
    processors = LogitsProcessorList([KnownTokensOnly(known, placeholder_ids(tokenizer))])
    if any(batch.beginnings):
        processors.append(BeginsWith(tokenizer, batch.beginnings, known, width))
    if settings.is_greedy:
        return processors
    processors.append(Temperature(settings.temperature))
    if settings.top_k > 0:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    processors.append(GumbelNoise(batch.seeds))
    return processors


def sampling_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return how the folder of a model asks to be drawn from, where its generation settings say that it is to be drawn.

    Raises:
        CheckpointError: if a value is no number, or out of its range.
    """
    asked = model.generation_config
    if asked is None or not asked.do_sample:
        return {}
    return own_sampling(vars(asked), f"generation_config.json of {model.name_or_path or 'the model'}")


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that end a text: the folder's generation settings, else its configuration, else its tokenizer."""
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return list(ids) if isinstance(ids, list) else [ids]
    return []
