"""Causal language models of `transformers` that are not FANformers: what a run does with each, and what it refuses."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fanformer.errors import ConfigError
from fanformer.loading import load
from fanformer.training import chunked_loss
from fanformer.training.chunked_loss import skip_logits
from fanformer.training.configuration import resolve_tuning
from fanformer.training.folder import read_records
from fanformer.training.other_models import blocks, has_plain_head
from fanformer.training.run import train
from tests.saved_models import tiny_tokenizer  # noqa: F401
from tests.training.conftest import Notebook

TINY = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
OWN = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "mamba": {"state_size": 4},
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.1},
}
PLAIN = {"llama": True, "gpt2": True, "qwen3": True, "granite": False, "gemma2": False, "cohere": False, "phi": False}


def other(kind: str) -> torch.nn.Module:
    """Return a tiny model whose weights are large enough for its logits to tell of what becomes of them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY, **OWN.get(kind, {})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lm_head.bias"):
                parameter.normal_()
    return model.eval()


@pytest.fixture
def tune(tmp_path, tiny_tokenizer):  # noqa: F811
    """Tune a tiny model of a kind on three questions; returns the result and the notes."""

    def start(kind: str, preference: bool = False, **fields: object) -> tuple[object, list[str]]:
        base = tmp_path / kind
        model = other(kind)
        model.save_pretrained(base)
        assert isinstance(tiny_tokenizer, PreTrainedTokenizerFast)
        tiny_tokenizer.save_pretrained(base)
        rows = [{"prompt": f"{word}?", "completion": word} for word in ("cat", "mat", "small")] * 2
        if preference:
            rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "def"} for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        given = {
            "data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "out"), "batch_size": 2, "max_steps": 2,
            "device": "cpu", "precision": "float32", "compile": "off", "log_steps": 1, "sequence_length": 64, **fields,
        }  # fmt: skip
        notebook = Notebook()
        objective = {"objective": "preferences"} if preference else {}
        return train(resolve_tuning(str(base), lambda: 128, {**given, **objective}), notebook), notebook.notes

    return start


@pytest.mark.parametrize("kind", PLAIN)
def test_whether_logits_are_the_heads_products(kind):
    assert has_plain_head(other(kind)) == PLAIN[kind]


def test_blocks_are_found_where_they_are_layers_of_the_trunk():
    assert [len(blocks(other(kind))) for kind in ("llama", "granite", "gpt2")] == [2, 2, 0]


@pytest.mark.parametrize("kind", ["granite", "phi", "gpt2", "llama"])
def test_a_loss_in_parts_is_the_models_own(kind, monkeypatch):
    monkeypatch.setattr(chunked_loss, "WHOLE_BYTES", 0)
    model, ids = other(kind), torch.arange(40).reshape(2, 20)
    inputs = {"input_ids": ids, "labels": ids, "shift_labels": ids.roll(-1, 1), "num_items_in_batch": 40}
    expected = model(**inputs)
    skip_logits(model)
    found = model(**inputs)
    assert (found.logits is None) == PLAIN[kind]
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.ci
def test_gpt2_is_tuned_by_adapters_and_their_merged_weights_are_those_of_peft(tune, tmp_path):
    result, _ = tune("gpt2", lora_rank=4, learning_rate=0.05)
    merged, ids = load(result.folder, device="cpu").model, torch.arange(20)[None]
    adapted = load(tmp_path / "gpt2", device="cpu", adapter=result.folder / "adapter").model
    base = load(tmp_path / "gpt2", device="cpu").model
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (merged, adapted, base)]
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


@pytest.mark.ci
def test_gpt2_learns_preferences_from_itself_as_the_reference(tune):
    result, _ = tune("gpt2", preference=True)
    first = read_records(result.folder)[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-4)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("kind", "preference", "message"),
    [
        ("mamba", False, "a mamba, in which the conversations of a packed row see each other"),
        ("granite", True, "a granite, whose logits are more than its LM head's products"),
    ],
)
def test_what_would_be_learnt_wrongly_is_refused_before_anything_is_written(tune, tmp_path, kind, preference, message):
    with pytest.raises(ConfigError, match=message):
        tune(kind, preference=preference)
    assert not (tmp_path / "out" / "run.yaml").exists()


@pytest.mark.ci
def test_a_model_without_a_list_of_blocks_is_not_compiled(tune):
    with pytest.raises(ConfigError, match="`compile` is on, but a gpt2 has no list of blocks to compile"):
        tune("gpt2", compile="on")
    _, notes = tune("gpt2", compile="auto")
    assert any("compile off (a gpt2 has no list of blocks to compile)" in note for note in notes)
