"""The folder that every quantization writes: what is counted, and what stays beside it."""

import shutil

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from fanformer.quantization.quantized_folder import REPORT_FILE, Settings, write_folder


def write(source, target):
    def write_model(folder):
        folder.mkdir()
        shutil.copy(source / "model.safetensors", folder)
        return ()

    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    return write_folder(source, target, Settings("gptq"), tokenizer, 0, (), write_model, "")


def test_bytes_are_those_of_the_weights_alone(model_copy, tmp_path):
    source = model_copy
    size = (source / "model.safetensors").stat().st_size
    for name in ("optimizer.safetensors", "reference.safetensors"):
        save_file({}, source / name)
    report = write(source, tmp_path / "out")
    assert (report.bytes_before, report.bytes) == (size, size)


def test_folders_with_similar_names_are_left_alone(saved_model, tmp_path):
    for name in ("out.new", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    for _ in range(2):
        write(saved_model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.new", "out.old"]
    assert all((tmp_path / name / "mine").exists() for name in ("out.new", "out.old"))


def test_a_link_stays_and_the_folder_that_it_means_is_replaced(saved_model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        write(saved_model, tmp_path / "link")
    assert (tmp_path / "link").readlink().name == "real"
    assert (tmp_path / "real" / REPORT_FILE).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_card_that_is_not_utf8_is_kept_as_far_as_it_can_be_read(model_copy, tmp_path):
    (model_copy / "README.md").write_bytes(b"# caf\xe9\n")
    write(model_copy, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# caf\ufffd\n\n## Quantized\n")
