"""Which type a tensor gets: the one asked for, or the next that fits, with a reason; nothing in silence."""

import math

import pytest

from fanformer.errors import ConfigError
from fanformer.gguf.plan import OFFERED, fitting_type, make_plan
from fanformer.model import FANformerConfig
from tests.tiny_models import every_rank


@pytest.mark.parametrize("kind", OFFERED)
def test_matrices_get_the_type_and_vectors_float32(tiny_config, kind):
    wide = {"hidden_size": 256, **every_rank(256), "intermediate_size": 512, "head_dim": 64}
    plan = make_plan(tiny_config(**wide), kind)
    head = "q6_k" if kind in ("q4_0", "q4_k", "q5_k") else kind
    for item in plan.tensors:
        asked = {"output.weight": head}.get(item.spec.name, kind if len(item.spec.shape) == 2 else "f32")
        assert (item.kind.name, item.note) == (asked, ""), item
    assert plan.notes == ()
    assert plan.config.intermediate_size == 512


def test_rows_that_do_not_fill_blocks_take_the_next_type_with_a_reason():
    assert fitting_type("q4_k", 512)[0].name == "q4_k"
    assert fitting_type("q4_k", 384)[0].name == "iq4_nl"
    assert fitting_type("q5_k", 384)[0].name == fitting_type("q6_k", 384)[0].name == "q8_0"
    for kind in ("q4_k", "q5_k", "q6_k", "q8_0", "q4_0"):
        found, note = fitting_type(kind, 50)
        assert found.name == "f16"
        assert f"rows of 50 do not fill blocks of {32 if kind.endswith('0') else 256} ({kind})" == note
    assert fitting_type("bf16", 7) == (fitting_type("bf16", 64)[0], "")


@pytest.mark.parametrize("kind", ["q8_0", "q6_k", "q5_k", "q4_k", "q4_0"])
def test_at_most_a_twentieth_of_the_default_blocks_stays_uncut(kind):
    plan = make_plan(FANformerConfig(), kind)
    blocks = [item for item in plan.tensors if item.spec.name.startswith("blk.")]
    sizes = {item.spec.name: math.prod(item.spec.shape) for item in blocks}
    whole = sum(sizes[item.spec.name] for item in blocks if item.kind.block_elements == 1)
    assert whole <= 0.05 * sum(sizes.values())
    assert all(item.kind.block_elements > 1 for item in blocks if len(item.spec.shape) == 2)
    assert plan.notes == ()  # nothing needs filling up


def test_a_model_is_filled_up_where_that_saves_bits():
    default = FANformerConfig()
    assert make_plan(default, "q4_k").config is default
    plan = make_plan(FANformerConfig(intermediate_size=1016), "q4_k")
    assert plan.config.intermediate_size == 1024
    assert plan.notes == (
        "intermediate_size 1016 is filled up with zeros to 1024, so that rows of ffn_down fill blocks",
    )
    kinds = {item.spec.name: item.kind.name for item in plan.tensors}
    whole = ("ffn_down_a", "ffn_up", "attn_qkv_a", "attn_output_a", "attn_output")
    assert {kinds[f"blk.3.{name}.weight"] for name in whole} == {kinds["token_embd.weight"]} == {"q4_k"}
    # their ranks are 384 and 224
    assert {kinds[f"blk.3.{name}.weight"] for name in ("attn_q", "attn_v_fan", "ffn_down")} == {"iq4_nl"}
    assert kinds["output.weight"] == "q6_k"


@pytest.mark.parametrize(("width", "kind", "filled"), [(424, "q4_k", 448), (96, "q8_0", 96), (50, "f16", 50)])
def test_filling_up_takes_the_smallest_file(tiny_config, width, kind, filled):
    config = tiny_config(intermediate_size=width)
    plan = make_plan(config, kind)
    assert plan.config.to_dict() == {**config.to_dict(), "intermediate_size": filled}
    assert config.intermediate_size == width


def test_embedding_and_head_have_types_of_their_own(tiny_config):
    plan = make_plan(tiny_config(hidden_size=256), "q4_0", "f16", "q8_0")
    kinds = {item.spec.name: item.kind.name for item in plan.tensors}
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("f16", "q8_0")
    tied = make_plan(tiny_config(hidden_size=256, tie_word_embeddings=True), "q4_k").tensors
    assert next(item.kind.name for item in tied if item.spec.name == "token_embd.weight") == "q6_k"


def test_types_that_do_not_exist_or_have_no_effect_are_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"`--type` is 'q4_K_M': did you mean `q4_k`\?"):
        make_plan(tiny_config(), "q4_K_M")
    with pytest.raises(ConfigError, match=r"`--head-type` is 'int3': expected one of: bf16, f16"):
        make_plan(tiny_config(), "q8_0", None, "int3")
    with pytest.raises(ConfigError, match=r"`--head-type` is f16, but the head is the embedding: set `--embedding-"):
        make_plan(tiny_config(tie_word_embeddings=True), "q8_0", None, "f16")
