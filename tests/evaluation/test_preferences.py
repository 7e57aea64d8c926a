"""Preferences: the loss against its equation, in float64, and log-probabilities against whole logits."""

import math

import pytest
import torch

from fanformer.data.packing import IGNORED_LABEL
from fanformer.evaluation.preferences import document_log_probabilities, dpo_loss, dpo_margins


def literal_loss(policy, reference, beta):
    """Equation 7 of arXiv:2305.18290, pair by pair."""
    total = 0.0
    for (chosen, rejected), (chosen_before, rejected_before) in zip(policy, reference, strict=True):
        inner = beta * math.log(math.exp(chosen) / math.exp(chosen_before))
        inner -= beta * math.log(math.exp(rejected) / math.exp(rejected_before))
        total -= math.log(1 / (1 + math.exp(-inner)))
    return total / len(policy)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-30 * torch.rand(5, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    return policy.requires_grad_(), reference


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_is_the_equation_and_its_gradient_right(pairs, beta):
    policy, reference = pairs
    assert dpo_loss(policy, reference, beta).item() == pytest.approx(
        literal_loss(policy.tolist(), reference.tolist(), beta), rel=1e-12
    )  # float64
    assert torch.autograd.gradcheck(lambda values: dpo_loss(values, reference, beta), policy)
    # section 4: the gradient of a pair weighs beta sigmoid(-margin), up for the chosen and down for the rejected answer
    dpo_loss(policy, reference, beta).backward()
    weight = beta * torch.sigmoid(-dpo_margins(policy, reference, beta)) / len(policy)
    torch.testing.assert_close(policy.grad, torch.stack((-weight, weight), dim=1))


def test_a_model_that_is_its_reference_loses_the_logarithm_of_two(pairs):
    policy, _ = pairs
    assert dpo_loss(policy, policy.detach(), 0.1).item() == pytest.approx(math.log(2))
    assert dpo_margins(policy, policy.detach(), 0.1).abs().max() == 0


def test_margins_far_out_stay_finite():
    policy = torch.tensor([[-1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    loss = dpo_loss(policy, torch.zeros(2, 2), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(5e3)
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("rows", [None, 1, 3, 100])
def test_log_probabilities_in_chunks_are_those_of_whole_logits(rows):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 6, dtype=torch.float64, generator=generator).requires_grad_()
    head = torch.randn(11, 6, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, 11, (20,), generator=generator)
    labels[torch.arange(0, 20, 3)] = IGNORED_LABEL
    documents = torch.tensor([0] * 7 + [2] * 10 + [-1] * 3)
    labels[-3:] = IGNORED_LABEL
    found = document_log_probabilities(hidden, head, labels, documents, 4, rows)
    whole = (hidden @ head.t()).log_softmax(-1)
    expected = torch.zeros(4, dtype=torch.float64)
    for place, (label, document) in enumerate(zip(labels.tolist(), documents.tolist(), strict=True)):
        if label != IGNORED_LABEL:
            expected[document] = expected[document] + whole[place, label]
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found.square().sum(), (hidden, head))
    theirs = torch.autograd.grad(expected.square().sum(), (hidden, head))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_no_label_at_all_is_zero_and_narrow_types_are_summed_wide():
    hidden, head = torch.randn(4, 3), torch.randn(5, 3)
    nothing = torch.full((4,), IGNORED_LABEL)
    assert document_log_probabilities(hidden, head, nothing, torch.zeros(4, dtype=torch.int64), 2).tolist() == [
        0.0,
        0.0,
    ]
    found = document_log_probabilities(hidden.bfloat16(), head.bfloat16(), nothing + 101, torch.arange(4), 4)
    assert found.dtype == torch.float32


def test_preferences_of_packed_rows_are_those_of_each_answer_alone(tiny_model, tiny_tokenizer):
    from fanformer.data.conversations.chat_tokens import add_chat_tokens
    from fanformer.data.conversations.examples import Example, Message
    from fanformer.data.conversations.rows import ConversationRows, tokenize_examples

    model = tiny_model(vocab_size=320)
    prepared = add_chat_tokens(model, tiny_tokenizer)
    said = [("the cat?", "sat", "on"), ("a mat?", "the mat sat", "no"), ("so", "small", "things and things")]
    examples = [
        Example((Message("user", asked), Message("assistant", good)), 1, (Message("assistant", bad),))
        for asked, good, bad in said
    ]
    documents = tokenize_examples(prepared.chatml, examples, 256, pytest.fail, preference=True).documents
    rows = ConversationRows(documents, 256, 0)
    assert len(rows) == 1
    row = {name: value[None] for name, value in rows[0].items()}
    with torch.no_grad():
        hidden = model.model(row["input_ids"], position_ids=row["position_ids"]).last_hidden_state
        found = document_log_probabilities(
            hidden[0], model.lm_head.weight, row["labels"][0], row["document_ids"][0], 2 * len(examples)
        ).view(-1, 2)
        for place, number in enumerate(rows.examples_of(0)):
            for part, answer in enumerate((examples[number].messages[1], examples[number].rejected[0])):
                encoded = prepared.chatml.encode([examples[number].messages[0], answer])
                logits = model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
                alone = sum(
                    logits[at - 1, token]
                    for at, (token, trained) in enumerate(zip(encoded.ids, encoded.trained, strict=True))
                    if trained
                )
                torch.testing.assert_close(found[place, part], alone, rtol=1e-5, atol=1e-4)  # float32, other masks
