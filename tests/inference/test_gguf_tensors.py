"""Architecture and tensors of a GGUF file: those of the model, for every switch, and back."""

import dataclasses

import pytest

from fanformer.errors import CheckpointError
from fanformer.inference.gguf_architecture import Architecture, shortest
from fanformer.inference.gguf_tensors import tensor_specs
from tests.gguf_models import STATIC_ROPES, VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # FAN without a part


class Header:
    """Metadata as a file has it."""

    def __init__(self, model, **changes):
        self.metadata = {key: value for key, (_, value) in model.metadata().items()}
        self.metadata.update({f"fanformer.{key.replace('__', '.')}": value for key, value in changes.items()})
        self.tensors = {spec.name for spec in tensor_specs(model)}

    def fail(self, reason):
        return CheckpointError(f"the file: {reason}")


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_tensors_are_the_state_dict(tiny_model, fields):
    model = tiny_model(**fields)
    specs = tensor_specs(Architecture.from_config(model.config))
    state = model.state_dict()
    if fields.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    filled = {name: tuple(value.shape) for name, value in state.items() if value.numel()}
    assert {spec.parameter: spec.shape for spec in specs} == filled
    assert len({spec.name for spec in specs}) == len(specs)
    assert all(len(spec.name) < 64 for spec in specs)


@pytest.mark.parametrize(
    "fields",
    [*VARIANTS.values(), *({"rope_parameters": rope} for rope in STATIC_ROPES.values())],
    ids=[*VARIANTS, *STATIC_ROPES],
)
def test_metadata_gives_the_configuration_back(tiny_config, fields):
    config = tiny_config(**fields)
    model = Architecture.from_config(config)
    found = Architecture.from_file(Header(model))
    assert found == model
    assert type(config)(**found.config_fields(), dropout=0.0).to_dict() == config.to_dict()


def test_float32_gives_the_number_that_was_meant():
    import numpy as np

    for value in (1e-5, 1e-6, 10000.0, 500000.0, 0.1):
        assert shortest(float(np.float32(value))) == value


def test_rank_is_the_configurations(tiny_config):
    for fields in VARIANTS.values():
        config = tiny_config(**fields)
        model = Architecture.from_config(config)
        for branch in ("attention", "ffn"):
            for role in ("readers", "writer"):
                assert model.rank_for(branch, role) == config.cola_rank_for(branch, role)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_length": "64"}, r"`fanformer.embedding_length` must be a whole number .* got '64'"),
        ({"embedding_length": 2**40}, r"`fanformer.embedding_length` must be a whole number from 1 to 16777216"),
        ({"embedding_length": True}, r"`fanformer.embedding_length` must be a whole number"),
        ({"block_count": 0}, r"`fanformer.block_count` must be a whole number"),
        ({"cola__norm": 1}, r"`fanformer.cola.norm` must be true or false, got 1"),
        ({"fan__placement": "everywhere"}, r"`fanformer.fan.placement` must be one of ffn, attention, both, .*, got"),
        ({"fan__placement": "ffn", "cola__layers": "attention"}, r"'ffn' needs low-rank layers in ffn, got full rank"),
        ({"fan__ratio": 0.6}, r"`fanformer.fan.ratio` must be in \[0.0, 0.5\], got 0.6"),
        ({"fan__ratio": float("nan")}, r"`fanformer.fan.ratio` must be a finite number"),
        ({"attention__layer_norm_rms_epsilon": 0.0}, r"rms_epsilon` must be in"),
        ({"attention__head_count_kv": 3}, r"`fanformer.attention.head_count` must be a multiple"),
        ({"attention__key_length": 15}, r"`fanformer.attention.key_length` must be even, got 15"),
        ({"rope__scaling__type": "dynamic"}, r"`fanformer.rope.scaling.type` must be one of default, linear"),
        ({"rope__freq_base": -1.0}, r"`fanformer.rope.freq_base` must be above 0"),
        ({"cola__rank_ratio": 2.0}, r"`fanformer.cola.rank_ratio` must be in \(0, 1\], got 2.0"),
    ],
)
def test_metadata_out_of_range_is_refused(tiny_config, changes, message):
    with pytest.raises(CheckpointError, match=message):
        Architecture.from_file(Header(Architecture.from_config(tiny_config()), **changes))


def test_missing_key_is_named(tiny_config):
    header = Header(Architecture.from_config(tiny_config()))
    del header.metadata["fanformer.cola.input"]
    with pytest.raises(CheckpointError, match=r"`fanformer.cola.input` must be a text, got nothing"):
        Architecture.from_file(header)


def test_architecture_has_every_field_that_decides_the_arithmetic(tiny_config):
    """A field added to the configuration must be stored, or be listed here as one that only training reads."""
    training_only = {
        "dropout", "attention_dropout", "gate_initial", "initializer_range", "embedding_initializer_range",
        "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    }  # fmt: skip
    own = {name for name in type(tiny_config()).__annotations__ if not name.startswith("_")}
    own -= {"model_type", "keys_to_ignore_at_inference", "base_model_pp_plan"}
    assert {item.name for item in dataclasses.fields(Architecture)} == own - training_only
