"""Low-rank adapters (LoRA, arXiv:2106.09685, by PEFT) in every linear layer of the blocks, beside a base that rests."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fanformer.errors import import_extra
from fanformer.generation.adapters import BASE_KEY, base_digest, check_base

_WEIGHTS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_ALPHA_OVER_RANK = 2
_OF_PEFT = (".lora_A.", ".lora_B.", ".trainable_tokens_", ".token_indices")
"""What the names of an adapter's tensors contain."""


def add_adapter(model: PreTrainedModel, rank: int, new_ids: Sequence[int], seed: int) -> None:
    """Put adapters into a model in place; they, and the rows of new tokens, are all that learns from then on.

    Args:
        model: a causal language model.
        rank: of each adapter.
        new_ids: tokens whose rows in the embedding and in the LM head learn too.
        seed: of the adapters' first factors; the second ones begin at 0.

    Raises:
        DependencyError: if the extra `lora` is not installed.
    """
    peft = import_extra("peft", "LoRA", "lora")
    rows = None
    if new_ids:
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        matrices = [model.get_input_embeddings(), *([] if tied else [model.get_output_embeddings()])]
        names = {id(module): name.split(".")[-1] for name, module in model.named_modules()}
        rows = {names[id(module)]: list(new_ids) for module in matrices}
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=_ALPHA_OVER_RANK * rank,
        target_modules="all-linear",
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(settings, model)


def save_adapter(model: nn.Module, tensors: dict[str, Tensor], base: str, folder: Path) -> None:
    """Write an adapter as PEFT reads it.

    Args:
        model: that has it.
        tensors: the model's, as they are to be saved.
        base: folder of the model that it belongs to.
        folder: is made.
    """
    peft = import_extra("peft", "LoRA", "lora")
    folder.mkdir()
    own = peft.get_peft_model_state_dict(model, state_dict=tensors)
    layers = [name.split(".lora_A.")[0] for name in tensors if ".lora_A." in name]
    digest = base_digest({layer: tensors[f"{layer}.base_layer.weight"] for layer in layers})
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in own.items()},
        folder / _WEIGHTS,
        metadata={"format": "pt", BASE_KEY: digest},
    )
    settings = model.peft_config["default"].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    content = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    (folder / _SETTINGS).write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def restore_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put the numbers of a saved adapter into those of a model.

    Raises:
        CheckpointError: if the base has other weights than the adapter was trained beside.
    """
    check_base(model, folder)
    peft = import_extra("peft", "LoRA", "lora")
    saved = {name.removeprefix("base_model.model."): value for name, value in load_file(folder / _WEIGHTS).items()}
    peft.set_peft_model_state_dict(model, saved)


def merged(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the model that computes the same without adapters, under the names of the base.

    Args:
        model: with adapters.
        tensors: its own, as they are to be saved.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not any(part in name for part in _OF_PEFT):
            for part in (".base_layer", ".original_module", ".token_adapter"):
                name = name.replace(part, "")
            found[name] = tensor
    settings = model.peft_config["default"]
    for name, tensor in tensors.items():
        layer = name.split(".lora_A.")[0]
        if layer != name:
            second = tensors[name.replace(".lora_A.", ".lora_B.")]
            change = (second.float() @ tensor.float()) * (settings.lora_alpha / settings.r)
            if model.get_submodule(layer).fan_in_fan_out:  # GPT-2's weights stand the other way round
                change = change.t()
            found[f"{layer}.weight"] = (found[f"{layer}.weight"].float() + change).to(tensor.dtype)
        layer = name.split(".token_adapter.trainable_tokens_delta")[0]
        if layer != name:
            ids = torch.tensor(settings.trainable_token_indices[layer.split(".")[-1]])
            found[f"{layer}.weight"] = found[f"{layer}.weight"].index_copy(0, ids, tensor)
    return found
