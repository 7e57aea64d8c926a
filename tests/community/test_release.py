"""Accepted rounds as signed folders: what was signed verifies, and nothing else does."""

import json
import shutil

import pytest

from fanformer.cli.main import main
from fanformer.errors import CheckpointError

pytest.importorskip("cryptography", reason="needs the extra `community` (cryptography)")

from fanformer.community.identity import ensure_host_identity, read_signing_key
from fanformer.community.invitation import key_fingerprint
from fanformer.community.release import digest_of, sign_folder, verify_run
from fanformer.training.checkpoint import publish, write_checkpoint


def write_round(run, number, weights):
    previous = run / f"checkpoint-{number - 1}"
    about = {
        "run": "cafe",
        "number": number,
        "previous": digest_of(previous) if previous.exists() else None,
        "record": {"result": "ab" * 32, "tokens": 100},
    }

    def fill(folder):
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text("a card")
        sign_folder(folder, read_signing_key(run / "keys"), about)

    return write_checkpoint(run, number, fill)


@pytest.fixture
def run(tmp_path):
    """A run of three rounds."""
    ensure_host_identity(tmp_path / "keys", tmp_path, ["127.0.0.1"])
    for number in (1, 2, 3):
        write_round(tmp_path, number, b"weights %d" % number)
    return tmp_path


def problems(run):
    return {one.folder.name: one.problem for one in verify_run(run) if one.problem}


def test_what_was_signed_verifies_with_another_card_and_without_rounds_that_were_pruned(run, capsys):
    (run / "checkpoint-2" / "README.md").write_text("an edited card")
    assert problems(run) == {}
    assert main(["community", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("as signed") == 3
    shutil.rmtree(run / "checkpoint-1")
    assert problems(run) == {}


def test_every_change_is_found(run, tmp_path, capsys):
    def change(name, words, spoil):
        copy = tmp_path / "copies" / name
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("copies"))
        spoil(copy / "checkpoint-2")
        assert words in problems(copy)["checkpoint-2"], name

    def edit_record(folder):
        content = json.loads((folder / "round.json").read_text())
        content["record"]["tokens"] = 10**9
        (folder / "round.json").write_text(json.dumps(content))

    change("weights", "the SHA-256 of model.safetensors", lambda at: (at / "model.safetensors").write_bytes(b"others"))
    change("missing", "config.json is missing", lambda at: (at / "config.json").unlink())
    change("added", "code.py is there and was not signed", lambda at: (at / "code.py").write_text("evil()"))
    change("record", "its signature is not that of the run's key", edit_record)
    change("unnamed", "it is not signed", lambda at: (at / "round.json").unlink())
    change("unsigned", "it is not signed", lambda at: (at / "round.json.sig").unlink())


def test_a_round_signed_by_another_key_is_forged(run, tmp_path, capsys):
    other = tmp_path / "other"
    ensure_host_identity(other / "keys", other, ["127.0.0.1"])
    for number in (1, 2, 3):
        write_round(other, number, b"weights %d" % number)
    shutil.rmtree(run / "checkpoint-3")
    shutil.copytree(other / "checkpoint-3", run / "checkpoint-3")
    assert list(problems(run)) == ["checkpoint-3"]
    assert main(["community", "verify", str(run)]) == 1
    assert "it is forged, or was changed" in capsys.readouterr().out


def test_a_true_round_in_another_ones_place_is_found(run):
    shutil.rmtree(run / "checkpoint-3")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-3")
    assert "it does not follow checkpoint-2" in problems(run)["checkpoint-3"]
    shutil.rmtree(run / "checkpoint-2")
    assert problems(run) == {"checkpoint-3": "it was signed as round 2"}


@pytest.fixture
def published(run):
    """A run whose newest round is in its folder too, beside what a host keeps there."""
    publish(run / "checkpoint-3", run)
    for name in (
        "run.yaml",
        "status.json",
        "status.json.new",
        "rounds.jsonl",
        "metrics.jsonl",
        "open.json",
        "loss.png",
    ):
        (run / name).write_text("the host's")
    return run


def test_the_model_in_the_runs_folder_is_checked_too(published, capsys):
    assert problems(published) == {}
    assert main(["community", "verify", str(published)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("as signed") == 4
    assert f"key: {key_fingerprint((published / 'public-key.pem').read_text())}" in shown
    weights = published / "model.safetensors"
    weights.unlink()  # it shares its bytes with the round's
    weights.write_bytes(b"another model")
    assert "the SHA-256 of model.safetensors" in problems(published)[published.name]
    assert main(["community", "verify", str(published)]) == 1


@pytest.mark.parametrize("name", ["adapter_config.json", "modeling_evil.py", "model-00001-of-00002.safetensors"])
def test_nothing_that_a_model_could_be_loaded_with_may_lie_beside_it(published, name):
    (published / name).write_text("{}")
    assert problems(published) == {published.name: f"{name} is there and was not signed"}


def test_a_model_without_a_signature_is_found(run):
    (run / "model.safetensors").write_bytes(b"a model")
    assert "it is not signed" in problems(run)[run.name]


def test_a_round_without_a_manifest_is_checked_too(run):
    (run / "checkpoint-2" / "manifest.json").unlink()
    assert problems(run) == {}
    (run / "checkpoint-2" / "model.safetensors").write_bytes(b"others")
    (run / "checkpoint-4").mkdir()
    found = problems(run)
    assert list(found) == ["checkpoint-2", "checkpoint-4"]
    assert "the SHA-256 of model.safetensors" in found["checkpoint-2"]
    assert "it is not signed" in found["checkpoint-4"]


def test_another_model_in_the_place_of_the_signed_one_is_found(published):
    for name in ("round.json", "round.json.sig", "model.safetensors"):
        (published / name).unlink()
    (published / "model-00001-of-00001.safetensors").write_bytes(b"another model")
    assert "it is not signed" in problems(published)[published.name]


def test_a_folder_of_something_else_is_one_line(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="no public key at"):
        verify_run(tmp_path)
    assert main(["community", "verify", str(tmp_path / "missing")]) == 2
    assert "no folder" in capsys.readouterr().err
