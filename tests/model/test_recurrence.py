"""Recurrent depth: the first step is the plain model, and every way of running r steps gives the same numbers."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.model.configuration_fanformer import RECURRENCE
from fanformer.model.recurrence_fanformer import StepCache
from tests.model.test_generation import GREEDY
from tests.model.test_reference import in_float64
from tests.reference import fanformer_float64 as reference

# Both sides are float64, and sum in another order: 18 blocks at eight steps.
TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}
PARTS = {"num_hidden_layers": 4, "prelude_layers": 1, "core_layers": 2, "coda_layers": 1}
KINDS = ("mix", "add", "concat")
STEPS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def model(tiny_model):
    return recurrent(tiny_model).double()


def recurrent(tiny_model, **fields):
    """Return a tiny model whose bridge is far from the identity; `tiny_model` moves its vectors already."""
    model = tiny_model(**{**PARTS, **fields})
    bridge = model.model.bridge
    with torch.no_grad():
        bridge.norm_weight.add_(0.4)
        if bridge.linear is not None:
            bridge.linear.weight.add_(0.05 * torch.randn_like(bridge.linear.weight))
    return model


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


@torch.no_grad()
def token_by_token(model, ids, cache=None, **options):
    """Return logits (B, T, V) of one token at a time on a cache."""
    cache, parts = cache if cache is not None else DynamicCache(config=model.config), []
    for place in range(ids.shape[1]):
        parts.append(model(ids[:, place : place + 1], past_key_values=cache, use_cache=True, **options).logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_logits_and_gradients_match_the_equations_in_float64(tiny_model, token_ids, kind, steps):
    model = in_float64(recurrent(tiny_model, injection=kind))
    ids = token_ids(2, 7)
    state = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    expected = reference.logits(state, model.config, ids, steps)
    found = model(ids, num_steps=steps).logits
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    expected.square().mean().backward()
    found.square().mean().backward()
    for name, parameter in model.named_parameters():
        if steps == 1 and ".bridge." in name:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, state[name].grad, atol=1e-10, rtol=1e-8, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_the_plain_model_bit_for_bit(tiny_model, token_ids, kind):
    model, plain = recurrent(tiny_model, injection=kind), tiny_model(num_hidden_layers=4)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".bridge." not in name})
    ids = token_ids(2, 9)
    assert torch.equal(logits(model, ids, num_steps=1), logits(plain, ids))
    assert not torch.equal(logits(model, ids, num_steps=2), logits(plain, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_folder_opens_as_recurrent_with_a_bridge_that_is_the_identity(tiny_model, token_ids, tmp_path, kind):
    plain, ids = tiny_model(num_hidden_layers=4), token_ids(2, 9)
    plain.save_pretrained(tmp_path)
    config = FANformerConfig.from_pretrained(tmp_path, **{**PARTS, "injection": kind})
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert report["missing_keys"]
    assert all(".bridge." in name for name in report["missing_keys"])
    model.eval()
    assert torch.equal(logits(model, ids, num_steps=1), logits(plain, ids))
    with torch.no_grad():
        state, e = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
        assert torch.equal(model.model.bridge(state, e), state)
    # so that r steps run the core's blocks r times in a row, as a plain model with copies of them would
    model, deep = model.double(), tiny_model(num_hidden_layers=6).double()
    order = model.config.recurrence.executed(2)
    assert order == [0, 1, 2, 1, 2, 3]
    rows = plain.state_dict()
    deep.load_state_dict(
        {
            name: rows[name.replace(f"layers.{name.split('.')[2]}.", f"layers.{order[int(name.split('.')[2])]}.")]
            if ".layers." in name
            else rows[name]
            for name in deep.state_dict()
        }
    )
    torch.testing.assert_close(logits(model, ids, num_steps=2), logits(deep, ids), **TOLERANCE)


def test_a_plain_model_s_file_knows_nothing_of_recurrence(tiny_config, tmp_path):
    config = tiny_config()
    assert config.recurrence is None
    config.save_pretrained(tmp_path)
    assert not set(RECURRENCE) & json.loads((tmp_path / "config.json").read_text()).keys()
    assert tiny_config(**PARTS).to_diff_dict()["core_layers"] == 2


def test_a_saved_folder_has_the_same_numbers_and_the_mean_is_the_default(model, token_ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = token_ids(2, 9)
    assert torch.equal(logits(loaded, ids), logits(model, ids, num_steps=4))
    assert loaded.config.recurrence == model.config.recurrence


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
def test_cached_decode_equals_full_forward(model, token_ids, steps, kind):
    ids = token_ids(2, 12)
    cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "lazy": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
    }[kind]()
    found = token_by_token(model, ids, cache, num_steps=steps)
    torch.testing.assert_close(found, logits(model, ids, num_steps=steps), **TOLERANCE)
    assert len(cache.layers) == 4 + 2 * (steps - 1)


@pytest.mark.parametrize("threshold", [0.2, 0.3])
@pytest.mark.parametrize("last", [False, True])
def test_cached_decode_equals_full_forward_under_exit(model, token_ids, threshold, last):
    ids = token_ids(2, 12)
    with torch.no_grad():
        whole = model(ids, num_steps=8, exit_threshold=threshold)
    assert whole.steps.unique().numel() > 1, "all tokens took the same number of steps: equality would prove little"
    cache = DynamicCache(config=model.config)
    if last:
        cache = StaticCache(config=model.config, max_cache_len=16)
    found = token_by_token(model, ids, cache, num_steps=8, exit_threshold=threshold)
    torch.testing.assert_close(found, whole.logits, **TOLERANCE)


def test_exit_gives_a_token_the_state_it_had_and_the_steps_it_took(model, token_ids):
    ids = token_ids(1, 10)
    with torch.no_grad():
        never = model(ids, num_steps=8, exit_threshold=1e-9)
        at_once = model(ids, num_steps=8, exit_threshold=1e9)
    assert never.steps.tolist() == [[8] * 10]
    torch.testing.assert_close(never.logits, logits(model, ids, num_steps=8), **TOLERANCE)
    assert at_once.steps.tolist() == [[2] * 10]  # a change is known from the second step on
    torch.testing.assert_close(at_once.logits, logits(model, ids, num_steps=2), **TOLERANCE)


def test_exit_ends_the_loop_once_all_tokens_rest(model, token_ids):
    runs = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: runs.append(1))
    logits(model, token_ids(1, 5), num_steps=8, exit_threshold=1e9)
    handle.remove()
    assert len(runs) == 2


def padded(rows, width):
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@pytest.mark.parametrize("options", [{"num_steps": 4}, {"num_steps": 8, "exit_threshold": 0.2}], ids=str)
def test_batched_with_left_padding_equals_single(model, token_ids, options):
    rows = [token_ids(1, length, seed=length)[0].tolist() for length in (3, 11, 7)]
    ids, mask = padded(rows, 11)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=positions, **options)
    for index, row in enumerate(rows):
        with torch.no_grad():
            alone = model(torch.tensor([row]), **options)
        torch.testing.assert_close(together.logits[index, -len(row) :], alone.logits[0], **TOLERANCE)
        if alone.steps is not None:
            assert together.steps[index, -len(row) :].tolist() == alone.steps[0].tolist()
            assert set(together.steps[index, : -len(row)].tolist()) <= {1}


def test_rows_of_a_batch_have_steps_of_their_own(model, token_ids):
    ids = token_ids(3, 9)
    steps = torch.tensor([1, 3, 8])
    with torch.no_grad():
        together = model(ids, num_steps=steps)
    assert together.steps.tolist() == [[count] * 9 for count in steps.tolist()]
    cached = token_by_token(model, ids, num_steps=steps)
    for index, count in enumerate(steps.tolist()):
        alone = logits(model, ids[index : index + 1], num_steps=count)
        torch.testing.assert_close(together.logits[index : index + 1], alone, **TOLERANCE)
        torch.testing.assert_close(cached[index : index + 1], alone, **TOLERANCE)


@pytest.mark.parametrize("options", [{"num_steps": 3}, {"num_steps": 8, "exit_threshold": 0.2}], ids=str)
@pytest.mark.parametrize("how", ["dynamic", "static", "beams"])
def test_generate_equals_recomputation(model, token_ids, options, how):
    ids = token_ids(2, 5)
    kinds = {"static": {"cache_implementation": "static", "disable_compile": True}, "beams": {"num_beams": 3}}
    asked = {**GREEDY, **kinds.get(how, {}), **options}
    cached = model.generate(ids, **asked)
    asked.pop("cache_implementation", None)
    assert torch.equal(cached, model.generate(ids, **asked, use_cache=False))
    assert not torch.equal(cached, model.generate(ids, **{**asked, "num_steps": 1, "exit_threshold": None}))


def test_last_step_cache_keeps_one_layer_a_block_and_is_exact_until_the_second_call(model, token_ids):
    ids = token_ids(2, 9)
    deep = model.model.depth
    model.model.depth = deep.changed(model.config, num_steps=4, last_step_cache=True)
    try:
        cache = DynamicCache(config=model.config)
        torch.testing.assert_close(
            logits(model, ids[:, :8], past_key_values=cache), logits(model, ids[:, :8], use_cache=False), **TOLERANCE
        )
        assert [layer.keys.shape[2] for layer in cache.layers] == [8] * 4
        next_one = logits(model, ids[:, 8:], past_key_values=cache)
        assert [layer.keys.shape[2] for layer in cache.layers] == [9] * 4
        whole = logits(model, ids, use_cache=False)[:, 8:]
        assert not torch.allclose(next_one, whole, **TOLERANCE)  # another function, which has to be measured
        with pytest.raises(ValueError, match="`last_step_cache` needs a DynamicCache, got layers of StaticLayer"):
            logits(model, ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    finally:
        model.model.depth = deep


def test_packed_documents_stay_apart_at_every_step(model, token_ids):
    first, second = token_ids(1, 6, seed=3), token_ids(1, 8, seed=4)
    packed = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(6), torch.arange(8)))[None]
    found = logits(model, packed, position_ids=positions, num_steps=4)
    torch.testing.assert_close(found[:, 6:], logits(model, second, num_steps=4), **TOLERANCE)


def test_a_future_token_changes_nothing_before_it(model, token_ids):
    ids = token_ids(1, 10)
    other = ids.clone()
    other[0, 7] = (other[0, 7] + 1) % 256
    for options in ({"num_steps": 8}, {"num_steps": 8, "exit_threshold": 0.2}):
        torch.testing.assert_close(logits(model, ids, **options)[:, :7], logits(model, other, **options)[:, :7])


@pytest.mark.parametrize("enable", ["gradient_checkpointing_enable"])
def test_checkpointed_steps_give_the_same_gradients(tiny_model, token_ids, enable):
    ids, gradients = token_ids(2, 9), []
    for checkpointed in (False, True):
        model = recurrent(tiny_model).train()
        if checkpointed:
            getattr(model, enable)({"use_reentrant": False})
        model(ids, labels=ids, num_steps=8, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_one_compiled_block_serves_every_number_of_steps(tiny_model, token_ids):
    model, ids = recurrent(tiny_model).train(), token_ids(2, 9)
    torch._dynamo.reset()
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    counts = []
    for steps in (1, 4, 8, 2):
        model(ids, labels=ids, num_steps=steps, use_cache=False).loss.backward()
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[0] == counts[-1] <= 4  # blocks with a norm in front and without, each once


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "`num_steps` must be in [1, 8], got 0: the model's configuration says how large it"),
        ({"num_steps": 9}, "`num_steps` must be in [1, 8], got 9"),
        ({"num_steps": torch.tensor([1, 9])}, "`num_steps` must be in [1, 8], got 9"),
        ({"num_steps": torch.tensor([0, 4])}, "`num_steps` must be in [1, 8], got 0"),
        ({"exit_threshold": 0.0}, "`exit_threshold` must be above 0, got 0.0: it is a relative change of a state."),
    ],
    ids=str,
)
def test_a_wrong_depth_is_refused(model, token_ids, options, message):
    with pytest.raises(ValueError) as error:
        logits(model, token_ids(2, 3), **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("options", [{"num_steps": 1}, {"exit_threshold": 0.1}], ids=str)
def test_a_plain_model_refuses_a_depth(tiny_model, token_ids, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` needs a model with recurrent depth, got"):
        logits(tiny_model(), token_ids(1, 3), **options)


def test_a_cache_of_another_depth_is_refused(model, token_ids):
    cache = DynamicCache(config=model.config)
    logits(model, token_ids(1, 3), past_key_values=cache, num_steps=4)
    with pytest.raises(ValueError, match="the cache is of another depth, got 10 layers, 2 steps need 6: go on with"):
        logits(model, token_ids(1, 1), past_key_values=cache, num_steps=2)


def test_paged_attention_is_refused(tiny_model, token_ids):
    model = recurrent(tiny_model)
    with pytest.raises(ValueError, match="`generate_batch` pages one layer of keys and values a block, got a model"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)


def test_engines_with_a_layer_of_keys_a_block_are_refused(model, token_ids):
    ids, options = token_ids(1, 3), {"attention_instances": {}}  # what vLLM and SGLang give the decoder
    with pytest.raises(
        ValueError, match="`num_steps` must be 1 in an engine with one layer of keys and values a block"
    ):
        model.model(ids, **options)
    assert torch.equal(
        model.model(ids, num_steps=1, **options).last_hidden_state, model.model(ids, num_steps=1).last_hidden_state
    )


def test_exit_is_refused_where_blocks_recompute(tiny_model, token_ids):
    model, ids = recurrent(tiny_model), token_ids(1, 3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert logits(model.eval(), ids, exit_threshold=0.1).isfinite().all()
    with pytest.raises(ValueError, match="`exit_threshold` must be None in training with gradient checkpointing"):
        model.train()(ids, exit_threshold=0.1, use_cache=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prelude_layers": 1, "core_layers": 2, "coda_layers": 2},
            "`prelude_layers`, `core_layers` and `coda_layers` must add up to `num_hidden_layers`, got (1, 2, 2) and 4",
        ),
        (
            {"prelude_layers": 2, "core_layers": 0, "coda_layers": 2},
            "`prelude_layers`, `core_layers` and `coda_layers` must add up to `num_hidden_layers`, got (2, 0, 2) and 4",
        ),
        (
            {"core_layers": 2},
            "`core_layers` needs `prelude_layers`, `core_layers` and `coda_layers`, got 2 beside None: set all three",
        ),
        ({"max_recurrence": 3}, "`max_recurrence` needs `prelude_layers`, `core_layers` and `coda_layers`, got 3"),
        (
            {"prelude_layers": 1, "core_layers": 2, "coda_layers": 1, "mean_recurrence": 9},
            "`mean_recurrence` must be in [1, max_recurrence], got 9 of 8: it is the r of every call that names none.",
        ),
    ],
    ids=str,
)
def test_a_wrong_recurrence_is_refused(tiny_config, fields, message):
    with pytest.raises(StrictDataclassError) as error:
        tiny_config(num_hidden_layers=4, **fields)
    assert str(error.value.__cause__ or error.value).startswith(message)


def test_a_token_at_rest_shows_others_the_keys_of_its_last_step():
    seen = StepCache(None, 0, False)
    key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    seen.update(key, value, 0)
    later = StepCache(None, 0, False)
    later.before, later.resting = seen.now, torch.tensor([[[True], [False], [True]]])
    new_key, _ = later.update(key + 1, value + 1, 0)
    assert torch.equal(new_key[:, :, 1], key[:, :, 1] + 1)
    assert torch.equal(new_key[:, :, 0], key[:, :, 0])
    assert torch.equal(new_key[:, :, 2], key[:, :, 2])


def test_classification_reads_the_depth(tiny_config, token_ids):
    from fanformer.model import FANformerForSequenceClassification

    torch.manual_seed(0)
    model = FANformerForSequenceClassification(tiny_config(**PARTS, num_labels=3, pad_token_id=0)).eval()
    ids = token_ids(2, 5).clamp(min=1)
    assert model(ids, num_steps=2).logits.shape == (2, 3)


def test_fresh_weights_are_those_of_the_plain_model(tiny_config):
    plain_fields = {"num_hidden_layers": 4}
    torch.manual_seed(0)
    plain = FANformerForCausalLM(tiny_config(**plain_fields)).state_dict()
    torch.manual_seed(0)
    model = FANformerForCausalLM(tiny_config(**PARTS)).state_dict()
    assert {name for name in model if name not in plain} == {"model.bridge.norm_weight", "model.bridge.scale"}
    assert all(torch.equal(model[name], value) for name, value in plain.items())
