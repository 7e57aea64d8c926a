"""An adapter that PEFT saved, merged into the model that it belongs to."""

import hashlib
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fanformer.data.conversations.chat_tokens import add_chat_tokens, set_ends
from fanformer.errors import CheckpointError, ConfigError, import_extra
from fanformer.generation.loading import LoadedModel, load_tokenizer

BASE_KEY = "fanformer_base"
"""Of the metadata of an adapter's tensors: the digest of the weights that it was trained beside."""
_SAMPLED = 64
"""Numbers of each matrix that a digest is made of; another training changes them all."""


def base_digest(matrices: Mapping[str, Tensor]) -> str:
    """Return what tells the weights of a base, read as float32, from others.

    Args:
        matrices: of the layers that have adapters, by name.
    """
    some = [matrices[name].detach().flatten() for name in sorted(matrices)]
    drawn = torch.cat([values[:: max(1, len(values) // _SAMPLED)].float().cpu() for values in some])
    return hashlib.blake2b(drawn.numpy().tobytes(), digest_size=8).hexdigest()


def check_base(model: PreTrainedModel, place: Path) -> None:
    """Refuse an adapter whose base had other weights; one that does not say which is taken.

    Args:
        model: the base in float32, with or without adapters beside its weights.
        place: folder of the adapter.

    Raises:
        CheckpointError: if its base was another training, or has the adapter already.
    """
    with safe_open(place / "adapter_model.safetensors", framework="pt") as saved:
        expected, names = (saved.metadata() or {}).get(BASE_KEY), set(saved.keys())
    if expected is None:
        return
    layers = {name.split(".lora_A.")[0].removeprefix("base_model.model.") for name in names if ".lora_A." in name}
    modules = {name: model.get_submodule(name) for name in layers}
    if base_digest({name: getattr(one, "base_layer", one).weight for name, one in modules.items()}) != expected:
        raise CheckpointError(
            f"the adapter in {place} was trained beside other weights than the model's: name the folder that it was "
            "trained on, as it was then; a tuned folder has its adapter merged already."
        )


def with_adapter(loaded: LoadedModel, folder: str | Path) -> LoadedModel:
    """Return a model with an adapter merged into its weights, and the adapter's tokenizer where it has one.

    Where that has tokens for conversations that the model has no rows for, the model grows as it did in training.

    Args:
        loaded: the base, in float32; its model is changed.
        folder: adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: if there is no adapter, or it does not fit the base.
        DependencyError: if the extra `lora` is not installed.
    """
    place = Path(folder).expanduser().absolute()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (place / name).is_file():
            raise CheckpointError(f"no {name} in {place}: expected an adapter as PEFT saves it.")
    peft = import_extra("peft", "--adapter", "lora")
    tokenizer: PreTrainedTokenizerFast = loaded.tokenizer
    if (place / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(place, sys.maxsize)
        _make_room(loaded, tokenizer, place)
    try:
        with warnings.catch_warnings(action="ignore"):  # of keys that are missing, which is refused below
            adapted = peft.PeftModel.from_pretrained(loaded.model, str(place), local_files_only=True)
        wanted = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)  # whether it grew or not
        reason = _unlike(set(wanted), place / "adapter_model.safetensors")
        if reason is None:
            check_base(loaded.model, place)
            model = adapted.merge_and_unload().eval()
    except CheckpointError:
        raise
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise _misfit(place, reason) from error
    if reason is not None:
        raise _misfit(place, reason)
    if tokenizer is not loaded.tokenizer:
        set_ends(model, tokenizer)
    return LoadedModel(model, tokenizer)


def _make_room(loaded: LoadedModel, tokenizer: PreTrainedTokenizerFast, place: Path) -> None:
    """Give a model rows for the tokens of an adapter's tokenizer, where it has too few.

    Raises:
        CheckpointError: if the adapter's tokens are not those that the model would have got.
    """
    ids = tokenizer.get_vocab()
    if max(ids.values()) < loaded.model.config.vocab_size:
        return
    try:
        own = add_chat_tokens(loaded.model, loaded.tokenizer, grow=True).tokenizer.get_vocab()
    except ConfigError as error:
        raise _misfit(place, str(error)) from error
    if own != ids:
        raise _misfit(place, f"its tokenizer has {len(ids)} tokens, other ones than the model's {len(own)}")


def adapter_note(folder: str) -> str:
    """Return what a report says of the adapter that was merged."""
    return f"the adapter {folder} is merged into the weights"


def _unlike(wanted: set[str], file: Path) -> str | None:
    """Return what sets the tensors of an adapter's file apart from those that the model takes, None if nothing does."""
    with safe_open(file, framework="pt") as saved:
        found = set(saved.keys())
    if found == wanted:
        return None
    name = min(found ^ wanted)
    return f"`{name}` is {'missing' if name in wanted else 'not in the model'}, {len(found ^ wanted)} such tensors"


def _misfit(place: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the adapter in {place} does not fit the model ({reason}): name the base that it was trained on."
    )
