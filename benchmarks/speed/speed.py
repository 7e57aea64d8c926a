"""What the benchmarks of speed share: the models, the machine's ceilings, and measuring in turns."""

import argparse
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fanformer.comparison.architectures import SMOLLM2_135M, architecture
from fanformer.comparison.ledger import Figure, measured_today, range_of, write_entry
from fanformer.data.packing import IGNORED_LABEL
from fanformer.machine.compiling import compile_options
from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.model.footprint import footprint
from fanformer.training.attention import attend_in_blocks
from fanformer.training.chunked_loss import skip_logits
from fanformer.training.configuration import load_preset
from fanformer.training.environment import keep_freed_memory

RESULTS = Path(__file__).parents[1] / "results"
OURS, TUNED, THEIRS, EQUAL = "fanformer", "fanformer-tuned", "smollm2-135m", "llama-92m"
"""The default model, 92m-tuned, Llama in SmolLM2-135M's shape, and a Llama with as many parameters as ours."""


def build(name: str, **fields: Any) -> PreTrainedModel:
    """Build a model with random weights, always the same; `fields` replace those of its configuration."""
    torch.manual_seed(0)
    if name == OURS:
        return FANformerForCausalLM(FANformerConfig(**{"dropout": 0.0, **fields}))
    if name == TUNED:
        return FANformerForCausalLM(FANformerConfig(**{"dropout": 0.0, **load_preset("92m-tuned").model, **fields}))
    if name == EQUAL:
        vocabulary = {"vocab_size": 49152, "max_position_embeddings": 8192}
        equal = architecture("llama@fanformer").config({**vocabulary, **fields})
        return LlamaForCausalLM(equal)
    return LlamaForCausalLM(LlamaConfig(**{**SMOLLM2_135M, **fields}))


def random_ids(batch: int, length: int) -> Tensor:
    """Return token ids (batch, length), always the same."""
    return torch.randint(49152, (batch, length), generator=torch.Generator().manual_seed(1))


def bytes_a_token(model: PreTrainedModel, context: float) -> float:
    """Return the bytes that decoding a token in float32 reads: weights but a lookup table's, keys and values."""
    measured = footprint(model.config)
    lookup = 0 if model.config.tie_word_embeddings else measured.parts["embedding"]
    return 4 * (measured.total - lookup) + measured.cache_bytes_per_token["float32"] * context


def ceilings() -> dict[str, float]:
    """Measure what bounds everything on this machine: a large float32 product, and reading memory."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    memory = torch.randn(2**27)
    product = min(seconds_of(lambda: left @ right) for _ in range(9))
    read = min(seconds_of(memory.sum) for _ in range(5))
    return {"product_gflops": 2 * 2048**3 / product / 1e9, "read_gb_per_second": memory.nbytes / read / 1e9}


def seconds_of(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turns(functions: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Return the seconds of each function's calls, which take turns after `warm_up` calls that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warm_up + rounds):
        for name, function in functions.items():
            took = seconds_of(function)
            if turn >= warm_up:
                seconds[name].append(took)
    return seconds


def times_faster(seconds: Mapping[str, Sequence[float]], ours: str, theirs: str) -> Figure:
    """Return how many times as fast ours is, from calls that followed each other."""
    return range_of([b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)], "times")


class Trainee:
    """A model that takes training steps as a run does: AdamW, float32, each block and the loss compiled by itself."""

    def __init__(
        self, model: PreTrainedModel, *, compiled: bool = True, blocks: bool = True, loss: bool = True
    ) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
        options = compile_options("cpu", torch.get_num_threads())
        skip_logits(model, {"options": options} if compiled and loss else None)
        if compiled and blocks:
            attend_in_blocks(model)
        if compiled:
            for layer in model.model.layers:
                layer.compile(fullgraph=True, dynamic=False, options=options)

    def step(self, **batch: Tensor) -> None:
        """Take one step; `labels` are shifted here where `shift_labels` are not given."""
        following = batch.pop("shift_labels", None)
        if following is None:
            following = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)
        counted = int((following != IGNORED_LABEL).sum())
        self.model(**batch, shift_labels=following, num_items_in_batch=counted, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def kind_of(name: str, kinds: Mapping[str, Sequence[str]]) -> str:
    """Return the first of `kinds` of which a word is in the name of an operator or a kernel, or "other"."""
    return next((kind for kind, words in kinds.items() if any(word in name for word in words)), "other")


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope of log time over log size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def arguments_of(text: str, **defaults: Any) -> argparse.Namespace:
    """Read a benchmark's arguments, --threads and --write beside its own, and set this process up."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        several = isinstance(default, tuple)
        kind = type(default[0] if several else default)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            nargs="+" if several else None,
            default=list(default) if several else default,
            help=f"default {' '.join(map(str, default)) if several else default}",
        )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default torch's")
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    parser.add_argument("--part", help="what is measured of it: the entry is then NAME-PART-DATE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    return arguments


def release() -> None:
    """Give compiled code and memory back, so that what follows starts afresh."""
    torch.compiler.reset()
    gc.collect()


def finish(
    name: str,
    what: str,
    arguments: argparse.Namespace,
    result: Mapping[str, Figure],
    details: Mapping[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    scale: str | None = "92m",
) -> None:
    """Print the figures, and write them to the ledger where that is asked for."""
    for key, figure in result.items():
        spread = "" if figure.low is None else f" ({figure.low:.4g} to {figure.high:.4g})"
        print(f"{key.replace('_', ' ')}: {figure.value:.4g} {figure.unit}{spread}")
    print(f"load {os.getloadavg()[0]:.1f}")
    if not arguments.write:
        return
    name = f"{name}-{arguments.part}" if arguments.part else name
    entry = measured_today(
        f"{name}-{{date}}",
        what=what,
        seeds=[0],
        configuration={"scale": scale}
        | {key: value for key, value in vars(arguments).items() if key not in ("write", "part")},
        data=data,
        result=dict(result),
        details={"load": os.getloadavg()[0], **(details or {})},
    )
    print(f"written to {write_entry(RESULTS, entry)}")
