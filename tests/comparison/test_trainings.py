"""What a comparison trains: other files and other text are other trainings, and what cannot be trained is named."""

import math

import pytest
import torch
import yaml
from transformers import LlamaConfig

from fanformer.comparison.architectures import Architecture, architecture
from fanformer.comparison.compare import run_comparison
from fanformer.comparison.trial import Result, run_trial
from fanformer.errors import ConfigError, DataError
from fanformer.training.events import silent
from fanformer.training.folder import read_records
from tests.comparison.test_comparison import small
from tests.saved_models import tiny_tokenizer  # noqa: F401

DECISIONS_FILE = "decisions.yaml"
MACHINE = ("device", "precision", "compile", "threads")


@pytest.fixture(autouse=True)
def _threads_stay():
    """Give torch its threads back; a comparison that decides about them sets them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def mine(tmp_path):
    """Save the configuration of a Llama of so many layers; returns its folder, always the same."""

    def save(num_hidden_layers):
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320}
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": num_hidden_layers}
        LlamaConfig(**sizes, **heads).save_pretrained(tmp_path / "mine")
        return str(tmp_path / "mine")

    return save


def asked_for(comparison, folder):
    """Return the trainings of the sweep; none is done, since each is known to diverge."""
    trials = []

    def known(trial):
        trials.append(trial)
        return Result("diverged", "made up", {}, [], {})

    run_comparison(comparison, folder, silent, known=known)
    return trials


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fanformer@1m:fan_ratio=2", "`fan_ratio` must be in [0, 0.5], got 2"),
        ("fanformer@1m:fan_placement=ffm", "'fan_placement' expected one of"),
        ("llama:hidden_size=wide", "'hidden_size' expected int"),
        ("llama@2m:hidden_size=wide", "'str'"),
        ("llama@2m:hidden_size=-32", "-32"),
    ],
)
def test_a_value_that_an_architecture_cannot_have_is_one_line_that_names_it(spec, message):
    with pytest.raises(ConfigError) as caught:
        architecture(spec)
    said = str(caught.value)
    assert said.startswith(f"architecture '{spec}' cannot be built: ")
    assert message in said
    assert "\n" not in said


def test_a_value_with_a_comma_is_refused_with_what_takes_it():
    spec = "llama@2m:rope_parameters={rope_type: linear, factor: 2}"
    with pytest.raises(ConfigError) as caught:
        architecture(spec)
    said = str(caught.value)
    assert said.startswith("the value of `rope_parameters` must be YAML without a comma, got '{rope_type: linear' in ")
    assert f"{spec!r}: write a config.json" in said


def test_a_config_json_is_the_architecture_of_its_folder(mine):
    folder = mine(num_hidden_layers=1)
    by_folder, by_file = architecture(folder), architecture(f"{folder}/config.json")
    assert by_file.config().num_hidden_layers == 1
    assert by_file.digest == by_folder.digest != ""


def test_an_architecture_whose_file_changed_is_another_training(corpus, mine, tmp_path):
    comparison = small(corpus, architectures=[mine(num_hidden_layers=1)])
    (first,), (again,) = (asked_for(comparison, tmp_path / "out") for _ in range(2))
    mine(num_hidden_layers=2)
    (changed,) = asked_for(comparison, tmp_path / "out")
    assert first.name == again.name != changed.name


def test_a_file_that_changes_under_way_ends_the_trainings_that_are_left(corpus, mine, tmp_path):
    folder, trials = mine(num_hidden_layers=1), []

    def known(trial):
        mine(num_hidden_layers=2)
        trials.append(trial)
        return Result("finished", "", {"loss": 1.0, "bits_per_byte": 1.0}, [], {})

    run_comparison(small(corpus, architectures=[folder], seeds=2), tmp_path / "out", silent, known=known)
    assert [trial.seed for trial in trials] == [0, 1]
    for trial in trials:
        with pytest.raises(ConfigError, match=r"mine has changed since the comparison began: start the comparison ag"):
            run_trial(trial, tmp_path / "trial", lambda event: None)
    assert not (tmp_path / "trial").exists()


def test_other_text_to_measure_on_is_another_training(corpus, tmp_path):
    text = tmp_path / "held-out.txt"
    text.write_text("the cat sees the old tree. " * 50)
    run = {**small(corpus).run, "eval_data": str(text)}
    comparison = small(corpus, architectures=["llama@60k"], run=run)
    (first,), (again,) = (asked_for(comparison, tmp_path / "out") for _ in range(2))
    text.write_text("the dog sees the blue river. " * 50)
    (other,) = asked_for(comparison, tmp_path / "out")
    assert first.name == again.name != other.name
    text.unlink()
    with pytest.raises(DataError, match=r"held-out\.txt`: no file"):
        asked_for(comparison, tmp_path / "out")


def test_a_tokenizer_that_is_asked_for_is_that_of_the_data_and_so_of_the_trainings(
    corpus,
    tiny_tokenizer,  # noqa: F811
    tmp_path,
):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    run = {name: value for name, value in small(corpus).run.items() if name != "vocab_size"}
    run["tokenizer"] = str(tmp_path / "tokenizer")
    (trial,) = asked_for(small(corpus, architectures=["llama@60k"], run=run), tmp_path / "out")
    assert len(tiny_tokenizer) == 300
    result = run_trial(trial, tmp_path / "trial", lambda event: None)
    assert (result.status, result.details["model"]["vocab_size"]) == ("finished", 320)  # a multiple of 64
    with pytest.raises(ConfigError, match=r"`tokenizer` does not apply to the prepared data .*: they have their own"):
        small(trial.data_folder, run=run)


def test_a_training_whose_values_are_no_numbers_at_its_end_has_diverged(corpus, tmp_path, monkeypatch):
    """Its steps stay finite, so that none ends it; what is measured of it does not."""
    build = Architecture.build

    def spoiled(self, needed):
        model = build(self, needed)
        model.lm_head.register_forward_hook(lambda module, _, logits: logits if module.training else logits * math.nan)
        return model

    monkeypatch.setattr(Architecture, "build", spoiled)
    (trial,) = asked_for(small(corpus, architectures=["fanformer@60k"]), tmp_path / "out")
    result = run_trial(trial, tmp_path / "trial", lambda event: None)
    assert (result.status, result.message) == ("diverged", "the held-out loss at the end is nan")
    steps = [record["step"] for record in read_records(tmp_path / "trial" / "run") if "loss" in record]
    assert steps[-1] == 10  # it was not ended before


def threads_of(comparison, folder):
    """Return the threads of a comparison's one training."""
    (trial,) = asked_for(comparison, folder)
    assert trial.settings.keys() >= set(MACHINE)
    return trial.settings["threads"]


def test_what_is_asked_of_the_machine_wins_over_what_was_decided_before(corpus, tmp_path):
    comparison = small(corpus, architectures=["llama@60k"])
    more = threads_of(comparison, tmp_path) + 1
    asked = small(corpus, architectures=["llama@60k"], run={**comparison.run, "threads": more})
    assert threads_of(asked, tmp_path) == more


def put_threads(path, threads):
    """Put another number of threads into what was decided."""
    content = yaml.safe_load(path.read_text())
    content["decided"]["threads"] = threads
    path.write_text(yaml.safe_dump(content))


def test_what_was_decided_holds_for_the_same_question_alone(corpus, tmp_path):
    comparison = small(corpus, architectures=["llama@60k"])
    own = threads_of(comparison, tmp_path)
    put_threads(tmp_path / DECISIONS_FILE, 77)
    assert threads_of(comparison, tmp_path) == 77
    assert threads_of(small(corpus, architectures=["llama@60k"], tokens=2560), tmp_path) == own
    assert threads_of(comparison, tmp_path) == own  # which the longer one's decision is not taken for either


def test_a_decision_that_is_damaged_or_of_an_older_version_is_made_anew(corpus, tmp_path):
    comparison, path = small(corpus, architectures=["llama@60k"]), tmp_path / DECISIONS_FILE
    own = threads_of(comparison, tmp_path)
    whole = path.read_text()
    half = whole[: whole.index("threads", whole.index("decided"))]
    old = yaml.safe_dump({**dict.fromkeys(MACHINE, "off"), "threads": 77})
    for content in ("", "{", "- 1", "asked: 1", half, old):
        path.write_text(content)
        assert threads_of(comparison, tmp_path) == own, content
        assert path.read_text() == whole
