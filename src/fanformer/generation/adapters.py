"""An adapter that PEFT saved, merged into the model that it belongs to."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from fanformer.errors import CheckpointError, import_extra
from fanformer.generation.loading import LoadedModel, load_tokenizer


def with_adapter(loaded: LoadedModel, folder: str | Path) -> LoadedModel:
    """Return a model with an adapter merged into its weights, and the adapter's tokenizer where it has one.

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
    try:
        adapted = peft.PeftModel.from_pretrained(loaded.model, str(place), local_files_only=True)
        model = adapted.merge_and_unload().eval()
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the adapter in {place} does not fit the model ({reason}): name the base that it was trained on."
        ) from error
    tokenizer: PreTrainedTokenizerFast = loaded.tokenizer
    if (place / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(place, model.config.vocab_size)
        for settings in (model.config, model.generation_config):
            settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return LoadedModel(model, tokenizer)
