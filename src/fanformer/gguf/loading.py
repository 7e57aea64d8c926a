"""A GGUF file as a torch model in float32: what its numbers stand for, to measure and to compare with."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerFast

from fanformer.errors import CheckpointError
from fanformer.gguf.architecture import Architecture, open_model
from fanformer.gguf.file import GGUFFile
from fanformer.gguf.parameters import check_parameters
from fanformer.gguf.tokenizer import GGUFTokenizer, special_ids
from fanformer.model import FANformerConfig, FANformerForCausalLM


def read_config(path: str | Path) -> FANformerConfig:
    """Return the configuration of the model in a GGUF file.

    Raises:
        CheckpointError: if the file is not there, damaged, or of another kind.
    """
    file, model = open_model(str(path))
    return _config(file, model)


def read_model(path: str | Path, dtype: torch.dtype | None = None) -> FANformerForCausalLM:
    """Return the dequantized model of a GGUF file, on the CPU, in evaluation mode.

    Args:
        path: the file.
        dtype: of the parameters; None is float32.

    Raises:
        CheckpointError: as `read_config`, or if a weight is not finite.
    """
    file, model = open_model(str(path))
    config = _config(file, model)
    held = check_parameters(config, file)  # before there is memory for what a file claims
    loaded = FANformerForCausalLM(config).eval()
    state = loaded.state_dict()
    with torch.no_grad():
        for item in held:
            state[item.parameter].copy_(torch.from_numpy(file.read_floats(file.tensors[item.name])))
    return loaded.to(dtype or torch.float32)


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file, as `transformers` has it.

    Raises:
        CheckpointError: as `read_config`, or if the tokenizer is damaged.
    """
    file, model = open_model(str(path))
    found = GGUFTokenizer(file, model.vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=found.backend_tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=found.chat_template,
        **found.special_tokens,
    )


def _config(file: GGUFFile, model: Architecture) -> FANformerConfig:
    ids, ends = special_ids(file, model.vocab_size)
    end: Any = ends[0] if len(ends) == 1 else ends or None
    try:
        return FANformerConfig(**vars(model), bos_token_id=ids["bos"], eos_token_id=end, pad_token_id=ids["pad"])
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise CheckpointError(f"{file.path.absolute()}: {reason}") from error
