"""`fanformer serve`: what is refused before a port is opened; see tests/server for what it does then."""

import socket

import pytest

from fanformer.cli.main import main


def refused(capsys, *words):
    assert main(["serve", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_a_public_address_needs_a_key(saved_model, capsys):
    for host in ("0.0.0.0", "::", "10.1.2.3"):
        message = refused(capsys, saved_model, "--host", host)
        assert message == (
            f"error: `--host` {host} can be reached by others and needs --api-key-file, got none: give keys.\n"
        )


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--allowed-host", "model.example.org:8000", "must be a name or address without scheme and port"),
        ("--allowed-host", "https://model.example.org", "must be a name or address without scheme and port"),
        ("--allowed-host", "", "must be a name or address"),
        ("--allow-origin", "https://page.example/", "must be scheme, name and port as a browser sends them"),
        ("--allow-origin", "page.example", "must be scheme, name and port as a browser sends them"),
        ("--allow-origin", "*", "must be scheme, name and port as a browser sends them"),
    ],
)
def test_names_and_origins_that_no_header_could_be_are_refused(saved_model, capsys, option, value, words):
    message = refused(capsys, saved_model, option, value)
    assert message.startswith(f"error: `{option}` {words}")
    assert f"got {value!r}" in message


@pytest.mark.parametrize(
    ("content", "words"), [("", "no API keys"), ("# none\n\n", "no API keys"), ("a b\n", "keys with spaces")]
)
def test_a_file_without_keys_is_refused(saved_model, tmp_path, capsys, content, words):
    file = tmp_path / "keys"
    file.write_text(content)
    assert words in refused(capsys, saved_model, "--api-key-file", file)


def test_keys_are_lines_without_comments(tmp_path):
    from fanformer.cli.serve import read_keys

    file = tmp_path / "keys"
    file.write_text("# of two teams\nsk-one\n\n  sk-two  \n")
    assert read_keys(str(file)) == ("sk-one", "sk-two")


def test_a_taken_port_is_told_before_a_model_is_loaded(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = refused(capsys, tmp_path / "missing", "--port", taken.getsockname()[1])
    assert "cannot listen at `--host` 127.0.0.1" in message
    assert "in use" in message


def test_two_models_need_two_names(saved_model, capsys):
    message = refused(capsys, saved_model, saved_model)
    assert "each model needs a name of its own, got 'tiny'" in message
    assert f"write NAME={saved_model}" in message


def test_missing_folders_and_wrong_numbers_are_told(saved_model, tmp_path, capsys):
    assert f"no model folder {tmp_path / 'missing'}" in refused(capsys, tmp_path / "missing", "--port", 0)
    assert "`context` must be from 2 to the 128 " in refused(capsys, saved_model, "--port", 0, "--context", 129)
    assert "`--slots` must be at least 1" in refused(capsys, saved_model, "--port", 0, "--slots", 0)
    assert "`--drain-seconds` must be above 0" in refused(capsys, saved_model, "--drain-seconds", 0)
    for limit in (0, "nan"):
        assert "`--memory-limit` must be above 0 GiB" in refused(
            capsys, saved_model, "--port", 0, "--memory-limit", limit
        )
    assert "`--threads` is for .gguf files" in refused(capsys, saved_model, "--port", 0, "--threads", 1)


def test_what_is_for_folders_or_for_files_alone_goes_to_these(saved_model, tmp_path, capsys):
    paths = [saved_model, tmp_path / "none.gguf"]
    for both in (paths, paths[::-1]):
        message = refused(capsys, *both, "--port", 0, "--threads", 1, "--dtype", "float32")
        assert "none.gguf" in message or "ggml" in message, "the file itself is what is wrong"
        assert "threads" not in message
        assert "dtype" not in message
    assert "`dtype` must be auto for a .gguf file" in refused(capsys, paths[1], "--port", 0, "--dtype", "float32")


def test_models_that_nobody_named_are_left_out_where_they_cannot_be_loaded(saved_model, tmp_path, capsys):
    from fanformer.cli.serve import _open
    from fanformer.errors import CheckpointError

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    settings = {"memory_limit": None, "slots": 1, "context": 64, "queue_size": 1, "device": "cpu", "threads": None}
    both = {"broken": str(tmp_path / "broken"), "good": str(saved_model)}
    served = _open(both, **settings, leaves_out=True)
    assert list(served) == ["good"]
    served["good"].close()
    assert capsys.readouterr().err.startswith("broken is left out: ")
    for paths, leaves_out in ((both, False), ({"broken": both["broken"]}, True)):
        with pytest.raises(CheckpointError, match="has model_type None"):
            _open(paths, **settings, leaves_out=leaves_out)


def test_the_memory_limit_counts_all_models(saved_model, capsys):
    small = ("--port", 0, "--device", "cpu", "--slots", 2, "--context", 64)
    message = refused(capsys, f"one={saved_model}", f"two={saved_model}", *small, "--memory-limit", "0.0005")
    assert "`--memory-limit` is 0.0005 GiB, got 0.00 GiB with" in message


def test_more_memory_than_the_limit_is_not_taken_before_it_is_refused(saved_model, capsys, monkeypatch):
    from fanformer.server import torch_slots

    made, make = [], torch_slots.TorchSlots.__init__

    def noted(slots, model, known, count, positions):
        made.append(count)
        make(slots, model, known, count, positions)

    monkeypatch.setattr(torch_slots.TorchSlots, "__init__", noted)
    limit = ("--memory-limit", "0.004")  # 4.1 MiB; 64 texts of 128 tokens in 2 layers take as much
    message = refused(capsys, saved_model, "--port", 0, "--device", "cpu", "--slots", 64, "--context", 128, *limit)
    assert "`--memory-limit` is 0.004 GiB, got 0.0" in message
    assert made == [1]


def test_a_missing_package_names_the_extra(saved_model, capsys, monkeypatch):
    import builtins
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] in ("fastapi", "uvicorn")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("fanformer.server")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *arguments, **named):
        if name.partition(".")[0] == "fastapi":
            raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    message = refused(capsys, saved_model)
    assert message == "error: serving needs fastapi, which is not installed: pip install 'fanformer[serve]'\n"
