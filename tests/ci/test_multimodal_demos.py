"""The demos of pictures and sound, run from end to end in a few steps, and the data that they take from elsewhere."""

import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from fanformer.errors import DataError
from fanformer.model.multimodal import load_picture, load_recording
from tests.local_hub import LocalHub, point_at
from tests.multimodal_files import COLOURS, TONES, write_picture, write_tone
from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401

pytestmark = pytest.mark.ci


def program(repository, *words):
    command = [sys.executable, *(str(word) for word in words)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize(("name", "counts"), [("image", (1438, 359)), ("audio", (2700, 300))])
def test_a_demo_trains_both_twins_and_says_that_two_steps_are_too_few(request, repository, tmp_path, name, counts):
    base = request.getfixturevalue("saved_model")
    pytest.importorskip("sklearn" if name == "image" else "soundfile")
    words = ("--base", base, "--output-dir", tmp_path / "demo", "--max-steps", 2)
    done = program(repository, f"examples/demo_{name}.py", *words)
    assert done.returncode == 1, done.stderr[-2000:]
    assert f"{counts[0]} examples to learn from, {counts[1]} held out" in done.stdout
    assert "the blind twin's: " in done.stdout
    assert f"asked for: {'95%' if name == 'image' else '90%'}" in done.stdout
    again = program(repository, f"examples/demo_{name}.py", *words)
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]  # nothing was trained anew


def dataset_folder(kind, folder):
    """Write a dataset of 12 pictures or recordings in the hub's form, parquet with types, and return its folder."""
    import datasets

    (folder / "media").mkdir(parents=True)
    (folder / "data").mkdir()
    names = list(COLOURS)[:3] if kind == "image" else list(TONES)
    rows = []
    for number in range(12):
        said = number % len(names)
        if kind == "image":
            path = write_picture(folder / "media" / f"{number}.png", names[said], number)
        else:
            path = write_tone(folder / "media" / f"{number}.wav", names[said], seed=number)
        rows.append({"media": {"bytes": path.read_bytes(), "path": None}, "label": said, "number": number})
    made = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=names))
    made = made.cast_column("media", (datasets.Image if kind == "image" else datasets.Audio)(decode=False))
    made.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    shutil.rmtree(folder / "media")
    return folder


@pytest.fixture
def demo_media(repository, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.syspath_prepend(str(repository / "examples"))
    import hub_media
    from huggingface_hub import close_session

    yield hub_media
    close_session()


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_a_dataset_becomes_files_and_their_names(demo_media, tmp_path, kind):
    source, out = dataset_folder(kind, tmp_path / "set"), tmp_path / "out"
    out.mkdir()
    learnt, held_out = demo_media.hub_examples(f"hf:{source}", out, kind)
    assert (len(learnt), len(held_out)) == (10, 2)
    told = Counter(answer for _, answer in learnt + held_out)
    assert told == Counter([(list(COLOURS)[:3] if kind == "image" else list(TONES))[n % (3 if kind == "image" else 2)]
                            for n in range(12)])  # fmt: skip
    for name, answer in learnt + held_out:
        if kind == "image":
            mean = np.asarray(load_picture(out / name)).reshape(-1, 3).mean(0)
            assert abs(mean - COLOURS[answer]).max() < 12
        else:
            samples = load_recording(out / name, 16000)
            loudest = np.abs(np.fft.rfft(samples)).argmax() * 16000 / len(samples)
            assert abs(loudest - TONES[answer]) < 20


def test_a_dataset_of_the_hub_is_fetched_and_one_with_a_test_split_holds_that_out(demo_media, tmp_path, monkeypatch):
    source = dataset_folder("image", tmp_path / "set")
    shutil.copy(source / "data/train-00000-of-00001.parquet", source / "data/test-00000-of-00001.parquet")
    (tmp_path / "out").mkdir()
    with LocalHub() as hub:
        hub.add("datasets", "some/colours", source)
        point_at(monkeypatch, hub.url)
        learnt, held_out = demo_media.hub_examples("hf:some/colours", tmp_path / "out", "image")
        with pytest.raises(DataError, match="`--data hf:some/none` cannot be loaded: "):
            demo_media.hub_examples("hf:some/none", tmp_path / "out", "image")
    assert (len(learnt), len(held_out)) == (12, 12)


def test_a_dataset_that_does_not_fit_is_refused_in_one_line(demo_media, tmp_path):
    source = dataset_folder("image", tmp_path / "set")

    def refused(message, spec=f"hf:{source}", kind="audio"):
        with pytest.raises(DataError, match=message) as caught:
            demo_media.hub_examples(spec, tmp_path, kind)
        assert "\n" not in str(caught.value)

    refused(r"one column of the type Audio, got media \(Image\), label \(ClassLabel\), number \(Value\)")
    refused("needs the hub, and HF_HUB_OFFLINE=1 forbids it", "hf:some/name", "image")
    (source / "data/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    refused("cannot be loaded: ", kind="image")


def test_a_demo_learns_from_a_dataset_and_refuses_other_data_in_its_folder(repository, saved_model, tmp_path):  # noqa: F811
    pytest.importorskip("datasets")
    source = dataset_folder("image", tmp_path / "set")
    words = ("examples/demo_image.py", "--base", saved_model, "--output-dir", tmp_path / "demo", "--max-steps", 1)
    done = program(repository, *words, "--data", f"hf:{source}")
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert "10 examples to learn from, 2 held out" in done.stdout
    assert "What is this?" in done.stdout
    assert "asked for" not in done.stdout  # which is for the demo's own data
    other = program(repository, *words)
    assert other.returncode == 2  # an option that cannot be, as of every command
    assert f"`--data` must be hf:{source} for " in other.stderr
