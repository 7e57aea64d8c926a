"""Train a byte-level BPE tokenizer, load any other, and turn documents into token ids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fanformer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
SMALLEST_VOCABULARY = 257
"""256 bytes and END_OF_TEXT."""
LARGEST_VOCABULARY = 1 << 22
"""The library that trains takes memory for as many tokens at once, and ends the process where there is none."""

# Where text may be cut into pieces that no token crosses. Of the splits tried on the standard library this gives the
# most bytes per token (held-out, vocabulary 4096 / 8192): this one 3.65 / 4.06, GPT-2's 3.42 / 3.72, cl100k's 3.37 /
# 3.70, o200k's 3.36 / 3.68. What counts is that line end and indentation are one piece, also behind punctuation.
PIECES = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}_]+(?:'(?:[sdmt]|ll|re|ve)(?![\p{L}\p{N}_]))?",  # a word, one sign before
        r" ?\p{N}{1,3}",  # up to three digits
        r" ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?",  # signs, the line end after them, the next line's indentation
        r"\s*[\r\n]+[ \t]*",  # blank lines and the next line's indentation
        r"\s+(?!\S)",  # spaces, the last one left to the word after them
        r"\s+",
    )
)

LONGEST_RUN = 1 << 12
"""Letters, signs or spaces in a row above which a text is cut for learning tokens; runs twice as long always are.

The time for learning grows with the square of a piece's length. Encoding does not, so it cuts nothing.
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; equal texts give an equal tokenizer, whatever the number of threads.

    Every text can be encoded and comes back unchanged. The one special token, END_OF_TEXT with id 0, is start, end and
    padding at once. Texts with few different words give fewer than `vocab_size` tokens. What is longer than LONGEST_RUN
    and has no break is learnt from in parts.

    Args:
        texts: what to learn the tokens from.
        vocab_size: most tokens, END_OF_TEXT included.

    Raises:
        ConfigError: if `vocab_size` leaves no room for the 256 bytes, or is above LARGEST_VOCABULARY.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"`vocab_size` must be at least {SMALLEST_VOCABULARY}, got {vocab_size}: 256 bytes and {END_OF_TEXT}"
        )
    if vocab_size > LARGEST_VOCABULARY:
        raise ConfigError(
            f"`vocab_size` must be at most {LARGEST_VOCABULARY:,}, got {vocab_size:,}: take a few tens of thousands"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_cut_long_runs(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _cut_long_runs(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts unchanged, but in parts where LONGEST_RUN characters from a multiple of it on are of one class."""
    import regex

    classes = (r"[\p{L}\p{M}_]", r"[^\s\p{L}\p{N}]", r"\s")  # what PIECES repeats without a bound
    is_run = regex.compile("|".join(f"{characters}{{{LONGEST_RUN}}}" for characters in classes)).match
    for text in texts:
        start = 0
        for place in range(LONGEST_RUN, len(text), LONGEST_RUN):
            if is_run(text, place):
                yield text[start:place]
                start = place
        yield text[start:] if start else text


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerBase:
    """Load a `transformers` tokenizer from a folder, the local cache or the hub, running no code that comes with it.

    Raises:
        ConfigError: if there is none, or it needs code of its own.
        DataError: if it is on the hub and the hub does not answer, or a file of a folder is a pipe or a device.
    """
    # what encodes text for a model that is loaded needs none of these
    from fanformer.data.sources.decompression import require_regular
    from fanformer.files.durable import printable

    folder = Path(name_or_folder).expanduser().absolute()
    if folder.is_dir():
        if printable(str(folder)) != str(folder):
            raise ConfigError(f"tokenizer `{printable(str(folder))}`: the folder must have a name in UTF-8: rename it")
        for path in map(folder.joinpath, _FILES):
            if os.path.lexists(path):
                require_regular(path)
        if (folder / "config.json").is_file():
            import fanformer.model  # noqa: F401  # registers our model type, which transformers otherwise warns about
        return _load(str(folder), local_files_only=True)
    if folder.exists() or name_or_folder.count("/") > 1 or name_or_folder.startswith((".", "/", "~")):
        raise ConfigError(
            f"tokenizer `{name_or_folder}`: no folder {folder}: expected a folder with tokenizer.json, or a hub name"
        )
    try:
        return _load(name_or_folder, local_files_only=True)
    except ConfigError:
        from fanformer.data.sources.hub import require_hub

        require_hub(
            f"tokenizer `{name_or_folder}` is not in the local cache; it",
            "go on offline with --tokenizer FOLDER, or without --tokenizer to train one on the data",
        )
    return _load(name_or_folder, local_files_only=False)


def _load(name_or_folder: str, *, local_files_only: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        # False, not None: None would ask on stdin whether to run the code of a folder that has some
        return AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False, local_files_only=local_files_only)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust side raises plain Exception, and a panic is no Exception at all
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"tokenizer `{name_or_folder}` cannot be loaded ({reason}): expected tokenizer.json and "
            "tokenizer_config.json, as `save_pretrained` of a tokenizer writes them"
        ) from error


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of every text, without start and end tokens.

    What looks like a special token in a text is ordinary text: it becomes the tokens of its characters.
    """
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def start_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that opens every document: bos, or eos where there is no bos."""
    return _first_id(tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id)


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends every document: eos, or bos where there is no eos."""
    return _first_id(tokenizer, tokenizer.eos_token_id, tokenizer.bos_token_id)


def _first_id(tokenizer: PreTrainedTokenizerBase, *candidates: int | None) -> int:
    for token_id in candidates:
        if token_id is not None:
            return token_id
    raise ConfigError(
        f"tokenizer `{tokenizer.name_or_path}` has neither a bos nor an eos token, and documents need one between "
        "them: set `eos_token` in its tokenizer_config.json"
    )
