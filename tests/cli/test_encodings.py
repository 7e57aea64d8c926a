"""What the command reads and writes under the encodings that Python takes from variables when it starts."""

import json

import pytest

from tests.warm_processes import WarmParent

FIXED = ("--seed", "1", "--max-length", "8", "--min-length", "8", "--device", "cpu")
WARM = (
    "fanformer.cli.chat",
    "fanformer.cli.generate",
    "fanformer.generation.torch_model",
    "fanformer.generation.loading",
)
C_LOCALE = {"PYTHONUTF8": "0", "LC_ALL": "C"}
ENCODINGS = {
    "utf-8 mode": {"PYTHONUTF8": "1"},
    "strict utf-8": {**C_LOCALE, "PYTHONIOENCODING": "utf-8:strict"},
    "ascii": {**C_LOCALE, "PYTHONIOENCODING": ""},
    "latin-1": {**C_LOCALE, "PYTHONIOENCODING": "latin-1"},
}


@pytest.fixture(scope="module", params=ENCODINGS)
def encoding(request):
    """The name of an encoding."""
    return request.param


@pytest.fixture(scope="module")
def warm(encoding):
    """Start the command where Python was started with the variables of an encoding."""
    with WarmParent(*WARM, env={"OMP_NUM_THREADS": "1", **ENCODINGS[encoding]}) as parent:
        yield parent


@pytest.mark.parametrize("has_template", [True, False], ids=["template", "base"])
def test_bytes_that_are_not_utf_8_do_not_end_the_conversation(
    warm, encoding, loaded, model_copy, tmp_path, has_template
):
    loaded.tokenizer.save_pretrained(model_copy)
    if has_template:
        (model_copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    lines = tmp_path / "lines"
    lines.write_bytes(b"caf\xc3\xa9\ncaf\xe9 \xff\x0c!\r\nhi\n")
    process = warm.start(["chat", model_copy, *FIXED], tmp_path, stdin=lines)
    code, err = process.wait(), process.stderr.read_bytes()
    assert code == 0, err
    others = ("base model", "/reset", "cut after")
    notices = [line for line in err.decode().splitlines() if not any(words in line for words in others)]
    expected = ["the line is not UTF-8: what cannot be read of it became U+FFFD."]
    assert notices == (expected if encoding != "latin-1" else [])  # where every byte is a character
    assert process.stdout.read_bytes().count(b"\n") >= 3


def test_json_is_complete_whatever_the_output_can_encode(warm, encoding, saved_model, tmp_path):
    prompt = "caf\xe9 \u65e5"
    (tmp_path / "prompt").write_text(prompt, encoding="utf-8")
    words = ("generate", saved_model, "--prompts-file", "-", "--json", *FIXED)
    process = warm.start(words, tmp_path, stdin=tmp_path / "prompt")
    assert process.wait() == 0, process.stderr.read_bytes()
    out = process.stdout.read_bytes().decode()
    assert json.loads(out)["prompt"] == prompt
    assert (prompt in out) == ("utf-8" in encoding)
