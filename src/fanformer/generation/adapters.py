"""An adapter that PEFT saved, merged into the model that it belongs to."""

import sys
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast

from fanformer.data.conversations.chat_tokens import add_chat_tokens
from fanformer.errors import CheckpointError, ConfigError, import_extra
from fanformer.generation.loading import LoadedModel, load_tokenizer


def with_adapter(loaded: LoadedModel, folder: str | Path) -> LoadedModel:
    """Return a model with an adapter merged into its weights, and the adapter's tokenizer where it has one.

    Where that has tokens for conversations that the model has no rows for, the model grows as it did in training.

    Args:
        loaded: the base; its model is changed.
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
        model = adapted.merge_and_unload().eval()
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise _misfit(place, reason) from error
    if reason is not None:
        raise _misfit(place, reason)
    if tokenizer is not loaded.tokenizer:
        for settings in (model.config, model.generation_config):
            settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
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
