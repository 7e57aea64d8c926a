"""The classic GPTQ layout in an environment that has GPTQModel, without the newer torch that it asks for."""

import json
from pathlib import Path

import pytest

from fanformer.model.configuration_fanformer import RANKS

pytestmark = pytest.mark.ci

# what the extra `gptq` brings beside what this environment has; its dependencies are not asked for, as they want
# another torch
PINS = (
    "gptqmodel==7.7.0",
    "optimum==2.3.0",
    "defuser==0.0.28",
    "device-smi==0.5.7",
    "logbar==0.4.15",
    "ninja==1.13.2",
    "protobuf==7.36.2",
    "pypcre==0.6.4",
    "tokenicer==0.0.14",
    "torchao==0.18.0",
)
COMPARE = """
import sys
from pathlib import Path

import torch
from fanformer.loading import load, load_model
from fanformer.quantization.gptq_v1 import stored_weight

packed, tokenizer = load(sys.argv[2], "cpu")
whole = load_model(sys.argv[1], "cpu", "float32")
ids = torch.tensor([tokenizer("a line of text, number one").input_ids])
number = 0
for name, module in packed.named_modules():
    if hasattr(module, "qweight"):
        number += 1
        weight = stored_weight(Path(sys.argv[2]), name, 4)
        x = torch.randn(5, weight.shape[1]).bfloat16()
        expected = x.float() @ weight.T + (0 if module.bias is None else module.bias.float())
        error = (module(x).float() - expected).norm() / expected.norm()
        assert error < 0.01, (name, float(error))
with torch.inference_mode():
    expected, found = whole(ids).logits, packed(ids).logits.float()
error = float((found - expected).norm() / expected.norm())
assert 0 < error < 0.2, error
print(number)
"""


@pytest.fixture(scope="module")
def python(python_with):
    """An interpreter that has PINS in front of what this one has."""
    return python_with(*PINS)


@pytest.mark.timeout(1800)
def test_a_trained_model_is_quantized_and_computes_on_packed_weights(fanformer, tmp_path):
    """Train a small model whose rows fill groups, quantize, load, compare with what is stored, generate, measure."""
    Path(tmp_path / "mine.txt").write_text("a line of text, number one and two and three.\n" * 2000)
    shape = (
        "--set",
        "model.hidden_size=128",
        "--set",
        "model.num_hidden_layers=2",
        "--set",
        "model.intermediate_size=200",
    )
    shape += tuple(word for name in RANKS for word in ("--set", f"model.{name}=96"))
    train = ("--preset", "nano", "--data", "mine.txt", "--max-steps", 10, "--sequence-length", 64)
    fanformer("train", *train, *shape, "--output-dir", "out")
    before = json.loads(fanformer("eval", "out", "--text", "mine.txt", "--device", "cpu", "--json", "-"))
    words = ("--format", "gptq-v1", "--calibration", "mine.txt", "--calibration-tokens", 4096)
    assert "embed_tokens" in fanformer("quantize", "out", *words, "--output-dir", "small")
    assert not (tmp_path / "logs").exists()
    assert not (tmp_path / "small" / "logs").exists()
    report = json.loads((tmp_path / "small" / "quantization.json").read_text())
    cut = [item for item in report["layers"] if item["method"] == "gptq"]
    assert {item["part"] for item in cut} == {"qkv_input", "q", "k", "v", "o", "gate_up_input", "gate", "up", "down"}
    assert {item["group_size"] for item in cut} == {32}  # rows of 96 fill no group of 64
    assert all(0 < item["weight_error"] < 0.2 and 0 < item["output_error"] < 0.2 for item in cut)
    assert report["bytes"] < report["bytes_before"]
    assert any("intermediate_size is filled up from 200 to 224" in note for note in report["notes"])
    assert int(fanformer("out", "small", program=("-c", COMPARE))) == len(cut)
    assert fanformer("generate", "small", "a line", "--max-length", 5).startswith("a line")
    after = json.loads(fanformer("eval", "small", "--text", "mine.txt", "--device", "cpu", "--json", "-"))
    # after ten steps the model is rough: this bound finds broken weights, not poor ones
    assert after["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=0.05)
    assert after["bits_per_byte"] != before["bits_per_byte"]
