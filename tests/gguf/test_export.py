"""Writing GGUF files: what they hold, what the report says, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fanformer.errors import ConfigError, DataError, DependencyError
from fanformer.gguf.export import Settings, export_gguf, pre_tokenizer_name, report_file
from fanformer.gguf.file import GGUFFile
from fanformer.loading import load
from tests.gguf_models import export, save

BLOCKS = ("q8_0", "q4_0", "q4_k", "q5_k", "q6_k")


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Folder of a model whose rows fill blocks of 256, but for W_b (rank 192) and down (F 250)."""
    fields = {"hidden_size": 256, "intermediate_size": 250, "head_dim": 64, "vocab_size": 320, "eos_token_id": 0}
    return save(tmp_path_factory.mktemp("wide") / "model", tiny_model(**fields), tiny_tokenizer)


def needs_ggml():
    pytest.importorskip("ggml", reason="needs the extra `gguf` (ggml-python)")


def test_metadata_is_in_llama_cpps_words(saved_model):
    metadata = GGUFFile(export(saved_model, "f16")).metadata
    expected = {
        "general.architecture": "fanformer",
        "general.type": "model",
        "general.name": "tiny",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "fanformer.vocab_size": 320,
        "fanformer.context_length": 128,
        "fanformer.embedding_length": 64,
        "fanformer.block_count": 2,
        "fanformer.feed_forward_length": 96,
        "fanformer.attention.head_count": 4,
        "fanformer.attention.head_count_kv": 2,
        "fanformer.attention.key_length": 16,
        "fanformer.attention.value_length": 16,
        "fanformer.rope.dimension_count": 16,
        "fanformer.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["fanformer.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (len(tokens), tokens[0], types[0], tokens[319], types[319]) == (320, "<|endoftext|>", 3, "[PAD319]", 5)
    assert all(merge.count(" ") == 1 for merge in metadata["tokenizer.ggml.merges"])


def test_every_documented_key_is_written_and_every_written_key_documented(repository, saved_model, tmp_path, loaded):
    import copy
    import re

    text = (repository / "docs/quantization.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `((?:general|fanformer|tokenizer)\.[\w.]+)`", text, flags=re.M))
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = "x"
    tokenizer.add_special_tokens({"pad_token": "<pad>", "unk_token": "<unk>"})
    written = set(GGUFFile(export(save(tmp_path / "model", loaded.model, tokenizer))).metadata)
    optional = {key for key in documented if ".rope.scaling." in key or ".recurrence." in key}
    assert written == documented - optional


def test_a_folder_whose_name_is_not_utf8_is_named_in_what_can_be_written(model_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(model_copy.rename(tmp_path / os.fsdecode(b"caf\xe9")))
    path = export(Path("."), "f16", tmp_path / "out.gguf")
    assert GGUFFile(path).metadata["general.name"] == "caf\\udce9"


def test_ways_to_cut_text_have_llama_cpps_names():
    level = {"type": "ByteLevel", "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert pre_tokenizer_name(level) == "gpt-2"
    assert pre_tokenizer_name({"type": "Sequence", "pretokenizers": [digits, level]}) == "smollm"
    split = {"type": "Split", "pattern": {"Regex": "x"}}
    assert pre_tokenizer_name({"type": "Sequence", "pretokenizers": [split, level]}) == "fanformer"
    assert pre_tokenizer_name({"type": "ByteLevel", "use_regex": False}) == "fanformer"


def test_report_tells_type_bits_and_error_of_every_tensor(saved_model, loaded, tmp_path):
    report = export_gguf(saved_model, tmp_path, Settings("bf16"))
    path = tmp_path / "model-bf16.gguf"
    assert json.loads(report_file(path).read_text())["tensors"][0]["name"] == "token_embd.weight"
    assert report.bytes == path.stat().st_size
    file = GGUFFile(path)
    assert [item.name for item in report.tensors] == list(file.tensors)
    state = loaded.model.state_dict()
    for item in report.tensors:
        exact, stored = state[item.parameter].numpy(), file.read_floats(file.tensors[item.name])
        error = np.linalg.norm((stored - exact).astype(np.float64)) / np.linalg.norm(exact)
        assert item.relative_error == pytest.approx(error, rel=1e-4, abs=1e-12)
        assert item.bits_per_weight == (16 if len(item.shape) > 1 else 32)
        assert (item.type, item.bytes) == (file.tensors[item.name].kind.name, file.tensors[item.name].num_bytes)
    bits = 8 * sum(item.bytes for item in report.tensors) / loaded.model.num_parameters()
    assert report.bits_per_weight == pytest.approx(bits)


def test_nothing_is_left_behind_by_a_write_that_fails(saved_model, tmp_path, monkeypatch):
    from fanformer.gguf import export as gguf_export

    def fail(*arguments):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(gguf_export, "_encode", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        export_gguf(saved_model, tmp_path, Settings("f16"))
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_there_is_kept_unless_overwritten(saved_model, tmp_path):
    path = tmp_path / "mine.gguf"
    path.write_text("precious")
    with pytest.raises(ConfigError, match=r"mine.gguf is there already: give another `--output-dir`, or `--overwrite`"):
        export_gguf(saved_model, path, Settings("f16"))
    assert path.read_text() == "precious"
    export_gguf(saved_model, path, Settings("f16", overwrite=True))
    assert path.read_bytes()[:4] == b"GGUF"


def test_other_models_are_refused(tiny_tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    folder = save(tmp_path / "llama", LlamaForCausalLM(config), tiny_tokenizer)
    with pytest.raises(ConfigError, match=r"is a llama, expected a fanformer: llama.cpp's own"):
        export_gguf(folder, tmp_path, Settings("f16"))


def test_other_tokenizers_are_refused(saved_model, loaded, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>")
    folder = save(tmp_path / "words", loaded.model, tokenizer)
    with pytest.raises(ConfigError, match=r"the tokenizer is WordLevel with the steps \['Whitespace'\], expected byte"):
        export_gguf(folder, tmp_path, Settings("f16"))


def test_values_that_a_type_lacks_are_refused(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model(vocab_size=320)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 1e6
    folder = save(tmp_path / "model", model, tiny_tokenizer)
    with pytest.raises(ConfigError, match=r"`lm_head.weight` has values beyond 65504, which f16 lacks: use bf16"):
        export_gguf(folder, tmp_path, Settings("f16"))
    export_gguf(folder, tmp_path, Settings("bf16"))


def test_calibration_that_has_no_effect_or_too_little_text_is_refused(saved_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat. " * 20)
    with pytest.raises(ConfigError, match=r"`--calibration` has no effect on the type bf16: leave it out"):
        export_gguf(saved_model, tmp_path, Settings("bf16", calibration=str(text)))
    needs_ggml()
    with pytest.raises(ConfigError, match=r"`--calibration-tokens` must be at least 1024, got 5"):
        export_gguf(saved_model, tmp_path, Settings("q4_0", calibration=str(text), calibration_tokens=5))
    with pytest.raises(DataError, match=r"has \d+ tokens, expected at least 1024: give more text"):
        export_gguf(saved_model, tmp_path, Settings("q4_0", calibration=str(text)))


def test_importance_is_the_mean_square_of_each_layers_input(loaded, tmp_path):
    from fanformer.gguf.importance import importance

    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and spoke of small things. " * 200)
    told = []
    found = importance(*loaded, str(text), 1500, on_progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (1500, 1500)
    assert {name for name, value in loaded.model.state_dict().items() if value.ndim == 2} - found.keys() == {
        "model.embed_tokens.weight"
    }
    ids = [0, *loaded.tokenizer(text.read_text(), add_special_tokens=False).input_ids][:1500]
    width = loaded.model.config.max_position_embeddings
    seen = []
    handle = loaded.model.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    with torch.no_grad():
        for start in range(0, 1500, width):
            loaded.model(torch.tensor([ids[start : start + width]]))
    handle.remove()
    expected = torch.cat(seen).square().mean(0).numpy()
    np.testing.assert_allclose(found["lm_head.weight"], expected, rtol=1e-5)


def test_importance_of_a_tied_head_is_that_of_the_embedding(tiny_model, tiny_tokenizer, tmp_path):
    from fanformer.gguf.importance import importance

    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and spoke of small things. " * 200)
    apart = tiny_model(vocab_size=320)
    tied = tiny_model(vocab_size=320, tie_word_embeddings=True)
    found = {
        name: importance(model, tiny_tokenizer, str(text), 1024) for name, model in (("apart", apart), ("tied", tied))
    }
    assert "model.embed_tokens.weight" not in found["apart"]
    matrices = {name: value for name, value in tied.named_parameters() if value.ndim == 2 and value.numel()}
    assert found["tied"].keys() == matrices.keys()
    assert found["tied"]["model.embed_tokens.weight"].shape == (64,)


def test_missing_extra_is_named_before_the_work_begins(saved_model, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ggml", None)
    with pytest.raises(DependencyError, match=r"need ggml-python, which is not installed: .*fanformer\[gguf\]"):
        export_gguf(saved_model, tmp_path, Settings("q4_k"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", BLOCKS)
def test_filled_up_and_mixed_files_stay_the_function(wide, token_ids, kind):
    """F 250 becomes 256: the added channels are 0, so that what is lost is the quantization's alone."""
    needs_ggml()
    original, back = load(wide, device="cpu").model, load(export(wide, kind), device="cpu").model
    assert (original.config.intermediate_size, back.config.intermediate_size) == (250, 256)
    for layer in back.model.layers:
        assert not layer.mlp.gate_proj.weight[250:].any()
        assert not layer.mlp.up_proj.weight[250:].any()
        assert not layer.mlp.gate_proj.bias[250:].any()
    # the same numbers without the added channels give the same logits
    state = back.state_dict()
    cut = {name: state[name][tuple(slice(length) for length in value.shape)]
           for name, value in original.state_dict().items()}  # fmt: skip
    original.load_state_dict(cut)
    with torch.no_grad():
        expected, found = original(token_ids(2, 20)).logits, back(token_ids(2, 20)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_errors_fall_with_the_bits(wide):
    needs_ggml()
    errors = {}
    for kind in BLOCKS:
        path = export(wide, kind)
        tensors = json.loads(report_file(path).read_text())["tensors"]
        item = next(item for item in tensors if item["name"] == "blk.1.attn_output_a.weight")
        assert item["type"] == kind
        errors[kind] = item["relative_error"]
    # what normal numbers lose, measured: 0.005, 0.02, 0.04, 0.07 and 0.09
    assert errors["q8_0"] < 0.008 < errors["q6_k"] < 0.025 < errors["q5_k"] < 0.045 < errors["q4_k"] < errors["q4_0"]
    assert errors["q4_0"] < 0.11


def test_importance_lowers_the_error_where_it_counts(wide, tmp_path):
    needs_ggml()
    from fanformer.gguf.importance import importance

    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and spoke of small things. " * 200)
    original = load(wide, device="cpu")
    weights = importance(*original, str(text), 2000)
    lost = {}
    for name, settings in (("plain", {}), ("weighted", {"calibration": str(text), "calibration_tokens": 2000})):
        model = load(export(wide, "q4_k", tmp_path / f"{name}.gguf", **settings), device="cpu").model
        state, exact = model.state_dict(), original.model.state_dict()
        names = [f"model.layers.{layer}.self_attn.o_proj.input.factor.weight" for layer in range(2)]
        lost[name] = sum(float((((state[n] - exact[n]) ** 2).numpy() * weights[n]).sum()) for n in names)
    assert lost["weighted"] < lost["plain"]
    assert json.loads(report_file(tmp_path / "weighted.gguf").read_text())["weighted"]


def test_importance_lowers_the_error_of_a_tied_head(tiny_model, tiny_tokenizer, tmp_path):
    needs_ggml()
    from fanformer.gguf.importance import importance

    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and spoke of small things. " * 200)
    folder = save(tmp_path / "model", tiny_model(vocab_size=320, tie_word_embeddings=True), tiny_tokenizer)
    original = load(folder, device="cpu")
    weights = importance(*original, str(text), 2000)["model.embed_tokens.weight"]
    exact, lost = original.model.get_input_embeddings().weight, {}
    for name, settings in (("plain", {}), ("weighted", {"calibration": str(text), "calibration_tokens": 2000})):
        path = export(folder, "q4_0", tmp_path / f"{name}.gguf", embedding_type="q4_0", **settings)
        stored = load(path, device="cpu").model.get_input_embeddings().weight
        lost[name] = float(((stored - exact).detach().numpy() ** 2 * weights).sum())
    assert 0 < lost["weighted"] < lost["plain"]
