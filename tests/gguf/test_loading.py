"""GGUF files back in torch: the numbers, the configuration and the tokenizer are those of the folder."""

import json
import lzma

import pytest
import torch
from safetensors.torch import load_file

from fanformer.errors import CheckpointError, DependencyError
from fanformer.generation.settings import GenerationSettings
from fanformer.loading import load, load_config
from tests.gguf_models import STATIC_ROPES, VARIANTS, export, save
from tests.saved_models import complete_on_torch as generate

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # FAN without a part

TEXTS = [
    "the cat sat",
    "",
    " two  spaces\n\n\tand 1234 numbers",
    "\u00fc\u20ac\U0001f600 <|endoftext|> x",
    "def f(a):\r\n",
]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_float32_file_is_the_model(tiny_model, tiny_tokenizer, token_ids, tmp_path, fields):
    model = tiny_model(**{"vocab_size": 320, **fields}, eos_token_id=0)
    path = export(save(tmp_path / "model", model, tiny_tokenizer))
    back = load(path, device="cpu").model
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    ids = token_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)


def test_a_file_from_before_each_kind_of_layer_had_a_rank_is_the_model_that_it_was(repository):
    io = load_file(repository / "tests/legacy/io.safetensors")
    model = load(repository / "tests/legacy/model-f16.gguf", device="cpu").model
    assert (model.config.fan_placement, model.config.qkv_rank, model.config.o_rank) == ("ffn", 24, None)
    with torch.no_grad():
        # the same arithmetic; another machine's products may sum in another order
        torch.testing.assert_close(model(io["input_ids"]).logits, io["logits"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rope", STATIC_ROPES.values(), ids=STATIC_ROPES)
def test_positions_of_other_types_come_back(tiny_model, tiny_tokenizer, token_ids, tmp_path, rope):
    model = tiny_model(vocab_size=320, rope_parameters=rope)
    back = load(export(save(tmp_path / "model", model, tiny_tokenizer)), device="cpu").model
    with torch.no_grad():
        assert torch.equal(back(token_ids(1, 40)).logits, model(token_ids(1, 40)).logits)


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_halves_are_the_models_rounded_and_vectors_stay(saved_model, loaded, kind, dtype):
    back = load(export(saved_model, kind), device="cpu").model
    for name, value in loaded.model.named_parameters():
        expected = value.to(dtype).float() if value.ndim > 1 else value
        assert torch.equal(dict(back.named_parameters())[name], expected), name


def test_dtype_may_be_asked_for(saved_model):
    assert load(export(saved_model), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(export(saved_model, "bf16"), device="cpu").model.dtype == torch.float32


def test_configuration_and_generated_text_are_the_folders(saved_model, loaded):
    path = export(saved_model)
    config = load_config(path)
    assert (config.eos_token_id, config.bos_token_id, config.vocab_size) == (0, 0, 320)
    settings = GenerationSettings(max_length=20, seed=5)
    expected = generate(*loaded, ["the cat", ""], settings)
    found = generate(*load(path, device="cpu"), ["the cat", ""], settings)
    assert [item.text for item in found] == [item.text for item in expected]


def test_several_end_tokens_come_back(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model(vocab_size=320, eos_token_id=[0, 7])
    path = export(save(tmp_path / "model", model, tiny_tokenizer))
    assert load_config(path).eos_token_id == [0, 7]


def test_tokenizer_gives_the_folders_ids_and_texts(saved_model, loaded):
    tokenizer = load(export(saved_model), device="cpu").tokenizer
    for text in TEXTS:
        ids = ids_of(loaded.tokenizer, text)
        assert ids_of(tokenizer, text) == ids
        assert tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
        assert tokenizer.decode(ids) == loaded.tokenizer.decode(ids)
    assert tokenizer.special_tokens_map == loaded.tokenizer.special_tokens_map
    assert len(tokenizer) == len(loaded.tokenizer)


def test_tokenizers_that_add_a_start_and_have_other_tokens_come_back(saved_model, tmp_path, loaded, tiny_tokenizer):
    import copy

    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    start = tokenizer.bos_token
    tokenizer.add_tokens(["cat", "<tag>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{start} $A", special_tokens=[(start, 0)])
    folder = save(tmp_path / "model", loaded.model, tokenizer)
    path = export(folder)
    again, back = load(folder, device="cpu").tokenizer, load(path, device="cpu").tokenizer
    for text in [*TEXTS, "a <tag> and <|user|> cat"]:
        assert back(text).input_ids == again(text).input_ids
        assert ids_of(back, text) == ids_of(again, text)


def test_tokenizer_of_the_standard_preset_gives_the_same_ids_on_real_text(shared, saved_model, tmp_path, loaded):
    from fanformer.data.tokenizer import train_tokenizer

    with lzma.open(shared / "data/text-small/valid.jsonl.xz", "rt") as lines:
        texts = [json.loads(line)["text"] for line in lines][:200]
    tokenizer = train_tokenizer(texts[:50], 320)
    path = export(save(tmp_path / "model", loaded.model, tokenizer))
    back = load(path, device="cpu").tokenizer
    for text in texts:
        assert ids_of(back, text) == ids_of(tokenizer, text)


def test_chat_template_comes_back(tiny_tokenizer, loaded, tmp_path):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    path = export(save(tmp_path / "model", loaded.model, tokenizer))
    assert load(path, device="cpu").tokenizer.chat_template == tokenizer.chat_template


def test_damaged_tokenizers_are_refused(saved_model, tmp_path):
    content = export(saved_model).read_bytes()
    path = tmp_path / "spoilt.gguf"
    for old, new, message in (
        (b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert",
         "its tokenizer is 'bert', expected `gpt2`"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz", "`tokenizer.ggml.tokens` must be an array of texts"),
        (b"tokenizer.huggingface.json", b"tokenizer.huggingface.jsen", "its tokenizer cannot be read"),
        (b'"type":"BPE"', b'"type":"BPX"', "its tokenizer cannot be read"),
        (b"tokenizer.ggml.bos_token_id\x04\0\0\0\0", b"tokenizer.ggml.bos_token_id\x04\0\0\0\xff",
         r"has the id 255|cannot be read|must be in"),
    ):  # fmt: skip
        assert content.count(old) == 1, old
        path.write_bytes(content.replace(old, new))
        if b"bos" in old:
            path.write_bytes(content.replace(old + b"\0", new + b"\xff"))
        with pytest.raises(CheckpointError, match=message):
            load(path, device="cpu")


def test_numbers_that_are_not_finite_are_refused(saved_model, tmp_path):
    from fanformer.gguf.file import GGUFFile

    content = bytearray(export(saved_model).read_bytes())
    info = GGUFFile(saved_model / "model-f32.gguf").tensors["output_norm.weight"]
    content[info.offset : info.offset + 4] = b"\0\0\x80\x7f"
    (tmp_path / "spoilt.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"`output_norm.weight` holds values that are not finite"):
        load(tmp_path / "spoilt.gguf", device="cpu")


@pytest.fixture
def registered():
    """`transformers` with our architecture, taken out again afterwards."""
    pytest.importorskip("transformers.integrations.gguf", reason="needs transformers 5.23")
    from transformers.integrations.gguf import GGUF_ARCHS, GGUF_CONFIG_ARCHS, gguf_tokenizer_mapping

    from fanformer.gguf.by_transformers import register_gguf

    known = gguf_tokenizer_mapping.GGUF_TOKENIZER_TYPES["gpt2"]
    register_gguf()
    register_gguf()
    yield
    del GGUF_ARCHS["fanformer"], GGUF_CONFIG_ARCHS["fanformer"]
    gguf_tokenizer_mapping.GGUF_TOKENIZER_TYPES["gpt2"] = known


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_transformers_loads_the_same_model(registered, tiny_model, tiny_tokenizer, tmp_path, fields):
    from transformers import AutoModelForCausalLM

    model = tiny_model(**{"vocab_size": 320, **fields}, eos_token_id=0)
    path = export(save(tmp_path / "model", model, tiny_tokenizer), "bf16")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = load(path, device="cpu").model
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    unlike = {"architectures", "dtype", "_name_or_path"}
    mine, other = ours.config.to_dict(), theirs.config.to_dict()
    assert {key: mine[key] for key in mine.keys() - unlike} == {key: other[key] for key in other.keys() - unlike}


def test_transformers_tokenizer_gives_the_folders_ids(registered, saved_model, loaded, tmp_path):
    from transformers import AutoTokenizer

    path = export(saved_model, output=tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert ids_of(tokenizer, text) == ids_of(loaded.tokenizer, text)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (loaded.tokenizer.bos_token, loaded.tokenizer.eos_token)


@pytest.mark.parametrize("template", ["{0} $A", "$A {0}", "{0} $A {0}"])
def test_transformers_tokenizer_adds_what_the_folders_adds(registered, loaded, tiny_tokenizer, tmp_path, template):
    import copy

    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = copy.deepcopy(tiny_tokenizer)
    end = tokenizer.eos_token  # which is the start too
    template = template.format(end)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(template, special_tokens=[(end, 0)])
    folder = save(tmp_path / "model", loaded.model, tokenizer)
    path = export(folder, output=tmp_path / "model.gguf")
    ids = load(folder, device="cpu").tokenizer("the cat").input_ids
    assert [ids[0] == 0, ids[-1] == 0] == [template.startswith(end), template.endswith(end)]
    assert AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)("the cat").input_ids == ids


def test_transformers_without_such_dictionaries_is_named(monkeypatch):
    import sys

    from fanformer.gguf.by_transformers import register_gguf

    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf", None)
    with pytest.raises(DependencyError, match=r"reads GGUF files of fixed architectures only: .*transformers>=5.23"):
        register_gguf()
