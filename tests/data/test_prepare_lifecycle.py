"""`fanformer data prepare` killed, starved, repeated, moved, misled, in any order: a folder is right or not there.

The short form runs always; FANFORMER_LIFECYCLE_SECONDS=1800 runs random sequences for that long. Processes work in
small batches, with a journal after each. What they should write is what one call gives that does everything in one
batch, with no journal and no interruption.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis of requirements-dev.txt")
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fanformer.data.preparation.prepare import open_prepared, prepare
from fanformer.data.sources.documents import open_source
from fanformer.data.sources.file_patterns import matching_files
from fanformer.data.tokenizer import load_tokenizer, train_tokenizer
from tests.data.texts import SMALL_SHARD_TOKENS
from tests.lifecycle import run_lifecycle
from tests.warm_processes import Strike, WarmParent

WARM = (
    "fanformer.cli.data",
    "fanformer.data.preparation.prepare",
    "tests.data.small_batches",
    "regex",
    "rich.progress",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
)
WORDS = "the small model spoke of many things and then of none while rain fell on an old stone bridge".split()  # noqa: SIM905


def lines(seed):
    """Return lines of jsonl, some of which repeat others, some too short for a filter, some with an address."""
    chance = random.Random(seed)
    texts = [" ".join(chance.choices(WORDS, k=chance.randrange(4, 60))) for _ in range(34)]
    texts += [f"see https://example.org/{seed} for {text}" for text in texts[:3]] + texts[5:10]
    chance.shuffle(texts)
    return "".join(json.dumps({"text": text, "from": f"book {len(text) % 3}"}) + "\n" for text in texts).encode()


PLAIN = {b"part-0.jsonl": lines(0), b"part-1.jsonl": lines(1), b"part-2.jsonl": lines(2)}
SOURCES = {
    "plain": PLAIN,
    "appended": PLAIN | {b"part-1.jsonl": lines(1) + lines(3)},
    "changed": PLAIN | {b"part-0.jsonl": lines(0).replace(b"small", b"large")},
    "one less": {b"part-0.jsonl": lines(0), b"part-1.jsonl": lines(1)},
    "one more": PLAIN | {b"part-3.jsonl": lines(3)},
    "renamed": {b"part-0.jsonl": lines(0), b"part-1.jsonl": lines(1), b"part-9.jsonl": lines(2)},
    "no utf-8": {b"part-0.jsonl": lines(0), b"part-1.jsonl": lines(1), b"part-\xe9.jsonl": lines(2)},
}


@dataclass(frozen=True)
class Asked:
    """What a command asks for; on this the result depends, with the source."""

    spec: str = "texts/*.jsonl"
    tokenizer: str | None = None
    filters: tuple[str, ...] = ()
    deduplicate: bool = False
    max_bytes: int | None = None
    held_out_fraction: float = 0.05

    def words(self):
        words = [self.spec, "--source-field", "from"]
        words += ["--held-out-fraction", self.held_out_fraction]
        words += ["--tokenizer", self.tokenizer] if self.tokenizer else ["--vocab-size", 300]
        words += [word for name in self.filters for word in ("--filter", name)]
        words += ["--dedup", "exact"] if self.deduplicate else []
        return words + (["--max-bytes", self.max_bytes] if self.max_bytes else [])

    def undisturbed(self, place):
        """Prepare in this process, in a single batch."""
        return prepare(
            open_source(self.spec, source_field="from"),
            place,
            tokenizer=load_tokenizer(self.tokenizer) if self.tokenizer else None,
            vocab_size=300,
            filters=self.filters,
            deduplicate=self.deduplicate,
            max_bytes=self.max_bytes,
            held_out_fraction=self.held_out_fraction,
            shard_tokens=SMALL_SHARD_TOKENS,
        )


ASKED = st.sampled_from(
    [
        Asked(),
        Asked(deduplicate=True),
        Asked(filters=("min-words",)),
        Asked(filters=("min-words", "clean-urls"), deduplicate=True),
        Asked(max_bytes=9000, deduplicate=True),
        Asked(tokenizer="tokens", deduplicate=True),
        Asked(tokenizer="tokens of another end", deduplicate=True),
        Asked(tokenizer="tokens", held_out_fraction=0.0),
        Asked(held_out_fraction=0.2),
        Asked(spec="texts/part-0.jsonl"),
    ]
)
OUTPUTS = st.sampled_from(["a", "deep/er/b"])
MOST_CHANGES = 70
"""A process changes files and folders between 40 and 70 times."""
MOMENTS = st.none() | st.integers(1, MOST_CHANGES) | st.floats(0, 0.6)
SIGNALS = st.sampled_from([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
WORKERS = st.sampled_from([1, 1, 1, 1, 2])
BAD_WORDS = [
    ["--vocab-size", "10"],
    ["--vocab-size", "9" * 22],
    ["--vocab-size", "9" * 12],
    ["--held-out-fraction", "nan"],
    ["--held-out-fraction", "0.7"],
    ["--max-bytes", "-5"],
    ["--max-bytes", "many"],
    ["--filter", "min-word"],
    ["--dedup", "fuzzy"],
    ["--tokenizer", "./nowhere"],
    ["--tokenizer", "texts"],
    ["--tokenizer", "tokens that are damaged"],
    ["--workers", "0"],
    ["--workers", "two"],
    ["--text-field", "words"],
    ["--unknown"],
    ["--output-dir", "texts"],
    ["--output-dir", "texts/part-0.jsonl"],
    ["--output-dir", "texts/part-0.jsonl/below"],
    ["--output-dir", "/"],
    ["--output-dir", "."],
    ["--output-dir", ".."],
    ["--output-dir", os.fsdecode(b"out\xe9")],
    ["--output-dir", "n" * 252],
    ["--output-dir", "n" * 300],
]
BAD_SPECS = ["texts", "texts/none.jsonl", "texts/*.txt", "nowhere/*", "/dev/zero", "a", "tokens/*", "hf:", ""]


class PrepareLifecycle(RuleBasedStateMachine):
    """Two places to write to, a source that changes, and whatever may happen to a process on the way."""

    warm: WarmParent
    top: Path
    whole: dict[tuple[Asked, str], dict[str, bytes]]
    """What an undisturbed preparation writes, by what was asked and the source; the same for all examples."""

    def __init__(self):
        super().__init__()
        self.cwd = self.top / "work"  # data.json has the path of a tokenizer
        self.cwd.mkdir()
        for name in ("tokens", "tokens of another end", "tokens that are damaged"):
            shutil.copytree(self.top / name, self.cwd / name)
        self.held: dict[str, dict[str, bytes]] = {}  # the content of every folder that there should be
        self.begun: dict[str, tuple[Asked, str]] = {}  # what the journals belong to
        self.processes = 0
        self.have_source("plain")

    def teardown(self):
        shutil.rmtree(self.top / "logs", ignore_errors=True)
        shutil.rmtree(self.cwd)

    # what there is, and what should be

    def source(self, asked):
        """Return a digest of the files that a command reads."""
        pattern, digest = self.cwd / asked.spec, hashlib.sha256()
        for path in sorted(matching_files(pattern) if "*" in asked.spec else [pattern]):
            digest.update(os.fsencode(path.name) + b"\0" + path.read_bytes())
        return digest.hexdigest()

    def expected(self, asked):
        key = asked, self.source(asked)
        if key not in self.whole:
            with tempfile.TemporaryDirectory(dir=self.top) as folder, contextlib.chdir(self.cwd):
                open_prepared(asked.undisturbed(Path(folder) / "whole").folder, verify=True)
                self.whole[key] = self.content(Path(folder) / "whole")
        return self.whole[key]

    def content(self, folder):
        """Return the files of a folder, without what a process that was killed at its very end has left to tidy."""
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.relative_to(folder).parts[0] != "work"
        }

    def partial(self, name):
        return self.cwd / f"{name}.partial"

    def has_journal(self, name):
        return (self.partial(name) / "work" / "journal.json").exists()

    # processes

    def start(self, name, *words, workers=1, **how):
        command = ["data", "prepare", "--workers", workers, "--output-dir", name, *words]  # the last one counts
        self.processes += 1  # files of its own for each: `resource_tracker` may write after the end of its process
        return self.warm.start(command, self.cwd, logs=self.top / "logs" / str(self.processes), **how)

    def said(self, process):
        """Return what a process that has ended wrote as errors.

        Without the lines that tell how far it is, and without what Python's own `resource_tracker` writes when a
        process that has workers is killed.
        """
        lines = process.stderr.read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not (line.startswith("encoding: ") or "resource_tracker" in line))

    def refusal(self, process):
        code, error = process.wait(), self.said(process)
        assert (code, error[:7], error.count("\n")) == (2, "error: ", 1), (code, error)
        assert "internal error" not in error, error
        return error

    def settle(self, name, asked, code):
        """Look at what a process left: its folder is absent, as it was, or exactly what the process was to write."""
        folder = self.cwd / name
        if name in self.held:
            assert code != 0
        elif folder.exists():
            content, expected = self.content(folder), self.expected(asked)
            assert json.loads(content["data.json"]) == json.loads(expected["data.json"])
            assert content == expected, f"{asked} gave other bytes"
            assert open_prepared(folder, verify=True).folder == folder
            self.held[name] = self.content(folder)
        assert code != 0 or name in self.held
        if not self.has_journal(name):
            self.begun.pop(name, None)
        else:
            assert name not in self.held
            self.begun.setdefault(name, (asked, self.source(asked)))

    def check_refusal(self, name, asked, error, had):
        """Fail unless there is a reason not to do what was asked, and the refusal says what to do."""
        if had:
            assert "exists already: choose another --output-dir, or delete it first" in error
        else:
            assert self.begun[name] != (asked, self.source(asked)), error
            assert ".partial was begun with " in error
            assert "give the same again to go on from there, or delete it to start anew" in error

    def run(self, name, asked, workers, moment, number):
        had, journal = name in self.held, self.has_journal(name)
        strike = Strike(number, moment) if isinstance(moment, int) else None
        process = self.start(name, *asked.words(), workers=workers, strike=strike)
        if isinstance(moment, float):
            time.sleep(moment)
            process.kill(number)
        code = process.wait()
        if code == 2:
            self.check_refusal(name, asked, self.refusal(process), had)
        else:
            said = self.said(process)
            assert said == "" or (moment is not None and re.fullmatch("error: .*\n", said)), said  # ended afterwards
            assert "internal error" not in said
            assert code == 0 or (moment is not None and code in (-number, 130 if number == signal.SIGINT else -number))
        if not had and code == 0:
            went_on = "went on after" in process.stdout.read_text()
            assert went_on <= journal, "work of nobody was taken up"
        self.settle(name, asked, code)
        if code == 0:
            left = {path.name for path in (self.cwd / name).parent.iterdir()}
            own = Path(name).name
            assert not left & {f"{own}.partial", f"{own}.lock"}
            assert not (self.cwd / name / "work").exists()

    # what may happen

    @rule(name=OUTPUTS, asked=ASKED, workers=WORKERS, moment=MOMENTS, number=SIGNALS)
    def prepare(self, name, asked, workers, moment, number):
        """A command, left alone or ended at some moment."""
        self.run(name, asked, workers, moment, number)

    @rule(name=OUTPUTS, workers=WORKERS, moment=MOMENTS, number=SIGNALS)
    def again(self, name, workers, moment, number):
        """The command that was ended."""
        if name in self.begun:
            self.run(name, self.begun[name][0], workers, moment, number)

    @rule(name=OUTPUTS, asked=ASKED, moments=st.lists(st.integers(12, MOST_CHANGES), min_size=1, max_size=3))
    def anew_with_kills_on_the_way(self, name, asked, moments):
        """From the beginning, ended a few times, to the end."""
        for path in (self.cwd / name, self.partial(name)):
            shutil.rmtree(path, ignore_errors=True)
        self.held.pop(name, None)
        self.begun.pop(name, None)
        for moment in (*moments, None):
            if name not in self.held:
                self.run(name, asked, 1, moment, signal.SIGKILL)
        assert name in self.held

    @rule(source=st.sampled_from(sorted(SOURCES)))
    def have_source(self, source):
        """The files are others from now on."""
        shutil.rmtree(self.cwd / "texts", ignore_errors=True)
        (self.cwd / "texts").mkdir()
        for name, content in SOURCES[source].items():
            (self.cwd / "texts" / os.fsdecode(name)).write_bytes(content)

    @rule(name=OUTPUTS, asked=ASKED, size=st.integers(700, 20_000))
    def prepare_on_a_full_disk(self, name, asked, size):
        """Where no file may grow beyond a size, it gets through or says what happened."""
        had, other = name in self.held, self.begun.get(name, (asked, self.source(asked)))
        process = self.start(name, *asked.words(), limits={"RLIMIT_FSIZE": size})
        code = process.wait()
        if code != 0:
            error = self.refusal(process)
            if "have TMPDIR name a folder with room" in error:
                assert not had
            elif had or other != (asked, self.source(asked)):
                self.check_refusal(name, asked, error, had)
            else:
                assert f"{self.cwd / name}.partial" in error, error
                assert "cannot be written" in error or "file is too large" in error, error
        self.settle(name, asked, code)

    @rule(
        name=OUTPUTS,
        which=st.integers(0, 20),
        how=st.sampled_from(["flip", "flip", "cut", "delete"]),
        share=st.floats(0, 0.999),
    )
    def damage_the_work(self, name, which, how, share):
        """Work that is damaged is not gone on from, or the damage is where it does not matter."""
        if not self.has_journal(name):
            return
        files = sorted(path for path in self.partial(name).rglob("*") if path.is_file() and path.stat().st_size)
        path = files[which % len(files)]
        content = bytearray(path.read_bytes())
        place = int(share * len(content))
        content[place] ^= 1
        if how == "delete":
            path.unlink()
        else:
            path.write_bytes(content[:place] if how == "cut" else content)
        asked, source = self.begun[name]
        process = self.start(name, *asked.words())
        if process.wait() != 0:
            error = self.refusal(process)
            assert name not in self.held
            assert "delete" in error or source != self.source(asked), error
            shutil.rmtree(self.partial(name))
        self.settle(name, asked, process.returncode)

    @rule(name=OUTPUTS, first=ASKED, second=ASKED, same=st.booleans(), pause=st.floats(0, 0.4))
    def two_at_once(self, name, first, second, same, pause):
        """One wins, the other is told."""
        asked = [first, first if same else second]
        free = name not in self.held and not self.has_journal(name)
        one = self.start(name, *asked[0].words())
        time.sleep(pause)
        processes = [one, self.start(name, *asked[1].words())]
        codes = [process.wait() for process in processes]
        for process, code in zip(processes, codes, strict=True):
            if code != 0:
                error = self.refusal(process)
                assert any(words in error for words in ("is in use by ", "exists already: ", "was begun with ")), error
        assert codes.count(0) <= 1
        assert not free or codes.count(0) == 1, codes
        if 0 in codes:
            self.settle(name, asked[codes.index(0)], 0)

    @rule(name=OUTPUTS, stays=st.booleans())
    def move(self, name, stays):
        """A folder is as good elsewhere."""
        if name not in self.held:
            return
        (self.cwd / name).rename(self.cwd / "elsewhere")
        assert self.content(self.cwd / "elsewhere") == self.held[name]
        process = self.warm.start(["data", "verify", "elsewhere"], self.cwd, logs=self.top / "logs" / "verify")
        assert process.wait() == 0, process.stderr.read_text()
        if stays:
            shutil.rmtree(self.cwd / "elsewhere")
            del self.held[name]
        else:
            (self.cwd / "elsewhere").rename(self.cwd / name)

    @rule()
    def exchange_the_work(self):
        """What is begun goes on under another name, too."""
        one, other = "a", "deep/er/b"
        if not (self.begun.keys() & {one, other}) or self.held:
            return
        aside = self.cwd / "aside"
        (self.cwd / "deep" / "er").mkdir(parents=True, exist_ok=True)
        for old, new in ((one, aside), (other, self.partial(one)), (aside, self.partial(other))):
            path = old if isinstance(old, Path) else self.partial(old)
            if path.exists():
                path.rename(new)
        begun = {name: self.begun[name] for name in (one, other) if name in self.begun}
        self.begun = {{one: other, other: one}[name]: value for name, value in begun.items()}

    @rule(name=OUTPUTS, foreign=st.booleans())
    def clear(self, name, foreign):
        """Work is given up; what is not ours is left alone under its name."""
        shutil.rmtree(self.partial(name), ignore_errors=True)
        self.begun.pop(name, None)
        if foreign and name not in self.held:
            self.partial(name).mkdir(parents=True)
            (self.partial(name) / "notes.txt").write_text("of somebody")
            error = self.refusal(self.start(name, *Asked().words()))
            assert "choose another --output-dir" in error
            assert self.content(self.partial(name)) == {"notes.txt": b"of somebody"}
            shutil.rmtree(self.partial(name))

    @rule(name=OUTPUTS, words=st.sampled_from(BAD_WORDS), asked=ASKED)
    def ask_for_what_cannot_be(self, name, words, asked):
        """Bad arguments are one line, and nothing is written, nothing lost."""
        self.leave_alone(name, [*asked.words(), *words])

    @rule(name=OUTPUTS, spec=st.sampled_from(BAD_SPECS))
    def ask_for_no_data(self, name, spec):
        """Nor where there is nothing to read."""
        self.leave_alone(name, [spec, "--vocab-size", 300])

    def leave_alone(self, name, words):
        before = self.everything()
        self.refusal(self.start(name, *words))
        assert self.everything() == before

    def everything(self):
        """Return all files but what a process that ended before its first journal has left."""
        loose = [self.partial(name) for name in ("a", "deep/er/b") if not self.has_journal(name)]
        return {
            path: path.read_bytes()
            for path in self.cwd.rglob("*")
            if path.is_file() and path.suffix != ".lock" and not any(folder in path.parents for folder in loose)
        }

    @invariant()
    def every_folder_is_what_it_should_be(self):
        """Folders that were complete are there byte for byte; no others have an output's name."""
        for name in ("a", "deep/er/b"):
            folder = self.cwd / name
            assert folder.exists() == (name in self.held)
            if name in self.held:
                assert self.content(folder) == self.held[name]
            assert self.has_journal(name) == (name in self.begun)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """A folder with tokenizers: one, one that differs in its last token alone, and one that is damaged."""
    top = tmp_path_factory.mktemp("prepare-lifecycle")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 9, 290)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|other|>"]})
    tokenizer.save_pretrained(top / "tokens")
    tokenizer.eos_token = "<|other|>"
    tokenizer.save_pretrained(top / "tokens of another end")
    shutil.copytree(top / "tokens", top / "tokens that are damaged")
    (top / "tokens that are damaged" / "tokenizer.json").write_text("{}")
    one, other = ((top / name / "tokenizer.json").read_bytes() for name in ("tokens", "tokens of another end"))
    assert one == other
    return top


@pytest.mark.ci
def test_a_folder_is_right_or_absent(top):
    with WarmParent(*WARM) as warm:
        PrepareLifecycle.warm, PrepareLifecycle.top, PrepareLifecycle.whole = warm, top, {}
        run_lifecycle(PrepareLifecycle, examples=4, steps=8)
