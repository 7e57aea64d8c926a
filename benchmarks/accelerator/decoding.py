"""How fast the accelerator decodes, ours beside Llama's."""

import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from context import Context, one_line
from measures import DRY, FULL, NAMES, Workload, allocated, build, peak_memory, random_ids, ratio, release, timed
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from fanformer.model.recurrence_fanformer import CACHE


class Decoder:
    """Greedy decoding of one batch on a static cache."""

    def __init__(self, model: PreTrainedModel, batch: int, workload: Workload, device: str, compiled: bool) -> None:
        steps = (workload.decode_rounds + 1) * workload.decode_steps
        self.model, self.device, self.compiled = model, device, compiled
        self.prompt = random_ids(model, (batch, workload.prompt_length), device)
        self.cache = StaticCache(config=model.config, max_cache_len=workload.prompt_length + steps)
        # Kept at one address: a captured graph reads its inputs there.
        self.token = torch.zeros((batch, 1), dtype=torch.long, device=device)
        self.position = torch.zeros((batch, 1), dtype=torch.long, device=device)

        def step(token: Tensor, position: Tensor) -> Tensor:
            logits = model(input_ids=token, position_ids=position, use_cache=True, **{CACHE: self.cache}).logits
            return logits.argmax(-1)

        self.step = torch.compile(step, mode="reduce-overhead", dynamic=False) if compiled else step

    @torch.no_grad()
    def prefill(self) -> None:
        """Read the prompt into an empty cache and choose the first new token."""
        self.cache.reset()
        logits = self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1, **{CACHE: self.cache}).logits
        self.token.copy_(logits.argmax(-1))
        self.position.fill_(self.prompt.shape[1])

    @torch.no_grad()
    def decode(self, steps: int) -> None:
        """Choose `steps` more tokens."""
        for _ in range(steps):
            if self.compiled and self.device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            self.token.copy_(self.step(self.token, self.position))
            self.position.add_(1)


def _decode_in_turns(
    models: Mapping[str, PreTrainedModel], batch: int, workload: Workload, device: str, compiled: bool
) -> dict[str, Any]:
    """Time both models at one batch size."""
    figures: dict[str, Any] = {}
    decoders: dict[str, Decoder] = {}
    for name, model in models.items():
        try:
            weights = sum(parameter.nbytes for parameter in model.parameters())
            before = allocated(device)
            decoder = Decoder(model, batch, workload, device, compiled)
            decoder.prefill()
            first_token = statistics.median(timed(decoder.prefill, device) for _ in range(workload.decode_rounds))
            warm_up = timed(partial(decoder.decode, workload.decode_steps), device)
            figures[name] = {
                "first_token_seconds": first_token,
                "warm_up_seconds": warm_up,
                "weights_gib": weights / 2**30,
                **peak_memory(device, before - weights),
            }
            decoders[name] = decoder
        except Exception as error:  # the other model is still worth timing
            figures[name] = {"error": one_line(error)}
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(workload.decode_rounds):
        for name, decoder in decoders.items():
            round_seconds = timed(partial(decoder.decode, workload.decode_steps), device)
            seconds[name].append(round_seconds / workload.decode_steps)
    for name, values in seconds.items():
        median = statistics.median(values)
        figures[name] |= {"seconds_per_token": median, "tokens_per_second": batch / median}
    return figures | ratio(seconds, "tokens_per_second")


def inference(context: Context, compiled: bool) -> dict[str, Any]:
    """Time greedy decoding of both models in turns, and the first token after a prompt: bf16 weights, sdpa.

    Args:
        context: what every part is told.
        compiled: compile the decoding step (on CUDA captured as a graph); the prompt is read uncompiled either way.
    """
    workload = DRY if context.dry_run else FULL
    compiling = compiled and not context.dry_run
    models = {name: build(name, workload).to(context.device, torch.bfloat16).eval() for name in NAMES}
    figures: dict[str, Any] = {"compiled": compiling, "prompt_length": workload.prompt_length}
    slowest = 0.0
    for batch in workload.decode_batches:
        if context.seconds_left < 1.5 * slowest:
            figures[f"batch_{batch}"] = {"skipped": f"{context.seconds_left:.0f} s left"}
            continue
        start = time.perf_counter()
        figures[f"batch_{batch}"] = _decode_in_turns(models, batch, workload, context.device, compiling)
        context.save(figures)
        release()
        slowest = max(slowest, time.perf_counter() - start)
    return figures
