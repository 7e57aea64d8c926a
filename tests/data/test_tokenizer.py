import builtins
import json
import os
import random
import re
import subprocess
import sys
import time

import pytest

from fanformer.data.preparation.encoding import document_encoder
from fanformer.data.preparation.workers import BatchEncoder
from fanformer.data.tokenizer import (
    END_OF_TEXT,
    LONGEST_RUN,
    _cut_long_runs,
    encode_documents,
    end_token_id,
    load_tokenizer,
    start_token_id,
    train_tokenizer,
)
from fanformer.errors import ConfigError, DataError

TEXT = 'def add(a, b):\n    """Return 12345 + don\'t."""\n    return a + b\n\n\nclass __Name__(Base):\n\tpass\n' * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 400)


@pytest.mark.parametrize(
    "text",
    [
        bytes(range(256)).decode("latin-1"),
        "".join(map(chr, range(0x20, 0x3000, 7))),
        "🙂👩‍👩‍👧‍👦🇩🇪 ﷽ 漢字かな交じり文 हिन्दी",
        "\t\tif x:\r\n\t\t\ty = 1  \n \n\n  z\n",
        "  leading and trailing  ",
        "12345678 0x1F 3.14e-10 it's 'self' don't O'Neil's",
        " \t\n",
        "\ufffd\u2028\x00\x1b",
    ],
    ids=["bytes", "letters", "emoji and scripts", "tabs", "spaces", "digits", "blank", "control"],
)
def test_every_text_comes_back_unchanged(tokenizer, text):
    [ids] = encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids) == text


def test_every_byte_has_a_token_and_no_token_is_unknown(tokenizer):
    assert 257 < len(tokenizer) <= 400
    ids = encode_documents(tokenizer, [chr(code) for code in range(128)])
    assert all(len(token) == 1 for token in ids)
    assert len({token[0] for token in ids}) == 128


def test_line_end_and_indentation_become_one_token(tokenizer):
    [ids] = encode_documents(tokenizer, ["):\n    return"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["):ĊĠĠĠĠ", "return"]


def test_digits_are_cut_in_threes():
    tokenizer = train_tokenizer(["12345678\n" * 50], 400)
    [ids] = encode_documents(tokenizer, ["12345678"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["123", "456", "78"]


def test_training_twice_and_on_one_thread_gives_the_same_tokenizer(tokenizer):
    code = (
        "import sys; from fanformer.data.tokenizer import train_tokenizer;"
        "sys.stdout.write(train_tokenizer([sys.stdin.read()], 400).backend_tokenizer.to_str())"
    )
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "5"}
    other = subprocess.run(
        [sys.executable, "-c", code], input=TEXT, env=environment, capture_output=True, text=True, check=True
    )
    assert other.stdout == tokenizer.backend_tokenizer.to_str()


DNA = "".join(random.Random(1).choices("ACGT", k=600_000))


@pytest.mark.parametrize("text", [DNA, "a" * 1_000_000, "=" * 1_000_000, " " * 1_000_000], ids=["DNA", "a", "=", " "])
def test_text_without_a_break_is_learnt_from_and_encoded_in_seconds(text):
    started = time.monotonic()
    tokenizer = train_tokenizer([text, TEXT], 320)
    [ids] = encode_documents(tokenizer, [text])
    assert time.monotonic() - started < 60  # 2 to 3 alone on two cores; learning from one piece took minutes
    assert tokenizer.decode(ids) == text
    [same] = document_encoder(tokenizer).encode([text])
    assert same.tolist() == ids
    assert len(ids) < len(text) / 1.5


def test_text_with_breaks_gives_the_tokenizer_that_uncut_text_gives(tokenizer, monkeypatch):
    runs = [sign * (LONGEST_RUN - 1) for sign in ("x", "=", " ", "\u0e01", "\n")]
    texts = [TEXT, *runs, "".join(f"{run}1" for run in runs), DNA[: LONGEST_RUN - 1] + "7" + DNA[: LONGEST_RUN - 1]]
    assert list(_cut_long_runs(texts)) == texts
    cut = train_tokenizer(texts, 400).backend_tokenizer.to_str()
    monkeypatch.setattr("fanformer.data.tokenizer._cut_long_runs", list)
    assert train_tokenizer(texts, 400).backend_tokenizer.to_str() == cut


@pytest.mark.parametrize("length", [2 * LONGEST_RUN, 10 * LONGEST_RUN + 5])
def test_no_part_that_is_learnt_from_has_a_long_run(length):
    text = f"{TEXT}{DNA[:length]} {'=' * length}{' ' * length}{TEXT}"
    parts = list(_cut_long_runs([text, TEXT]))
    assert "".join(parts) == text + TEXT
    assert parts[-1] == TEXT
    for characters in (r"[ACGT]+", "=+", " +"):
        assert all(len(run) < 2 * LONGEST_RUN for part in parts for run in re.findall(characters, part))


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"`vocab_size` must be at least 257, got 256: 256 bytes and <\|endoftext\|>"):
        train_tokenizer(["text"], 256)


def test_special_token_in_a_document_is_ordinary_text(tokenizer):
    text = f"before {END_OF_TEXT} after"
    [ids] = encode_documents(tokenizer, [text])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]  # the tokenizer itself is left as it was


def test_encoding_adds_and_drops_nothing_and_warns_of_nothing(tokenizer, caplog, capsys):
    tokenizer.model_max_length, before = 10, tokenizer.model_max_length
    try:
        documents = encode_documents(tokenizer, [TEXT, "x"])
    finally:
        tokenizer.model_max_length = before
    assert [tokenizer.decode(ids) for ids in documents] == [TEXT, "x"]
    assert encode_documents(tokenizer, []) == []
    assert not caplog.records
    assert not capsys.readouterr().err


def test_start_is_bos_and_end_is_eos_and_either_stands_in_for_the_other(tokenizer):
    from transformers import ByT5Tokenizer

    assert start_token_id(tokenizer) == end_token_id(tokenizer) == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    byte_tokenizer = ByT5Tokenizer()
    assert byte_tokenizer.bos_token_id is None
    assert start_token_id(byte_tokenizer) == end_token_id(byte_tokenizer) == byte_tokenizer.eos_token_id
    byte_tokenizer.bos_token = "<pad>"
    assert (start_token_id(byte_tokenizer), end_token_id(byte_tokenizer)) == (0, 1)
    byte_tokenizer.eos_token = None
    assert (start_token_id(byte_tokenizer), end_token_id(byte_tokenizer)) == (0, 0)
    byte_tokenizer.bos_token = None
    with pytest.raises(ConfigError, match=r"has neither a bos nor an eos token.*: set `eos_token` in its"):
        start_token_id(byte_tokenizer)


def test_tokenizer_written_in_python_encodes_special_tokens_as_text():
    from transformers import ByT5Tokenizer

    assert encode_documents(ByT5Tokenizer(), ["a</s>"]) == [[ord(sign) + 3 for sign in "a</s>"]]


def test_folder_with_code_of_its_own_loads_without_a_question_or_a_warning(tokenizer, tmp_path, monkeypatch, capsys):
    tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "fanformer", "auto_map": {"AutoConfig": "configuration_fanformer.FANformerConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on stdin"))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert start_token_id(loaded) == 0
    assert not capsys.readouterr().err


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"cannot be loaded \(.*\): expected tokenizer.json and tokenizer_config.json"
    ):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{ broken")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    with pytest.raises(ConfigError, match=r"cannot be loaded \(.*\): expected tokenizer.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match=r"tokenizer `./none`: no folder .*none: expected a folder with"):
        load_tokenizer("./none")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_pipe_or_device_in_place_of_a_tokenizer_file_is_refused(tokenizer, tmp_path, name):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} is a pipe, expected a regular file"):
        load_tokenizer(str(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=rf"{name} is a character device, expected a regular file"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_on_the_hub_offline_is_refused_within_seconds(monkeypatch):
    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"HF_HUB_OFFLINE=1 forbids it: unset it, or go on offline with --tokenizer FOL"
    ):
        load_tokenizer("someone/something")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("part", "value"),
    [("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}), ("prefix", "x" * 16)],
)
def test_tokenizer_file_that_makes_the_library_panic_is_refused(tokenizer, tmp_path, part, value):
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    if part == "prefix":
        content["model"]["continuing_subword_prefix"] = value
    else:
        content[part] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match=r"cannot be loaded \((Precompiled|range end index).*\): expected tokenizer.json"
    ):
        load_tokenizer(str(tmp_path))


def test_tokenizer_in_a_folder_whose_name_is_not_utf8_is_refused(tokenizer, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"caf\\udce9`: the folder must have a name in UTF-8: rename it"):
        load_tokenizer(str(folder))


def test_tokenizer_that_fails_at_a_text_is_told_with_the_text(tokenizer):
    class Failing:
        def encode(self, texts):
            raise Exception("Encountered an unknown token but `unk_id` is missing")

    encoder = BatchEncoder(Failing(), 0, 0, 300, "<u2")
    with pytest.raises(
        ConfigError, match=r"fails at a text of a.jsonl:7 or after it \(Encountered .* missing\): use an"
    ):
        encoder.encode([(False, "a.jsonl:7", "text")])


def test_errors_are_one_line(tmp_path):
    for name in (str(tmp_path), "./none", "someone/something"):
        with pytest.raises((ConfigError, DataError)) as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)
