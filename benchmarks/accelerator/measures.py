"""What accelerator.py measures: the machine, its ceilings and training steps, ours beside Llama's."""

import gc
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from context import REPOSITORY, Context, one_line
from roofline import roofline_seconds
from speed import kind_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fanformer.comparison.architectures import SMOLLM2_135M
from fanformer.data.packing import IGNORED_LABEL
from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.model.footprint import OPERATIONS, footprint
from fanformer.training.attention import choose_attention, document_bounds
from fanformer.training.chunked_loss import skip_logits


@dataclass(frozen=True)
class Workload:
    """The sizes of everything that is measured."""

    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]
    batch: int
    length: int
    blocks: int
    """Blocks of steps per model; the two models take turns, block by block."""
    block_steps: int
    warm_up_steps: int
    decode_batches: tuple[int, ...]
    prompt_length: int
    decode_rounds: int
    decode_steps: int
    product_size: int
    copy_bytes: int


FULL = Workload(
    ours={"dropout": 0.0},
    theirs=SMOLLM2_135M,
    batch=16,
    length=1024,
    blocks=10,
    block_steps=10,
    warm_up_steps=5,
    decode_batches=(1, 8, 64),
    prompt_length=512,
    decode_rounds=5,
    decode_steps=32,
    product_size=8192,
    copy_bytes=2**31,
)
"""`92m` beside SmolLM2-135M's shape, 100 steps each."""

_TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
DRY = Workload(
    ours={**_TINY, "dropout": 0.0},
    theirs=_TINY,
    batch=2,
    length=32,
    blocks=2,
    block_steps=1,
    warm_up_steps=1,
    decode_batches=(1, 2),
    prompt_length=8,
    decode_rounds=2,
    decode_steps=2,
    product_size=256,
    copy_bytes=2**20,
)

NAMES = ("fanformer", "llama")


def build(name: str, workload: Workload) -> PreTrainedModel:
    """Build one of the two models with random weights, always the same."""
    torch.manual_seed(0)
    if name == "fanformer":
        return FANformerForCausalLM(FANformerConfig(**workload.ours))
    return LlamaForCausalLM(LlamaConfig(**workload.theirs))


def random_ids(model: PreTrainedModel, shape: tuple[int, ...], device: str) -> Tensor:
    """Return token ids of `model`, always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(device)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], object], device: str) -> float:
    """Return the seconds that a call takes on the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def allocated(device: str) -> int:
    """Return the bytes that tensors hold on the device, and start the search for the peak anew; 0 on the CPU."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(device: str, before: int) -> dict[str, float]:
    """Return what the peak added to the `before` of `allocated`, in GiB; nothing on the CPU, which keeps no count."""
    return {"peak_memory_gib": (torch.cuda.max_memory_allocated() - before) / 2**30} if device == "cuda" else {}


def release() -> None:
    """Give compiled code and memory back, so that what follows starts afresh."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _answer(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    return finished.stdout.strip() if finished.returncode == 0 else None


def machine(context: Context) -> dict[str, Any]:
    """Return what the figures were measured on and with."""
    changes = _answer("git", "status", "--porcelain", "--untracked-files=no")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "commit": _answer("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(changes),
    }
    if context.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def ceilings(context: Context) -> dict[str, Any]:
    """Measure the two rates that bound everything: a large bf16 matrix product and a large copy."""
    workload = DRY if context.dry_run else FULL
    device, size, repeats = context.device, workload.product_size, 5
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    source = torch.randn(workload.copy_bytes // 4, device=device)
    target = torch.empty_like(source)

    def products() -> None:
        for _ in range(repeats):
            torch.mm(left, right, out=out)

    def copies() -> None:
        for _ in range(repeats):
            target.copy_(source)

    seconds = {}
    for name, function in (("product", products), ("copy", copies)):
        timed(function, device)  # libraries load and choose their kernels
        seconds[name] = statistics.median(timed(function, device) for _ in range(9)) / repeats
    return {
        "product_shape": [size, size, size],
        "bf16_product_tflops": 2 * size**3 / seconds["product"] / 1e12,
        "copied_bytes": workload.copy_bytes,
        "bandwidth_gb_per_second": 2 * workload.copy_bytes / seconds["copy"] / 1e9,  # read and written
    }


class Trainee:
    """A model with its optimizer, ready to be stepped and timed."""

    def __init__(
        self,
        model: PreTrainedModel,
        workload: Workload,
        device: str,
        whole: bool | None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self.inputs = inputs or {}
        self.model, self.device = model.to(device).train(), device
        skip_logits(model, None if whole is None else {"dynamic": False})  # as a run does
        self.batches = random_ids(model, (8, workload.batch, workload.length), device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
        if whole:
            model.compile(dynamic=False)
        elif whole is not None:
            for layer in model.model.layers:
                layer.compile(fullgraph=True, dynamic=False)
        self.loss = torch.zeros(())
        self.steps = 0

    def train(self, steps: int) -> None:
        """Take optimizer steps over the batches, one after another and again from the start."""
        for _ in range(steps):
            ids = self.batches[self.steps % len(self.batches)]
            following = F.pad(ids[:, 1:], (0, 1), value=IGNORED_LABEL)
            with torch.autocast(self.device, torch.bfloat16):
                self.loss = self.model(
                    input_ids=ids,
                    labels=following,
                    shift_labels=following,
                    num_items_in_batch=ids.shape[0] * (ids.shape[1] - 1),
                    use_cache=False,
                    **self.inputs,
                ).loss
            self.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.steps += 1


def _ready(name: str, context: Context, workload: Workload, whole: bool) -> tuple[Trainee, dict[str, Any]]:
    before = allocated(context.device)
    model = build(name, workload)
    trainee = Trainee(model, workload, context.device, None if context.dry_run else whole)
    warm_up = timed(partial(trainee.train, workload.warm_up_steps), context.device)
    first_loss = trainee.loss.item()
    allocated(context.device)  # compiling may have taken more than a step does
    trainee.train(1)
    flops = 3 * footprint(model.config).forward_operations_at(workload.length)
    return trainee, {
        "parameters": model.num_parameters(),
        "flops_per_token": flops,
        "warm_up_seconds": warm_up,
        "loss_after_warm_up": first_loss,
        **peak_memory(context.device, before),
    }


KERNELS = {
    "attention": ("flash", "fmha", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "xmma"),
    "optimizer": ("multi_tensor", "adam"),
    "fused by the compiler": ("triton",),
    "copies": ("memcpy", "memset"),
}
"""Words in the names of kernels that tell what they do; the first that fits counts."""


def kernels(trainee: Trainee, steps: int = 3) -> dict[str, Any]:
    """Return where the device's time of a training step goes: seconds by kind, and each of the longest kernels.

    On the CPU, for the dry run, the time of operators.
    """
    cuda = trainee.device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    trainee.train(1)
    synchronize(trainee.device)
    with torch.profiler.profile(activities=activities) as profiler:
        trainee.train(steps)
        synchronize(trainee.device)
    found = {
        event.key: (
            (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 / steps,
            event.count / steps,
        )
        for event in profiler.key_averages()
    }
    by_kind: dict[str, float] = {}
    for name, (seconds, _) in found.items():
        kind = kind_of(name.lower(), KERNELS)
        by_kind[kind] = by_kind.get(kind, 0.0) + seconds
    longest = sorted(found, key=lambda name: -found[name][0])[:40]
    calls = {"calls": sum(count for _, count in found.values())}
    return calls | {"seconds_by_kind": by_kind, "longest": [[*found[name], name[:160]] for name in longest]}


def training(context: Context, whole: bool) -> dict[str, Any]:
    """Time training steps of both models in turns: bf16 autocast, fused AdamW, sdpa, the same loss, random tokens.

    Args:
        context: what every part is told.
        whole: compile the model as a whole; else each decoder layer by itself, head and loss not at all.
    """
    workload = DRY if context.dry_run else FULL
    figures: dict[str, Any] = {
        "compiled": "no (dry run)" if context.dry_run else "whole model" if whole else "each layer",
        "batch": [workload.batch, workload.length],
        "flops_formula": OPERATIONS,
    }
    trainees: dict[str, Trainee] = {}
    for name in NAMES:
        try:
            trainees[name], figures[name] = _ready(name, context, workload, whole)
        except Exception as error:  # the other model is still worth timing
            figures[name] = {"error": one_line(error)}
        context.save(figures)
        gc.collect()
    seconds = _in_turns(trainees, workload, context)
    limits = context.earlier.get("ceilings", {})
    peak = limits.get("bf16_product_tflops")
    for name, trainee in trainees.items():
        figures[name] |= _rates(seconds[name], figures[name]["flops_per_token"], workload, peak)
        if "bandwidth_gb_per_second" in limits:
            rates = limits["bf16_product_tflops"] * 1e12, limits["bandwidth_gb_per_second"] * 1e9
            figures[name]["roofline_seconds"] = roofline_seconds(trainee.model, *figures["batch"], *rates)
        figures[name] |= {"timed_steps": len(seconds[name]) * workload.block_steps, "last_loss": trainee.loss.item()}
    context.save(figures)
    for name, trainee in trainees.items():
        figures[name]["kernels"] = kernels(trainee)
    trainees.clear()
    release()
    return figures | ratio(seconds, "tokens_per_second")


def _in_turns(trainees: Mapping[str, Trainee], workload: Workload, context: Context) -> dict[str, list[float]]:
    """Return the seconds per step of every block; the trainees take turns, as long as there is time."""
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    longest = 0.0
    for _ in range(workload.blocks):
        if context.seconds_left < 2 * longest * len(trainees) + 5:
            break
        for name, trainee in trainees.items():
            block = timed(partial(trainee.train, workload.block_steps), context.device)
            seconds[name].append(block / workload.block_steps)
            longest = max(longest, block)
    return seconds


def packed_positions(batch: int, length: int, device: str) -> Tensor:
    """Return the positions (batch, length) of rows full of documents, a quarter of a row each on average."""
    generator = torch.Generator().manual_seed(2)
    starts = torch.rand(batch, length, generator=generator) < 4 / length
    starts[:, 0] = True
    index = torch.arange(length).expand(batch, length)
    return (index - index.where(starts, 0).cummax(-1).values).to(device)


def packing(context: Context) -> dict[str, Any]:
    """Time training steps of our model on packed rows by each attention that a run can take, in turns."""
    workload = DRY if context.dry_run else FULL
    device: str = context.device
    figures: dict[str, Any] = {}
    positions = packed_positions(workload.batch, workload.length, device)
    trainees: dict[str, Trainee] = {}
    for wanted in ("sdpa",) if context.dry_run else ("sdpa", "varlen", "flex_attention"):
        try:
            model = build(NAMES[0], workload)
            choose_attention(model, wanted, device, "bfloat16", compiled=True)
            bounds = document_bounds(model, positions)
            inputs = {"position_ids": positions, **bounds}
            trainee = Trainee(model, workload, device, None if context.dry_run else False, inputs)
            figures[wanted] = {"warm_up_seconds": timed(partial(trainee.train, workload.warm_up_steps), device)}
            trainees[wanted] = trainee
        except Exception as error:  # the others are still worth timing
            figures[wanted] = {"error": one_line(error)}
        context.save(figures)
    seconds = _in_turns(trainees, workload, context)
    tokens = workload.batch * workload.length
    for wanted, values in seconds.items():
        if not values:
            continue
        figures[wanted] |= {"seconds_per_step": values, "tokens_per_second": tokens / statistics.median(values)}
        if wanted != "sdpa" and "sdpa" in seconds:
            ratios = [a / b for a, b in zip(seconds["sdpa"], values, strict=True)]
            figures[wanted]["times_sdpa"] = [statistics.median(ratios), min(ratios), max(ratios)]
    trainees.clear()
    release()
    return figures


def _rates(seconds: list[float], flops: int, workload: Workload, peak: float | None) -> dict[str, float]:
    """Return the rates that follow from the seconds per step of each block."""
    if not seconds:
        return {}
    median = statistics.median(seconds)
    tokens = workload.batch * workload.length / median
    rates = {
        "seconds_per_step": median,
        "fastest_block": min(seconds),
        "slowest_block": max(seconds),
        "iterations_per_second": 1 / median,
        "tokens_per_second": tokens,
        "model_tflops": tokens * flops / 1e12,
    }
    return rates | ({"utilisation": rates["model_tflops"] / peak} if peak else {})


def ratio(seconds: Mapping[str, list[float]], of_what: str) -> dict[str, Any]:
    """Return ours / theirs of a rate, as the median over blocks that ran one after the other, and its range."""
    ratios = [theirs / ours for ours, theirs in zip(*(seconds.get(name, []) for name in NAMES), strict=False)]
    if not ratios:
        return {}
    spread = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {f"ratio_of_{of_what}": spread}
