"""Reading of the pages that reports write."""

from html.parser import HTMLParser

VOID = {"meta", "img", "link", "br"}


class Reader(HTMLParser):
    """Reads a page: balanced tags, what it refers to, its ids, its words and its record."""

    def __init__(self, content):
        super().__init__()
        self.open, self.links, self.ids, self.words, self.record = [], [], [], [], ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.links += [given[name] for name in ("src", "href", "xlink:href") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        if tag not in VOID:
            self.open.append((tag, given.get("id")))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if ("script", "record") in self.open:
            self.record += data
        elif not any(tag in ("script", "style") for tag, _ in self.open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())
