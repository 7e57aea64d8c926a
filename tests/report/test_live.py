"""A page that is followed: made anew where its sources changed, for this machine alone."""

import http.client
import threading

import pytest

from fanformer.errors import CheckpointError, ConfigError
from fanformer.report.live import LIVE_SCRIPT, LiveServer
from fanformer.report.page import page


class Source:
    """Something that changes, and counts how often it is shown."""

    def __init__(self):
        self.value, self.made, self.error = "one", 0, None

    def make(self):
        if self.error is not None:
            raise self.error
        self.made += 1
        return page("title", [f"<h1>{self.value}</h1>"], {}, "record.json", LIVE_SCRIPT)


@pytest.fixture
def live():
    source = Source()
    with LiveServer(0, source.make, lambda: (source.value, source.error)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield source, server
        server.shutdown()
        thread.join()


def ask(server, path="/", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response.status, response.headers, content


def test_the_page_is_made_anew_where_something_changed_and_only_then(live):
    source, server = live
    status, headers, content = ask(server)
    assert status == 200
    assert "<h1>one</h1>" in content
    assert "default-src 'none'" in headers["content-security-policy"]
    _, first, inside = ask(server, "/main")
    assert inside.strip() == "<h1>one</h1>"
    assert ask(server, "/main")[1]["etag"] == first["etag"]
    assert source.made == 1
    source.value = "two"
    _, second, inside = ask(server, "/main")
    assert inside.strip() == "<h1>two</h1>"
    assert second["etag"] != first["etag"]
    assert source.made == 2


def test_what_cannot_be_read_is_told_and_comes_back(live):
    source, server = live
    source.error = CheckpointError("the run is gone")
    status, _, content = ask(server, "/main")
    assert (status, content) == (500, "the run is gone")
    source.error = None
    assert ask(server)[0] == 200


def test_other_names_and_paths_are_refused(live):
    _, server = live
    assert ask(server, host="evil.example")[0] == 403
    assert ask(server, "/etc/passwd")[0] == 404


def test_a_taken_port_is_told(live):
    _, server = live
    port = server.server_address[1]
    with pytest.raises(ConfigError, match=f"cannot listen at `--port` {port}: .* choose another"):
        LiveServer(port, str, int)
