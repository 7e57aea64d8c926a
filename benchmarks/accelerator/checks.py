"""What accelerator.py proves: the device computes what the CPU does, and every fast path what the slow one does.

Models are small, in float32 unless said otherwise; biases, gates, norms and the matrices that end a branch are moved
off their initial values, so that everything matters.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from context import Context, one_line
from measures import release
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.model.configuration_fanformer import RANKS
from fanformer.training.attention import choose_attention, document_bounds

# Distances are |out - reference| / |reference| over all elements. Float32 sums in another order move logits by about
# 1e-6; a tf32 product would move them by 3e-4, and must not pass. Gradients of gates and biases are sums that cancel.
LOGITS, GRADIENT, BFLOAT16, EXACT = 1e-4, 1e-3, 5e-2, 0.0
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"fan_placement": "layer", **dict.fromkeys(RANKS), "norm_placement": "pre", "qkv_norm": "none"},
    {"fan_placement": "none", "norm_placement": "hybrid", "gated_residual": False, "tie_word_embeddings": True},
)
DOCUMENTS = (37, 64, 1, 26)
"""Lengths of the documents of a packed row."""


def small_model(device: str, attention: str = "sdpa", **fields: Any) -> FANformerForCausalLM:
    """Build a small model, its weights the same on every device."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "dropout": 0.0,
        "qkv_rank": 88,
        "o_rank": 64,
        "gate_up_rank": 56,
        "down_rank": 80,
    }
    model = FANformerForCausalLM(FANformerConfig(**{**sizes, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif not parameter.any():
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        model.lm_head.weight.mul_(10)  # so that greedy text does not repeat one token
    model.set_attn_implementation(attention)
    return model.to(device)


def token_ids(device: str, *shape: int) -> Tensor:
    """Return token ids below 512, the same on every device."""
    return torch.randint(512, shape, generator=torch.Generator().manual_seed(1)).to(device)


def distance(out: Tensor, reference: Tensor) -> float:
    """Return |out - reference| / |reference|, in float64 on the CPU; NaN where either has one."""
    out, reference = out.detach().double().cpu(), reference.detach().double().cpu()
    return ((out - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def gradients(model: FANformerForCausalLM, logits: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a fixed weighted sum of `logits` for every parameter."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    model.zero_grad(set_to_none=True)
    (logits * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def worst(out: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Return the largest distance of any parameter's gradient, NaN if any is NaN."""
    return torch.tensor([distance(out[name], reference[name]) for name in reference]).max().item()


def logits_equal_the_cpus(device: str, **fields: Any) -> float:
    """Compare logits on the device and on the CPU."""
    ids = token_ids("cpu", 2, 127)
    with torch.no_grad():
        return distance(small_model(device, **fields)(ids.to(device)).logits, small_model("cpu", **fields)(ids).logits)


def gradients_equal_the_cpus(device: str, **fields: Any) -> float:
    """Compare gradients on the device and on the CPU."""
    ours, theirs, ids = small_model(device, **fields), small_model("cpu", **fields), token_ids("cpu", 2, 127)
    return worst(gradients(ours, ours(ids.to(device)).logits), gradients(theirs, theirs(ids).logits))


def bfloat16_is_close_to_float32(device: str) -> float:
    """Compare bfloat16 weights with float32 ones."""
    ids = token_ids(device, 2, 127)
    with torch.no_grad():
        return distance(small_model(device).bfloat16()(ids).logits, small_model(device)(ids).logits)


def cached_text_equals_uncached(device: str, cache: str) -> float:
    """Count tokens of greedy text that differ between decoding on a cache and reading everything anew."""
    model, ids = small_model(device), token_ids(device, 2, 33)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, cache_implementation=cache, disable_compile=True, **options)
    return float((cached != model.generate(ids, use_cache=False, **options)).sum())


def padded_rows_equal_single_rows(device: str) -> float:
    """Compare rows of one left-padded batch, logits and gradients, with the same rows alone."""
    model, rows = small_model(device), [token_ids(device, length) for length in (40, 23, 1)]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    single = torch.cat([model(row[None]).logits[0] for row in rows])
    return max(distance(padded, single), worst(gradients(model, padded), gradients(model, single)))


def packed_documents_equal_separate_ones(device: str, attention: str) -> float:
    """Compare documents packed in one row, logits and gradients, with the same documents alone under sdpa."""
    model, reference = small_model(device, attention), small_model(device)
    ids = token_ids(device, 1, sum(DOCUMENTS))
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None].to(device)
    packed = model(ids, position_ids=positions, use_cache=False).logits[0]
    separate = torch.cat([reference(document).logits[0] for document in ids.split(DOCUMENTS, dim=1)])
    return max(distance(packed, separate), worst(gradients(model, packed), gradients(reference, separate)))


def varlen_attention_equals_sdpa(device: str) -> float:
    """Compare attention by the documents' bounds with attention by their mask, logits and gradients, in bfloat16."""
    ours, theirs = small_model(device), small_model(device)
    choose_attention(ours, "varlen", device, "bfloat16", compiled=False)
    ids = token_ids(device, 1, sum(DOCUMENTS))
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None].to(device)
    with torch.autocast(device, torch.bfloat16):
        bounds = document_bounds(ours, positions)
        left = ours(ids, position_ids=positions, use_cache=False, **bounds).logits
        right = theirs(ids, position_ids=positions, use_cache=False).logits
    return max(distance(left, right), worst(gradients(ours, left), gradients(theirs, right)))


def sdpa_equals_eager_attention(device: str) -> float:
    """Compare the fused attention, logits and gradients, with the one spelt out."""
    ours, theirs, ids = small_model(device), small_model(device, "eager"), token_ids(device, 2, 127)
    left, right = ours(ids).logits, theirs(ids).logits
    return max(distance(left, right), worst(gradients(ours, left), gradients(theirs, right)))


def compiled_equals_eager(device: str, whole: bool, compiling: bool) -> float:
    """Compare compiled code, logits and gradients, with the same model uncompiled."""
    ours, theirs, ids = small_model(device), small_model(device), token_ids(device, 2, 127)
    if compiling:
        for module in [ours] if whole else ours.model.layers:
            module.compile(fullgraph=True, dynamic=False)
    left, right = ours(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits
    return max(distance(left, right), worst(gradients(ours, left), gradients(theirs, right)))


def resumed_training_equals_uninterrupted(device: str, precision: str) -> float:
    """Count the tensors of weights and optimizer whose bits differ between a run and one resumed in its middle."""
    from fanformer.training.configuration import resolve
    from fanformer.training.run import train

    model = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32, "dropout": 0.1}
    steps, different = 8, 0
    with tempfile.TemporaryDirectory() as place:
        folder, text = Path(place), Path(place) / "text.txt"
        text.write_text("\n".join(f"line {number} of {number * number} in all, and so on" for number in range(2000)))
        fields: dict[str, Any] = {
            "data": str(text), "vocab_size": 320, "sequence_length": 128, "batch_size": 4, "max_steps": steps,
            "save_steps": steps // 2, "eval_tokens": 256, "keep_last": 2, "device": device, "precision": precision,
            "compile": "off", **{f"model.{name}": value for name, value in model.items()},
        }  # fmt: skip
        for name in ("straight", "resumed"):
            train(resolve("nano", overrides={**fields, "output_dir": str(folder / name)}))
        shutil.rmtree(folder / "resumed" / f"checkpoint-{steps}")
        train(resolve("nano", overrides={**fields, "output_dir": str(folder / "resumed"), "resume": True}))
        for file in ("model.safetensors", "optimizer.safetensors"):
            one, two = (load_file(folder / name / f"checkpoint-{steps}" / file) for name in ("straight", "resumed"))
            different += sum(not torch.equal(one[name], two[name]) for name in one)
    torch.use_deterministic_algorithms(False)
    return float(different)


def planned(context: Context) -> Iterable[tuple[str, float, Callable[[], float]]]:
    """Return every check: its name, its tolerance, and the function that returns the distance."""
    device, compiling = context.device, not context.dry_run
    for fields in VARIANTS:
        variant = "_".join(str(value) for value in fields.values()) or "default"
        yield f"logits_equal_the_cpus.{variant}", LOGITS, partial(logits_equal_the_cpus, device, **fields)
        yield f"gradients_equal_the_cpus.{variant}", GRADIENT, partial(gradients_equal_the_cpus, device, **fields)
    yield "bfloat16_is_close_to_float32", BFLOAT16, partial(bfloat16_is_close_to_float32, device)
    for cache in ("dynamic", "static"):
        name = f"cached_text_equals_uncached.{cache}"
        yield name, EXACT, partial(cached_text_equals_uncached, device, cache)
    yield "padded_rows_equal_single_rows", GRADIENT, partial(padded_rows_equal_single_rows, device)
    yield "sdpa_equals_eager_attention", GRADIENT, partial(sdpa_equals_eager_attention, device)
    for attention in ("sdpa", "eager") + (("flex_attention",) if device == "cuda" else ()):  # flex: no CPU backward
        name = f"packed_documents_equal_separate_ones.{attention}"
        yield name, GRADIENT, partial(packed_documents_equal_separate_ones, device, attention)
    if device == "cuda":
        yield "varlen_attention_equals_sdpa", BFLOAT16, partial(varlen_attention_equals_sdpa, device)
    for precision in ("float32", "bfloat16"):
        name = f"resumed_training_equals_uninterrupted.{precision}"
        yield name, EXACT, partial(resumed_training_equals_uninterrupted, device, precision)
    for whole in (False, True):
        name = f"compiled_equals_eager.{'whole' if whole else 'each_layer'}"
        yield name, GRADIENT, partial(compiled_equals_eager, device, whole, compiling)


def checks(context: Context) -> dict[str, Any]:
    """Run every check; one that fails, or dies, leaves the others to run."""
    torch.set_float32_matmul_precision("highest")
    figures: dict[str, Any] = {"compiled": not context.dry_run}
    for name, tolerance, function in planned(context):
        if context.seconds_left < 5:
            figures[name] = {"skipped": f"{max(context.seconds_left, 0):.0f} s left"}
            continue
        try:
            value = function()
            figures[name] = {"ok": value <= tolerance, "tolerance": tolerance}
            figures[name]["distance"] = value if value == value else "nan"
        except Exception as error:  # the other checks still say something
            figures[name] = {"ok": False, "error": one_line(error)}
        context.save(figures)
        if figures["compiled"]:
            release()
    return figures
