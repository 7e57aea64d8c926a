"""`fanformer convert`: golden files become a model folder, and nothing is left behind when they do not."""

import pytest


def arguments(golden_files, name, output_dir, published_format):
    weights = golden_files / f"{name}_reference_tiny.weights.safetensors"
    config = golden_files / f"{name}_reference_tiny.config.json"
    return ["convert", weights, "--config", config, "--format", published_format, "--output-dir", output_dir]


@pytest.mark.parametrize(
    ("name", "published_format"),
    [("fanformer", "fanformer-olmo"), ("cola", "cola"), ("hybridnorm", "hybridnorm-olmo")],
)
def test_published_weights_become_a_model_folder(command, golden_files, tmp_path, name, published_format):
    import torch
    from safetensors.torch import load_file

    from fanformer.loading import load_model

    outcome = command(*arguments(golden_files, name, tmp_path / "new" / "model", published_format))
    assert (outcome.code, outcome.out) == (0, "")
    model = load_model(tmp_path / "new" / "model", device="cpu")
    golden = load_file(golden_files / f"{name}_reference_tiny.io.safetensors")
    with torch.no_grad():
        logits = model(golden["input_ids"].long(), use_cache=False).logits
    # The published code's own rounding in float32; design.md asks for 1e-5.
    torch.testing.assert_close(logits, golden["logits"].to(logits.dtype), atol=1e-5, rtol=0)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_empty_folder_is_taken_and_a_used_one_refused(command, golden_files, tmp_path):
    (tmp_path / "empty").mkdir()
    assert command(*arguments(golden_files, "cola", tmp_path / "empty", "cola")).code == 0
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "empty").iterdir())
    message = command(*arguments(golden_files, "cola", tmp_path / "empty", "cola")).refusal()
    assert f"must be new or empty, got {tmp_path / 'empty'}" in message
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "empty").iterdir())


def test_a_link_stays_and_the_folder_that_it_means_is_taken(command, golden_files, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert command(*arguments(golden_files, "cola", tmp_path / "link", "cola")).code == 0
    assert (tmp_path / "link").readlink().name == "real"
    assert (tmp_path / "real" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_folder_that_cannot_be_made_is_refused_before_the_weights_are_read(command, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "empty")
    words = ["convert", tmp_path / "none", "--config", tmp_path / "none", "--format", "cola", "--output-dir"]
    assert f"{tmp_path / 'empty'} is the current folder" in command(*words, ".").refusal()
    assert f"{tmp_path / 'file'} is no folder" in command(*words, tmp_path / "file/out").refusal()


def test_a_mount_point_or_a_read_only_place_is_refused_before_the_weights_are_read(command, tmp_path, mount_disk):
    disk = mount_disk("size=64k,ro")
    words = ["convert", tmp_path / "none", "--config", tmp_path / "none", "--format", "cola", "--output-dir"]
    assert f"{disk} is a mount point" in command(*words, disk).refusal()
    assert f"{disk} cannot be written to" in command(*words, disk / "out").refusal()


def test_wrong_format_is_refused_and_writes_nothing(command, golden_files, tmp_path):
    message = command(*arguments(golden_files, "cola", tmp_path / "out", "colla")).refusal()
    assert "cola" in message.replace("colla", "")
    command(*arguments(golden_files, "cola", tmp_path / "out", "fanformer-olmo")).refusal()
    assert list(tmp_path.iterdir()) == []


def test_failure_while_writing_leaves_nothing(command, golden_files, tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    def write_half(self, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", write_half)
    message = command(*arguments(golden_files, "cola", tmp_path / "out", "cola")).refusal()
    assert message == f"error: no space left on the disk: {tmp_path / 'out'}"
    assert list(tmp_path.iterdir()) == []


def test_missing_and_foreign_files_are_refused(command, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    words = ["--config", tmp_path / "config.json", "--format", "cola", "--output-dir", tmp_path / "out"]
    assert f"no such file or folder: {tmp_path / 'none'}" in command("convert", tmp_path / "none", *words).refusal()
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04not safetensors at all")
    assert "must be a safetensors file" in command("convert", tmp_path / "weights.bin", *words).refusal()
    assert not (tmp_path / "out").exists()
