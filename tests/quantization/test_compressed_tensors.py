"""GPTQ and AWQ folders: what is refused before any work; tests/ci quantizes a model where the extra is installed."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fanformer.data.held_out import held_out_stream
from fanformer.errors import CheckpointError, ConfigError, DataError, DependencyError
from fanformer.loading import load
from fanformer.quantization.compressed_tensors import export_compressed, restore_dtypes
from fanformer.quantization.quantized_folder import Settings

installed = importlib.util.find_spec("llmcompressor") is not None


@pytest.mark.skipif(installed, reason="the extra `quantize` is installed")
def test_missing_extra_is_named(saved_model, tmp_path):
    with pytest.raises(DependencyError, match=r"pip install 'fanformer\[quantize\]'"):
        export_compressed(saved_model, tmp_path / "out", Settings("gptq"))


def test_quantized_folder_is_refused(model_copy, tmp_path):
    config = json.loads((model_copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (model_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is quantized already: give the folder that it was made from"):
        export_compressed(model_copy, tmp_path / "out", Settings("gptq"))


@pytest.mark.parametrize(
    ("method", "module", "packages", "extra"),
    [
        ("compressed-tensors", "compressed_tensors", "compressed-tensors", "quantize"),
        ("gptq", "gptqmodel", "gptqmodel optimum", "gptq"),
    ],
)
def test_reading_a_quantized_folder_names_the_package(model_copy, method, module, packages, extra):
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    config = json.loads((model_copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (model_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(DependencyError, match=rf"pip install {packages} \(the extra fanformer\[{extra}\] has it\)"):
        load(model_copy)


def test_taken_folder_is_refused(saved_model, tmp_path):
    (tmp_path / "mine.txt").write_text("a")
    with pytest.raises(ConfigError, match="holds no quantized model: give another `--output-dir`"):
        export_compressed(saved_model, tmp_path, Settings("gptq", overwrite=True))
    (tmp_path / "quantization.json").write_text("{}")
    with pytest.raises(ConfigError, match="is there already: give another `--output-dir`, or `--overwrite`"):
        export_compressed(saved_model, tmp_path, Settings("gptq"))
    with pytest.raises(ConfigError, match="is the model's own folder"):
        export_compressed(saved_model, saved_model, Settings("gptq", overwrite=True))


def test_unknown_method_is_refused(saved_model, tmp_path):
    with pytest.raises(ConfigError, match="`method` must be one of gptq, awq, got 'rtn'"):
        export_compressed(saved_model, tmp_path / "out", Settings("rtn"))


@pytest.mark.skipif(not installed, reason="needs the extra `quantize`")
def test_missing_tokenizer_is_one_line(model_copy, tmp_path):
    (model_copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        export_compressed(model_copy, tmp_path / "out", Settings("gptq", calibration="stdlib"))


def test_what_is_not_quantized_is_written_in_the_dtype_that_its_file_had(model_copy, tmp_path):
    """The file's, which may be narrower than the configuration's: the model in the box is computed with in float32."""
    source, out = model_copy / "model.safetensors", tmp_path / "out"
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(source).items()}
    norm = next(name for name in narrow if "norm" in name)
    narrow[norm] = narrow[norm].float()
    save_file(narrow, source, metadata={"format": "pt"})
    assert json.loads((model_copy / "config.json").read_text())["dtype"] == "float32"
    layer = next(name for name in narrow if ".mlp." in name and name.endswith(".weight")).removesuffix(".weight")
    kept = {name: tensor for name, tensor in narrow.items() if name != f"{layer}.weight"} | {"new": torch.rand(4)}
    cut = {f"{layer}.weight_packed": torch.ones(4, dtype=torch.int32), f"{layer}.weight_scale": torch.rand(4)}
    out.mkdir()
    file = out / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in kept.items()} | cut, file, metadata={"format": "pt"})
    restore_dtypes(out, {layer: 32, "lm_head": None}, model_copy)
    written, changed = file.stat(), file.read_bytes()
    restore_dtypes(out, {layer: 32, "lm_head": None}, model_copy)
    assert (file.stat().st_ino, file.read_bytes()) == (written.st_ino, changed)  # there is nothing left to change
    found = load_file(file)
    assert found.keys() == (kept | cut).keys()
    for name, tensor in (kept | cut).items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    with safe_open(file, "pt") as written:
        assert written.metadata() == {"format": "pt"}
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


def test_a_folder_of_float32_stays_as_the_library_wrote_it(model_copy, tmp_path):
    file = shutil.copy(model_copy / "model.safetensors", tmp_path / "model.safetensors")
    written, before = file.stat(), file.read_bytes()
    restore_dtypes(tmp_path, {"lm_head": None}, model_copy)
    assert (file.stat().st_ino, file.read_bytes()) == (written.st_ino, before)


def test_too_little_text_is_refused(loaded, tmp_path):
    (tmp_path / "short.txt").write_text("a cat")
    with pytest.raises(DataError, match=r"short.txt` has \d+ tokens, expected at least 1024: give more text"):
        held_out_stream(tmp_path, loaded.tokenizer, str(tmp_path / "short.txt"), 4096)
    with pytest.raises(ConfigError, match="`--calibration-tokens` must be at least 1024, got 10"):
        held_out_stream(tmp_path, loaded.tokenizer, "stdlib", 10)


def test_held_out_data_of_a_run_is_found_and_its_loss_told(loaded, tmp_path):
    (tmp_path / "run.yaml").write_text("configuration: {eval_data: null}\ndata: {folder: gone}\n")
    with pytest.raises(DataError, match=r"what the run held out cannot be read .*: give text that it was not trained"):
        held_out_stream(tmp_path, loaded.tokenizer, None, 4096)
    (tmp_path / "run.yaml").write_text("data: []\n")
    with pytest.raises(ConfigError, match="does not say where its data is"):
        held_out_stream(tmp_path, loaded.tokenizer, None, 4096)
