"""The tokenizer inside a GGUF file, on the `tokenizers` library alone: the same ids as the folder's, without torch.

llama.cpp's keys hold the tokens and merges. What they cannot say (how text is cut into pieces, special tokens' flags)
is in `tokenizer.huggingface.json`, a key of the GGUF specification: the folder's tokenizer.json.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fanformer.errors import CheckpointError, ConfigError, DependencyError
from fanformer.gguf.file import GGUFFile, Texts

WHOLE = "tokenizer.huggingface.json"
PIPELINE = "tokenizer.fanformer.pipeline"
"""The key that files had in its place, with all of it but tokens and merges."""
END_IDS = "fanformer.end_token_ids"
TEMPLATE = "tokenizer.chat_template"
TOKENS, TOKEN_TYPES, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of a token, in llama.cpp's numbers."""
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}
"""Special tokens as `transformers` names them -> the ends of their keys."""


class GGUFTokenizer:
    """Turns text into token ids and back, as the tokenizer of the folder that the file was made of does."""

    def __init__(self, file: GGUFFile, vocab_size: int) -> None:
        """Build the tokenizer.

        Args:
            file: a GGUF file of ours.
            vocab_size: V, how many ids the model has.

        Raises:
            CheckpointError: if the file's tokenizer is missing, damaged, or does not fit the model.
        """
        self.name_or_path = str(file.path)
        self.backend_tokenizer = _backend(file, vocab_size)
        used = np.flatnonzero(file.metadata[TOKEN_TYPES] != UNUSED)
        self.known: int = int(used.max(initial=-1)) + 1
        """One more than the largest id that stands for text; those from here on only fill up the vocabulary."""
        ids, self.end_ids = special_ids(file, vocab_size)
        """The ids that end a text."""
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids["bos"], ids["eos"], ids["pad"]
        self.special_tokens: dict[str, str] = {}
        for name, number in ids.items():
            if number is not None:
                text = self.backend_tokenizer.id_to_token(number)
                if text is None:
                    raise file.fail(f"is damaged: its {name} token has the id {number}, which its tokenizer lacks.")
                self.special_tokens[f"{name}_token"] = text
        """Text of each special token by its name, such as bos_token."""
        template = file.metadata.get(TEMPLATE)
        if template is not None and not isinstance(template, str):
            raise file.fail(f"is damaged: `{TEMPLATE}` must be a text, got {type(template).__name__}.")
        self.chat_template: str | None = template

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of `text`, without start and end tokens.

        Args:
            text: what to encode.
            special: whether what looks like a special token is one; else it is ordinary text.
        """
        self.backend_tokenizer.encode_special_tokens = not special
        return list(self.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Return the text of token ids; the arguments are those of `transformers`.

        Raises:
            ConfigError: if spaces are to be cleaned up, which this tokenizer never does.
        """
        if clean_up_tokenization_spaces:
            raise ConfigError("`clean_up_tokenization_spaces` must be False, got True: a GGUF's text is never changed.")
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @property
    def start_id(self) -> int:
        """The id that opens every text: bos, or eos where there is no bos.

        Raises:
            ConfigError: if the file names neither.
        """
        for number in (self.bos_token_id, self.eos_token_id):
            if number is not None:
                return number
        raise ConfigError(f"{self.name_or_path} names neither a bos nor an eos token, and texts begin with one.")

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        return_dict: bool = False,
        tokenize: bool = True,
    ) -> list[int] | str:
        """Return the ids of a conversation, or its text; the arguments are those of `transformers`.

        Raises:
            ConfigError: if a dictionary is asked for, or if the file has no template.
            CheckpointError: if the template refuses the messages or is broken.
        """
        if return_dict or self.chat_template is None:
            raise ConfigError(
                f"`return_dict` must be False and a chat template be there, got {return_dict} and "
                f"{'none' if self.chat_template is None else 'one'} in {self.name_or_path}."
            )
        text = _render(self.chat_template, self.name_or_path, messages, add_generation_prompt, self.special_tokens)
        return self.encode(text, special=True) if tokenize else text


def _render(template: str, name: str, messages: list[dict[str, str]], prompt: bool, special: dict[str, str]) -> str:
    """Return the conversation as text; the environment is the one that `transformers` documents for templates."""
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise DependencyError(
            "chat templates need jinja2, which is not installed: pip install 'fanformer[gguf]'"
        ) from error

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    template = without_generation_tags(template)
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda p: datetime.now().strftime(p)}
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **special
        )
    except (TemplateError, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CheckpointError(f"{name}: its chat template fails: {reason}.") from error


_GENERATION = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")
"""The two tags by which `transformers` knows what of a template is the assistant's; Jinja itself has none of them."""


def without_generation_tags(template: str) -> str:
    """Return a chat template that writes the same and that any Jinja can read.

    A tag beside which spaces or line ends may be trimmed leaves an empty comment, for which the same are.
    """

    def replaced(tag: re.Match[str]) -> str:
        before, after = template[: tag.start()][-1:], template[tag.end() :][:1]
        plain = not tag[1] and not tag[2] and before.strip() and after.strip()
        return "" if plain else f"{{#{tag[1]} {tag[2]}#}}"

    return _GENERATION.sub(replaced, template)


def special_ids(file: GGUFFile, vocab_size: int) -> tuple[dict[str, int | None], list[int]]:
    """Return the ids of a file's special tokens, those of SPECIAL, None for one that it lacks; and what ends a text.

    Raises:
        CheckpointError: if one is not among the model's ids.
    """
    ids: dict[str, int | None] = {}
    for name, key in SPECIAL.items():
        number = file.metadata.get(f"tokenizer.ggml.{key}")
        if number is not None and not (type(number) is int and 0 <= number < vocab_size):
            got = str(number)[:40]
            raise file.fail(f"is damaged: `tokenizer.ggml.{key}` must be in [0, {vocab_size}), got {got}.")
        ids[name] = number
    ends = file.metadata.get(END_IDS)
    if ends is None:
        return ids, [] if ids["eos"] is None else [ids["eos"]]
    if not isinstance(ends, np.ndarray) or ends.dtype.kind not in "iu":
        raise file.fail(f"is damaged: `{END_IDS}` must be an array of whole numbers.")
    found: list[int] = ends.tolist()
    if not all(0 <= number < vocab_size for number in found):
        raise file.fail(f"is damaged: `{END_IDS}` must be in [0, {vocab_size}), got {found[:8]}.")
    return ids, found


def _texts(file: GGUFFile, key: str) -> Texts:
    value = file.metadata.get(key)
    if not isinstance(value, Texts):
        raise file.fail(f"its tokenizer is missing or damaged: `{key}` must be an array of texts.")
    return value


def _backend(file: GGUFFile, vocab_size: int) -> Tokenizer:
    """Build the tokenizer, and check that its tokens are those of llama.cpp's keys."""
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise file.fail(f"its tokenizer is {str(kind)[:40]!r}, expected `gpt2`: byte-level BPE.")
    tokens, merges = _texts(file, TOKENS), _texts(file, MERGES)
    types = file.metadata.get(TOKEN_TYPES)
    if len(tokens) != vocab_size or not isinstance(types, np.ndarray) or types.shape != (vocab_size,):
        raise file.fail(
            f"its tokenizer does not fit: expected {vocab_size} tokens with their types, got {len(tokens)}."
        )
    try:
        whole = file.metadata.get(WHOLE)
        if whole is None:
            whole = put_together(str(file.metadata.get(PIPELINE)), tokens, types.tolist(), merges)
        backend = Tokenizer.from_str(str(whole))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust side raises plain Exception, and a panic is no Exception at all
        reason = " ".join(str(error).split())[:200]
        raise file.fail(f"its tokenizer cannot be read: {reason}.") from error
    used = np.flatnonzero(types != UNUSED).tolist()
    # token by token: asking for the whole vocabulary would take as much memory again
    if backend.get_vocab_size() != len(used) or any(backend.id_to_token(each) != tokens[each] for each in used):
        raise file.fail(f"is damaged: its tokenizer has other tokens than `{TOKENS}`.")
    return backend


def put_together(pipeline: str, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str]) -> str:
    """Return tokenizer.json of a file from before WHOLE, which has all but tokens and merges as PIPELINE."""
    content = json.loads(pipeline)
    outside = set(content.pop("outside_vocabulary"))
    known = zip(tokens, range(len(tokens)), types, strict=True)
    vocabulary = {token: number for token, number, kind in known if kind != UNUSED and number not in outside}
    content["model"] |= {"vocab": vocabulary, "merges": [merge.split(" ") for merge in merges]}
    return json.dumps(content)


def split_json(content: dict[str, Any], num_tokens: int) -> tuple[list[str], list[int], list[str]]:
    """Return tokens, their types and merges of a byte-level BPE's tokenizer.json, as llama.cpp has them.

    Args:
        content: tokenizer.json.
        num_tokens: V; ids that the tokenizer lacks become unused tokens.

    Raises:
        ConfigError: if it is another kind of tokenizer.
    """
    model = content["model"]
    parts = content.get("pre_tokenizer") or {}
    steps = [step["type"] for step in parts.get("pretokenizers", [parts]) if step]
    if model["type"] != "BPE" or "ByteLevel" not in steps:
        raise ConfigError(
            f"the tokenizer is {model['type']} with the steps {steps}, expected byte-level BPE: no other kind can be "
            "put into a GGUF file yet."
        )
    tokens = [f"[PAD{number}]" for number in range(num_tokens)]
    types = [UNUSED] * num_tokens
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for item in content.get("added_tokens", []):
        tokens[item["id"]] = item["content"]
        types[item["id"]] = CONTROL if item["special"] else USER_DEFINED
    return tokens, types, [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
