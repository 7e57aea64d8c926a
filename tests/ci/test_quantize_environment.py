"""GPTQ and AWQ in an environment that has the extra `quantize`, with the transformers that llm-compressor wants."""

import json
from pathlib import Path

import pytest

from fanformer.loading import model_in_the_box

pytestmark = pytest.mark.ci

# what the extra brings beside what this environment has; without what only GPUs need (nvidia-ml-py)
PINS = (
    "llmcompressor==0.14.0.1",
    "compressed-tensors==0.19.0",
    "transformers==5.17.0",
    "huggingface-hub==1.33.0",
    "httpx==0.28.1",
    "httpcore==1.0.9",
    "anyio==4.16.0",
    "h11==0.16.0",
    "auto-round==0.15.1",
    "datasets==5.2.0",
    "loguru==0.7.3",
    "pillow==13.0.0",
    "py-cpuinfo==9.0.0",
    "requests==2.34.2",
    "psutil==7.2.2",
    "pandas==3.1.1",
    "pyarrow==26.0.1",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "xxhash==4.1.0",
    "python-dateutil==2.9.0.post0",
    "six==1.17.0",
    "tzdata==2026.6",
    "urllib3==2.8.0",
    "charset-normalizer==3.5.3",
)
FILES = ("tests/quantization/test_compressed_tensors.py", "tests/quantization/test_linear_layers.py")
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
print(tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0]))
"""


@pytest.fixture(scope="module")
def python(python_with):
    """An interpreter that has PINS in front of what this one has."""
    return python_with(*PINS)


@pytest.mark.timeout(1800)
def test_refusals_hold_where_the_extra_is_installed(fanformer, repository):
    out = fanformer("-p", "no:cacheprovider", *FILES, program=("-m", "pytest"), folder=repository)
    assert "needs the extra" not in out


@pytest.mark.timeout(1800)
def test_with_the_oldest_transformers_a_cache_changes_no_text(fanformer, repository):
    assert "transformers==5.17.0" in PINS
    assert '"transformers>=5.17"' in (repository / "pyproject.toml").read_text()
    fanformer("-p", "no:cacheprovider", "tests/model/test_generation.py", program=("-m", "pytest"), folder=repository)


@pytest.mark.timeout(1800)
def test_the_model_in_the_box_is_quantized_by_both_methods_and_writes(fanformer, english, tmp_path):
    """Quantize it, load it with this package and without, let it write, and measure the loss of bits."""
    calibration, text = english
    box, story = model_in_the_box(), "Once upon a time, a little girl"
    before = json.loads(fanformer("eval", box, "--text", text, "--device", "cpu", "--json", "-"))
    for method, bits, most in (("gptq", 4, 0.05), ("gptq", 8, 5e-3), ("awq", 4, 0.05)):
        name = f"{method}{bits}"
        words = ("--format", method, "--bits", bits, "--calibration", calibration, "--calibration-tokens", 4096)
        assert "embed_tokens" in fanformer("quantize", box, *words, "--output-dir", name)
        report = json.loads((tmp_path / name / "quantization.json").read_text())
        methods = {item["method"] for item in report["layers"]}
        assert methods == ({"gptq", "none"} if method == "gptq" else {"awq+gptq", "gptq", "none"})
        assert {item["part"] for item in report["layers"] if item["method"] == "none"} == {"embedding", "head"}
        assert all(0 < item["output_error"] < 0.5 for item in report["layers"] if item["method"] != "none")
        assert report["bytes"] < report["bytes_before"]
        assert fanformer("generate", name, story, "--max-length", 5).startswith(story)
        assert fanformer(name, story, program=("-c", LOAD)).startswith(story)
        after = json.loads(fanformer("eval", name, "--text", text, "--device", "cpu", "--json", "-"))
        assert after["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=most), name
        assert after["bits_per_byte"] != before["bits_per_byte"]


@pytest.mark.timeout(1800)
def test_an_adapter_is_quantized_with_its_base_as_the_merged_folder_is(fanformer, tmp_path):
    Path(tmp_path / "mine.txt").write_text("a line of text, number one and two and three.\n" * 2000)
    rows = [{"prompt": f"{word}?", "completion": word} for word in ("one", "two", "three", "line", "text")]
    Path(tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ("--max-steps", 3, "--sequence-length", 64, "--compile", "off", "--precision", "float32")
    layers = ("--set", "model.num_hidden_layers=2")
    fanformer("train", "--preset", "nano", "--data", "mine.txt", *short, *layers, "--output-dir", "out")
    fanformer("finetune", "out", "--data", "rows.jsonl", "--lora", *short, "--output-dir", "tuned")
    words = ("--format", "gptq", "--calibration", "mine.txt", "--calibration-tokens", 1024)
    fanformer("quantize", "tuned", *words, "--output-dir", "merged")
    fanformer("quantize", "out", "--adapter", "tuned/adapter", *words, "--output-dir", "apart")
    merged, apart = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("merged", "apart"))
    assert apart["eos_token_id"] == merged["eos_token_id"]
    losses = []
    for name in ("merged", "apart"):
        measured = fanformer("eval", name, "--text", "mine.txt", "--device", "cpu", "--json", "-")
        losses.append(json.loads(measured)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # the same weights to a rounding, which a cut may cross
    notes = json.loads((tmp_path / "apart" / "quantization.json").read_text())["notes"]
    assert any("tuned/adapter is merged into the weights" in note for note in notes)
