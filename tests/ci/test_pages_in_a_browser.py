"""Pages of runs and of comparisons in a real browser: accessible, as wide as the window, and live."""

import shutil
import threading

import pytest
from playwright.sync_api import expect

from fanformer.comparison.pages.report import write_comparison_page
from fanformer.report import live
from fanformer.report.live import LiveServer
from fanformer.training.pages.report import live_page, write_run_page
from fanformer.training.run import train
from tests.comparison.test_report import two_families
from tests.server.conftest import PATIENCE_SECONDS
from tests.training.conftest import corpus, tiny_run  # noqa: F401

pytestmark = pytest.mark.ci

expect.set_options(timeout=1000 * PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def run_folder(corpus, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_run(corpus, folder, eval_steps=2, log_steps=1))
    return folder


@pytest.fixture(scope="module")
def pages(run_folder, tmp_path_factory):
    """A page of a run, one of two runs, and one of a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    other = shutil.copytree(run_folder, folder / "other")
    write_run_page([run_folder], folder / "run.html")
    write_run_page([run_folder, other], folder / "runs.html")
    write_comparison_page(two_families(), folder / "comparison.html")
    return folder


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
@pytest.mark.parametrize("name", ["run", "runs", "comparison"])
def test_pages_are_accessible_and_as_wide_as_the_window(pages, open_tab, name, width, dark):
    tab = open_tab((pages / f"{name}.html").as_uri(), width, dark, wait="#save[href]")
    for summary in tab.page.locator("summary").all():
        if summary.locator("xpath=..").get_attribute("open") is None:
            summary.click()
    assert tab.violations() == []
    assert tab.is_as_wide_as_its_window()


def test_a_run_is_followed(run_folder, tmp_path, open_tab, monkeypatch):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    script = live.LIVE_SCRIPT.replace(f"look, {live.SECONDS * 1000}", "look, 50")
    assert script != live.LIVE_SCRIPT
    metrics = folder / "metrics.jsonl"
    with LiveServer(0, live_page([folder], script), lambda: metrics.stat().st_size) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        tab = open_tab(server.address, wait="#save[href]")
        expect(tab.page.locator("main table").first).to_contain_text("2 of 6")
        expect(tab.page.locator("#state")).to_contain_text("live")
        tab.page.locator("summary").last.click()
        with metrics.open("a") as file:
            file.write("".join(lines[2:]))
        expect(tab.page.locator("main table").first).not_to_contain_text("of 6")
        expect(tab.page.locator("details").last).to_have_attribute("open", "")
        assert tab.violations() == []
        server.shutdown()
        thread.join()
    expect(tab.page.locator("#state")).to_contain_text("not live any more")
    assert all("net::ERR" in error for error in tab.errors)
    tab.errors.clear()
