"""A model folder either loads whole or is refused with one line that says what is wrong."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from fanformer.errors import CheckpointError, ConfigError
from fanformer.generation.loading import load, load_config
from fanformer.machine.devices import resolve_device, resolve_dtype


def edit_config(folder, **changes):
    file = folder / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder, **arguments):
    with pytest.raises(CheckpointError) as caught:
        load(folder, **{"device": "cpu", **arguments})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_saved_model_loads_bit_for_bit(saved_model):
    model, tokenizer = load(saved_model, device="cpu")
    saved = load_file(saved_model / "model.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())
    assert not model.training
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_any_causal_model_of_transformers_loads(tmp_path, tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert type(load(tmp_path, device="cpu").model).__name__ == "LlamaForCausalLM"


def test_dtype_auto_keeps_the_saved_one_and_a_name_converts(saved_model, tmp_path):
    model, tokenizer = load(saved_model, device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu").model.dtype == torch.bfloat16


def test_missing_folder_is_named_with_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal("nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "fanformer train" in message


def test_missing_folder_that_reads_like_a_hub_name_says_how_to_fetch_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "hf download someone/model --local-dir" in refusal("someone/model")


def test_file_instead_of_folder_is_refused(saved_model):
    assert "is a file, expected a model folder" in refusal(saved_model / "model.safetensors")


def test_folder_without_config_offers_its_newest_checkpoint(saved_model, tmp_path):
    import shutil

    assert "no config.json" in refusal(tmp_path)
    for step in (5, 10):
        shutil.copytree(saved_model, tmp_path / f"checkpoint-{step}")
    assert "checkpoint-10" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\udcff".encode("utf-8", "surrogateescape")])
def test_broken_config_is_refused(model_copy, content):
    write = (model_copy / "config.json").write_bytes
    write(content if isinstance(content, bytes) else content.encode())
    assert "config.json is damaged" in refusal(model_copy)


def test_config_value_out_of_range_is_reported_like_any_setting(model_copy):
    edit_config(model_copy, fan_ratio=0.7)
    assert "`fan_ratio` must be in [0, 0.5], got 0.7" in refusal(model_copy)


def test_unknown_config_key_names_the_nearest(model_copy):
    edit_config(model_copy, hidden_sise=64)
    assert "did you mean `hidden_size`?" in refusal(model_copy)


def test_unknown_architecture_is_refused_and_its_code_not_run(model_copy, capfd):
    edit_config(
        model_copy, model_type="other", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"}
    )
    (model_copy / "evil.py").write_text("raise SystemExit('ran')")
    assert "model_type 'other'" in refusal(model_copy)
    assert "trust" not in "".join(capfd.readouterr())  # nobody is asked on the terminal


@pytest.mark.parametrize("architecture", ["FANformerModel", "BertForMaskedLM"])
def test_model_without_a_language_head_is_refused(model_copy, architecture):
    edit_config(model_copy, architectures=[architecture])
    assert f"holds {architecture}, expected a causal language model" in refusal(model_copy)


def test_encoder_is_refused(tmp_path):
    from transformers import ViTConfig

    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    assert "holds vit, expected a causal language model" in refusal(tmp_path)


def test_folder_without_weights_is_refused(model_copy):
    (model_copy / "model.safetensors").unlink()
    (model_copy / "training_args.bin").write_bytes(b"")  # no weights, though of a suffix that weights have
    assert "expected model.safetensors" in refusal(model_copy)


class Bomb:
    """Unpickling this makes a file, which shows that code ran."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_weights_are_refused_and_never_opened(model_copy, tmp_path):
    (model_copy / "model.safetensors").unlink()
    (model_copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    message = refusal(model_copy)
    assert "pytorch_model.bin" in message
    assert "never loaded" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, 5, 100, 5000, -1])
def test_truncated_weights_are_refused(model_copy, size):
    file = model_copy / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(size if size >= 0 else file.stat().st_size - 1)
    message = refusal(model_copy)
    assert "truncated" in message
    assert str(file) in message


def test_weights_with_a_broken_header_are_refused(model_copy):
    with (model_copy / "model.safetensors").open("r+b") as stream:
        stream.seek(8)
        stream.write(b"not json")
    assert "corrupt: its header" in refusal(model_copy)


@pytest.fixture
def sharded(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    loaded.tokenizer.save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


def test_sharded_weights_load_and_a_missing_or_truncated_shard_is_named(sharded):
    load(sharded, device="cpu")
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    assert f"{shard.name} is truncated" in refusal(sharded)
    shard.unlink()
    assert f"{shard.name} is missing" in refusal(sharded)
    (sharded / "model.safetensors.index.json").write_text("{}")
    assert "weight_map" in refusal(sharded)


def test_vocabulary_that_does_not_fit_the_weights_is_refused(model_copy):
    edit_config(model_copy, vocab_size=384)
    message = refusal(model_copy)
    assert "vocabulary" in message
    assert "384" in message
    assert "320 rows" in message


def test_weights_of_another_shape_are_refused(model_copy):
    edit_config(model_copy, intermediate_size=128)
    assert "do not fit its config.json: `model.layers.0.mlp" in refusal(model_copy)


def test_missing_and_unknown_weights_are_refused(model_copy):
    edit_weights(model_copy, lambda tensors: tensors.pop("model.norm.weight"))
    assert "lacks `model.norm.weight`" in refusal(model_copy)
    edit_weights(model_copy, lambda t: t.update({"model.norm.weight": torch.ones(64), "spare": torch.ones(1)}))
    assert "has unknown `spare`" in refusal(model_copy)


def test_weights_that_are_not_finite_are_refused(model_copy):
    edit_weights(model_copy, lambda tensors: tensors["lm_head.weight"][0, 0].fill_(torch.nan))
    assert "`lm_head.weight` holds values that are not finite" in refusal(model_copy)


def test_missing_tokenizer_is_named(model_copy):
    (model_copy / "tokenizer.json").unlink()
    assert "no tokenizer in" in refusal(model_copy)


def test_broken_tokenizer_is_refused(model_copy):
    (model_copy / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "cannot be read" in refusal(model_copy)


def test_tokenizer_larger_than_the_vocabulary_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model(vocab_size=256).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "ids up to 299" in message
    assert "vocab_size is 256" in message


def test_configuration_is_read_without_weights(saved_model):
    assert load_config(saved_model).vocab_size == 320


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_device_is_an_error(saved_model):
    with pytest.raises(ConfigError, match="`device` 'cuda' is not there"):
        load(saved_model, device="cuda")


def test_unknown_device_and_dtype_are_errors():
    with pytest.raises(ConfigError, match="must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(ConfigError, match="`device` 'cpu:1' is not there"):
        resolve_device("cpu:1")
    with pytest.raises(ConfigError, match="`dtype` must be auto, float32, bfloat16, float16, got 'int8'"):
        resolve_dtype("int8")
