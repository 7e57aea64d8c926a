"""TRL, which knows nothing of this project: on the same rows the same losses, and its trainers train our folder."""

import json

import pytest
import torch

from fanformer.data.conversations.chat_tokens import add_chat_tokens
from fanformer.data.conversations.chatml import END, as_text
from fanformer.data.conversations.reading import read_examples
from fanformer.data.conversations.rows import ConversationRows, tokenize_examples
from fanformer.evaluation.preferences import measure_pairs
from fanformer.training.pair_loss import PairLoss, ReferencedRows
from tests.ci.test_readme import blocks
from tests.saved_models import tiny_tokenizer  # noqa: F401

pytestmark = pytest.mark.ci
PINS = ("trl==1.16.0",)
SAID = [
    ["the cat?", "sat on the mat."],
    ["a small model", "speaks", "of what", "of small things\nand more."],
    ["def add(a, b)?", "return a + b", "the mat?", "no.", "so", "small."],
]
PAIRS = [("the cat?", "on the mat", "in a hat"), ("a model", "small", "speaks of things"), ("so", "no.", "yes, and no")]
ROLES = ("user", "assistant")


@pytest.fixture(scope="module")
def python(python_with):
    """An interpreter that has PINS in front of what this one has."""
    return python_with(*PINS)


@pytest.fixture
def prepared(tiny_model, tiny_tokenizer, tmp_path):  # noqa: F811
    """A model made ready for chat, saved, and another one as the reference."""
    model, other = tiny_model(vocab_size=320), tiny_model(seed=1, vocab_size=320)
    tokens = add_chat_tokens(model, tiny_tokenizer)
    add_chat_tokens(other, tiny_tokenizer)
    for each, name in ((model, "folder"), (other, "reference")):
        each.save_pretrained(tmp_path / name)
        tokens.tokenizer.save_pretrained(tmp_path / name)
    return model, other, tokens


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def packed(tokens, path, **options):
    examples = read_examples(str(path), pytest.fail, **options).examples
    documents = tokenize_examples(tokens.chatml, examples, 512, pytest.fail, **options).documents
    rows = ConversationRows(documents, 512, tokens.tokenizer.pad_token_id)
    assert len(rows) == 1
    return rows


@pytest.mark.timeout(1800)
def test_losses_of_answers_and_of_pairs_are_trls(fanformer, repository, prepared, tmp_path):
    model, other, tokens = prepared
    messages = write(
        tmp_path / "messages.jsonl",
        [{"messages": [{"role": ROLES[at % 2], "content": text} for at, text in enumerate(said)]} for said in SAID],
    )
    pairs = write(
        tmp_path / "pairs.jsonl", [{"prompt": asked, "chosen": good, "rejected": bad} for asked, good, bad in PAIRS]
    )
    # as TRL writes conversations, the line end behind END would be learnt: it gets the same text without
    plain = write(
        tmp_path / "plain.jsonl",
        [
            {
                "prompt": as_text(example.messages[:1], prompt=True),
                "chosen": example.messages[1].content + END,
                "rejected": example.rejected[0].content + END,
            }
            for example in read_examples(str(pairs), pytest.fail, preference=True).examples
        ],
    )
    script = repository / "tests" / "ci" / "trl_losses.py"
    printed = fanformer(tmp_path / "folder", tmp_path / "reference", messages, plain, program=(str(script),))
    theirs = json.loads(printed.splitlines()[-1])

    rows = packed(tokens, messages)
    row = rows[0]
    with torch.no_grad():
        labels = row["labels"][None]
        ours = model(
            row["input_ids"][None],
            position_ids=row["position_ids"][None],
            labels=labels,
            shift_labels=labels,
            num_items_in_batch=rows.num_labels,
        ).loss
    # both in float32, one packed and one padded
    assert theirs["sft"] == pytest.approx(float(ours), rel=1e-5)

    rows = ReferencedRows(packed(tokens, pairs, preference=True))
    rows.reference = measure_pairs(other, rows.rows, [0], 1)
    loss, batch = PairLoss(0.25), rows.batch([0])
    loss.install(model, None)
    with torch.no_grad():  # what a step of a run computes
        output = model(**batch, shift_labels=batch["labels"], num_items_in_batch=loss.count(batch), use_cache=False)
    margin, accuracy = output.figures.tolist()
    assert theirs["dpo"] == pytest.approx(float(output.loss), rel=1e-5)
    assert theirs["margin"] == pytest.approx(margin, rel=1e-4, abs=1e-4)
    assert theirs["accuracy"] == pytest.approx(accuracy)
    block = next(block for _, block in blocks((repository / "docs" / "tuning.md").read_text()) if "SFTTrainer" in block)
    fanformer(block, program=("-c",))
    assert (tmp_path / "tuned" / "modeling_fanformer.py").is_file()
    assert theirs["sft_after"] < theirs["sft"]
    assert theirs["dpo_after"] < theirs["dpo"]
