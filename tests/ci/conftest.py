"""Environments with an extra that the core lacks, and running in them; a browser without a screen."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

BROWSER = Path("/usr/bin/chromium-headless-shell")
"""Where Debian has it; elsewhere it is what `playwright install chromium-headless-shell` brings."""


@pytest.fixture(scope="module")
def python_with(tmp_path_factory):
    """Return a function that makes an interpreter which has pinned packages in front of what this one has."""

    def make(*pins):
        folder = tmp_path_factory.mktemp("environment") / "env"
        venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        [site] = (folder / "lib").glob("python*/site-packages")
        # a plain path in a .pth file is searched, but .pth files inside it are not
        borrowed = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "borrowed.pth").write_text(borrowed + "\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *pins]
        subprocess.run(install, check=True, timeout=1500)
        return python

    return make


@pytest.fixture
def fanformer(python, repository, tmp_path):
    """Return a function that runs `fanformer` with the module's `python`, and returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(repository / "src"), "OMP_NUM_THREADS": "1"}

    def run(*words, program=("-m", "fanformer.cli.main"), folder=tmp_path, timeout=600):
        command = [str(python), *program, *map(str, words)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
        return done.stdout

    return run


@pytest.fixture
def english(repository, tmp_path):
    """Names, in the folder of `fanformer`, of two files of English: one to calibrate on, one to measure on."""
    for name in ("quantization", "training"):
        (tmp_path / f"{name}.txt").write_text((repository / f"docs/{name}.md").read_text(encoding="utf-8"))
    return "quantization.txt", "training.txt"


@pytest.fixture(scope="module")
def browser():
    """A browser with a microphone that plays tones."""
    from playwright.sync_api import sync_playwright

    fake = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=BROWSER if BROWSER.exists() else None, args=["--no-sandbox", *fake]
        )
        yield found
        found.close()


class Tab:
    """A page of a browser with what went wrong in it, and what it asked for."""

    def __init__(self, page):
        self.page, self.errors, self.requests = page, [], []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request))

    def violations(self):
        """What axe finds against accessibility, a line each."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]

    def is_as_wide_as_its_window(self):
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture
def open_tab(browser):
    """Return a function that opens a tab; afterwards none may have an error left, or have asked another server."""
    tabs, contexts = [], []

    def make(address, width=1200, dark=False, wait="body[data-ready]"):
        scheme = "dark" if dark else "light"
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        context.set_default_timeout(120_000)  # the machine may be busy
        contexts.append(context)
        tab = Tab(context.new_page())
        tabs.append((address, tab))
        tab.page.goto(address)
        if wait is not None:
            tab.page.wait_for_selector(wait)
        return tab

    yield make
    for context in contexts:
        context.close()
    for address, tab in tabs:
        assert tab.errors == []
        others = [one.url for one in tab.requests if not one.url.startswith((address, "data:", "blob:"))]
        assert others == []
