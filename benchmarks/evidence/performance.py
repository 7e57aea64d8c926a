"""The page docs/performance.md: how fast, against whom, and how far from the machine's limit; from the ledger alone."""

import fnmatch
import re
from collections.abc import Callable, Sequence

from claims import FAILS, HOLDS, NOT_MEASURED, Row
from tables import code, how_table, interval_text, measured_text, number, scale_text, table, table_row, threshold_text

from fanformer.comparison.ledger import Entry

WORDS = {HOLDS: "reached", FAILS: "not reached"}
HEAD = """# Performance

Made by `make evidence` from [benchmarks/results](../benchmarks/results) and
[benchmarks/performance.yaml](../benchmarks/performance.yaml). Ratios are of steps that took turns in one run, medians,
with the lowest and the highest; above 1 ours is faster. *Of the limit* is, for training, operations over those of a
large product in the same time, and for decoding the bytes that must be read over the measured bandwidth.

Operations count every query against a whole row of keys (`footprint.OPERATIONS`, as PaLM does). Shares of a CPU's rate
that are dated up to 2026-11-28 counted half of these pairs; the GPU's are recounted, and so is their aim: 0.366 is 0.3
where causal attention counts half.

What says *tuned* was measured on the block of preset `92m-tuned`, the default until 2026-11-28, and answers no question
about `92m`.
"""
HOW = """## How it was measured

`make bench` runs what a CPU can measure, `make check-serve` and `check-serve-beside` what needs a server,
`python benchmarks/accelerator/accelerator.py` what needs a GPU.
"""


def performance_page(rows: Sequence[Row], entries: Sequence[Entry]) -> str:
    """Return the page: a line for each question with its newest answer, then settings, profiles and loads."""
    newest = list({row.claim.id: row for row in reversed(rows)}.values())[::-1]
    header = ["question", "against", "aim", "answer", "measured", "of the limit"]
    lines = [HEAD, table(header, [_cells(row) for row in newest])]
    used = [row.entry for row in newest if row.entry is not None]
    for pattern, (title, words, made) in SECTIONS.items():
        found = [entry for entry in entries if fnmatch.fnmatchcase(entry.name, pattern)]
        if found:
            used.append(max(found, key=lambda entry: (entry.date, entry.name)))
            lines += [f"## {title}\n", f"{words} Entry {code(used[-1].name)}.\n", *made(used[-1]), ""]
    return "\n".join([*lines, HOW, how_table(used)])


def _cells(row: Row) -> list[str]:
    claim, entry, figure = row.claim, row.entry, row.figure
    begin = [claim.claim, claim.against or "-", threshold_text(claim)]
    if entry is None or figure is None:
        return [*begin, NOT_MEASURED, f"by {code(claim.command)}", "-"]
    share = entry.result.get(claim.limit) if claim.limit is not None else None
    answer = f"**{WORDS.get(row.verdict, row.verdict)}**"
    measured = measured_text(figure) + scale_text(claim, entry)
    return [*begin, answer, measured, "-" if share is None else f"{share.value:.0%}"]


def settings_table(entry: Entry) -> list[str]:
    """Return a line for each setting of a speed-settings entry, what costs the most to lose first."""
    prefix = "times_as_long_"
    found = {name.removeprefix(prefix): figure for name, figure in entry.result.items() if name.startswith(prefix)}
    lines = ["| changed | times as long | interval |", "|---|---:|---|"]
    for name in sorted(found, key=lambda one: -found[one].value):
        lines.append(table_row([name.replace("_", " "), number(found[name].value), interval_text(found[name])]))
    return lines


def profile_table(entry: Entry) -> list[str]:
    """Return a column for each thing that a speed-profile entry took apart, a line for each kind of operator."""
    prefix = "milliseconds_"
    columns = [name.removeprefix(prefix) for name in entry.result if name.startswith(prefix)]
    first, last = "share_of_", f"_{columns[0]}"
    shares = [name for name in entry.result if name.startswith(first) and name.endswith(last)]
    kinds = [name.removeprefix(first).removesuffix(last) for name in shares]
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|---|" + "---:|" * len(columns)]
    lines.append(table_row(["whole, ms", *(number(entry.result[prefix + name].value) for name in columns)]))
    for kind in kinds:
        values = [f"{entry.result[f'{first}{kind}_{name}'].value:.0%}" for name in columns]
        lines.append(table_row([kind.replace("_", " "), *values]))
    return lines


def load_table(entry: Entry) -> list[str]:
    """Return a line for each number of clients of a serve-torch or serve-ggml entry."""
    names = [re.fullmatch(r"tokens_per_second_(\d+)_clients_stream", name) for name in entry.result]
    lines = ["| clients | tokens/s, streams | tokens/s, whole | first token p50, s | p99, s |", "|---:|" + "---:|" * 4]
    for clients in sorted(int(found.group(1)) for found in names if found):
        shown = [f"tokens_per_second_{clients}_clients_{way}" for way in ("stream", "whole")]
        shown += [f"first_token_{part}_{clients}_clients_stream" for part in ("p50", "p99")]
        lines.append(table_row([str(clients), *(number(entry.result[name].value) for name in shown)]))
    return lines


_LOAD = (
    "`92m` with random weights on loopback, prompts of 128 tokens that are read, answers of 64, 16 slots; 20% of the "
    "requests are malformed or hung up on, every other answer is compared with the offline one."
)
SECTIONS: dict[str, tuple[str, str, Callable[[Entry], list[str]]]] = {
    "speed-settings-*": (
        "What each setting of training on a CPU is worth",
        "A step in float32 with one thing changed over one with everything on: above 1 the setting pays, below 1 the "
        "change does. bfloat16 products are fast where the processor has them, which `--precision auto` measures; what "
        "keeping freed memory is worth is measured by `benchmarks/speed/malloc.py`.",
        settings_table,
    ),
    "speed-profile-*": (
        "What takes the time on a CPU",
        "Shares of torch's profile. *Fused* is everything but large products: norms, activations, Fourier features, "
        "rotation, gates, and in decoding the products of a single row too. Profiles of `92m` beside `92m-tuned`, and "
        "what was tried to decode as fast, are in experiments.md: two graphs "
        "[on ggml](experiments.md#2026-11-29-what-the-defaults-block-costs-in-speed-and-two-attempts-at-ggmls-share), "
        "three more "
        "[on torch](experiments.md#2026-11-29-what-reads-one-input-as-one-product-while-decoding).",
        profile_table,
    ),
    "serve-torch-*": ("The server under load, float32 on torch", _LOAD, load_table),
    "serve-ggml-*": ("The server under load, q8_0 on ggml", _LOAD, load_table),
}
"""Title, words and table of the newest entry of a pattern."""
