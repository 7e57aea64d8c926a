"""Architecture and tensors of a GGUF file: those of the model, for every switch, and back."""

import dataclasses
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from fanformer.errors import CheckpointError
from fanformer.gguf.architecture import Architecture, Factors, metadata, read_factors, shortest
from fanformer.gguf.blocks import TYPES
from fanformer.gguf.file import TensorInfo
from fanformer.gguf.parameters import check_parameters, parameters
from fanformer.model import FANformerConfig
from fanformer.model.configuration_fanformer import RECURRENCE
from tests.gguf_models import STATIC_ROPES, VARIANTS
from tests.tiny_models import TUNED

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPE += ("num_key_value_heads", "head_dim", "max_position_embeddings")

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # FAN without a part


class Header:
    """Metadata and tensors as a file has them."""

    path = Path("file.gguf")

    def __init__(self, config, **changes):
        self.metadata = {key: value for key, (_, value) in metadata(config).items()}
        self.metadata.update({f"fanformer.{key.replace('__', '.')}": value for key, value in changes.items()})
        self.tensors = {}
        for item in parameters(config):
            self.add(item.name, item.shape)

    def add(self, name, shape, kind="f32"):
        self.tensors[name] = TensorInfo(name, shape, TYPES[kind], 0, 0)

    def fail(self, reason):
        return CheckpointError(f"the file: {reason}")


def configuration(header):
    """The configuration that a header gives on torch."""
    return FANformerConfig(**vars(Architecture.from_file(header)), dropout=0.0)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_tensors_are_the_state_dict(tiny_model, fields):
    model = tiny_model(**fields)
    found = parameters(model.config)
    state = model.state_dict()
    if fields.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    filled = {name: tuple(value.shape) for name, value in state.items() if value.numel()}
    assert {item.parameter: item.shape for item in found} == filled
    assert len({item.name for item in found}) == len(found)
    assert all(len(item.name) < 64 for item in found)
    assert all(item.name.endswith((".weight", ".bias")) and "proj" not in item.name for item in found)


@pytest.mark.parametrize(
    "fields",
    [*VARIANTS.values(), *({"rope_parameters": rope} for rope in STATIC_ROPES.values())],
    ids=[*VARIANTS, *STATIC_ROPES],
)
def test_metadata_gives_the_configuration_back(tiny_config, fields):
    config = tiny_config(**fields)
    assert configuration(Header(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_what_is_read_off_the_tensors_is_the_models(tiny_model, fields):
    model = tiny_model(**fields)
    layer, header = model.model.layers[1], Header(model.config)
    modules = {"attn_qkv": layer.self_attn.qkv_input, "attn_output": getattr(layer.self_attn.o_proj, "input", None)}
    modules |= {"ffn_gate_up": layer.mlp.gate_up_input, "ffn_down": getattr(layer.mlp.down_proj, "input", None)}
    expected = {}
    for part, module in modules.items():
        if module is not None and module.factor is not None:
            writes = part in ("attn_output", "ffn_down")
            activation = model.config.writer_activation if writes else model.config.cola_activation
            expected[part] = Factors(module.out_features, module.periodic, module.count, activation)
    assert read_factors(Architecture.from_file(header), header) == expected


@pytest.mark.parametrize(
    "name",
    [
        "default",
        "tuned",
        "separate-inputs",
        "fan-layer",
        "ffn-fan-separate",
        "llama",
        "recurrent",
        "recurrent-concat",
    ],
)
def test_any_tensor_that_is_missing_or_of_another_shape_is_refused(tiny_config, name):
    config = tiny_config(**VARIANTS[name])
    model = Architecture.from_file(Header(config))
    for item in parameters(config):
        header = Header(config)
        del header.tensors[item.name]
        with pytest.raises(CheckpointError, match=r"tensors do not fit its metadata: it (lacks|has) `"):
            read_factors(Architecture.from_file(header) if item.name != "output.weight" else model, header)
        for place in range(len(item.shape)):
            header = Header(config)
            header.add(item.name, tuple(length + (i == place) for i, length in enumerate(item.shape)))
            with pytest.raises(CheckpointError, match="tensors do not fit its metadata: `"):
                read_factors(model, header)
            with pytest.raises(CheckpointError, match="tensors do not fit its metadata: `"):
                check_parameters(config, header)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"attn_q_fan": (9, 44)}, r"`attn_q` makes 66 outputs of 4 heads"),
        ({"attn_qkv_a": (40, 64)}, r"`attn_qkv` reads 44, and its first factors have 40 rows"),
        ({"ffn_gate_up_a_norm": (20,)}, r"`ffn_gate_up` reads 28, and its first factors have 28 rows and norms of 20"),
        ({"attn_output_a_norm": (40,)}, r"has norms between the factors of O and down, which were deleted: train"),
        ({"attn_nothing": (40,)}, r"it has `blk.0.attn_nothing.weight` and 1 more"),
    ],
)
def test_shapes_that_agree_in_all_blocks_must_be_a_models_too(tiny_config, lengths, message):
    header = Header(tiny_config())
    for name, shape in lengths.items():
        for layer in range(2):
            header.add(f"blk.{layer}.{name}.weight", shape)
    with pytest.raises(CheckpointError, match=message):
        read_factors(Architecture.from_file(header), header)


def test_norms_of_other_types_are_refused(tiny_config):
    header = Header(tiny_config())
    header.add("blk.1.ffn_norm.weight", (64,), "f16")
    with pytest.raises(CheckpointError, match=r"stores `blk.1.ffn_norm.weight` as f16, expected f32: norms, gates"):
        read_factors(Architecture.from_file(header), header)


def test_float32_gives_the_number_that_was_meant():
    import numpy as np

    for value in (1e-5, 1e-6, 10000.0, 500000.0, 0.1):
        assert shortest(float(np.float32(value))) == value


BEFORE = {"cola.layers": "readers", "cola.rank_ratio": 0.75}
REPLACED = ("cola.qkv_rank", "cola.o_rank", "cola.gate_up_rank", "cola.down_rank", "cola.writer_activation")
REPLACED += ("fan.multiple",)


def header_from_before(tiny_config, **changes):
    """Return metadata as they were before each kind of layer had a rank of its own."""
    header = Header(tiny_config(**TUNED))
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
    found = configuration(header_from_before(tiny_config, **stored))
    shape = {name: getattr(found, name) for name in SHAPE}
    assert found.to_dict() == FANformerConfig(**shape, **rank, **forms, cola_layers=layers, dropout=0.0).to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cola.layers": "mlp"}, r"`cola_layers` must be one of readers, all, attention, ffn, got 'mlp'"),
        ({"cola.layers": "all"}, r"`writer_norm` True was deleted, as docs/experiments.md says: train the model"),
        ({"cola.rank_ratio": float("inf")}, r"`fanformer.cola.rank_ratio` must be a finite number"),
        ({"cola.rank": 0}, r"`fanformer.cola.rank` must be a whole number"),
        ({"cola.o_rank": 5}, r"`cola_rank_ratio` and `o_rank` exclude each other"),
    ],
)
def test_wrong_metadata_from_before_are_refused(tiny_config, changes, message):
    with pytest.raises((CheckpointError, ValueError), match=message):
        configuration(header_from_before(tiny_config, **changes))


def test_a_rank_from_before_that_is_not_the_tensors_is_refused(tiny_config):
    header = header_from_before(tiny_config, **{"cola.rank_ratio": 2.0})
    with pytest.raises(CheckpointError, match=r"`blk.0.attn_k.weight` is \(32, 48\), expected \(32, 128\)"):
        check_parameters(configuration(header), header)


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
        ({"cola__o_rank": 0}, r"`fanformer.cola.o_rank` must be a whole number"),
        (
            {"cola__writer_activation": "relu"},
            r"`fanformer.cola.writer_activation` must be one of silu, .*, got 'relu'",
        ),
        ({"fan__ratio": float("nan")}, r"`fanformer.fan.ratio` must be a finite number"),
        ({"attention__layer_norm_rms_epsilon": 0.0}, r"rms_epsilon` must be in"),
        ({"attention__head_count_kv": 3}, r"`fanformer.attention.head_count` must be a multiple"),
        ({"attention__key_length": 15}, r"`fanformer.attention.key_length` must be even, got 15"),
        ({"rope__scaling__type": "dynamic"}, r"`fanformer.rope.scaling.type` must be one of default, linear"),
        ({"rope__freq_base": -1.0}, r"`fanformer.rope.freq_base` must be above 0"),
        ({"rope__scaling__type": "linear"}, r"`fanformer.rope.scaling.factor` must be above 0 for RoPE .* got nothing"),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 0.0},
            r"above 0 for RoPE of the type linear, got 0",
        ),
    ],
)
def test_metadata_out_of_range_is_refused(tiny_config, changes, message):
    with pytest.raises(CheckpointError, match=message):
        Architecture.from_file(Header(tiny_config(), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fan__multiple": 12}, r"`fan_multiple` must be a power of two, got 12"),
        ({"fan__ratio": 0.6}, r"`fan_ratio` must be in \[0, 0.5\], got 0.6"),
    ],
)
def test_what_the_tensors_tell_is_refused_where_the_metadata_cannot_be(tiny_config, changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        configuration(Header(tiny_config(), **changes))


def test_features_between_factors_need_factors(tiny_config):
    header = Header(tiny_config(**TUNED))
    del header.metadata["fanformer.cola.gate_up_rank"]
    with pytest.raises(StrictDataclassError, match=r"'ffn' needs a low-rank gate and up, got full rank"):
        configuration(header)


def test_missing_key_is_named(tiny_config):
    header = Header(tiny_config())
    del header.metadata["fanformer.cola.input"]
    with pytest.raises(CheckpointError, match=r"`fanformer.cola.input` must be a text, got nothing"):
        Architecture.from_file(header)


def test_architecture_has_every_field_that_decides_the_arithmetic(tiny_config):
    """A field added to the configuration must be stored, or be listed here as one that only training reads."""
    training_only = {
        "dropout", "attention_dropout", "gate_initial", "initializer_range", "embedding_initializer_range",
        "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    }  # fmt: skip
    own = {item.name for item in dataclasses.fields(FANformerConfig) if item.name in FANformerConfig.__annotations__}
    assert vars(Architecture.from_file(Header(tiny_config(**VARIANTS["recurrent"])))).keys() == own - training_only
    assert vars(Architecture.from_file(Header(tiny_config()))).keys() == own - training_only - set(RECURRENCE)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("core_count", 3, r"`fanformer.recurrence.core_count` must fit the blocks, got \[1, 3, 0\] of 3"),
        ("core_count", 0, r"`fanformer.recurrence.core_count` must be a whole number from 1"),
        ("prelude_count", -1, r"`fanformer.recurrence.prelude_count` must be a whole number from 0"),
        ("mean_steps", 9, r"`fanformer.recurrence.mean_steps` must be at most the largest number of steps, \(9, 8\)"),
        ("injection", "sum", r"`fanformer.recurrence.injection` must be one of mix, add, concat, got 'sum'"),
    ],
    ids=str,
)
def test_a_recurrence_that_cannot_be_is_refused(tiny_config, key, value, message):
    header = Header(tiny_config(**VARIANTS["recurrent"]))
    header.metadata[f"fanformer.recurrence.{key}"] = value
    with pytest.raises(CheckpointError, match=message):
        Architecture.from_file(header)
