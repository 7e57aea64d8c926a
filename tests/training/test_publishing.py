import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

from fanformer.errors import CheckpointError, ConfigError, DataError
from fanformer.training import publishing
from fanformer.training.publishing import check_push_possible, push
from fanformer.training.run import train
from tests.local_hub import LocalHub, point_at
from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401
from tests.training.conftest import Notebook

CARD = (
    "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [fanformer, causal-lm]\n---\n\n# A model\n"
)


@pytest.fixture
def hub(monkeypatch):
    """A hub that knows the token of this process."""
    from huggingface_hub import close_session

    monkeypatch.setattr(publishing, "WAIT_SECONDS", 0.01)
    monkeypatch.setenv("HF_TOKEN", LocalHub.TOKEN)
    with LocalHub() as server:
        point_at(monkeypatch, server.url)
        yield server
    close_session()


@pytest.fixture
def run_folder(saved_model, tmp_path):  # noqa: F811
    """The folder of a finished run, with all that must not leave it."""
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(saved_model, folder)
    for name in ("data", "held-out", "checkpoint-4", ".cache"):
        (folder / name).mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "run.yaml").write_text("configuration: {}\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "loss.png").write_bytes(b"\x89PNG\0" + os.urandom(9000))
    shutil.copytree(saved_model, folder / "checkpoint-4", dirs_exist_ok=True)
    (folder / "checkpoint-4" / "README.md").write_text(CARD)
    private = ("training_state.json", "manifest.json", "optimizer.safetensors")
    for name in (*(f"checkpoint-4/{name}" for name in private), "data/train.bin", "held-out/a.txt", ".cache/x"):
        (folder / name).write_bytes(b"private")
    for name in (".lock", "run.lock", ".hidden", "run.yaml.new"):
        (folder / name).write_bytes(b"private")
    return folder


def model_files(folder):
    """Return what should arrive, by name, and what the hub puts into a new repository."""
    names = {"README.md", "run.yaml", "metrics.jsonl", "loss.png", "model.safetensors", "config.json"}
    names |= {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {"modeling_fanformer.py", "configuration_fanformer.py", "recurrence_fanformer.py"}
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def arrived(hub, name="user/tiny"):
    return {path: data for path, data in hub.repositories["models", name].files.items() if path != ".gitattributes"}


@pytest.mark.parametrize("large_storage", [True, False], ids=["large files apart", "all in the commit"])
def test_every_file_of_the_model_and_no_other_arrives_byte_for_byte(hub, run_folder, monkeypatch, large_storage):
    from huggingface_hub import constants

    hub.has_large_storage = large_storage
    # with Xet the client uploads in another way, which asks for Xet storage only if there are large files
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", large_storage)
    assert push(run_folder, "user/tiny") == f"{hub.url}/user/tiny"
    expected = model_files(run_folder)
    assert len(expected) == 12
    assert arrived(hub) == expected
    assert bool(hub.asked("PUT /storage/")) == large_storage


def test_name_without_an_owner_is_the_users_own(hub, run_folder):
    push(run_folder, "tiny")
    assert arrived(hub) == model_files(run_folder)


def test_checkpoint_is_pushed_without_what_only_training_needs(hub, run_folder):
    push(run_folder / "checkpoint-4", "user/tiny")
    assert arrived(hub) == model_files(run_folder / "checkpoint-4")


def test_second_push_sends_what_has_changed(hub, run_folder):
    push(run_folder, "user/tiny")
    first = hub.repositories["models", "user/tiny"].head
    (run_folder / "README.md").write_text(CARD + "\nbetter\n")
    hub.requests.clear()
    push(run_folder, "user/tiny")
    assert hub.repositories["models", "user/tiny"].head != first
    assert arrived(hub) == model_files(run_folder)
    assert not hub.asked("PUT /storage/")


def test_failures_of_the_hub_are_tried_again(hub, run_folder):
    hub.fail("POST /api/repos/create", status=502)
    hub.fail("POST /api/models/user/tiny/commit", status=503)
    push(run_folder, "user/tiny")
    assert arrived(hub) == model_files(run_folder)
    assert len(hub.asked("/commit/")) == 2


def test_push_that_fails_for_good_gives_the_command_that_makes_up_for_it(hub, run_folder, tmp_path):
    hub.fail("POST /api/repos/create", times=99, status=502)
    with pytest.raises(
        ConfigError, match=r"`push_to_hub` user/tiny failed \(.*502.*\): the model is complete"
    ) as caught:
        push(run_folder, "user/tiny")
    assert len(hub.asked("/api/repos/create")) == publishing.TRIES
    assert "\n" not in str(caught.value)
    hub.faults.clear()
    command = shlex.split(re.search(r"send it later with `(hf upload .*)`$", str(caught.value))[1])
    environment = os.environ | hub.environment(tmp_path / "home", token=hub.TOKEN)
    program = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()"]
    subprocess.run([*program, *command[1:]], env=environment, capture_output=True, check=True, timeout=60)
    assert arrived(hub) == model_files(run_folder)


def test_refusal_is_not_tried_again(hub, run_folder):
    with pytest.raises(ConfigError, match=r"`push_to_hub` other/tiny failed \(.*rights.*\): the model is complete in"):
        push(run_folder, "other/tiny")
    assert len(hub.asked("/api/repos/create")) == 1


def test_broken_card_is_refused_before_anything_is_sent(hub, run_folder):
    (run_folder / "README.md").write_text("---\ntags: 7\n---\n")
    with pytest.raises(ConfigError, match=r"`push_to_hub` user/tiny failed \(.*tags.*array.*\)"):
        push(run_folder, "user/tiny")
    assert not hub.asked("/commit/")


def test_folder_without_a_model_is_refused(hub, tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold config.json and model.safetensors to be pushed: name a fini"):
        push(tmp_path, "user/tiny")


def test_run_that_can_push_is_told_so(hub):
    check_push_possible("user/tiny")
    check_push_possible("tiny")


def test_push_that_cannot_work_is_refused_before_training(hub, monkeypatch):
    with pytest.raises(ConfigError, match=r"`push_to_hub` must be a repository as USER/NAME, got 'a/b/c': Repo id"):
        check_push_possible("a/b/c")
    with pytest.raises(ConfigError, match=r"`push_to_hub` other/tiny: the token is of `user`, who may write to user: "):
        check_push_possible("other/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match=r"user/tiny: the hub does not accept the token \(.*\): log in with `hf auth"):
        check_push_possible("user/tiny")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=r"user/tiny needs a token, got none: log in with `hf auth login`, or set"):
        check_push_possible("user/tiny")
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    hub.stop()
    with pytest.raises(
        DataError, match=r"`push_to_hub` user/tiny needs the hub, and .* does not answer \(.*\): run with"
    ):
        check_push_possible("user/tiny")
    hub.start()


@pytest.mark.ci
def test_pushed_model_loads_by_its_name_with_equal_weights(hub, run_folder, tmp_path):
    from safetensors.torch import load_file

    push(run_folder, "user/tiny")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('user/tiny', trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained('user/tiny', trust_remote_code=True)\n"
        "assert 'fanformer' not in sys.modules, 'the code must come from the hub'\n"
        "torch.save([model.state_dict(), tokenizer('a small model').input_ids], sys.argv[1])"
    )
    environment = os.environ | hub.environment(tmp_path / "home")
    command = [sys.executable, "-c", code, tmp_path / "loaded.pt"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    weights, ids = torch.load(tmp_path / "loaded.pt")
    saved = load_file(run_folder / "model.safetensors")
    assert set(saved) <= set(weights)
    for name, value in saved.items():
        assert torch.equal(weights[name], value), name
    assert ids


def test_run_that_could_not_push_is_refused_before_it_leaves_anything(hub, run_config, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    config = run_config(push_to_hub="user/tiny")
    with pytest.raises(ConfigError, match=r"`push_to_hub` user/tiny needs a token"):
        train(config, Notebook())
    assert not config.folder.exists()


def test_finished_run_is_on_the_hub(hub, run_config):
    result = train(run_config(push_to_hub="user/tiny", max_steps=2), Notebook())
    assert (result.folder / "data").is_dir()
    sent = {path.name: path.read_bytes() for path in result.folder.iterdir() if path.is_file()}
    assert arrived(hub) == {name: content for name, content in sent.items() if not name.startswith(".")}
    assert {"README.md", "model.safetensors", "config.json", "run.yaml", "tokenizer.json"} <= set(arrived(hub))
