"""Self-speculation: one step of a recurrent depth drafts tokens, and r steps verify them, the first one used again.

The text is that of greedy decoding at r steps. Sources: arXiv:2211.17192 (speculative decoding), arXiv:2502.05171
(drafts by the same model at fewer steps).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from fanformer.errors import ConfigError
from fanformer.model.recurrence_fanformer import deepen, fit_cache

Choose = Callable[[Tensor, Tensor], int]
"""Returns the next token for ids (1, T) and the logits (1, V) behind them."""


def check_speculation(model: PreTrainedModel, draft_tokens: int) -> None:
    """Raise ConfigError if a model cannot draft so many tokens for itself."""
    depth = getattr(model.get_decoder(), "depth", None)
    if getattr(model.config, "recurrence", None) is None or depth is None:
        raise ConfigError(
            f"`draft_tokens` needs a model with recurrent depth, got {draft_tokens} for a {model.config.model_type} "
            "without: leave it out."
        )
    if draft_tokens < 1:
        raise ConfigError(f"`draft_tokens` must be at least 1, got {draft_tokens}: 4 is usual.")
    if depth.is_adaptive or depth.last_step_cache or depth.largest < 2:
        raise ConfigError(
            f"`draft_tokens` needs a fixed number of steps above 1 and a cache of all of them, got {depth}: leave out "
            "`exit_threshold` and set `num_steps` higher."
        )


class SelfSpeculation:
    """Continues a text by drafts of one step, verified by as many as the model's depth says."""

    def __init__(self, model: PreTrainedModel, draft_tokens: int) -> None:
        """Take a model.

        Args:
            model: with recurrent depth, in evaluation mode.
            draft_tokens: most tokens that are drafted before they are verified.

        Raises:
            ConfigError: as `check_speculation`.
        """
        check_speculation(model, draft_tokens)
        self.model, self.draft_tokens = model, draft_tokens
        self._decoder: Any = model.get_decoder()
        self._recurrence = self._decoder.bridge.recurrence
        self.drafted = self.accepted = 0
        """Tokens that one step has drafted so far, and how many of those were those of all steps."""

    @torch.inference_mode()
    def continue_ids(self, ids: list[int], most: int, choose: Choose, on_token: Callable[[int], bool]) -> list[int]:
        """Return up to `most` tokens that follow `ids`.

        Args:
            ids: the text, at least one token.
            most: new tokens.
            choose: takes the next token of the logits; must be a function of its arguments.
            on_token: hears every token as it is certain; True ends the text there.
        """
        device = self.model.device
        cache = DynamicCache(config=self.model.config)
        fit_cache(cache, self._recurrence, self._decoder.depth)
        if len(ids) > 1:
            self.model(torch.tensor([ids[:-1]], device=device), past_key_values=cache, logits_to_keep=1)
        text = list(ids)
        while len(text) - len(ids) < most:
            count = min(self.draft_tokens, most - (len(text) - len(ids)))
            for token in self._round(text, count, cache, choose):
                text.append(token)
                if on_token(token):
                    return text[len(ids) :]
        return text[len(ids) :]

    def _round(self, text: list[int], count: int, cache: DynamicCache, choose: Choose) -> list[int]:
        """Draft `count` tokens after `text` and return those that all steps agree to, and the first that they do not.

        The cache holds all of the text but its last token, before and after.
        """
        decoder, recurrence = self._decoder, self._recurrence
        known, drafted, states = len(text) - 1, list(text), []
        whole = self._options(count, known, cache)  # before the cache grows
        for index in range(count):
            options = self._options(1, known + index, cache)
            e = self._run(recurrence.prelude, self._embed(drafted[-1:]), cache, options)
            state = self._run(recurrence.core, e, cache, options)
            states.append((e, state))
            drafted.append(self._choose(choose, drafted, self._run(recurrence.coda, state, cache, options)))
        for layer in recurrence.coda:
            cache.layers[layer].crop(-count)

        def run(blocks: range, x: Tensor, past: Any) -> Tensor:
            return self._run(blocks, x, past, whole)

        e, state = (torch.cat(parts, dim=1) for parts in zip(*states, strict=True))
        steps = range(2, decoder.depth.largest + 1)
        state = run(recurrence.coda, deepen(run, decoder.bridge, state, e, cache, steps), cache)
        certain: list[int] = []
        for index in range(count):
            before = [*text, *certain]
            certain.append(self._choose(choose, before, state[:, index : index + 1]))
            if certain[-1] != drafted[len(before)]:
                break
        self.drafted += count
        self.accepted += sum(one == other for one, other in zip(certain, drafted[len(text) :], strict=False))
        if count > len(certain):
            cache.crop(len(certain) - count)
        return certain

    def _embed(self, ids: list[int]) -> Tensor:
        embedded: Tensor = self._decoder.embed_tokens(torch.tensor([ids], device=self.model.device))
        return embedded  # (1, T, D)

    def _options(self, count: int, known: int, cache: DynamicCache) -> dict[str, Any]:
        """Return what the blocks are told of `count` tokens behind `known` cached ones."""
        like = self._embed([0] * count)
        places = torch.arange(known, known + count, device=like.device)[None]
        mask = create_causal_mask(self.model.config, like, None, cache)  # by place: names differ by version
        rotary = self._decoder.rotary_emb(places, like.dtype)
        return {"attention_mask": mask, "position_embeddings": rotary, "position_ids": places, "use_cache": True}

    def _run(self, blocks: range, x: Tensor, past: Any, options: dict[str, Any]) -> Tensor:
        found: Tensor = self._decoder.run(blocks, x, past, **options)
        return found

    def _choose(self, choose: Choose, ids: list[int], hidden: Tensor) -> int:
        output: Any = self.model.get_output_embeddings()
        logits = output(self._decoder.norm(hidden))[:, -1]
        return choose(torch.tensor([ids], device=logits.device), logits)
