"""Attention backends, compilation, checkpointing, adapters and outputs: what runs the model changes no number."""

import copy

import pytest
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from fanformer.model import FANformerConfig, FANformerForCausalLM, FANformerModel
from tests.tiny_models import FULL_RANK, PAPERS_COLA

# Two ways of adding the same float32 numbers; logits here are of size 10.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
VARIANTS = [
    {},
    {"fan_placement": "layer", **FULL_RANK, "norm_placement": "pre", "qkv_norm": "none"},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "gated_residual": False},
    {**PAPERS_COLA},
]


def logits_and_gradients(model, run, input_ids):
    """Run forward and backward; return logits and a copy of every gradient."""
    model.zero_grad()
    output = run(input_ids, labels=input_ids, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], **TOLERANCE)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        scale = theirs[1][name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[1][name], atol=1e-5 * scale + 1e-9, rtol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_sdpa_equals_eager(tiny_model, token_ids, fields):
    model = tiny_model(**fields)
    input_ids = token_ids(3, 17)
    results = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
        results.append(logits_and_gradients(model, model, input_ids))
    assert_same(*results)


@torch.no_grad()
def test_sdpa_equals_eager_with_padding(tiny_model, token_ids):
    model = tiny_model()
    input_ids, mask = token_ids(3, 17), torch.ones(3, 17, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, 9:] = 0
    results = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        results.append(model(input_ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*results, **TOLERANCE)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_whole_model_is_one_graph_and_gives_the_same_gradients(tiny_model, token_ids, fields):
    model = tiny_model(**fields).train()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input_ids = token_ids(2, 17)
    assert_same(
        logits_and_gradients(model, compiled, input_ids),
        logits_and_gradients(model, model, input_ids),
    )


@pytest.mark.slow
def test_inductor_gives_the_same_gradients(tiny_model, token_ids):
    model = tiny_model().train()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    input_ids = token_ids(2, 17)
    assert_same(
        logits_and_gradients(model, compiled, input_ids),
        logits_and_gradients(model, model, input_ids),
    )


@pytest.mark.parametrize("enable", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(tiny_model, token_ids, enable, dropout):
    model = tiny_model(dropout=dropout).train()
    if not hasattr(model, enable):
        pytest.skip(f"this version of transformers has no {enable}")
    input_ids = token_ids(2, 17)
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))

    torch.manual_seed(0)
    expected = logits_and_gradients(model, model, input_ids)
    assert len(calls) == 1
    getattr(model, enable)()
    torch.manual_seed(0)
    found = logits_and_gradients(model, model, input_ids)
    assert len(calls) == 3  # once forward, once again for the backward pass
    assert torch.equal(found[0], expected[0])
    for name, gradient in found[1].items():
        assert torch.equal(gradient, expected[1][name]), name


def test_lora_on_all_linear_trains_saves_reloads_and_merges(tiny_model, token_ids, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra `lora`")
    base = tiny_model()
    pristine = copy.deepcopy(base)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    linears = {n for n, m in pristine.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert {name.removeprefix("base_model.model.") for name in adapted} == linears

    input_ids = token_ids(2, 17)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5

    model.eval()
    with torch.no_grad():
        expected = model(input_ids).logits
        assert not torch.allclose(expected, pristine(input_ids).logits, atol=0.1)
        model.save_pretrained(tmp_path)
        reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path).eval()
        torch.testing.assert_close(reloaded(input_ids).logits, expected, **TOLERANCE)
        merged = reloaded.merge_and_unload()
        assert type(merged) is FANformerForCausalLM
        # Adding the product to the weight rounds once more than adding it to the output; logits are of size 10.
        torch.testing.assert_close(merged(input_ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(
            model.generate(input_ids=input_ids, max_new_tokens=5, do_sample=False, pad_token_id=0),
            reloaded.generate(input_ids=input_ids, max_new_tokens=5, do_sample=False, pad_token_id=0),
        )


@pytest.fixture
def probe():
    """Register an attention backend that records how it was called."""
    calls = []

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        calls.append({"module": module, "q": query, "k": key, "v": value, "scaling": scaling, "kwargs": kwargs})
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    AttentionInterface.register("probe", attention)
    yield calls
    del ALL_ATTENTION_FUNCTIONS._global_mapping["probe"]


@torch.no_grad()
def test_keyword_arguments_reach_a_foreign_attention_backend(tiny_model, token_ids, probe):
    """What vLLM's Transformers backend asks for."""
    model = tiny_model()
    model.set_attn_implementation("probe")
    model(token_ids(2, 5), attention_instances="from the engine", use_cache=False)
    assert len(probe) == 2
    for index, call in enumerate(probe):
        assert call["kwargs"]["attention_instances"] == "from the engine"
        assert call["module"].layer_idx == index
        assert call["module"].is_causal
        assert call["module"].num_key_value_groups == 2
        assert call["scaling"] == 16**-0.5
        assert call["q"].shape == (2, 4, 5, 16)
        assert call["k"].shape == call["v"].shape == (2, 2, 5, 16)


def test_class_says_what_vllm_asks(tiny_model):
    for name in ("_supports_attention_backend", "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn"):
        assert getattr(FANformerModel, name) == getattr(LlamaForCausalLM, name) is True
    model = tiny_model()
    assert type(model.model) is FANformerModel  # everything of ours is in the base model, the head is plain
    assert {name for name, _ in model.named_children()} == {"model", "lm_head"}
    assert set(FANformerConfig.base_model_pp_plan) <= {name for name, _ in model.model.named_children()}


@torch.no_grad()
def test_hidden_states_and_attentions_come_out(tiny_model, token_ids):
    model = tiny_model()
    model.set_attn_implementation("eager")
    output = model(token_ids(2, 7), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 7, 64)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 7, 7)] * 2
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    torch.testing.assert_close(output.hidden_states[0], model.get_input_embeddings()(token_ids(2, 7)))
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
        assert torch.equal(weights, weights.tril())


@torch.no_grad()
def test_outputs_may_be_a_tuple(tiny_model, token_ids):
    model = tiny_model()
    input_ids = token_ids(2, 7)
    expected = model(input_ids, labels=input_ids, use_cache=False)
    loss, logits = model(input_ids, labels=input_ids, use_cache=False, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    (hidden,) = model.model(input_ids, use_cache=False, return_dict=False)
    assert torch.equal(hidden, model.model(input_ids).last_hidden_state)


@torch.no_grad()
def test_logits_to_keep_gives_the_rows_asked_for(tiny_model, token_ids):
    model = tiny_model()
    input_ids = token_ids(2, 7)
    full = model(input_ids).logits
    torch.testing.assert_close(model(input_ids, logits_to_keep=0).logits, full)
    torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, full[:, -2:], **TOLERANCE)
    indices = torch.tensor([0, 5])
    torch.testing.assert_close(model(input_ids, logits_to_keep=indices).logits, full[:, indices], **TOLERANCE)


@torch.no_grad()
def test_embeddings_may_replace_ids(tiny_model, token_ids):
    model = tiny_model()
    input_ids = token_ids(2, 7)
    embeddings = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(input_ids).logits)


@torch.no_grad()
def test_loss_is_the_mean_over_predicted_tokens(tiny_model, token_ids):
    model = tiny_model()
    input_ids = token_ids(2, 9)
    labels = input_ids.masked_fill(input_ids < 80, -100)
    logits = model(input_ids).logits
    losses = -logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    kept = labels[:, 1:] != -100
    assert 0 < kept.sum() < kept.numel()
    expected = losses[kept].mean()
    torch.testing.assert_close(model(input_ids, labels=labels).loss, expected)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(input_ids, labels=labels, shift_labels=shifted).loss, expected)
    # As Trainer counts over accumulated batches: a sum over a given number of tokens.
    accumulated = model(input_ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(accumulated, losses[kept].sum() / 100)


def test_bf16_autocast_trains_near_float32(tiny_model, token_ids):
    model = tiny_model().train()
    input_ids = token_ids(2, 33)
    expected = model(input_ids, labels=input_ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids, labels=input_ids)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.item() == pytest.approx(expected.item(), rel=0.02)  # bf16 keeps 8 bits
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
def test_default_model_takes_one_real_training_step():
    torch.manual_seed(0)
    model = FANformerForCausalLM(FANformerConfig(dropout=0.0)).train()
    assert sum(parameter.numel() for parameter in model.parameters()) == 92_230_144
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    input_ids = torch.randint(0, 49152, (1, 1024))
    losses = []
    for _ in range(2):
        loss = model(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
