"""The bars of the model in the box, measured: `make check-release`.

    python release/check.py [--model FOLDER] [--data ../shared/data] [--work runs/release] [--json FILE]
        [--only NAME,...]

Prints a line for each bar, with what was measured and whether it holds; the status is 1 where one does not. The blind
twin is `make_model.py --blind`'s.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import grammar
from rows import NOT_THERE, titled_stories, unanswerable_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/quality"))

from answer_data import Row, fairytales, instruction_rows
from tuning_data import follows, question

import fanformer
from fanformer.cli.failure import quiet_libraries
from fanformer.errors import FANformerError
from fanformer.evaluation.answers import exact_match, token_f1
from fanformer.generation.interruption import Interruption
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.text_model import Batch, TextModel

STORIES, STORY_TOKENS, INSTRUCTIONS, UNANSWERABLE = 50, 100, 600, 200
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
        work: where `make_model.py` and twins left theirs.
    """

    model: Path
    data: Path
    work: Path

    @property
    def valid_questions(self) -> Path:
        """FairytaleQA's held-out questions."""
        return self.data / "questions/fairytaleqa-valid.jsonl.xz"


def answers(model: TextModel, rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Return the greedy answer to each row's question, and whether it ended by itself."""
    return written(model, list(map(question, rows)), GenerationSettings(max_length=60, temperature=0.0, seed=0))


def written(model: TextModel, questions: Sequence[str], settings: GenerationSettings) -> list[tuple[str, bool]]:
    """Return the answer to each question, the n-th drawn from the n-th seed, and whether it ended by itself."""
    asked = [model.encode_messages([{"role": "user", "content": question}]) for question in questions]
    found: dict[int, tuple[str, bool]] = {}
    by_length = sorted(range(len(asked)), key=lambda index: len(asked[index]))
    for start in range(0, len(asked), _TOGETHER):
        part = by_length[start : start + _TOGETHER]
        rows = [asked[index] for index in part]
        batch = Batch(rows, [""] * len(part), settings, None, Interruption(), seeds=part)
        for index, new in zip(part, model.continue_batch(batch), strict=True):
            text = model.tokenizer.decode(new, skip_special_tokens=True)
            found[index] = text.strip(), bool(new) and new[-1] in model.end_ids
    return [found[index] for index in range(len(asked))]


def bits_per_byte(on: Checking) -> Bar:
    """Held-out text."""
    found = fanformer.evaluate(on.model, [on.data / "text-small/valid.jsonl.xz"])["bits_per_byte"]
    return Bar("bits per byte", "at most 1.60, aim 1.45", f"{found:.4f}", found <= 1.60, {"bits_per_byte": found})


def stories(on: Checking) -> Bar:
    """Stories from titles that training has not seen."""
    seen = {title for title, _ in titled_stories(on.data / "text-small/train.jsonl.xz")}
    found = dict.fromkeys(title for title, _ in titled_stories(on.data / "text-small/valid.jsonl.xz"))
    titles = [title for title in found if title not in seen]
    asked = [f"Tell me a short story called {titles[index % len(titles)]}." for index in range(STORIES)]
    settings = GenerationSettings(max_length=STORY_TOKENS)
    texts = [text for text, _ in written(fanformer.load(on.model), asked, settings)]
    passed = fmean(grammar.passes(texts))
    repeated = fmean(repeats(text) for text in texts)
    holds = passed >= 0.8 and repeated <= 0.1
    measured = f"{passed:.0%} pass, {repeated:.0%} repeat eight words ({len(titles)} titles)"
    demand = "at least 80% pass the grammar checker, no 8-gram twice in 90%"
    return Bar("50 stories", demand, measured, holds, {"passed": passed, "repeating": repeated})


def repeats(text: str) -> bool:
    """Return whether a text says the same eight words twice."""
    words = text.lower().split()
    grams = Counter(tuple(words[start : start + 8]) for start in range(len(words) - 7))
    return any(count > 1 for count in grams.values())


def calibration(on: Checking) -> Bar:
    """What the grammar checker says of human stories, and of these with their words shuffled."""
    texts = [whole_sentences(text) for _, text in titled_stories(on.data / "text-small/valid.jsonl.xz")]
    human = fmean(grammar.passes(texts))
    mixed = fmean(grammar.passes([grammar.shuffled(text, index) for index, text in enumerate(texts)]))
    measured = f"{human:.1%} of {len(texts)} human stories, {mixed:.1%} shuffled"
    demand = "at least 95% of human stories pass, at most 20% shuffled"
    return Bar("grammar checker", demand, measured, human >= 0.95 and mixed <= 0.2, {"human": human, "shuffled": mixed})


def whole_sentences(text: str, words: int = 80) -> str:
    """Return the whole sentences among the first words of a text."""
    beginning = " ".join(text.split()[:words])
    return beginning[: max(map(beginning.rfind, ".!?")) + 1]


def questions(on: Checking) -> list[Bar]:
    """Explicit questions on passages, beside a twin that was tuned and asked without them."""
    scores, ended = scored(on, on.model, blind=False)
    figures = {"f1": fmean(scores), "exact_match": fmean(score == 1 for score in scores)}
    bars = [
        Bar("explicit questions, F1", "above 0.134, aim 0.253", interval(scores), fmean(scores) > 0.134, figures),
        Bar("answers that end", "at least 98%", f"{fmean(ended):.1%}", fmean(ended) >= 0.98, {"ended": fmean(ended)}),
    ]
    name, demand = "beside a blind twin", "above it by more than the interval"
    if not (on.work / "blind/config.json").is_file():
        return [*bars, Bar(name, demand, "no twin: python release/make_model.py --blind", None, {})]
    blind, _ = scored(on, on.work / "blind", blind=True)
    apart = [one - other for one, other in zip(scores, blind, strict=True)]
    holds = fmean(apart) > half_interval(apart)
    return [*bars, Bar(name, demand, f"{interval(apart)} above {fmean(blind):.3f}", holds, {"blind_f1": fmean(blind)})]


def scored(on: Checking, model: Path, *, blind: bool) -> tuple[list[float], list[bool]]:
    """Return token F1 of every answer to an explicit question, and whether it ended by itself."""
    rows = [row for row in fairytales(on.valid_questions, frozenset(), blind=blind) if row["explicit"]]
    found = answers(fanformer.load(model), rows)
    scores = [token_f1(text, row["references"]) for (text, _), row in zip(found, rows, strict=True)]
    return scores, [end for _, end in found]


def half_interval(values: Sequence[float]) -> float:
    """Return half the 95% interval of a mean."""
    return _T * stdev(values) / len(values) ** 0.5


def interval(values: Sequence[float]) -> str:
    """Return a mean and half of its 95% interval in words."""
    return f"{fmean(values):.3f} +- {half_interval(values):.3f}"


def not_there(on: Checking) -> Bar:
    """Questions whose passage does not hold the answer, and those whose passage does."""
    model = fanformer.load(on.model)
    without = list(unanswerable_rows(on.valid_questions, frozenset(), UNANSWERABLE, 0))
    held = list(fairytales(on.valid_questions, frozenset(), blind=False))[:: max(1, 1025 // UNANSWERABLE)]
    said = [fmean(exact_match(text, [NOT_THERE]) for text, _ in answers(model, rows)) for rows in (without, held)]
    measured = f"said to {said[0]:.0%} of {len(without)}, and to {said[1]:.0%} of {len(held)} whose passage has it"
    figures = {"right": said[0], "wrong": said[1]}
    return Bar("the passage does not say", "more often where it does not", measured, said[0] > said[1], figures)


def instructions(on: Checking) -> Bar:
    """Checkable instructions of kinds that it was tuned on, with words that it has not seen there."""
    rows = list(instruction_rows(INSTRUCTIONS, held_out=True))
    kept: dict[str, list[bool]] = {}
    for row, (text, _) in zip(rows, answers(fanformer.load(on.model), rows), strict=True):
        kept.setdefault(row["kind"], []).append(follows(row, text))
    shares = {kind: fmean(part) for kind, part in kept.items()}
    share = fmean(one for part in kept.values() for one in part)
    weakest = ", ".join(f"{kind} {shares[kind]:.0%}" for kind in sorted(shares, key=shares.__getitem__)[:4])
    measured = f"{share:.0%} of {len(rows)} (weakest: {weakest})"
    return Bar("instructions followed", "at least 70%", measured, share >= 0.7, {"followed": share, **shares})


def installed(on: Checking) -> list[Bar]:
    """The wheel in an empty environment: its 4-bit file, and the first answer of a process."""
    place = on.work / "installed"
    command = install_wheel(place)
    file = place / "box.gguf"
    file.unlink(missing_ok=True)
    run(command, "quantize", str(on.model), "--format", "gguf", "--type", "q4_k", "--output-dir", str(file))
    text = [on.data / "text-small/valid.jsonl.xz"]
    ours, whole = (fanformer.evaluate(path, text)["bits_per_byte"] for path in (file, on.model))
    size = file.stat().st_size
    four = Bar(
        "4-bit GGUF",
        "within 2% of its bits per byte, at most 6 MB",
        f"{ours / whole - 1:+.2%}, {size / 1e6:.2f} MB",
        ours <= 1.02 * whole and size <= 6_000_000,
        {"ratio": ours / whole, "bytes": size},
    )
    seconds = {}
    for name, words in (("torch", []), ("ggml", [str(file)])):
        started = time.monotonic()
        if not run(command, "chat", *words, said="Hello\n").strip():
            raise RuntimeError(f"fanformer chat on {name} said nothing.")
        seconds[name] = time.monotonic() - started
    measured = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    holds = seconds["torch"] <= 10 and seconds["ggml"] <= 3
    return [four, Bar("first answer from a cold start", "within 10 s, on ggml within 3 s", measured, holds, seconds)]


def run(command: Path, *words: str, said: str | None = None) -> str:
    """Run a `fanformer` and return what it printed."""
    return subprocess.run([command, *words], input=said, capture_output=True, text=True, check=True).stdout


def install_wheel(place: Path) -> Path:
    """Build the wheel, install it in an environment of its own, and return its `fanformer`."""
    root, python = Path(__file__).parents[1], place / "env/bin/python"
    shutil.rmtree(place, ignore_errors=True)
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    subprocess.run([sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", place, root], check=True)
    subprocess.run([sys.executable, "-m", "venv", place / "env"], check=True)
    torch = next(line for line in (root / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    for wanted in (torch, f"{next(place.glob('fanformer-*.whl'))}[gguf]"):
        subprocess.run([python, *pip, "install", wanted], check=True)
    return python.with_name("fanformer")


BARS: dict[str, Callable[[Checking], Bar | list[Bar]]] = {
    "bits": bits_per_byte,
    "grammar": calibration,
    "stories": stories,
    "questions": questions,
    "not-there": not_there,
    "instructions": instructions,
    "installed": installed,
}


def main() -> int:
    """Print the bars."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("src/fanformer/box"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/release"))
    parser.add_argument("--only", default=",".join(BARS), help=f"some of {','.join(BARS)}")
    parser.add_argument("--json", type=Path, help="write the figures there")
    asked = parser.parse_args()
    quiet_libraries()
    on, bars = Checking(asked.model, asked.data, asked.work), []
    for name in asked.only.split(","):
        found = BARS[name](on)
        for bar in found if isinstance(found, list) else [found]:
            verdict = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}[bar.holds]
            print(f"{verdict:14} {bar.name}: {bar.measured} (demand: {bar.demand})", flush=True)
            bars.append(bar)
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(bar) for bar in bars], indent=2) + "\n", encoding="utf-8")
    return 0 if all(bar.holds for bar in bars) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FANformerError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
