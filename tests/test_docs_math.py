"""docs/math.md stays true: its lines define its symbols, its counts are the model's, its tests exist."""

import re
from pathlib import Path

import pytest
import torch

from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.model.configuration_fanformer import RANKS
from fanformer.model.footprint import OPERATIONS, footprint
from fanformer.model.modeling_fanformer import _ACTIVATIONS


@pytest.fixture(scope="module")
def page(repository) -> Path:
    return repository / "docs" / "math.md"


def links(page):
    """Return (symbol, name, line, path, anchor) of each row that ends in a link to a line."""
    row = re.compile(r"\| `(\w+)` \| \[(\w+\.py):(\d+)\]\(([\w./]+)#L(\d+)\) \|$", re.MULTILINE)
    return row.findall(page.read_text(encoding="utf-8"))


def count_rows(page):
    """Return {part: (formula, count)} of the tables of counts."""
    rows = re.findall(r"^\| (\w+) \| `([\d*+ ]+)` \| ([\d,]+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {part: (formula, int(count.replace(",", ""))) for part, formula, count in rows}


def test_every_line_defines_its_symbol(page):
    wrong = []
    for symbol, name, line, path, anchor in links(page):
        target = (page.parent / path).resolve()
        assert target.name == name
        source = target.read_text(encoding="utf-8").splitlines()
        defined = [i for i, text in enumerate(source, 1) if re.match(rf"\s*(class|def) {symbol}\b", text)]
        if [str(number) for number in defined] != [line] or anchor != line:
            wrong.append(f"{symbol} is defined at {name}:{defined}, docs/math.md says {line} (link: {anchor})")
    assert not wrong, "\n".join(wrong)


def test_every_class_and_function_of_the_model_file_has_a_row(page, repository):
    source = (repository / "src/fanformer/model/modeling_fanformer.py").read_text(encoding="utf-8")
    defined = re.findall(r"^(?:class|def) (\w+)", source, re.MULTILINE)
    assert len(defined) > 15
    assert set(defined) - {symbol for symbol, *_ in links(page)} == set()


def test_every_number_of_a_count_is_its_sum(page):
    rows = count_rows(page)
    assert len(rows) == 18
    for part, (formula, count) in rows.items():
        assert eval(formula) == count, part  # digits, + and * only, as count_rows matched


def test_counts_are_the_models(page):
    config = FANformerConfig()
    with torch.device("meta"):
        model = FANformerForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def total(*words, prefix="layers.1."):
        return sum(size for name, size in sizes.items() if prefix in name and any(word in name for word in words))

    expected = {part: total(f"{part}_proj") for part in ("q", "k", "v", "o", "gate", "up", "down")}
    expected |= {part: total(part) for part in ("qkv_input", "gate_up_input")}
    expected["norms"] = total("norm") - total("input.norm")  # those count with the first factors
    expected["gates"] = total("residual.gate")
    expected["block"] = total("")
    expected["embedding"] = sizes["model.embed_tokens.weight"]
    expected["head"] = sizes["lm_head.weight"]
    expected["final_norm"] = sizes["model.norm.weight"]
    expected["first_norm"] = total("input_layernorm", prefix="layers.0.")
    expected["blocks"] = total("", prefix="layers.") - expected["first_norm"]
    expected["total"] = model.num_parameters()
    assert {part: count for part, (_, count) in count_rows(page).items()} == expected


def test_operations_per_token_are_those_of_the_model(page):
    text = page.read_text(encoding="utf-8")
    formula, total = re.search(r"`([\d*+ ]+)`, ([\d,]+) forward", text).groups()
    counted = footprint(FANformerConfig())
    assert eval(formula) == int(total.replace(",", "")) == counted.forward_operations
    assert f"2*{counted.matrix_weights} " in formula
    assert "4 L H K T" in OPERATIONS
    assert "4 L H K T" in text


def test_numbers_in_the_text_are_the_codes(page):
    text, config = page.read_text(encoding="utf-8"), FANformerConfig()
    for name in ("initializer_range", "embedding_initializer_range", "gate_initial"):
        assert f"`{name}` = {getattr(config, name)} |" in text
    squares = {name: square for name, (_, square) in _ACTIVATIONS.items()}
    assert f"{squares['silu']:.4f} for SiLU, {squares['gelu']:.4f} for GELU, {squares['linear']:.0f} for none" in text
    assert f"{squares['residual']:.4f} for `x + silu(x)`" in text
    for name in RANKS:
        assert re.search(rf"`{name}`[^`]* {getattr(config, name)}\b", text)
    heads = {"Q": config.num_attention_heads, "K and V": config.num_key_value_heads}
    q, kv = (count * config.head_dim for count in heads.values())
    p_q, p_kv = config.periodic_width(q), config.periodic_width(kv)
    assert f"{p_q} of Q's {q:,}, {p_kv} of the {kv} of K and of V" in text
    assert f"left, {q - 2 * p_q:,} and {kv - 2 * p_kv}, is a multiple of {config.fan_multiple}" in text
    assert f"{1 - 92_230_144 / 134_515_008:.1%} smaller" in text


def test_every_test_it_names_exists(page, repository):
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", page.read_text(encoding="utf-8"))
    assert len(named) >= 8
    for path, test in named:
        assert f"def {test}" in (repository / path).read_text(encoding="utf-8"), f"{path}::{test}"
