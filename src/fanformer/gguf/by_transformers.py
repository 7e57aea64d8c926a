"""Teaches `transformers` our GGUF files: `from_pretrained(folder, gguf_file=...)` for model, configuration, tokenizer.

`transformers` keeps a dictionary for each of the three, which we add to. They are no documented interface: the test of
this file says which versions have them in this form.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import transformers

import fanformer.model  # noqa: F401  registers the Auto classes
from fanformer.errors import CheckpointError, DependencyError
from fanformer.gguf.architecture import Architecture
from fanformer.gguf.file import ARCHITECTURE
from fanformer.gguf.parameters import parameters
from fanformer.gguf.tokenizer import END_IDS, PIPELINE, WHOLE, put_together

_WHOLE_NAME, _PIPELINE_NAME = "tokenizer_json", "fanformer_pipeline"


def register_gguf() -> None:
    """Let `from_pretrained(folder, gguf_file=NAME)` of the Auto classes read our files; calling it again is harmless.

    The model gets the numbers that the file's stand for; the tokenizer gives the ids of the folder's.

    Raises:
        DependencyError: if this version of `transformers` has no such dictionaries.
    """
    try:
        from transformers.integrations.gguf import GGUF_ARCHS, GGUF_CONFIG_ARCHS, GGUF_TOKENIZER_MAPPING
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_TYPES
    except ImportError as error:
        raise DependencyError(
            f"transformers {transformers.__version__} reads GGUF files of fixed architectures only: pip install "
            "'transformers>=5.23', or load the file with fanformer.loading.load."
        ) from error
    GGUF_ARCHS[ARCHITECTURE] = _renamings
    GGUF_CONFIG_ARCHS[ARCHITECTURE] = _config
    for key, name in ((WHOLE, _WHOLE_NAME), (PIPELINE, _PIPELINE_NAME)):
        GGUF_TOKENIZER_MAPPING["tokenizer"][key.removeprefix("tokenizer.")] = name
    known = GGUF_TOKENIZER_TYPES["gpt2"]
    if not isinstance(known, _ByteLevel):
        GGUF_TOKENIZER_TYPES["gpt2"] = _ByteLevel(known)


def _config(metadata: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return config.json for a file's metadata."""
    name = metadata.get("general.name", "this GGUF file")
    # what `transformers` has read stands for the file
    read: Any = SimpleNamespace(metadata=metadata, tensors=names)
    read.fail = lambda reason: CheckpointError(f"GGUF file of {name}: {reason}")
    model = Architecture.from_file(read)
    ends = metadata.get(END_IDS, metadata.get("tokenizer.ggml.eos_token_id"))
    return {
        **vars(model),
        "model_type": ARCHITECTURE,
        "architectures": ["FANformerForCausalLM"],
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if isinstance(ends, list) and len(ends) == 1 else ends,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _renamings(config: Any) -> list[Any]:
    """Return for every tensor of a model what it is called in the file and in the state dict."""
    import re

    from transformers.core_model_loading import WeightRenaming

    return [WeightRenaming(f"^{re.escape(item.name)}$", item.parameter) for item in parameters(config)]


class _ByteLevel:
    """Builds byte-level BPE tokenizers: ours from our files, others as `transformers` does."""

    def __init__(self, others: Callable[[dict[str, Any]], Any]) -> None:
        self._others = others

    def __call__(self, content: dict[str, Any]) -> Any:
        """Return a tokenizer for what `transformers` has read of a file."""
        from tokenizers import Tokenizer

        whole = content.get(_WHOLE_NAME)
        if whole is None and _PIPELINE_NAME in content:
            parts = content["tokens"], content["token_type"], content["merges"]
            whole = put_together(content[_PIPELINE_NAME], *parts)
        if whole is None:
            return self._others(content)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(whole))
