"""The playground in a real browser: answers, stop, reload, a server that goes away, tokens, a look inside, keys."""

import json
import shutil
import threading

import pytest
from playwright.sync_api import expect

from fanformer.server.limits import Access
from fanformer.server.models import ServedModel, SlotSettings
from tests.saved_models import asking, model_copy, recurrent_model, saved_model, tiny_tokenizer  # noqa: F401
from tests.server.conftest import PATIENCE_SECONDS, running
from tests.server.test_chat import TEMPLATE

pytestmark = pytest.mark.ci

expect.set_options(timeout=1000 * PATIENCE_SECONDS)
PROMPT = "the cat sat on "
GREEDY = {"temperature": "0", "max_tokens": "30"}


class Steps:
    """Holds the steps of a model back until they are given."""

    def __init__(self, model, monkeypatch):
        self.given = threading.Semaphore(0)
        self.is_open = False
        forward = model.slots.forward

        def held(tokens, every=False):
            if not self.is_open:
                self.given.acquire(timeout=PATIENCE_SECONDS)
            return forward(tokens, every)

        monkeypatch.setattr(model.slots, "forward", held)

    def give(self, count):
        self.given.release(count)

    def open(self):
        self.is_open = True
        self.given.release(100)


@pytest.fixture(scope="module")
def models(saved_model, tmp_path_factory):  # noqa: F811
    """A base model, and one with a chat template that is otherwise the same."""
    folder = shutil.copytree(saved_model, tmp_path_factory.mktemp("chat") / "chat")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    found = {
        name: ServedModel.open(path, name, SlotSettings(2, 100, 4), device="cpu")
        for name, path in (("tiny", saved_model), ("talks", folder))
    }
    yield found
    for model in found.values():
        model.close()


@pytest.fixture(scope="module")
def client(models):
    """A client of a server with both."""
    with running(models) as found:
        yield found


@pytest.fixture
def tab(client, open_tab):
    return open_tab(f"http://127.0.0.1:{client.port}/")


def fill(page, **fields):
    for name, value in {**GREEDY, **fields}.items():
        page.fill(f"#{name}", value)


def answers(page):
    return page.locator(".pane .answer .turn:last-child")


def wait_until_idle(client):
    """Wait until the server has nothing in work: what was stopped is freed."""
    waiting = threading.Event()
    for _ in range(10 * PATIENCE_SECONDS):
        if client.service.gate.in_work == 0:
            return
        waiting.wait(0.1)
    raise AssertionError("a request that nobody waits for is still in work")


def test_a_click_brings_the_answer_of_every_model_as_the_api_gives_it(tab, client):
    page = tab.page
    page.fill("#prompt", PROMPT)
    fill(page)
    page.click("#send")
    expect(page.locator("#status")).to_have_text("Done.")
    written = client.complete(prompt=PROMPT, max_tokens=30, temperature=0, top_k=100, top_p=0.85)["choices"][0]["text"]
    assert [one.text_content() for one in answers(page).all()] == [written, written]
    assert page.locator(".pane h2").all_text_contents() == ["tiny", "talks"]
    expect(page.locator(".about").first).to_contain_text("30 tokens")
    page.uncheck("#model-1")
    assert page.locator(".pane h2").all_text_contents() == ["tiny"]


def test_text_comes_piece_by_piece_and_stop_frees_the_slot(tab, client, models, monkeypatch):
    page = tab.page
    page.uncheck("#model-1")
    steps = Steps(models["tiny"], monkeypatch)
    page.fill("#prompt", PROMPT)
    fill(page)
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    steps.give(8)
    expect(answers(page)).not_to_be_empty()  # while the rest is held back
    expect(page.locator("#send")).to_be_disabled()
    assert client.service.gate.in_work == 1
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator(".about")).to_contain_text("stopped after")
    steps.open()
    wait_until_idle(client)
    expect(page.locator("#send")).to_be_enabled()


def test_a_reload_in_mid_stream_keeps_the_text_and_frees_the_slot(tab, client, models, monkeypatch):
    page = tab.page
    page.uncheck("#model-1")
    steps = Steps(models["tiny"], monkeypatch)
    page.fill("#prompt", PROMPT)
    fill(page, seed="7")
    page.click("#send")
    steps.give(8)
    expect(answers(page)).not_to_be_empty()
    before = answers(page).text_content()
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.input_value("#prompt") == PROMPT
    assert page.input_value("#seed") == "7"
    assert answers(page).text_content().startswith(before)
    assert not page.is_checked("#model-1")
    steps.open()
    wait_until_idle(client)
    page.click("#send")
    expect(page.locator("#status")).to_have_text("Done.")


def test_the_settings_begin_as_the_first_models_folder_asks_and_stay_ones_own(asking, saved_model, open_tab):  # noqa: F811
    folders = {"asks": asking(do_sample=True, temperature=0.9, top_p=0.8), "tiny": saved_model}
    found = {
        name: ServedModel.open(path, name, SlotSettings(1, 100, 4), device="cpu") for name, path in folders.items()
    }
    try:
        with running(found) as client:
            page = open_tab(f"http://127.0.0.1:{client.port}/").page
            shown = [page.input_value(f"#{name}") for name in ("temperature", "top_p", "top_k")]
            assert shown == ["0.9", "0.8", "100"]
            page.fill("#temperature", "0.5")
            page.reload()
            page.wait_for_selector("body[data-ready]")
            assert page.input_value("#temperature") == "0.5"
    finally:
        for model in found.values():
            model.close()


def test_a_server_that_goes_away_is_told(saved_model, open_tab, monkeypatch):  # noqa: F811
    model = ServedModel.open(saved_model, "tiny", SlotSettings(2, 100, 4), device="cpu")
    with running({"tiny": model}) as client:
        tab = open_tab(f"http://127.0.0.1:{client.port}/")
        page = tab.page
        steps = Steps(model, monkeypatch)
        page.fill("#prompt", PROMPT)
        fill(page)
        page.click("#send")
        steps.give(6)
        expect(answers(page)).not_to_be_empty()
        for connection in list(client.server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)  # as the end of a process does
        client.server.force_exit = client.server.should_exit = True
        client.thread.join(PATIENCE_SECONDS)
    steps.open()
    expect(page.locator(".about")).to_contain_text("The connection to the server ended")
    expect(page.locator("#status")).to_have_text("Not every answer came to its end.")
    page.click("#send")
    expect(page.locator(".about")).to_have_text("The server does not answer. Start it again, then send again.")
    assert all("net::ERR" in error for error in tab.errors)
    tab.errors.clear()
    model.close()


def test_a_chat_remembers_what_was_said(tab):
    page = tab.page
    page.uncheck("#model-0")
    page.check("[name=mode][value=chat]")
    fill(page, max_tokens="3")
    page.fill("#system", "be brief")
    for message in ("hello", "and then?"):
        page.fill("#prompt", message)
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("Done.")
    first = page.locator(".turn.assistant").first.text_content()
    sent = [json.loads(one.post_data) for one in tab.requests if one.url.endswith("/chat/completions")]
    assert sent[1]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and then?"},
    ]
    page.check("#model-0")
    page.fill("#prompt", "again")
    page.click("#send")
    expect(page.locator(".about").first).to_contain_text("base model without a chat template")
    assert [error for error in tab.errors if "400" not in error] == []
    tab.errors.clear()


def said(page, message):
    page.fill("#prompt", message)
    page.click("#send")
    expect(page.locator("#status")).to_have_text("Done.")


def test_a_question_that_got_no_answer_comes_back_and_is_asked_once(tab):
    page = tab.page
    page.uncheck("#model-0")
    page.check("[name=mode][value=chat]")
    fill(page, max_tokens="3")
    said(page, "hello")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.fill("#prompt", "and then?")
    page.click("#send")
    expect(page.locator(".about")).to_have_text("The server does not answer. Start it again, then send again.")
    expect(page.locator("#prompt")).to_have_value("and then?")
    expect(page.locator(".turn.user")).to_have_text(["hello"])
    assert all("net::ERR" in error for error in tab.errors)
    tab.errors.clear()
    page.unroute("**/v1/chat/completions")
    page.click("#send")
    expect(page.locator("#status")).to_have_text("Done.")
    sent = [json.loads(one.post_data) for one in tab.requests if one.url.endswith("/chat/completions")][-1]
    assert [one["content"] for one in sent["messages"] if one["role"] == "user"] == ["hello", "and then?"]
    assert [one["role"] for one in sent["messages"]] == ["user", "assistant", "user"]


def test_what_was_said_stays_with_a_model_that_is_left_out_and_goes_when_all_is_cleared(tab):
    page = tab.page
    page.uncheck("#model-0")
    page.check("[name=mode][value=chat]")
    fill(page, max_tokens="3")
    said(page, "hello")
    page.uncheck("#model-1")
    page.check("#model-1")
    expect(page.locator(".turn.user")).to_have_text(["hello"])
    page.reload()
    page.wait_for_selector("body[data-ready]")
    expect(page.locator(".turn.user")).to_have_text(["hello"])
    page.uncheck("#model-1")
    page.click("#clear")
    page.check("#model-1")
    expect(page.locator(".turn")).to_have_count(0)


def test_tokens_tell_their_alternatives_to_pointer_and_keys(tab, client):
    page = tab.page
    page.uncheck("#model-1")
    page.check("#sure")
    page.fill("#prompt", PROMPT)
    fill(page)
    page.click("#send")
    expect(page.locator("#status")).to_have_text("Done.")
    fields = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "logprobs": 5}
    choice = client.complete(**fields)["choices"][0]
    tokens = page.locator("[role=option]")
    shown = [one.text_content() for one in tokens.all()]
    names = [name.removeprefix("bytes:") for name in choice["logprobs"]["tokens"]]
    assert shown == [names[0].removeprefix(" "), *names[1:]]  # without the space that stands in the prompt
    others = choice["logprobs"]["top_logprobs"][3]
    others.pop(choice["logprobs"]["tokens"][3])
    others = {name.removeprefix("bytes:"): value for name, value in others.items()}
    tokens.nth(3).hover()
    detail = page.locator(".detail")
    assert all(name.strip() in detail.text_content() for name in others)
    likeliest = max(others, key=others.get)
    assert detail.text_content().partition("others: ")[2].startswith(f"\u201c{likeliest}\u201d")
    page.focus("[role=listbox]")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    active = page.get_attribute("[role=listbox]", "aria-activedescendant")
    assert page.locator(f"#{active}").text_content() == shown[1]
    expect(page.locator("[aria-selected=true]")).to_have_count(1)
    page.uncheck("#sure")
    assert answers(page).text_content() == choice["text"]


@pytest.mark.parametrize("text", [" cat", "cat"], ids=["nothing withheld", "a space withheld"])
def test_the_coloured_view_leaves_out_what_the_text_does(tab, text):
    page = tab.page
    page.uncheck("#model-1")
    page.check("#sure")
    fill(page)
    scores = {"tokens": [" cat"], "token_logprobs": [-1.0], "top_logprobs": [{" cat": -1.0}], "text_offset": [0]}
    choice = {"index": 0, "text": text, "logprobs": scores, "finish_reason": "length"}
    stream = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    said(page, PROMPT)
    assert page.locator("[role=option]").text_content() == text


def test_a_look_inside_shows_every_block(tab, client):
    page = tab.page
    page.fill("#prompt", PROMPT)
    page.click("#inside > summary")
    page.select_option("#inside-model", "tiny")
    page.click("#look")
    rows = page.locator("#inside-shown tbody tr")
    expect(rows).to_have_count(2)
    layers = client("POST", "/inside", {"model": "tiny", "prompt": PROMPT})[2]["layers"]
    for row, layer in zip(rows.all(), layers, strict=True):
        middles = [layer["gates"]["attention"][1], layer["gates"]["feed_forward"][1], layer["turns"][1]]
        shown = row.text_content()
        assert all(f"{value:.2f}" in shown for value in middles)


def test_attention_is_told_of_every_head_and_token_by_pointer_and_keys(tab, client):
    page = tab.page
    page.fill("#prompt", PROMPT)
    page.click("#inside > summary")
    page.select_option("#inside-model", "tiny")
    page.click("#look")
    page.select_option("#inside-layer", "1")
    page.wait_for_selector(".attention canvas")
    asked = {"model": "tiny", "prompt": PROMPT, "layer": 1}
    attention = client("POST", "/inside", asked)[2]["attention"]
    names = [name.removeprefix("bytes:") for name in attention["tokens"]]
    tokens = page.locator(".attention [role=option]")
    assert [one.text_content() for one in tokens.all()] == names
    heads = page.locator(".attention [type=radio]")
    expect(heads).to_have_count(len(attention["heads"]))
    expect(page.locator(".attention canvas")).to_have_count(len(attention["heads"]))
    detail = page.locator(".attention .detail")

    def told(head, token):
        row = attention["heads"][head][token]
        place = max(range(len(row)), key=row.__getitem__)
        share = f"{100 * row[place]:.0f}%" if row[place] >= 0.1 else f"{100 * row[place]:.1f}%"
        return f"\u201c{names[token]}\u201d in head {head} looks at \u201c{names[place]}\u201d {share}"

    expect(detail).to_contain_text(told(0, len(names) - 1))
    tokens.nth(3).hover()
    expect(detail).to_contain_text(told(0, 3))
    heads.first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(detail).to_contain_text(told(2, 3))
    page.keyboard.press("Tab")
    page.keyboard.press("Home")
    expect(detail).to_contain_text(told(2, 0))
    page.keyboard.press("ArrowRight")
    expect(detail).to_contain_text(told(2, 1))
    active = page.get_attribute(".attention [role=listbox]", "aria-activedescendant")
    assert page.locator(f"#{active}").text_content() == names[1]
    page.select_option("#inside-layer", "")
    expect(page.locator(".attention")).to_have_count(0)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)])
def test_it_is_accessible_and_fits_the_window(client, open_tab, width, dark):
    tab = open_tab(f"http://127.0.0.1:{client.port}/", width, dark)
    page = tab.page
    assert tab.violations() == []
    if width < 500:
        page.click("#settings > summary")
    page.check("#sure")
    page.fill("#prompt", PROMPT)
    fill(page)
    page.click("#send")
    expect(page.locator("#status")).to_have_text("Done.")
    page.click("#inside > summary")
    page.click("#look")
    page.wait_for_selector("#inside-shown table")
    page.select_option("#inside-layer", "1")
    page.wait_for_selector(".attention canvas")
    assert tab.violations() == []
    assert tab.is_as_wide_as_its_window()


def test_everything_is_reached_by_the_tab_key(tab):
    page = tab.page
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    buttons = {"prompt", "send", "clear", "model-0", "model-1", "temperature", "seed", "stop-strings", "sure", "skip"}
    assert buttons <= seen


def test_the_dial_is_there_where_a_model_has_one_and_does_what_it_says(saved_model, recurrent_model, open_tab):  # noqa: F811
    paths = {"tiny": saved_model, "deep": recurrent_model}
    served = {name: ServedModel.open(path, name, SlotSettings(2, 100, 4), device="cpu") for name, path in paths.items()}
    with running(served) as client:
        tab = open_tab(f"http://127.0.0.1:{client.port}/")
        page = tab.page
        page.uncheck("#model-0")
        page.fill("#num_steps", "8")
        expect(page.locator("#steps-shown")).to_have_text("8")
        page.fill("#prompt", PROMPT)
        fill(page)
        page.click("#send")
        expect(page.locator("#status")).to_have_text("Done.")
        asked = {"model": "deep", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "num_steps": 8}
        assert answers(page).text_content() == client.complete(**asked)["choices"][0]["text"]
        page.check("#model-0")
        page.uncheck("#model-1")
        assert not page.is_visible("#num_steps")
    for model in served.values():
        model.close()


def test_a_server_with_keys_shows_the_page_and_asks_for_one(models, open_tab):
    with running(models, Access(keys=("secret",))) as client:
        tab = open_tab(f"http://127.0.0.1:{client.port}/", wait=None)
        page = tab.page
        expect(page.locator("#status")).to_contain_text("asks for an API key")
        assert all("401" in error for error in tab.errors)
        tab.errors.clear()
        page.fill("#key", "secret")
        page.click("#use-key")
        page.fill("#prompt", PROMPT)
        fill(page)
        page.click("#send")
        expect(page.locator("#status")).to_have_text("Done.")
        assert "secret" not in page.evaluate("JSON.stringify(sessionStorage)")
        written = answers(page).first.text_content()
        for _ in range(2):
            page.reload()
            expect(page.locator("#status")).to_contain_text("asks for an API key")
        tab.errors.clear()
        page.fill("#key", "secret")
        page.click("#use-key")
        expect(answers(page).first).to_have_text(written)
