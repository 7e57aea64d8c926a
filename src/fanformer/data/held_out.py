"""Text that a model was not trained on, as tokens: what calibration runs and what the scan measures on."""

from pathlib import Path

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from fanformer.data.conversations.chat_tokens import document_ends
from fanformer.data.prepared import TokenStream, open_prepared
from fanformer.data.sources.documents import open_source
from fanformer.data.token_files import lay_out
from fanformer.data.tokenizer import encode_documents
from fanformer.errors import ConfigError, DataError

DEFAULT_TOKENS = 65536
FEWEST_TOKENS = 1024
"""Below this many tokens, chance decides which channels count."""
_RUN_FILE, _OTHER_HELD_OUT = "run.yaml", "held-out"  # as `fanformer train` leaves them


def held_out_stream(
    folder: Path, tokenizer: PreTrainedTokenizerBase, source: str | None, max_tokens: int
) -> TokenStream:
    """Open text for a model: that of `source`, or what its training held out.

    Args:
        folder: the model's, in which run.yaml says where the held-out tokens are.
        tokenizer: of the model.
        source: stdlib, a file or glob, or hf:NAME; read only as far as needed. None takes what was held out.
        max_tokens: as much of `source` as is needed; held-out tokens are mapped, not read.

    Raises:
        ConfigError: if `max_tokens` is below FEWEST_TOKENS, or the folder does not say what was held out.
        DataError: if there is no such text, or it has fewer than FEWEST_TOKENS.
    """
    if max_tokens < FEWEST_TOKENS:
        raise ConfigError(f"`--calibration-tokens` must be at least {FEWEST_TOKENS}, got {max_tokens}.")
    stream = _of_run(folder, tokenizer) if source is None else _of_source(tokenizer, source, max_tokens)
    if len(stream.tokens) < FEWEST_TOKENS:
        name = "what the run held out" if source is None else f"`--calibration {source}`"
        raise DataError(f"{name} has {len(stream.tokens)} tokens, expected at least {FEWEST_TOKENS}: give more text.")
    return stream


def _of_source(tokenizer: PreTrainedTokenizerBase, source: str, max_tokens: int) -> TokenStream:
    documents: list[np.ndarray] = []
    count = num_bytes = 0
    for document in open_source(source):
        ids = encode_documents(tokenizer, [document.text])[0]
        documents.append(np.array(ids, dtype=np.uint32))
        count, num_bytes = count + len(ids) + 1, num_bytes + len(document.text.encode("utf-8", "surrogatepass"))
        if count > max_tokens:
            break
    start, end = document_ends(tokenizer)
    tokens = lay_out(documents, start, end, np.dtype(np.uint32), close=True)
    return TokenStream(tokens, start, end, len(documents), num_bytes)


def _of_run(folder: Path, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    remedy = "give text that it was not trained on as `--calibration SPEC`."
    file = folder / _RUN_FILE
    if not file.is_file():
        raise ConfigError(f"`--calibration` is needed, since {folder.absolute()} has no {_RUN_FILE}: {remedy}")
    try:
        run = yaml.safe_load(file.read_text(encoding="utf-8"))
        other = run["configuration"]["eval_data"]
        place = folder / _OTHER_HELD_OUT if other is not None else folder / run["data"]["folder"]
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise ConfigError(f"{file.absolute()} does not say where its data is: {remedy}") from error
    try:
        data = open_prepared(place)
        stream = data.split("heldout" if other is None else "train")
    except (DataError, OSError) as error:
        reason = str(error).rstrip(".")
        raise DataError(f"what the run held out cannot be read ({reason}): {remedy}") from error
    if not data.tokenizer().get_vocab().items() <= tokenizer.get_vocab().items():  # tokens may have been added
        raise DataError(f"{place.absolute()} was made with another tokenizer than {folder.absolute()}: {remedy}")
    return stream
