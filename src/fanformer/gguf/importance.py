"""How much each input channel of each matrix counts: the mean square of what passes through it on real text.

Source: llama.cpp's importance matrix (tools/imatrix): a rounding error in column i costs in proportion to E[x_i^2].
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fanformer.data.held_out import DEFAULT_TOKENS, FEWEST_TOKENS
from fanformer.data.sources.documents import open_source
from fanformer.data.tokenizer import encode_documents, start_token_id
from fanformer.errors import ConfigError, DataError
from fanformer.gguf.blocks import Floats


def importance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    source: str,
    tokens: int = DEFAULT_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Floats]:
    """Return the mean square of every input channel of every linear layer, by the name of its weight.

    A tied head's weight has the name of the embedding, as in a file.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        source: text to run, one that the model has not been trained on; read only as far as needed.
        tokens: how many tokens to run.
        on_progress: called with tokens done, and with `tokens`.

    Raises:
        ConfigError: if `tokens` is below FEWEST_TOKENS.
        DataError: if the source has fewer than FEWEST_TOKENS.
    """
    if tokens < FEWEST_TOKENS:
        raise ConfigError(f"`--calibration-tokens` must be at least {FEWEST_TOKENS}, got {tokens}.")
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        sums[f"{name}.weight"] = sums.get(f"{name}.weight", 0) + x.double().square().flatten(0, -2).sum(0)

    modules = dict(model.named_modules()).items()
    layers = [name for name, module in modules if isinstance(module, nn.Linear) and module.weight.numel()]
    done = 0
    with torch.inference_mode(), watched_inputs(model, layers, add):
        for ids in _pieces(tokenizer, source, model.config.max_position_embeddings, tokens):
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
            done += len(ids)
            if on_progress is not None:
                on_progress(done, tokens)
    if done < FEWEST_TOKENS:
        raise DataError(
            f"`--calibration {source}` has {done} tokens, expected at least {FEWEST_TOKENS}: give more text."
        )
    if model.config.tie_word_embeddings:
        sums["model.embed_tokens.weight"] = sums.pop("lm_head.weight")
    return {name: (total / done).float().cpu().numpy().astype(np.float32) for name, total in sums.items()}


@contextmanager
def watched_inputs(model: nn.Module, layers: Iterable[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Let `see` have the name and the input of every named layer that runs within the `with` block."""
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0]))
        for name in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pieces(tokenizer: PreTrainedTokenizerFast, source: str, length: int, tokens: int) -> Iterator[list[int]]:
    """Yield token ids of documents, each piece at most `length` long, together at most `tokens`."""
    for document in open_source(source):
        ids = [start_token_id(tokenizer), *encode_documents(tokenizer, [document.text])[0]]
        for start in range(0, len(ids), length):
            piece = ids[start : start + min(length, tokens)]
            if piece:
                tokens -= len(piece)
                yield piece
            if tokens <= 0:
                return
