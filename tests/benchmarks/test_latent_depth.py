"""The benchmark of recurrent depth, all of it in little: what it says is there, and equality is found equal."""

import shutil
import sys
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fanformer.comparison.ledger import EXACT, Figure
from tests.gguf_models import save
from tests.saved_models import recurrent_model, saved_model, tiny_tokenizer  # noqa: F401
from tests.training.conftest import corpus, run, run_config  # noqa: F401


@pytest.fixture
def depth(repository, monkeypatch):
    """The benchmark."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "quality"))
    import latent_depth

    return latent_depth


@pytest.fixture
def given(recurrent_model, tmp_path):  # noqa: F811
    texts = ["the cat sat on the mat. a small model speaks of small things. " * 4, "def add(a, b):\n    return a\n" * 6]
    asked = {"dry_run": True, "gguf": False, "rounds": 1, "work": tmp_path, "tokens": "1k", "number": 0}
    return Namespace(run=recurrent_model, texts=texts, **asked)


def test_the_dial_is_eval_at_every_number_of_steps(depth, given):
    figures = depth.dial(given)
    bits = {steps: figures[f"bits_per_byte_{steps}"].value for steps in (1, 2, 4, 8)}
    assert len(set(bits.values())) == 4
    assert figures["bits_ratio_8_over_4"].value == bits[8] / bits[4]


def test_exit_saves_more_the_larger_the_threshold(depth, given):
    figures = depth.exits(given)
    for steps in (4, 8):
        saved = [figure.value for name, figure in figures.items() if name.startswith(f"saved_from_{steps}_")]
        assert saved == sorted(saved)
        assert all(0 <= share < 1 for share in saved)
        free = [
            figures[name.replace("bits_ratio", "saved")].value
            for name, figure in figures.items()
            if name.startswith(f"bits_ratio_from_{steps}_") and figure.value <= depth.MOST_LOST
        ]
        assert figures[f"saved_from_{steps}"].value == max([0, *free])
    assert figures["bits_ratio_from_8_at_0.005"].value == pytest.approx(1, abs=0.05)


def test_a_cache_of_all_steps_gives_the_bits_of_a_full_pass(depth, given):
    from fanformer.loading import load

    figures = depth.caches(given)
    model, tokenizer = load(given.run, "cpu", "float32")
    bits = []
    whole = tokenizer.encode(given.texts[0], add_special_tokens=False)
    assert len(whole) >= 46
    for start in (0, 23):  # a document gives several rows
        ids = torch.tensor([[0, *whole[start : start + 23]]])
        with torch.no_grad():
            chances = model(ids).logits[0, :-1].log_softmax(-1)
        bits += (-chances.gather(-1, ids[0, 1:, None])[5:, 0] / torch.log(torch.tensor(2.0))).tolist()
    assert figures["bits_per_token_all_steps_cached"].value == pytest.approx(sum(bits) / len(bits), rel=1e-4)
    assert figures["bits_per_token_last_steps_cached"].value != figures["bits_per_token_all_steps_cached"].value


def test_drafts_are_found_equal_and_rates_are_beside_four_steps(depth, given):
    figures = depth.speeds(given)
    assert figures["rate_torch_4"].value == 1
    equal = [figures[f"drafts_equal_{steps}"] for steps in (4, 8)]
    assert [(one.value, one.interval) for one in equal] == [(1, EXACT)] * 2
    assert 0 <= figures["accepted_8"].value <= 1
    ratio = figures["rate_torch_8_drafts"].value / figures["rate_torch_8"].value
    assert figures["drafts_times_faster_8"].value == pytest.approx(ratio)  # of the one round that counts


def test_completions_are_cut_at_their_last_line_before_they_are_parsed(depth, given):
    assert depth.parses("def f(x):\n    return x\n    retu")
    assert not depth.parses("def f(x:\n    return x\n")
    assert not depth.parses("def f(")  # nothing whole
    assert not depth.parses("(" * 10_000 + "\n")
    assert depth.completions(given).keys() == {"parse_1", "parse_2", "parse_4", "parse_8"}


@pytest.mark.ci
def test_a_plain_run_goes_on_as_recurrent_and_its_first_step_is_itself(
    depth,
    given,
    tiny_model,
    tiny_tokenizer,  # noqa: F811
    tmp_path,
):
    given.base = save(tmp_path / "base", tiny_model(vocab_size=320, num_hidden_layers=3), tiny_tokenizer)
    given.preset = "nano-recurrent"
    figures = depth.retrofit(given)
    assert figures["first_step_is_plain"].value == 1
    plain, recurrent = (figures[f"bits_per_byte_{name}"].value for name in ("plain", "recurrent"))
    assert figures["bits_ratio"].value == recurrent / plain
    weights = tmp_path / "retrofit-plain-0" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert depth.retrofit(given) == figures  # what is trained is not trained again
    assert weights.stat().st_mtime_ns == before


def test_seeds_give_intervals_and_what_must_be_equal_is_the_worst_of_them(depth):
    def found(bits, ratio, equal):
        exact = Figure(equal, "1 if equal", interval=EXACT)
        return {"bits": Figure(bits, "bits per byte"), "ratio": Figure(ratio, "ratio"), "equal": exact}

    together = depth.over_runs([found(2.0, 1.0, 1.0), found(3.0, 4.0, 0.0)])
    assert together["bits"].value == 2.5
    assert together["bits"].low < 2 < 3 < together["bits"].high
    assert together["ratio"].value == pytest.approx(2.0)
    assert together["equal"] == Figure(0.0, "1 if equal", interval=EXACT)
    assert depth.over_runs([found(2.0, 1.0, 1.0)]) == found(2.0, 1.0, 1.0)


def test_what_is_measured_is_kept_and_another_run_is_refused(depth, recurrent_model, tmp_path, monkeypatch, capsys):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. a small model speaks of small things. " * 4)
    words = ["latent_depth.py", str(recurrent_model), "--text", str(text), "--parts", "dial", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "--dry-run"])
    depth.main()
    first = capsys.readouterr().out
    assert "dial bits_ratio_8_over_4: " in first
    monkeypatch.setitem(depth.MEASURES, "dial", None)  # it would be called
    depth.main()
    assert capsys.readouterr().out == first
    monkeypatch.setattr(sys, "argv", [*words, "--dry-run", "--rounds", "7", "--tokens", "1M"])
    with pytest.raises(SystemExit, match="was begun with tokens 500k, got 1M: give another --work"):
        depth.main()


def test_weights_text_or_threads_that_changed_are_not_taken_for_those_that_were_measured(
    depth,
    recurrent_model,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    folder, text = shutil.copytree(recurrent_model, tmp_path / "run"), tmp_path / "text.txt"
    text.write_text("the cat sat on the mat.")
    words = [folder, "--text", text, "--parts", "dial", "--work", tmp_path / "work", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["latent_depth.py", *map(str, words)])
    monkeypatch.setitem(depth.MEASURES, "dial", lambda given: {})
    for _ in range(2):
        depth.main()
    text.write_text("a small model speaks of small things.")
    with pytest.raises(SystemExit, match=r"was begun with text_digest .*: give another --work"):
        depth.main()
    text.write_text("the cat sat on the mat.")
    depth.main()
    weights = load_file(folder / "model.safetensors")
    name = min(weights)
    save_file({**weights, name: weights[name] + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"was begun with weights .*: give another --work"):
        depth.main()
    shutil.copy(recurrent_model / "model.safetensors", folder)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(SystemExit, match=r"was begun with threads \d+, got 77: give another --work"):
        depth.main()


def test_what_cannot_be_measured_ends_before_anything_is(depth, recurrent_model, saved_model, capsys):  # noqa: F811
    for words, message in (
        (
            [recurrent_model, "--parts", "dial,dail"],
            "--parts must be of dial, exit, cache, speed, parse, retrofit, got",
        ),
        ([recurrent_model, "--parts", "retrofit"], "the part `retrofit` needs --base"),
        ([recurrent_model, "--dry-run", "--write"], "--write has no effect with --dry-run"),
        ([saved_model], "has no recurrent depth: name the folder of a run of a preset such as nano-recurrent"),
    ):
        with pytest.raises(SystemExit):
            depth.parsed(list(map(str, words)))
        assert message in capsys.readouterr().err


@pytest.mark.ci
def test_without_a_text_it_reads_what_the_run_held_out(depth, run):  # noqa: F811
    import yaml

    from fanformer.data.prepared import open_prepared

    parts = {"num_hidden_layers": 3, "prelude_layers": 1, "core_layers": 1, "coda_layers": 1}
    result, _ = run(max_steps=1, held_out_fraction=0.3, **{f"model.{name}": value for name, value in parts.items()})
    texts = depth.texts_of(Namespace(run=result.folder, text=None))
    data = yaml.safe_load((result.folder / "run.yaml").read_text())["data"]
    held_out = open_prepared(result.folder / data["folder"]).split("heldout")
    assert len(texts) == held_out.num_documents
    assert sum(len(text.encode()) for text in texts) == held_out.num_bytes
    assert depth.seeds_of([result.folder]) == [0]
