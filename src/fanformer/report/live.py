"""A page that follows what it shows: served on loopback, made anew where its sources changed."""

import hashlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fanformer.errors import ConfigError, FANformerError

SECONDS = 5
"""Between two looks of the page at what is new."""
LIVE_SCRIPT = f"""
const main = document.querySelector("main"), state = document.createElement("p");
state.id = "state"; state.className = "quiet"; state.setAttribute("role", "status");
document.querySelector("footer").prepend(state);
let seen = null;
async function look() {{
  try {{
    const answer = await fetch("main", {{cache: "no-store"}});
    if (!answer.ok) throw new Error(await answer.text());
    if (answer.headers.get("etag") !== seen) {{
      const open = [...main.querySelectorAll("details")].map(one => one.open);
      const focused = [...main.querySelectorAll("summary, [tabindex]")].indexOf(document.activeElement);
      main.innerHTML = await answer.text();
      if (seen !== null || open.length) main.querySelectorAll("details").forEach((one, i) => {{
        if (i < open.length) one.open = open[i]; }});
      if (focused >= 0) main.querySelectorAll("summary, [tabindex]")[focused]?.focus();
      seen = answer.headers.get("etag");
      state.textContent = "live, changed at " + new Date().toLocaleTimeString();
    }}
  }} catch (error) {{ state.textContent = "not live any more: " + error.message; }}
  setTimeout(look, {SECONDS * 1000});
}}
setTimeout(look, {SECONDS * 1000});
"""
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class LiveServer(ThreadingHTTPServer):
    """Serves one page to this machine alone."""

    daemon_threads = True

    def __init__(self, port: int, make: Callable[[], str], changed: Callable[[], object]) -> None:
        """Bind the port.

        Args:
            port: 0 takes a free one.
            make: returns the page, with `LIVE_SCRIPT` in it.
            changed: returns what is unlike what it was when the page has to be made anew.

        Raises:
            ConfigError: if the port is taken.
        """
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen at `--port` {port}: {error}; choose another, 0 takes one.") from error
        self._make, self._changed = make, changed
        self._lock = threading.Lock()
        self._made: tuple[object, str] | None = None

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def page(self) -> str:
        """Return the page as it is now."""
        with self._lock:
            state = self._changed()
            if self._made is None or self._made[0] != state:
                self._made = state, self._make()
            return self._made[1]


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        """Answer with the page, or with what its element `main` holds."""
        names = {f"{name}:{self.server.server_address[1]}" for name in ("127.0.0.1", "localhost")}
        if self.headers.get("host") not in names:  # a page elsewhere could reach us by a name of its own
            self._send(403, "the Host header does not name this server", "text/plain")
        elif self.path not in ("/", "/main"):
            self._send(404, "there is no such path", "text/plain")
        else:
            try:
                page = self.server.page()
            except FANformerError as error:
                self._send(500, str(error), "text/plain")
                return
            inside = page[page.index("<main>") + 6 : page.index("</main>")]
            self._send(200, page if self.path == "/" else inside, "text/html")

    def _send(self, status: int, content: str, kind: str) -> None:
        body = content.encode()
        self.send_response(status)
        self.send_header("content-type", f"{kind}; charset=utf-8")
        self.send_header("content-length", str(len(body)))
        self.send_header("content-security-policy", POLICY)
        self.send_header("etag", hashlib.sha256(body).hexdigest()[:16])
        self.send_header("cache-control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  its name is the base class's
        """Say nothing: the terminal shows the address alone."""
