"""Number formats of GGUF: what their bytes stand for is what ggml says."""

import json
from pathlib import Path

import numpy as np
import pytest

from fanformer.gguf.blocks import BY_NUMBER, TYPES, dequantize
from fanformer.gguf.export import encode_rows

# 256 numbers, quantized and dequantized by ggml 0.15.3 itself
GOLDEN = json.loads(Path(__file__).with_name("blocks.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_blocks_stand_for_the_numbers_that_ggml_says(name):
    raw = np.frombuffer(bytes.fromhex(GOLDEN[name]["bytes"]), np.uint8)
    expected = np.frombuffer(bytes.fromhex(GOLDEN[name]["float32"]), "<f4")
    np.testing.assert_array_equal(dequantize(raw, TYPES[name], (256,)), expected)
    rows = dequantize(np.concatenate([raw, raw]), TYPES[name], (2, 256))
    np.testing.assert_array_equal(rows, np.stack([expected, expected]))


def test_every_type_with_blocks_has_golden_bytes():
    assert GOLDEN.keys() == {name for name, kind in TYPES.items() if kind.block_elements > 1}
    assert len(BY_NUMBER) == len(TYPES)


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_of_a_row_are_those_of_its_blocks(name):
    assert len(GOLDEN[name]["bytes"]) // 2 == TYPES[name].row_bytes(256)
    assert TYPES[name].bits_per_weight == 8 * TYPES[name].row_bytes(256) / 256


@pytest.mark.parametrize(("name", "relative"), [("f32", 0.0), ("f16", 2**-11), ("bf16", 2**-8)])
def test_floats_round_to_the_nearest(name, relative):
    values = np.random.default_rng(3).standard_normal((7, 5)).astype(np.float32)
    back = dequantize(encode_rows(values, TYPES[name]), TYPES[name], values.shape)
    assert np.abs(back - values).max() <= np.abs(values).max() * relative
    # a second time nothing changes
    np.testing.assert_array_equal(dequantize(encode_rows(back, TYPES[name]), TYPES[name], back.shape), back)


def test_bfloat16_ties_go_to_the_even_number_as_in_torch():
    import torch

    values = np.array([[1.0, 1.00390625, 1.01171875, -2.0078125, 3e38, 1e-40]], dtype=np.float32)
    ours = dequantize(encode_rows(values, TYPES["bf16"]), TYPES["bf16"], values.shape)
    np.testing.assert_array_equal(ours, torch.from_numpy(values).bfloat16().float().numpy())
