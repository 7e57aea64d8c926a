"""`fanformer train` begun, killed, resumed, replaced, moved, starved and misled, in any order: nothing saved is lost.

The short form runs always; FANFORMER_LIFECYCLE_SECONDS=1800 runs random sequences for that long. The learning rate is
constant, so that the weights after a step are a function of the data, the seed and what the run began with, whatever
its length and however often it was killed: every checkpoint there ever is must hold the very bits of a run that nothing
disturbed.
"""

import hashlib
import json
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

pytest.importorskip("hypothesis", reason="needs hypothesis of requirements-dev.txt")
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fanformer.training.checkpoint import OPTIMIZER_FILE, REPLACED, WEIGHTS_FILE, checkpoints, problem, step_of
from fanformer.training.folder import read_records
from tests.lifecycle import run_lifecycle
from tests.warm_processes import Strike, WarmParent

WARM = (
    "fanformer.cli.train",
    "fanformer.cli.terminal",
    "fanformer.training.run",
    "fanformer.data.preparation.prepare",
    "matplotlib.pyplot",
    "transformers.models.auto.modeling_auto",
)
TOKENS_PER_STEP = 4 * 32
SHAPE = [
    *("--set", "model.hidden_size=32", "--set", "model.num_hidden_layers=1", "--set", "model.num_attention_heads=2"),
    *("--set", "model.num_key_value_heads=1", "--set", "model.head_dim=16", "--set", "model.intermediate_size=32"),
    *("--set", "model.dropout=0.1", "--set", "model.vocab_size=300", "--vocab-size", "300"),
    *("--set", "model.max_position_embeddings=32"),
]
RECIPE = [
    *("--sequence-length", "32", "--batch-size", "4", "--precision", "float32", "--compile", "off", "--device", "cpu"),
    *("--set", "warmup_fraction=0", "--set", "decay_fraction=0", "--set", "log_steps=1", "--set", "eval_tokens=64"),
    *("--set", "threads=1", "--eval-steps", "3", "--save-steps", "2"),
    *("--set", "sample_prompt=" + "zq" * 14),  # fills most of the positions: few tokens are drawn
]
TEXTS = {
    "one.txt": "".join(f"line {number} of a plain text file, {number * number} in all.\n" for number in range(60)),
    "two.txt": "".join(
        f"the {word} sees a river under the old tree, and runs.\n" for word in ("cat", "dog", "fox") * 30
    ),
}
FOLDERS = st.sampled_from(["a", "b"])
DATA = st.sampled_from(sorted(TEXTS))
LENGTHS = st.integers(1, 9)
KINDS = st.sampled_from(["--max-steps", "--tokens"])
MOST_CHANGES = 120
"""A run changes files and folders between 60 and 120 times."""
MOMENTS = st.none() | st.integers(1, MOST_CHANGES) | st.floats(0, 1.5)
SIGNALS = st.sampled_from([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])


@dataclass(frozen=True)
class Origin:
    """What decides the weights after every step of a run.

    Attributes:
        seed: of the run; no two runs have the same.
        data: names of the texts, each with the step from which it is trained on.
        init: hash of the weights that the run began with, None for fresh ones.
        vocabulary: hash of the tokenizer that the weights were trained with.
    """

    seed: int
    data: tuple[tuple[str, int], ...]
    init: str | None = None


@dataclass(frozen=True)
class Kept:
    """A run that must not be lost: what it is, and the last step that is known to be saved."""

    origin: Origin
    saved: int = 0


def length(kind, steps):
    return [kind, str(steps if kind == "--max-steps" else steps * TOKENS_PER_STEP)]


def digest(*files):
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def seed_of(folder):
    """Return the seed in a folder's run.yaml, by which a run is known, or None where there is none."""
    path = folder / "run.yaml"
    return yaml.safe_load(path.read_text())["configuration"]["seed"] if path.is_file() else None


class TrainLifecycle(RuleBasedStateMachine):
    """Two folders for runs, two texts, and whatever may happen to a process on the way."""

    warm: WarmParent
    top: Path

    def __init__(self):
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="train-lifecycle-"))
        self.cwd, self.undisturbed = self.home / "work", self.home / "undisturbed"
        self.cwd.mkdir()
        self.undisturbed.mkdir()
        for name, text in TEXTS.items():
            (self.cwd / name).write_text(text)
        self.kept: dict[str, Kept] = {}
        self.seeds = 0
        self.references: dict[tuple[Origin, int], dict[int, str]] = {}
        self.moved = 0

    def teardown(self):
        shutil.rmtree(self.home)

    # what a run would be without the disturbances

    def start(self, *words, cwd=None, **how):
        return self.warm.start(["train", *words], cwd or self.cwd, logs=self.home / "logs", **how)

    def flags(self, origin):
        shape = SHAPE if origin.init is None else ["--init-from", str(self.undisturbed / f"model-{origin.init}")]
        return ["--data", origin.data[0][0], "--seed", str(origin.seed), *shape, *RECIPE]

    def reference(self, origin, step):
        """Return the hashes of weights and optimizer after every step up to `step` of a run that nothing disturbs."""
        folder = self.undisturbed / "-".join(map(str, (origin.seed, *sum(origin.data, ()))))
        if not folder.exists() and len(origin.data) > 1:
            before, (_, begun) = replace(origin, data=origin.data[:-1]), origin.data[-1]
            self.reference(before, begun)
            shutil.copytree(self.undisturbed / "-".join(map(str, (before.seed, *sum(before.data, ())))), folder)
            for path in checkpoints(folder):
                if step_of(path) > begun:
                    shutil.rmtree(path)
        every = ["--save-steps", "1", "--keep-last", "99", "--output-dir", folder, *length("--max-steps", max(step, 1))]
        for path in self.cwd.glob("*.txt"):
            shutil.copy(path, self.undisturbed)
        done = {step_of(path) for path in checkpoints(folder)} if folder.exists() else set()
        if step not in done:
            words = [*self.flags(origin), *every, "--resume"]
            if len(origin.data) > 1:
                words[1] = origin.data[-1][0]
                words.append("--allow-changed-data")
            if origin.init is not None and folder.exists():
                words = ["--resume", *every, "--data", words[1], *words[words.index("--allow-changed-data") :]] if (
                    len(origin.data) > 1
                ) else ["--resume", *every]  # fmt: skip
            process = self.start(*words, cwd=self.undisturbed)
            assert process.wait() == 0, process.stderr.read_text()
        return folder / f"checkpoint-{step}"

    def check_checkpoint(self, path, origin):
        """Fail unless a checkpoint is whole and holds the bits it would hold if nothing had happened."""
        assert problem(path) is None, (path, problem(path))
        expected = self.reference(origin, step_of(path))
        for name in (WEIGHTS_FILE, OPTIMIZER_FILE, "tokenizer.json", "config.json"):
            assert digest(path / name) == digest(expected / name), (path, name, origin)

    # what is there

    def counted(self, name):
        """Return the folder of the run that counts: while a new one has no checkpoint, the one that it replaces."""
        folder = self.cwd / name
        if (folder / REPLACED).is_dir() and not checkpoints(folder):
            return folder / REPLACED
        if (folder / ".replacing").is_dir():  # on its way: all of it is the same run
            return None
        return folder

    def files(self, name):
        folder = self.cwd / name
        passing = (".unfinished", ".lock", REPLACED, ".replacing")
        return {
            path: path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and not any(part.startswith(passing) for part in path.relative_to(folder).parts)
            and not path.name.endswith((".lock", ".new"))
        }  # fmt: skip

    def settle(self, name, successor=None, new_data=None):
        """Look at what a process left in a folder and learn from it what must not be lost from now on."""
        folder, before = self.counted(name), self.kept.get(name)
        if folder is None:
            return
        seed = seed_of(folder) if folder.is_dir() else None
        if seed is None:
            assert before is None, f"the run of {before} is gone from {name}"
            return
        steps = [step_of(path) for path in checkpoints(folder)]
        known = {kept.origin.seed: kept for kept in (before, successor) if kept is not None}
        assert seed in known, (seed, known)
        kept = known[seed]
        if kept is successor and before is not None and before.saved:
            assert steps, f"the run of {before} is gone from {name}, and its successor has no checkpoint"
        if new_data is not None and kept is before:
            trained_on = yaml.safe_load((folder / "run.yaml").read_text())["configuration"]["data"]
            if trained_on == new_data and kept.origin.data[-1][0] != new_data:
                kept = replace(kept, origin=replace(kept.origin, data=(*kept.origin.data, (new_data, kept.saved))))
        saved = max(steps, default=0)
        assert saved >= kept.saved, f"{name} had a checkpoint of step {kept.saved}, now {saved}"
        self.kept[name] = replace(kept, saved=saved)
        for path in checkpoints(folder):
            self.check_checkpoint(path, self.kept[name].origin)

    def assert_refused(self, process, name, before):
        """Fail unless a process refused in one line; it changes nothing but what an earlier one left half done."""
        code, error = process.wait(), process.stderr.read_text()
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert (code, len(lines), "Traceback" in error) == (2, 1, False), (code, error)
        if before is not None:
            assert self.files(name) == before, set(self.files(name)) ^ set(before)
        return lines[0]

    def unchanged(self, name):
        """Return a folder's files where a refused command must leave them, None where it may put back a run."""
        folder = self.cwd / name
        pending = (folder / REPLACED, folder / ".replacing", folder / ".unfinished" / "manifest.json")
        return None if any(path.exists() for path in pending) else self.files(name)

    def end(self, process, moment, number):
        """Wait for a process, which gets a signal at its moment, and check that it tells the truth of what it saved."""
        if isinstance(moment, float):
            time.sleep(moment)
            process.kill(number)
        code, out, error = process.wait(), process.stdout.read_text(), process.stderr.read_text()
        assert "Traceback" not in error, error
        assert "internal error" not in error, error
        assert code in (0, 2, -number, 128 + number), (code, error)
        if "which is saved" in out:
            words = out[out.index("after step ") :].split()
            return code, int(words[2].rstrip(","))
        return code, None

    def train(self, name, words, successor, moment, number, new_data=None, **how):
        strike = Strike(number, moment) if isinstance(moment, int) else None
        process = self.start(*words, "--output-dir", name, strike=strike, **how)
        code, said = self.end(process, moment, number)
        self.settle(name, successor, new_data)
        if said is not None:
            assert self.kept[name].saved == said, (self.kept[name], process.stdout.read_text())
        return code, process

    def new(self, data, init=None):
        self.seeds += 1
        return Kept(Origin(self.seeds, ((data, 0),), init))

    # what may happen

    @rule(name=FOLDERS, data=DATA, steps=LENGTHS, kind=KINDS, overwrite=st.booleans(), moment=MOMENTS, number=SIGNALS)
    def begin(self, name, data, steps, kind, overwrite, moment, number):
        """A new run, left alone or ended at some moment."""
        new, before = self.new(data), self.unchanged(name)
        words = [*self.flags(new.origin), *length(kind, steps), *["--overwrite"] * overwrite]
        had = self.kept.get(name)
        code, process = self.train(name, words, new, moment, number)
        if code == 0:
            assert had is None or overwrite
            assert self.kept[name] == replace(new, saved=steps)
            self.check_published(name, steps)
        elif code == 2:
            assert not overwrite, process.stderr.read_text()
            why = "already holds a run" if had is not None else "data.partial was begun with"
            assert why in self.assert_refused(process, name, before)

    @rule(name=FOLDERS, data=DATA, steps=LENGTHS, overwrite=st.booleans(), moment=MOMENTS, number=SIGNALS)
    def begin_from(self, name, data, steps, overwrite, moment, number):
        """A new run from the weights of the other folder, which bring their tokenizer."""
        source = self.cwd / {"a": "b", "b": "a"}[name]
        other = self.kept.get(source.name)
        if other is None or self.counted(source.name) != source or not (source / WEIGHTS_FILE).is_file():
            words = ["--data", data, "--init-from", source, *RECIPE, *length("--max-steps", steps), "--overwrite"]
            before = self.unchanged(name)
            process = self.start(*words, "--output-dir", name)
            if not (source / "config.json").is_file():
                self.assert_refused(process, name, before)
            else:
                process.kill()
                process.wait()
                self.seeds += 0
            return
        init = digest(source / WEIGHTS_FILE, source / "tokenizer.json")
        place = self.undisturbed / f"model-{init}"
        if not place.exists():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("checkpoint-*", "data*", ".*", "run.yaml"))
        new, had = self.new(data, init), self.kept.get(name)
        words = [*self.flags(new.origin), *length("--max-steps", steps), *["--overwrite"] * overwrite]
        code, _ = self.train(name, words, new, moment, number)
        if code == 0:
            assert had is None or overwrite
            assert digest(self.cwd / name / "tokenizer.json") == digest(source / "tokenizer.json")
        elif code == 2:
            assert not overwrite, process.stderr.read_text()
            assert had is not None or "data.partial was begun with" in process.stderr.read_text()

    @rule(name=FOLDERS, more=st.integers(0, 4), kind=KINDS, moment=MOMENTS, number=SIGNALS)
    def resume(self, name, more, kind, moment, number):
        """A run goes on, by another kind of length too; what is there goes on from its last checkpoint."""
        had = self.kept.get(name)
        if had is None:
            return
        steps = max(1, had.saved + more)
        code, process = self.train(name, ["--resume", *length(kind, steps)], None, moment, number)
        assert code != 2, process.stderr.read_text()
        if code == 0:
            assert self.kept[name].saved == steps
            self.check_published(name, steps)

    @rule(name=FOLDERS, data=DATA, allowed=st.booleans(), moment=MOMENTS, number=SIGNALS)
    def resume_on(self, name, data, allowed, moment, number):
        """Other data are refused, or taken in the tokens that the weights know."""
        had, before = self.kept.get(name), self.unchanged(name)
        if had is None or not had.saved:
            return
        words = ["--resume", "--data", data, *length("--max-steps", had.saved + 1), *["--allow-changed-data"] * allowed]
        code, process = self.train(name, words, None, moment, number, new_data=data)
        same = data == had.origin.data[-1][0]
        if code == 0:
            assert same or allowed
            assert self.kept[name].saved == had.saved + 1
        elif code == 2:
            assert not same
            assert not allowed
            assert "the data changed since the run began" in self.assert_refused(process, name, before)

    @rule(
        name=FOLDERS,
        words=st.sampled_from(
            [
                ["--data", "misspelt.txt"],
                ["--data", "OWN/data"],
                ["--init-from", "OWN"],
                ["--init-from", "nowhere"],
                ["--set", "model.head_dim=3"],
                ["--sequence-length", "100000"],
                ["--set", "sample_prompt=" + "word " * 90],
                ["--learning-rate", "nan"],
                ["--device", "cuda:7"],
                ["--resume"],
            ]
        ),
    )
    def overwrite_by_what_cannot_begin(self, name, words):
        """Bad input is one line, and what was there stays as it was."""
        before = self.unchanged(name)
        words = [word.replace("OWN", str(self.cwd / name)) for word in words]
        process = self.start("--data", "one.txt", *SHAPE, *RECIPE, *words, "--overwrite", "--output-dir", name)
        self.assert_refused(process, name, before)
        self.settle(name)

    @rule(name=FOLDERS, size=st.integers(2_000, 400_000), overwrite=st.booleans())
    def train_on_a_full_disk(self, name, size, overwrite):
        """Where no file may grow beyond a size, a run ends in one line or gets through; nothing is lost."""
        had = self.kept.get(name)
        limits = {"RLIMIT_FSIZE": size}
        if had is None or overwrite:
            new = self.new("one.txt")
            words = [*self.flags(new.origin), *length("--max-steps", 4), "--overwrite"]
        else:
            new, words = None, ["--resume", *length("--max-steps", had.saved + 2)]
        code, _ = self.train(name, words, new, None, signal.SIGKILL, limits=limits)
        assert code in (0, 2)

    @rule(name=FOLDERS)
    def move(self, name):
        """A folder with a run is as good under another name, and back."""
        if not (self.cwd / name).exists():
            return
        (self.cwd / name).rename(self.cwd / "elsewhere")
        had = self.kept.get(name)
        if had is not None:
            steps = max(1, had.saved)
            process = self.start("--resume", "--output-dir", "elsewhere", *length("--max-steps", steps))
            assert process.wait() == 0, process.stderr.read_text()
        (self.cwd / "elsewhere").rename(self.cwd / name)
        self.settle(name)

    @rule(name=FOLDERS)
    def damage_the_last_checkpoint(self, name):
        """A flipped bit costs the steps since the checkpoint before, and no more."""
        folder, had = self.counted(name), self.kept.get(name)
        if had is None or folder is None or len(checkpoints(folder)) < 2:
            return
        *_, before, last = checkpoints(folder)
        file = last / WEIGHTS_FILE
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.unlink()  # it may be linked to the published one
        file.write_bytes(content)
        kept = replace(had, saved=step_of(before))
        if len(had.origin.data) > 1 and had.origin.data[-1][1] > kept.saved:
            origin = replace(had.origin, data=(*had.origin.data[:-1], (had.origin.data[-1][0], kept.saved)))
            kept = replace(kept, origin=origin)
        self.kept[name] = kept
        process = self.start("--resume", "--output-dir", name, *length("--max-steps", kept.saved))
        assert process.wait() == 0, process.stderr.read_text()
        assert "is damaged" in process.stderr.read_text()
        self.settle(name)

    def check_published(self, name, steps):
        """Fail unless a run's folder holds the model of its last checkpoint, and figures of every step, in order."""
        folder, origin = self.cwd / name, self.kept[name].origin
        for file in (WEIGHTS_FILE, "tokenizer.json"):
            assert digest(folder / file) == digest(folder / f"checkpoint-{steps}" / file)
        records = read_records(folder)
        assert [record["step"] for record in records] == list(range(1, steps + 1))
        expected = read_records(self.reference(origin, steps).parent)
        for key in ("loss", "grad_norm", "rows"):
            assert [record[key] for record in records] == [record[key] for record in expected[:steps]], key

    @invariant()
    def nothing_that_was_saved_is_gone(self):
        """Every run that counts has the checkpoint that it is known to have."""
        for name, kept in self.kept.items():
            folder = self.counted(name)
            if folder is not None:
                assert seed_of(folder) == kept.origin.seed
                assert kept.saved in [0, *map(step_of, checkpoints(folder))]
                json.dumps(read_records(folder))


@pytest.mark.ci
def test_nothing_saved_is_lost_and_nothing_is_silently_another_run():
    with WarmParent(*WARM) as warm:
        TrainLifecycle.warm = warm
        run_lifecycle(TrainLifecycle, examples=4, steps=8)
