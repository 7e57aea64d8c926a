"""A page of one file: HTML with its style and its data inside, readable on a phone, in the dark and on paper."""

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1c1e21; --quiet: #5b6470; --line: #d9dde2;
  --tint: #f4f6f8; --warn: #fff4df; --link: #0b62a8 }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --text: #e4e7eb; --quiet: #9aa4b1; --line: #343b44;
  --tint: #1e2329; --warn: #3a2f17; --link: #74b5ee } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.2rem 4rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem }
p, ul { max-width: 48rem } a { color: var(--link) } .quiet { color: var(--quiet) }
.warn { background: var(--warn); padding: .5rem .8rem; border-radius: .4rem; max-width: none }
.wide { overflow-x: auto } .wide:focus-visible, summary:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--quiet); font-weight: 600 }
td pre { margin: 0; padding: .3rem .5rem } code, pre { font-size: .85rem; overflow-wrap: anywhere }
pre { background: var(--tint); padding: .8rem; border-radius: .4rem; white-space: pre-wrap }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.2rem }
figure { margin: 0 0 1rem } figure svg, figure img { width: 100%; height: auto; display: block }
figure svg text { font-family: system-ui, sans-serif !important }
figure img { background: #ffffff; border-radius: .4rem }
figcaption { color: var(--quiet); font-size: .85rem }
details { margin: .8rem 0 } summary { cursor: pointer; color: var(--link) }
@media (max-width: 40rem) { body { padding: 1rem .8rem 3rem } ul { padding-left: 1.2rem }
  .many, .many thead, .many tbody, .many tr { display: block }
  .many thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
  .many tr { border-bottom: 2px solid var(--line); padding: .4rem 0 }
  .many td { display: grid; grid-template-columns: 9rem 1fr; gap: .6rem; border: 0; padding: .1rem 0;
    overflow-wrap: anywhere } .many td:empty { display: none }
  .many td::before { content: attr(data-label); color: var(--quiet) } }
@page { margin: 12mm }
@media print { :root { font-size: 9px } body { max-width: none; padding: 0; font-size: 1rem }
  .wide { overflow: visible } .charts { display: block; orphans: 1; widows: 1 }
  figure, tr { break-inside: avoid } h2 { break-after: avoid }
  .charts figure { display: inline-block; width: 49% } #save, #state { display: none }
  details > summary { list-style: none } }
"""
_MANY_COLUMNS = 3
_STRING_OR_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN')
_SAVE = """
const record = document.getElementById("record"), link = document.getElementById("save");
link.href = URL.createObjectURL(new Blob([record.textContent], {type: "application/json"}));
link.hidden = false;
"""


def page(title: str, body: Sequence[str], record: Mapping[str, Any], name: str, script: str = "") -> str:
    """Return a whole HTML page, with its record inside to be read by programs and saved by people.

    Args:
        title: of the page, as plain text.
        body: HTML of its parts.
        record: plain values; the element `record` holds them as JSON.
        name: of the file that the record is saved as, which needs scripts.
        script: that the page runs besides.
    """
    # "<" cannot end the element early when it is written as an escape, which JSON reads back as itself
    raw = _json(record).replace("<", "\\u003c")
    content = "\n".join(body)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{content}
</main>
<footer>
<p><a id="save" download="{text(name)}" hidden>Save the numbers as JSON</a></p>
<noscript><p>The numbers are in this file: the JSON in its element <code>record</code>.</p></noscript>
</footer>
<script type="application/json" id="record">{raw}</script>
<script>{_SAVE}{script}</script>
</body>
</html>
"""


def _json(record: Mapping[str, Any]) -> str:
    """Return a record as JSON in which infinity is 1e999, which every reader rounds to it; what is no number is null.

    The perplexity of a training that all but diverged is infinite, for which JSON has no word.
    """
    raw = json.dumps(record, separators=(",", ":"))
    words = {"Infinity": "1e999", "-Infinity": "-1e999", "NaN": "null"}
    return _STRING_OR_WORD.sub(lambda found: words.get(found[0], found[0]), raw)


def text(content: object) -> str:
    """Return any value as text of a page."""
    return html.escape(str(content))


class Preformatted(str):
    """A text that is shown with its own lines and spaces."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], name: str = "") -> str:
    """Return a table of plain texts.

    It scrolls by itself where it is wider than the page; one of three or more columns is a list of its rows on a phone.

    Args:
        header: names of the columns.
        rows: of texts, one a column; one that is `Preformatted` keeps its lines.
        name: of the table, for who does not see it; default: those of its first columns.
    """
    head = "".join(f'<th scope="col">{text(label)}</th>' for label in header)
    body = "\n".join(
        "<tr>" + "".join(_cell(label, cell) for label, cell in zip(header, row, strict=True)) + "</tr>" for row in rows
    )
    kind = ' class="many"' if len(header) >= _MANY_COLUMNS else ""
    label = text(f"table: {name or ', '.join(header[:4])}")
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{label}"><table{kind}>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(label: str, content: str) -> str:
    shown = f"<pre>{text(content)}</pre>" if isinstance(content, Preformatted) else text(content)
    return f'<td data-label="{text(label)}">{shown}</td>'


def bullets(lines: Iterable[str]) -> str:
    """Return plain texts as a list."""
    return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in lines) + "</ul>"


def picture(png: bytes, caption: str) -> str:
    """Return a picture as a part of the page."""
    image = f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{text(caption)}">'
    return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>"
