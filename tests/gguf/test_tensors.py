"""Architecture and tensors of a GGUF file: those of the model, for every switch, and back."""

import dataclasses

import pytest

from fanformer.errors import CheckpointError
from fanformer.gguf.architecture import Architecture, shortest
from fanformer.gguf.tensors import tensor_specs
from fanformer.model import FANformerConfig
from tests.gguf_models import STATIC_ROPES, VARIANTS
from tests.tiny_models import TUNED

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPE += ("num_key_value_heads", "head_dim", "max_position_embeddings")

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


def test_p_is_the_configurations(tiny_config):
    for multiple in (1, 2, 4, 8, 16, 64):
        for ratio in (0.0, 0.01, 0.15, 0.25, 0.3, 0.375, 0.4, 0.5):
            config = tiny_config(fan_multiple=multiple, fan_ratio=ratio)
            model = Architecture.from_config(config)
            widths = [*range(1, 400), 768, 1536, 2048]
            assert [model.periodic_width(n) for n in widths] == [config.periodic_width(n) for n in widths]


BEFORE = {"cola.layers": "readers", "cola.rank_ratio": 0.75}
REPLACED = ("cola.qkv_rank", "cola.o_rank", "cola.gate_up_rank", "cola.down_rank", "cola.writer_activation")
REPLACED += ("fan.multiple",)


def header_from_before(tiny_config, **changes):
    """Return metadata as they were before each kind of layer had a rank of its own."""
    header = Header(Architecture.from_config(tiny_config(**TUNED)))
    for key in REPLACED:
        header.metadata.pop(f"fanformer.{key}", None)
    header.metadata |= {f"fanformer.{key}": value for key, value in {**BEFORE, **changes}.items()}
    return header


@pytest.mark.parametrize("layers", ["readers", "all", "attention", "ffn"])
@pytest.mark.parametrize("rank", [{"cola_rank_ratio": 0.4}, {"cola_rank_ratio": 0.75, "cola_rank": 7}], ids=str)
def test_metadata_from_before_each_kind_of_layer_had_a_rank_are_read_as_the_configuration_reads_them(
    tiny_config, layers, rank
):
    forms = {"cola_activation": "gelu", "cola_norm": False, "fan_placement": "none"}
    stored = {key.replace("_", ".", 1): value for key, value in {**rank, **forms, "cola_layers": layers}.items()}
    found = Architecture.from_file(header_from_before(tiny_config, **stored))
    shape = {name: value for name, value in found.config_fields().items() if name in SHAPE}
    config = FANformerConfig(**shape, **rank, **forms, cola_layers=layers)
    assert found == Architecture.from_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cola.layers": "mlp"}, r"`fanformer.cola.layers` must be one of readers, all, attention, ffn, got 'mlp'"),
        ({"cola.rank_ratio": 2.0}, r"`fanformer.cola.rank_ratio` must be in \(0, 1\], got 2.0"),
        ({"cola.rank": 0}, r"`fanformer.cola.rank` must be a whole number"),
        ({"cola.layers": "all"}, r"has norms between the factors of O and down: train the model without them"),
        ({"cola.o_rank": 5}, r"has `fanformer.cola.layers` and `fanformer.cola.o_rank`, which replaced it"),
    ],
)
def test_wrong_metadata_from_before_are_refused(tiny_config, changes, message):
    with pytest.raises(CheckpointError, match=message):
        Architecture.from_file(header_from_before(tiny_config, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_length": "64"}, r"`fanformer.embedding_length` must be a whole number .* got '64'"),
        ({"embedding_length": 2**40}, r"`fanformer.embedding_length` must be a whole number from 1 to 16777216"),
        ({"embedding_length": True}, r"`fanformer.embedding_length` must be a whole number"),
        ({"block_count": 0}, r"`fanformer.block_count` must be a whole number"),
        ({"cola__norm": 1}, r"`fanformer.cola.norm` must be true or false, got 1"),
        ({"fan__placement": "everywhere"}, r"`fanformer.fan.placement` must be one of projection, .*, got"),
        ({"fan__placement": "both"}, r"`fanformer.fan.placement` must be one of projection, .*, got 'both'"),
        ({"cola__writer_norm": True}, r"`fanformer.cola.writer_norm` must be false, got true: train the model without"),
        ({"fan__multiple": 12}, r"`fanformer.fan.multiple` must be a power of two, got 12"),
        ({"cola__o_rank": 0}, r"`fanformer.cola.o_rank` must be a whole number"),
        (
            {"cola__writer_activation": "relu"},
            r"`fanformer.cola.writer_activation` must be one of silu, .*, got 'relu'",
        ),
        ({"fan__ratio": 0.6}, r"`fanformer.fan.ratio` must be in \[0.0, 0.5\], got 0.6"),
        ({"fan__ratio": float("nan")}, r"`fanformer.fan.ratio` must be a finite number"),
        ({"attention__layer_norm_rms_epsilon": 0.0}, r"rms_epsilon` must be in"),
        ({"attention__head_count_kv": 3}, r"`fanformer.attention.head_count` must be a multiple"),
        ({"attention__key_length": 15}, r"`fanformer.attention.key_length` must be even, got 15"),
        ({"rope__scaling__type": "dynamic"}, r"`fanformer.rope.scaling.type` must be one of default, linear"),
        ({"rope__freq_base": -1.0}, r"`fanformer.rope.freq_base` must be above 0"),
    ],
)
def test_metadata_out_of_range_is_refused(tiny_config, changes, message):
    with pytest.raises(CheckpointError, match=message):
        Architecture.from_file(Header(Architecture.from_config(tiny_config()), **changes))


def test_features_between_factors_need_factors(tiny_config):
    header = Header(Architecture.from_config(tiny_config(**TUNED)))
    del header.metadata["fanformer.cola.gate_up_rank"]
    with pytest.raises(CheckpointError, match=r"'ffn' needs `fanformer.cola.gate_up_rank`, got full rank"):
        Architecture.from_file(header)


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
