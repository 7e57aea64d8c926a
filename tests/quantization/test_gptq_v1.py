"""The classic GPTQ layout: what needs no library; tests/ci quantizes a model where GPTQModel is installed."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file

from fanformer.errors import CheckpointError, ConfigError, DependencyError
from fanformer.quantization.gptq_v1 import _module_tree, common_group, export_gptq_v1, stored_weight, texts_of
from fanformer.quantization.linear_layers import matrices_by_part
from fanformer.quantization.quantized_folder import KEPT_HIGH, Settings
from tests.tiny_models import FULL_RANK, TUNED, every_rank

installed = importlib.util.find_spec("gptqmodel") is not None


@pytest.mark.skipif(installed, reason="GPTQModel is installed")
def test_missing_library_is_named(saved_model, tmp_path):
    with pytest.raises(DependencyError, match=r"pip install 'fanformer\[gptq\]'"):
        export_gptq_v1(saved_model, tmp_path / "out", Settings("gptq-v1"))


def test_groups_that_no_kernel_has_are_refused(saved_model, tmp_path):
    with pytest.raises(ConfigError, match="`--group-size` must be at least 32 for gptq-v1, got 16"):
        export_gptq_v1(saved_model, tmp_path / "out", Settings("gptq-v1", group_size=16))


def test_packed_rows_become_their_documents():
    ids = torch.arange(40)
    positions = torch.cat(
        [torch.arange(5, 17), torch.arange(3), torch.arange(25)]
    )  # the first goes on from a row before
    found = texts_of([{"input_ids": ids[None], "position_ids": positions[None]}])
    assert [text.tolist() for text in found] == [list(range(12)), list(range(15, 40))]


@pytest.mark.parametrize("bits", [4, 8])
def test_stored_weight_is_what_was_packed(tmp_path, bits):
    inputs, outputs, group, most = 64, 24, 32, 2**bits
    random = torch.Generator().manual_seed(0)
    integers = torch.randint(most, (inputs, outputs), generator=random)
    zeros = torch.randint(1, most + 1, (inputs // group, outputs), generator=random)  # version 1 stores them less 1
    scales = torch.rand(inputs // group, outputs, generator=random).half()
    index = torch.arange(inputs) // group
    each = 32 // bits

    def pack(values):  # (n * each, m) to (n, m), the first in the lowest bits
        words = torch.zeros(values.shape[0] // each, values.shape[1], dtype=torch.long)
        for place in range(each):
            words |= values[place::each] << (bits * place)
        return words.to(torch.int32)

    stored = {"qweight": pack(integers), "qzeros": pack((zeros - 1).T).T.contiguous(), "scales": scales}
    tensors = {f"a.b.{name}": value for name, value in (stored | {"g_idx": index.int()}).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    expected = ((integers - zeros[index] % most) * scales.float()[index]).T
    assert torch.equal(stored_weight(tmp_path, "a.b", bits), expected)
    with pytest.raises(CheckpointError, match=r"left `a\.c` out"):
        stored_weight(tmp_path, "a.c", bits)


@pytest.mark.parametrize(("fields", "expected"), [({}, 32), (every_rank(64), 64)])
def test_the_group_is_the_largest_that_fills_the_most_rows(tiny_model, fields, expected):
    model = tiny_model(**{"hidden_size": 128, "head_dim": 32, **every_rank(96), **fields})
    assert common_group(model, 128) == expected


@pytest.mark.parametrize(
    "fields",
    [{}, TUNED, {"fan_placement": "layer"}, {**FULL_RANK, "fan_placement": "none"}, FULL_RANK],
)
def test_the_description_of_a_block_has_every_matrix_once_factors_before_what_reads_them(tiny_model, fields):
    model = tiny_model(**fields)
    names = [n for part, found in matrices_by_part(model).items() if part not in KEPT_HIGH for n in found]
    tree = _module_tree(names)
    assert tree[:3] == ["model", "layers", "#"]
    paths = [f"{branch}.{step.split(':')[0]}" for branch, steps in tree[3].items() for step in steps]
    assert sorted(paths) == sorted({name.split(".", 3)[3] for name in names})
    ran: list[str] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name.split(".", 3)[3]))
        for name in names
        if name.startswith("model.layers.1.")
    ]
    model(torch.tensor([[1, 2, 3]]))
    assert [path for path in paths if path in ran] == ran
    assert len(hooks) == len(ran)
