"""How much each input channel of each matrix counts: the mean square of what passes through it on real text.

Source: llama.cpp's importance matrix (tools/imatrix): a rounding error in column i costs in proportion to E[x_i^2].
"""

from collections.abc import Callable, Iterator

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
    handles = [
        module.register_forward_pre_hook(_recorder(f"{name}.weight", sums))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel()
    ]
    done = 0
    try:
        with torch.inference_mode():
            for ids in _pieces(tokenizer, source, model.config.max_position_embeddings, tokens):
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
                done += len(ids)
                if on_progress is not None:
                    on_progress(done, tokens)
    finally:
        for handle in handles:
            handle.remove()
    if done < FEWEST_TOKENS:
        raise DataError(
            f"`--calibration {source}` has {done} tokens, expected at least {FEWEST_TOKENS}: give more text."
        )
    return {name: (total / done).float().cpu().numpy().astype(np.float32) for name, total in sums.items()}


def _recorder(name: str, sums: dict[str, torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        squares = inputs[0].detach().double().square().flatten(0, -2).sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    return record


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
