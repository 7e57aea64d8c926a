"""The picture of what a model sees: shares of attention that add up, what was read, and a drawing that is whole."""

from xml.etree import ElementTree

import pytest
import torch

from fanformer.generation.media_model import load_media_model
from tests.multimodal_files import save_with_towers, write_rows
from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401


@pytest.fixture
def sight(repository, monkeypatch):
    """The program."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import sight

    return sight


def test_what_is_looked_at_adds_up_and_depends_on_the_picture(sight, saved_model, tmp_path):  # noqa: F811
    folder, rows = save_with_towers(saved_model, tmp_path / "model"), write_rows(tmp_path / "rows", 6, 2)
    found = sight.sights(folder, rows)
    assert [one.right for one in found] == ["blue", "green", "red", "white"]  # one of each, and no recording
    for one in found:
        assert one.shares.shape == (4, 4)
        assert one.shares.sum() == pytest.approx(1, abs=1e-5)
        assert 0 < one.at_picture < 1
    assert abs(found[0].shares - found[2].shares).max() > 1e-6
    red = found[2].pixels
    assert red.shape == (16, 16, 3)
    assert abs(red.reshape(-1, 3).mean(0) - (220, 30, 30)).max() < 12  # what was written, give or take its noise
    asked = load_media_model(folder, "cpu").generate(
        "which colour?", images=[rows.parent / "p0.png"], max_length=8, temperature=0.0
    )
    assert found[2].said == asked
    drawn = ElementTree.fromstring(sight.drawing(found))
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}image"))) == 2 * len(found)
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 16 * len(found)


def test_rollout_is_half_of_itself_and_half_of_what_each_layer_attends_to(sight):
    to_first = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    mixed = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]])
    assert sight.rollout([to_first]).tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert sight.rollout([to_first, mixed]).tolist() == [[0.875, 0.125], [0.625, 0.375]]


def test_committed_picture_is_whole_small_and_by_itself(sight, repository):
    content = (repository / "docs" / "sight.svg").read_bytes()
    assert len(content) < 150_000
    drawn = ElementTree.fromstring(content)
    assert drawn.get("aria-label").count(" is read as ") == sight.MOST
    links = [element.get("href") for element in drawn.iter() if element.get("href")]
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
