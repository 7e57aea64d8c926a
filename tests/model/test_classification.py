"""Classes of texts and of tokens, by the Auto classes, from the folder of a language model."""

import copy
import re
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from fanformer.model import FANformerForSequenceClassification, FANformerForTokenClassification
from tests.saved_models import tiny_tokenizer  # noqa: F401

KINDS = pytest.mark.parametrize(
    ("auto", "kind"),
    [
        (AutoModelForSequenceClassification, FANformerForSequenceClassification),
        (AutoModelForTokenClassification, FANformerForTokenClassification),
    ],
    ids=["sequence", "token"],
)
PAD = 0


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("classification")
    tiny_model(vocab_size=320, pad_token_id=PAD).save_pretrained(path)
    return path


@KINDS
def test_auto_classes_take_the_decoder_of_a_language_model(folder, tiny_model, tmp_path, auto, kind):
    model, report = auto.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert type(model) is kind
    expected = {"score.weight"}
    assert (report["missing_keys"], report["unexpected_keys"]) == (expected, set())
    decoder = tiny_model(vocab_size=320, pad_token_id=PAD).model.state_dict()
    assert all(torch.equal(value, decoder[name]) for name, value in model.model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert again.config.num_labels == 3
    assert torch.equal(again.score.weight, model.score.weight)


def test_a_text_is_read_at_its_last_token_that_is_no_padding(folder, token_ids):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    ids = token_ids(1, 7).clamp(min=1)
    with torch.no_grad():
        expected = model.score(model.model(ids).last_hidden_state[:, -1])
        for left, right in ((0, 0), (0, 4), (4, 0)):
            padded = torch.nn.functional.pad(ids, (left, right), value=PAD)
            present = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
            positions = (present.cumsum(-1) - 1).clamp(min=0)
            found = model(padded, attention_mask=present, position_ids=positions).logits
            # other shapes, other orders of sums
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_token_has_read_only_those_before_it(folder, token_ids):
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=3).eval()
    ids = token_ids(1, 9)
    with torch.no_grad():
        whole, start = model(ids).logits, model(ids[:, :5]).logits
    assert whole.shape == (1, 9, 3)
    torch.testing.assert_close(whole[:, :5], start, rtol=1e-4, atol=1e-5)  # other shapes, other orders of sums


def test_the_example_of_the_page_trains(folder, tiny_tokenizer, repository, tmp_path, monkeypatch):  # noqa: F811
    """The block itself, on texts whose class is their first word."""
    shutil.copytree(folder, tmp_path / "folder")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "folder")
    page = (repository / "docs" / "tuning.md").read_text(encoding="utf-8")
    [block] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Classification" in block]
    words = ["mat", "small", "add", "things", "model"]
    names = {
        "texts": [f"{start} {one} {other}" for one in words for other in words for start in ("the", "a")],
        "labels": [0, 1] * len(words) ** 2,
    }
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(block, names)
    assert names["loss"] < 0.1
    assert AutoModelForSequenceClassification.from_pretrained("classifier").config.num_labels == 2


def test_ten_lines_train_a_classifier_of_texts(folder):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    ids = torch.randint(10, 250, (32, 8))
    labels = torch.arange(32) % 2
    ids[:, 3] = 5 + labels  # the class is a token
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        accuracy = (model.eval()(ids).logits.argmax(-1) == labels).float().mean()
    assert loss < 0.1
    assert accuracy == 1


def test_ten_lines_train_a_classifier_of_tokens(folder):
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=2)
    ids = torch.randint(10, 250, (32, 8))
    labels = ids.roll(1, dims=1) % 2  # of the token before
    labels[:, 0] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        right = (model.eval()(ids).logits.argmax(-1) == labels)[:, 1:].float().mean()
    assert loss < 0.2
    assert right > 0.95
