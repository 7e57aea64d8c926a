"""The playground's files, what it asks the models' server for, and `fanformer playground` before it serves."""

import os
import re
from importlib import resources

import pytest

from fanformer.cli.playground import newest_models
from fanformer.generation.settings import GenerationSettings
from fanformer.server.gate import route_of
from fanformer.server.limits import Access
from tests.server.conftest import running


def page_files():
    return {
        one.name: one.read_text("utf-8") for one in resources.files("fanformer.server").joinpath("playground").iterdir()
    }


def test_every_file_is_served_under_a_strict_policy_and_sent_once(client):
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for name, content in page_files().items():
        status, headers, body = client("GET", f"/page/{name}")
        assert (status, body) == (200, content)
        assert headers["content-type"].startswith(kinds[name.rpartition(".")[2]])
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        again = client("GET", f"/page/{name}", headers={"if-none-match": headers["etag"]})
        assert (again[0], again[2]) == (304, "")
    assert client("GET", "/")[2] == page_files()["index.html"]


def test_no_file_names_another_server_or_holds_code_that_the_policy_forbids():
    for name, content in page_files().items():
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", content) == [], name
        assert not re.search(r"\son\w+=|style=|javascript:|<script>|<style>", content), name
        for link in re.findall(r'(?:src|href|from)[ =]"([^"#]+)"', content):
            assert link.removeprefix("/page/") in page_files(), (name, link)


def test_other_paths_stay_unknown(client):
    for path in ("/page/none.js", "/page/", "/page/../app.py", "/page/%2e%2e/app.py"):
        assert client("GET", path)[0] == 404, path
    assert client("POST", "/", {})[0] == 405


def test_the_page_needs_no_key_and_is_there_while_the_server_drains(served):
    with running({"tiny": served}, Access(keys=("secret",))) as client:
        assert client("GET", "/")[0] == 200
        assert client("GET", "/v1/models")[0] == 401
        assert client("GET", "/", headers={"host": "evil.example"})[0] == 403
        client.service.gate.draining = True
        assert client("GET", "/page/main.js")[0] == 200
    assert [route_of(path) for path in ("/", "/page/main.js", "/page/x", "/pages")] == ["/", "/", "/", "other"]


def test_settings_of_the_page_begin_as_those_of_the_command():
    given = dict(re.findall(r'id="(\w+)" type="number"[^>]*value="([^"]+)"', page_files()["index.html"]))
    usual = GenerationSettings()
    named = {
        "temperature": usual.temperature,
        "top_p": usual.top_p,
        "top_k": usual.top_k,
        "max_tokens": usual.max_length,
    }
    assert {name: float(given[name]) for name in named} == named
    assert (given["min_p"], given["repetition_penalty"]) == ("0", "1")


def test_the_server_takes_what_the_page_lets_through(client):
    inputs = re.findall(r'<input id="(\w+)" type="number"([^>]*)>', page_files()["index.html"])
    assert len(inputs) == 7
    for name, attributes in inputs:
        ends = re.findall(r'(?:min|max)="([\d.]+)"', attributes)
        assert ends
        for end in ends:
            value = int(end) if 'step="1"' in attributes else float(end)
            asked = {"model": "tiny", "prompt": "the cat", "max_tokens": 1, name: value}
            status, _, found = client("POST", "/v1/completions", asked)
            assert status == 200, (name, found)


def test_models_tell_what_they_can_do(client, served):
    [model] = client("GET", "/v1/models")[2]["data"]
    is_folder = served.has_inside
    assert model["capabilities"] == {
        "chat": False,
        "inside": is_folder,
        "inputs": ["text"],
        "num_steps": None,
        "sampling": {},
    }


def test_a_look_inside_tells_every_block_or_says_why_not(client, served):
    status, _, body = client("POST", "/inside", {"model": "tiny", "prompt": "the cat sat on the mat"})
    if not served.has_inside:
        assert status == 400
        assert body["error"]["param"] == "model"
        assert "no gates or Fourier channels to look at: name a FANformer's folder" in body["error"]["message"]
        return
    assert status == 200
    assert body["tokens"] == len(served.encode("the cat sat on the mat"))
    assert len(body["layers"]) == 2
    for layer in body["layers"]:
        low, middle, high = layer["gates"]["attention"]
        assert 0 < low <= middle <= high < 1
        assert sum(layer["spectrum"]) == pytest.approx(1)
    long = client("POST", "/inside", {"model": "tiny", "prompt": "the cat " * 400})[2]
    assert long["tokens"] == served.positions
    assert client.refused("/inside", prompt="")[1]["message"].startswith("a look inside needs at least 2 tokens, got 1")


def test_the_attention_of_a_block_is_told_of_the_first_tokens(client, served):
    if not served.has_inside:
        pytest.skip("a GGUF file has nothing to look at")
    prompt = "the cat sat on the mat"
    plain = client("POST", "/inside", {"model": "tiny", "prompt": prompt})[2]
    found = client("POST", "/inside", {"model": "tiny", "prompt": prompt, "layer": 1})[2]
    attention = found.pop("attention")
    assert found == plain
    assert attention["layer"] == 1
    assert "".join(attention["tokens"][1:]) == prompt
    ids, heads = served.attention_maps(prompt, 1)
    assert attention["heads"] == [[[round(share, 4) for share in row] for row in head] for head in heads]
    assert [len(row) for row in attention["heads"][0]] == list(range(1, len(ids) + 1))
    long = client("POST", "/inside", {"model": "tiny", "prompt": "the cat " * 400, "layer": 0})[2]["attention"]
    assert {len(head) for head in long["heads"]} == {len(long["tokens"])} == {64}
    status, error = client.refused("/inside", prompt=prompt, layer=2)
    assert (status, error["param"]) == (400, "layer")
    assert error["message"] == "`layer` must be in [0, 2), got 2: the model has 2 blocks."


def test_the_newest_models_are_found(tmp_path):
    for age, name in enumerate(["e", "d", "c", "b", "a"]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (tmp_path / "runs" / name / file).write_text("{}")
            os.utime(tmp_path / "runs" / name / file, (1000 - age, 1000 - age))
    (tmp_path / "runs" / "not a model").mkdir()
    assert [path.name for path in newest_models(tmp_path / "runs")] == ["e", "d", "c", "b"]
    assert newest_models(tmp_path / "none") == []
