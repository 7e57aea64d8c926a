"""The bars of the model in the box, measured: `make check-release`.

    python release/check.py [--model FOLDER] [--data ../shared/data] [--work runs/release] [--only NAME,...]
        [--write]

Prints a line for each bar, with what was measured and whether it holds; the status is 1 where one does not. The blind
twin and the comparison with a Llama are stages of `make_model.py`. `--write` puts the figures into the ledger, and the
lines into the model's card.

What is measured is kept under WORK/measured, by the hash of the model's weights. The same command goes on after any end
and measures what is not there; `--only NAME` measures NAME again, and `--write` writes all that is there of this model.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import grammar
from card import CARD_FILE, with_measured
from rows import NOT_THERE, human_stories, titles, unanswerable_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/quality"))

from answer_data import Row, fairytales, instruction_rows
from tuning_data import follows, question

import fanformer
from fanformer.cli.failure import quiet_libraries, run_program, user_message
from fanformer.comparison.ledger import Figure, measured_today, write_entry
from fanformer.errors import ConfigError
from fanformer.evaluation.answers import exact_match, token_f1
from fanformer.files.durable import hash_file, read_json, replace_json, replace_text
from fanformer.generation.interruption import Interruption
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.text_model import Batch, TextModel, check_length

STORIES, STORY_TOKENS, INSTRUCTIONS, UNANSWERABLE = 50, 100, 600, 200
ANSWER_TOKENS = 60
LEDGER = Path("benchmarks/results")
BOX = Path(__file__).parents[1] / "src/fanformer/box"
"""The model that the wheel brings."""
_TOGETHER = 16
"""Answers that are written together."""
_T = 1.96
"""Half a 95% interval of a mean over many answers, in standard errors."""


@dataclass(frozen=True)
class Bar:
    """One demand and what was measured.

    Attributes:
        name: what it is about.
        demand: in words.
        measured: in words.
        holds: whether it is met; None where it could not be measured, `measured` then says what is missing.
        figures: the numbers.
    """

    name: str
    demand: str
    measured: str
    holds: bool | None
    figures: dict[str, float]


@dataclass(frozen=True)
class Checking:
    """What the bars are measured on.

    Attributes:
        model: the folder that ships.
        data: the folder of real data.
        work: where `make_model.py` left its stages.
        ended: of every answer to a question or an instruction, whether it ended by itself; `ends` reads it.
    """

    model: Path
    data: Path
    work: Path
    ended: list[bool] = field(default_factory=list)

    @property
    def valid_questions(self) -> Path:
        """FairytaleQA's held-out questions."""
        return self.data / "questions/fairytaleqa-valid.jsonl.xz"

    @property
    def held_out(self) -> Path:
        """The text that it is measured on."""
        return self.data / "text-small/valid.jsonl.xz"

    def result(self, stage: str) -> dict[str, float] | None:
        """Return the result of a stage of `make_model.py`, None where it is not done."""
        file = self.work / "stages" / f"{stage}.json"
        return json.loads(file.read_text(encoding="utf-8"))["result"] if file.is_file() else None

    def answers(self, rows: Sequence[Row]) -> list[str]:
        """Return the greedy answer to each row's question."""
        found = answers(fanformer.load(self.model), rows)
        self.ended.extend(len(ids) < ANSWER_TOKENS for _, ids in found)
        return [text for text, _ in found]


def answers(model: TextModel, rows: Sequence[Row]) -> list[tuple[str, list[int]]]:
    """Return the greedy answer to each row's question, and its tokens without the one that ends it."""
    settings = GenerationSettings(max_length=ANSWER_TOKENS, temperature=0.0, seed=0)
    return written(model, list(map(question, rows)), settings)


def written(model: TextModel, questions: Sequence[str], settings: GenerationSettings) -> list[tuple[str, list[int]]]:
    """Return the answer to each question, the n-th drawn from the n-th seed, and its tokens without that of its end.

    Raises:
        ConfigError: if a question leaves no room for its answer.
    """
    asked = [model.encode_messages([{"role": "user", "content": content}]) for content in questions]
    for content, ids in zip(questions, asked, strict=True):
        check_length(model.positions, content, ids, settings.max_length)
    found: dict[int, tuple[str, list[int]]] = {}
    by_length = sorted(range(len(asked)), key=lambda index: len(asked[index]))
    for start in range(0, len(asked), _TOGETHER):
        part = by_length[start : start + _TOGETHER]
        rows = [asked[index] for index in part]
        batch = Batch(rows, [""] * len(part), settings, None, Interruption(), seeds=part)
        for index, new in zip(part, model.continue_batch(batch), strict=True):
            said = list(itertools.takewhile(lambda token: token not in model.end_ids, new))
            found[index] = model.tokenizer.decode(said, skip_special_tokens=True).strip(), said
    return [found[index] for index in range(len(asked))]


def bits_per_byte(on: Checking) -> Bar:
    """Held-out text."""
    found = fanformer.evaluate(on.model, [on.held_out])["bits_per_byte"]
    base = on.result("base")
    measured = f"{found:.4f}" + ("" if base is None else f" (base {base['bits_per_byte']:.4f})")
    return Bar("bits per byte", "at most 1.60, aim 1.45", measured, found <= 1.60, {"bits_per_byte": found})


def beside_llama(on: Checking) -> Bar:
    """The base's shape beside a Llama of equal parameters."""
    name, demand = "bits per byte less a Llama's", "below 0: both after a tenth of the tokens, three seeds"
    found = on.result("beside")
    if found is None:
        return Bar(name, demand, "no comparison: python release/make_model.py", None, {})
    if found["low"] is None:
        measured = f"{found['value']:+.4f} by a single seed, whose noise is not known: give `beside.seeds` two or more"
        return Bar(name, demand, measured, None, {})
    measured = f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
    return Bar(name, demand, measured, found["high"] < 0, {"difference_to_llama": found["value"]})


def stories(on: Checking) -> Bar:
    """Stories from titles that training has not seen."""
    seen = set(titles(on.data / "text-small/train.jsonl.xz"))
    unseen = [title for title in titles(on.held_out) if title not in seen]
    asked = [f"Tell me a short story called {unseen[index % len(unseen)]}." for index in range(STORIES)]
    model = fanformer.load(on.model)
    told = written(model, asked, model.settings(max_length=STORY_TOKENS))
    texts, tokens = [text for text, _ in told], fmean(len(ids) for _, ids in told)
    passed = fmean(grammar.passes(texts))
    repeated = fmean(repeats(text) for text in texts)
    holds = passed >= 0.8 and repeated <= 0.1
    asked_for = f"{min(len(unseen), STORIES)} titles, {tokens:.0f} tokens on average"
    measured = f"{passed:.0%} pass, {repeated:.0%} repeat eight words ({asked_for})"
    demand = "at least 80% pass the grammar checker, no 8-gram twice in 90%"
    figures = {"stories_passed": passed, "stories_repeating": repeated, "story_tokens": tokens}
    return Bar(f"{STORIES} stories of {STORY_TOKENS} tokens", demand, measured, holds, figures)


def repeats(text: str) -> bool:
    """Return whether a text says the same eight words twice."""
    words = text.lower().split()
    grams = Counter(tuple(words[start : start + 8]) for start in range(len(words) - 7))
    return any(count > 1 for count in grams.values())


def calibration(on: Checking) -> Bar:
    """What the grammar checker says of human stories, and of these with their words shuffled."""
    parts = (on.held_out, on.data / "text-small/train.jsonl.xz")  # the checker learns from neither
    texts = [whole_sentences(text) for part in parts for text in human_stories(part)]
    human = fmean(grammar.passes(texts))
    mixed = fmean(grammar.passes([grammar.shuffled(text, index) for index, text in enumerate(texts)]))
    measured = f"{human:.1%} of {len(texts)} human stories, {mixed:.1%} shuffled"
    demand = "at least 95% of human stories pass, at most 20% shuffled"
    figures = {"human_passed": human, "shuffled_passed": mixed}
    return Bar("grammar checker", demand, measured, human >= 0.95 and mixed <= 0.2, figures)


def whole_sentences(text: str, words: int = 80) -> str:
    """Return the whole sentences among the first words of a text."""
    beginning = " ".join(text.split()[:words])
    return beginning[: max(map(beginning.rfind, ".!?")) + 1]


def questions(on: Checking) -> list[Bar]:
    """Explicit questions on passages, beside a twin that was tuned and asked without them."""
    rows, blind_rows = (
        [row for row in fairytales(on.valid_questions, frozenset(), blind=blind) if row["explicit"]]
        for blind in (False, True)
    )
    texts = on.answers(rows)
    scores = scored(rows, texts)
    exact = fmean(exact_match(text, row["references"]) for text, row in zip(texts, rows, strict=True))
    figures = {"f1": fmean(scores), "exact_match": exact}
    above = fmean(scores) > 0.134
    bar = Bar("explicit questions, F1", "above 0.134, aim above 0.253", interval(scores), above, figures)
    name, demand = "beside a blind twin", "above it by more than the interval"
    if on.result("blind") is None:
        return [bar, Bar(name, demand, "no twin: python release/make_model.py", None, {})]
    blind = scored(blind_rows, [text for text, _ in answers(fanformer.load(on.work / "blind"), blind_rows)])
    apart = [one - other for one, other in zip(scores, blind, strict=True)]
    holds = fmean(apart) > half_interval(apart)
    measured = f"{interval(apart)} above {fmean(blind):.3f}"
    return [bar, Bar(name, demand, measured, holds, {"blind_f1": fmean(blind), "f1_above_blind": fmean(apart)})]


def scored(rows: Sequence[Row], texts: Sequence[str]) -> list[float]:
    """Return token F1 of every answer."""
    return [token_f1(text, row["references"]) for text, row in zip(texts, rows, strict=True)]


def half_interval(values: Sequence[float]) -> float:
    """Return half the 95% interval of a mean."""
    return _T * stdev(values) / len(values) ** 0.5


def interval(values: Sequence[float]) -> str:
    """Return a mean and half of its 95% interval in words."""
    return f"{fmean(values):.3f} +- {half_interval(values):.3f}"


def not_there(on: Checking) -> Bar:
    """Questions whose passage does not hold the answer, and those whose passage does."""
    without = list(unanswerable_rows(on.valid_questions, frozenset(), UNANSWERABLE, 0))
    held = [row for row in fairytales(on.valid_questions, frozenset(), blind=False) if row["explicit"]][::4]
    said = [fmean(exact_match(text, [NOT_THERE]) for text in on.answers(rows)) for rows in (without, held)]
    measured = f"said to {said[0]:.0%} of {len(without)}, and to {said[1]:.0%} of {len(held)} whose passage has it"
    figures = {"not_there_right": said[0], "not_there_wrong": said[1]}
    return Bar("the passage does not say", "more often where it does not", measured, said[0] > said[1], figures)


def instructions(on: Checking) -> Bar:
    """Checkable instructions of kinds that it was tuned on, with words that it has not seen there."""
    rows = list(instruction_rows(INSTRUCTIONS, held_out=True))
    kept: dict[str, list[bool]] = {}
    for row, text in zip(rows, on.answers(rows), strict=True):
        kept.setdefault(row["kind"], []).append(follows(row, text))
    shares = {kind: fmean(part) for kind, part in kept.items()}
    share = fmean(one for part in kept.values() for one in part)
    weakest = ", ".join(f"{kind} {shares[kind]:.0%}" for kind in sorted(shares, key=shares.__getitem__)[:4])
    measured = f"{share:.0%} of {len(rows)} (weakest: {weakest})"
    figures = {"followed": share, **{f"followed_{kind}": value for kind, value in shares.items()}}
    return Bar("instructions followed", "at least 70%", measured, share >= 0.7, figures)


def ends(on: Checking) -> Bar:
    """All answers to questions and instructions above."""
    if not on.ended:
        return Bar("answers that end", "at least 98%", "none was asked for: --only questions,ends", None, {})
    share = fmean(on.ended)
    measured = f"{share:.1%} of {len(on.ended)} within {ANSWER_TOKENS} tokens"
    return Bar("answers that end", "at least 98%", measured, share >= 0.98, {"ended": share})


def installed(on: Checking) -> list[Bar]:
    """The wheel in an empty environment: its 4-bit file, and the first answer of a process."""
    place = on.work / "installed"
    command, file, seconds, alone = install_wheel(place), place / "box.gguf", {}, without_network()

    def first_answer(name: str, words: Sequence[Path]) -> None:
        started = time.monotonic()
        if not run([*alone, command, "chat", *words], said="Hello\n").strip():
            raise RuntimeError(f"fanformer chat on {name} said nothing.")
        seconds[f"first_answer_seconds_{name}"] = time.monotonic() - started

    first_answer("torch", named(on.model))  # before anything else has run there
    story = ["generate", *named(on.model), "One day, a little girl", "--temperature", "0", "--max-length", "30"]
    if (there := run([command, *story])) != (here := run([sys.executable, "-m", "fanformer", *story])):
        raise RuntimeError(f"the wheel with the newest packages writes {there!r}, got {here!r} in this environment.")
    run([command, "quantize", on.model, "--format", "gguf", "--type", "q4_k", "--output-dir", file])
    ours, whole = (fanformer.evaluate(path, [on.held_out])["bits_per_byte"] for path in (file, on.model))
    size = file.stat().st_size
    four = Bar(
        "4-bit GGUF",
        "within 2% of its bits per byte, at most 6 MB",
        f"{ours / whole - 1:+.2%}, {size / 1e6:.2f} MB",
        ours <= 1.02 * whole and size <= 6_000_000,
        {"q4_k_bits_per_byte_ratio": ours / whole, "q4_k_bytes": size},
    )
    first_answer("ggml", [file])
    torch, ggml = seconds.values()
    measured = f"{torch:.1f} s, on ggml {ggml:.1f} s" + ("" if alone else "; the network could not be cut off here")
    demand = "within 10 s, on ggml within 3 s, without a network"
    holds = (torch <= 10 and ggml <= 3) if alone else None
    return [four, Bar("first answer from a cold start", demand, measured, holds, seconds)]


def named(model: Path) -> list[Path]:
    """Return the words by which `fanformer chat` is asked for a model: none for the one in the box."""
    return [] if model.resolve() == BOX.resolve() else [model]


def without_network() -> list[str]:
    """Return the words before a command that take the network from it; none where this machine does not allow it."""
    words = ["unshare", "--net", "--map-root-user"]
    if shutil.which(words[0]) is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        return []
    return words


def run(command: Sequence[str | Path], said: str | None = None) -> str:
    """Run a command and return what it printed.

    Raises:
        ConfigError: if it fails; the message ends with its last line.
    """
    done = subprocess.run(command, input=said, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ConfigError(f"{' '.join(map(str, command))} ended with status {done.returncode}: {lines[-1]}")
    return done.stdout


def install_wheel(place: Path) -> Path:
    """Build the wheel, install it in an environment of its own, and return its `fanformer`; raises as `run`."""
    root, python = Path(__file__).parents[1], place / "env/bin/python"
    shutil.rmtree(place, ignore_errors=True)
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    shutil.rmtree(root / "build/lib", ignore_errors=True)  # of an earlier wheel, whose modules would come along
    run([sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", place, root])
    run([sys.executable, "-m", "venv", place / "env"])
    torch = next(line for line in (root / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    for wanted in (torch, f"{next(place.glob('fanformer-*.whl'))}[gguf]"):
        run([python, *pip, "install", wanted])
    return python.with_name("fanformer")


BARS: dict[str, Callable[[Checking], Bar | list[Bar]]] = {
    "bits": bits_per_byte,
    "llama": beside_llama,
    "grammar": calibration,
    "stories": stories,
    "questions": questions,
    "not-there": not_there,
    "instructions": instructions,
    "ends": ends,
    "installed": installed,
}
"""Every bar by its name, those that ask before the one that counts how answers end."""
COUNTED = "ends"
"""The bar that is counted from what others asked."""
NOT_KEPT = (COUNTED, "llama")
"""Measured each time anew: that one, and the one that is read from trainings beside the model."""
REACHED = {True: "yes", False: "**no**", None: "not measured"}
"""What the card says of a bar that holds, one that does not, and one that could not be measured."""


class Kept:
    """What was measured of one model, in a file, so that bars can be measured in parts."""

    def __init__(self, work: Path, sha256: str) -> None:
        """Read what is there.

        Args:
            work: the folder of `make_model.py`.
            sha256: of the model's weights.
        """
        self.sha256, self._file = sha256, work / "measured" / f"{sha256[:16]}.json"
        self._content: dict[str, dict[str, Any]] = dict(read_json(self._file)) if self._file.is_file() else {}

    def keep(self, name: str, bars: Sequence[Bar], ended: Sequence[bool]) -> None:
        """Keep a name's bars, if one of them at least was measured, and of its answers whether they ended."""
        if any(bar.figures for bar in bars):
            self._content[name] = {"bars": [asdict(bar) for bar in bars], "ended": list(ended)}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            replace_json(self._file, self._content)

    def bars(self, name: str) -> list[Bar]:
        """Return a name's bars, none where none of them was measured."""
        return [Bar(**bar) for bar in self._content.get(name, {"bars": []})["bars"]]

    @property
    def ended(self) -> list[bool]:
        """Of all answers that were kept, whether they ended by themselves."""
        return [one for name in BARS for one in self._content.get(name, {"ended": []})["ended"]]


def measured_bars(name: str, on: Checking, kept: Kept) -> list[Bar]:
    """Measure a name's bars and keep them; one that fails is one that was not measured, and costs no other."""
    on.ended[:] = kept.ended if name == COUNTED else []
    try:
        found = BARS[name](on)
    except Exception as error:  # after hours of other bars
        if (why := user_message(error)) is None:
            traceback.print_exc()
            why = " ".join(f"{type(error).__name__}: {error}".split())
        return [Bar(name, "to be measured", f"failed: {why}", None, {})]
    bars = found if isinstance(found, list) else [found]
    if name not in NOT_KEPT:
        kept.keep(name, bars, on.ended)
    return bars


def write(on: Checking, kept: Kept) -> None:
    """Write all that was measured of this model: the figures into the ledger, and the bars into the model's card."""
    bars = [bar for name in BARS for bar in (measured_bars(name, on, kept) if name in NOT_KEPT else kept.bars(name))]
    bars = [bar for bar in bars if bar.figures]
    if not bars:
        raise ConfigError("`--write` needs a bar that was measured, got none: see the lines above.")
    figures = {name: Figure(value, unit_of(name)) for bar in bars for name, value in bar.figures.items()}
    told = {bar.name: {"demand": bar.demand, "measured": bar.measured, "holds": bar.holds} for bar in bars}
    print(
        write_entry(
            LEDGER,
            measured_today(
                "release-box-{date}",
                what="the model in the box: every bar that it is to reach",
                kind="evaluation",
                seeds=[0],  # of all that is drawn
                configuration={"model": on.model.name, "sha256": kept.sha256},
                result=figures,
                details={"bars": told},
            ),
        )
    )
    lines = [f"| {bar.name} | {bar.measured} | {bar.demand} | {REACHED[bar.holds]} |" for bar in bars]
    table = "\n".join(["| what | measured | demand | reached |", "|---|---|---|---|", *lines])
    card = on.model / CARD_FILE
    replace_text(card, with_measured(card.read_text(encoding="utf-8"), table))


def unit_of(figure: str) -> str:
    """Return what a figure counts, by its name."""
    units = {"bits_per_byte": "bits per byte", "difference_to_llama": "bits per byte", "story_tokens": "tokens"}
    units |= {"q4_k_bytes": "bytes", "q4_k_bits_per_byte_ratio": "ratio"}
    return "seconds" if "seconds" in figure else units.get(figure, "share")


def main() -> int:
    """Print the bars."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=BOX)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/release"))
    parser.add_argument("--only", help=f"measure these again, some of {','.join(BARS)}; default: what is not measured")
    parser.add_argument("--write", action="store_true", help="write ledger and card")
    asked = parser.parse_args()
    quiet_libraries()
    names = list(BARS) if asked.only is None else asked.only.split(",")
    if unknown := [name for name in names if name not in BARS]:
        parser.error(f"--only must be of {', '.join(BARS)}, got {unknown[0]!r}")
    weights = asked.model / "model.safetensors"
    if not (asked.model / "config.json").is_file() or not weights.is_file():
        raise ConfigError(f"no model in {asked.model}: make it with `make release-model`.")
    on, kept, all_hold = Checking(asked.model, asked.data, asked.work), Kept(asked.work, hash_file(weights)), True
    for name in names:
        known = kept.bars(name)
        is_known = bool(known) and all(bar.figures for bar in known) and asked.only is None
        for bar in known if is_known else measured_bars(name, on, kept):
            verdict = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}[bar.holds]
            before = " [measured before]" if is_known else ""
            print(f"{verdict:14} {bar.name}: {bar.measured} (demand: {bar.demand}){before}", flush=True)
            all_hold = all_hold and bar.holds is True
    if asked.write:
        write(on, kept)
    return 0 if all_hold else 1


if __name__ == "__main__":
    run_program(main, "stopped: what was measured is kept, and the same command goes on")
