"""An ordinary transformers model: Auto classes, saving and loading, and folders that carry their own code."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fanformer.model import FANformerConfig, FANformerForCausalLM, FANformerModel
from tests.reference.initialisation import assert_starts_as_expected
from tests.tiny_models import FULL_RANK, PAPERS_COLA

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = [
    {},
    {"tie_word_embeddings": True},
    {"fan_placement": "layer", **FULL_RANK},
    {**PAPERS_COLA, "gate_initial": -2.0},
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
]


@pytest.fixture
def nan_memory():
    """Fill fresh memory with NaN, so that a parameter that nobody sets cannot pass by luck."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def tensors(model):
    """Return every parameter and every buffer, persistent or not."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_same_tensors(ours, theirs):
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.device == theirs[name].device, name
        assert torch.equal(tensor, theirs[name]), name


def test_auto_classes_build_our_classes(tiny_config, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is FANformerConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is FANformerModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is FANformerForCausalLM
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is FANformerForCausalLM


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_parameter_and_buffer_survives_saving_bit_for_bit(tiny_model, nan_memory, tmp_path, fields):
    model = tiny_model(**fields)
    model.save_pretrained(tmp_path)
    assert_same_tensors(model, FANformerForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_model_built_on_meta_takes_the_saved_weights(tiny_model, nan_memory, tmp_path, token_ids, fields):
    model = tiny_model(**fields)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        assigned, emptied = FANformerForCausalLM(model.config), FANformerForCausalLM(model.config)
    assert {tensor.device.type for tensor in tensors(assigned).values()} == {"meta"}
    assigned.load_state_dict(model.state_dict(), assign=True)
    emptied.to_empty(device="cpu").load_state_dict(model.state_dict())
    input_ids = token_ids(1, 5)
    for loaded in (assigned, emptied, FANformerForCausalLM.from_pretrained(tmp_path)):
        assert_same_tensors(model, loaded)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(input_ids).logits, model(input_ids).logits)


def test_bf16_survives_saving(tiny_model, nan_memory, tmp_path, token_ids):
    tiny_model().save_pretrained(tmp_path / "fp32")
    model = FANformerForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "bf16")
    loaded = FANformerForCausalLM.from_pretrained(tmp_path / "bf16")  # the dtype is that of the file
    assert_same_tensors(model, loaded)
    assert loaded(token_ids(1, 5)).logits.dtype == torch.bfloat16


def test_casting_to_bf16_leaves_rotary_angles_exact(tiny_model):
    # A buffer of frequencies would be rounded to 8 bits: at position 100,000 the angle would be off by hundreds.
    rotary = tiny_model().model.rotary_emb
    positions = torch.tensor([[100_000]])
    before = rotary(positions, torch.float32)
    after = rotary.to(torch.bfloat16)(positions, torch.float32)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_sharded_checkpoint_survives_saving(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_tensors(model, FANformerForCausalLM.from_pretrained(tmp_path))


def test_base_model_and_head_load_each_others_folders(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "head")
    base = FANformerModel.from_pretrained(tmp_path / "head")
    assert_same_tensors(base, model.model)
    base.save_pretrained(tmp_path / "base")
    assert_same_tensors(FANformerForCausalLM.from_pretrained(tmp_path / "base").model, model.model)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"fan_placement": "layer", **FULL_RANK, "norm_placement": "pre"},
        {"tie_word_embeddings": True},
        {
            **PAPERS_COLA,
            "gate_up_rank": None,
            "down_rank": None,
            "fan_placement": "none",
            "gate_initial": -2.0,
        },
    ],
    ids=str,
)
def test_parameter_missing_from_a_checkpoint_starts_as_before_training(tiny_model, nan_memory, tmp_path, fields):
    model = tiny_model(num_hidden_layers=1, **fields)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    saved = load_file(path)
    assert len(saved) >= 15
    for missing in saved:
        save_file({name: tensor for name, tensor in saved.items() if name != missing}, path, {"format": "pt"})
        loaded, info = FANformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert missing in info["missing_keys"]
        parameters = dict(loaded.named_parameters())
        assert_starts_as_expected(missing, parameters[missing].detach(), model.config)
        for name, tensor in tensors(model).items():
            if name != missing and not (missing == "model.embed_tokens.weight" and fields.get("tie_word_embeddings")):
                assert torch.equal(tensor, tensors(loaded)[name]), f"without {missing}, {name} is not as saved"


def test_resized_vocabulary_keeps_old_rows(tiny_model):
    model = tiny_model()
    before = model.get_input_embeddings().weight.clone(), model.lm_head.weight.clone()
    model.resize_token_embeddings(260)
    assert model.config.vocab_size == 260
    assert torch.equal(model.get_input_embeddings().weight[:256], before[0])
    assert torch.equal(model.lm_head.weight[:256], before[1])


def test_saved_folder_names_the_class_behind_every_auto_class(tiny_model, tmp_path):
    model = tiny_model()
    for saved in (model, model.model):
        path = tmp_path / type(saved).__name__
        saved.save_pretrained(path)
        assert json.loads((path / "config.json").read_text())["auto_map"] == {
            "AutoConfig": "configuration_fanformer.FANformerConfig",
            "AutoModel": "modeling_fanformer.FANformerModel",
            "AutoModelForCausalLM": "modeling_fanformer.FANformerForCausalLM",
            "AutoModelForSequenceClassification": "modeling_fanformer.FANformerForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_fanformer.FANformerForTokenClassification",
        }
        code = {file.name for file in path.glob("*.py")}
        assert code == {"configuration_fanformer.py", "modeling_fanformer.py", "recurrence_fanformer.py"}


def test_base_model_takes_no_offence_at_the_head_but_at_what_belongs_nowhere(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, output_loading_info=True)[1]["unexpected_keys"] == set()
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "lm_head.bias": torch.zeros(4)}, tmp_path / "model.safetensors", {"format": "pt"})
    for kind in (AutoModel, AutoModelForCausalLM):
        assert kind.from_pretrained(tmp_path, output_loading_info=True)[1]["unexpected_keys"] == {"lm_head.bias"}


WITHOUT_OUR_PACKAGE = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "fanformer":
                raise ModuleNotFoundError("blocked: " + name)

    sys.meta_path.insert(0, Blocker())
    import torch
    from pathlib import Path
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    folder, again = Path(sys.argv[1]), Path(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert model.__class__.__module__.startswith("transformers_modules."), model.__class__
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size == 64
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(base).__name__ == "FANformerModel"
    io = load_file(folder / "io.safetensors")
    with torch.no_grad():
        assert torch.equal(model(io["input_ids"]).logits, io["logits"])
    generated = model.generate(io["input_ids"], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, io["generated"])
    model.save_pretrained(again)
    for kind in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        classifier = kind.from_pretrained(folder, trust_remote_code=True, num_labels=3)
        assert classifier(io["input_ids"]).logits.shape[-1] == 3
        assert torch.equal(classifier.model.embed_tokens.weight, model.model.embed_tokens.weight)
        classifier.save_pretrained(again / "classifier")
        kind.from_pretrained(again / "classifier", trust_remote_code=True)
    print("loaded without our package")
"""


@pytest.mark.ci
def test_saved_folder_loads_in_a_process_without_our_package(tiny_model, token_ids, tmp_path):
    model = tiny_model()
    folder, again = tmp_path / "model", tmp_path / "again"
    model.save_pretrained(folder)
    input_ids = token_ids(1, 7)
    with torch.no_grad():
        logits = model(input_ids).logits
    generated = model.generate(input_ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    save_file({"input_ids": input_ids, "logits": logits, "generated": generated}, folder / "io.safetensors")

    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_OUR_PACKAGE), folder, again],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "loaded without our package" in result.stdout, result.stderr
    assert "UNEXPECTED" not in result.stderr  # the head's weights, in the report of the base model
    # Saved again from there, the folder is as complete as before.
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    for name in ("configuration_fanformer.py", "modeling_fanformer.py", "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
