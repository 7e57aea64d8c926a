"""`fanformer quantize` killed, starved, repeated and given rubbish, in any order: a file that is there is whole.

The short form runs always; FANFORMER_LIFECYCLE_SECONDS=600 runs random sequences for that long.
"""

import json
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis of requirements-dev.txt")
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fanformer.loading import load
from tests.gguf_models import save
from tests.lifecycle import run_lifecycle
from tests.warm_processes import Strike, WarmParent

WARM = (
    "fanformer.cli.quantize",
    "fanformer.gguf.export",
    "fanformer.generation.loading",
    "rich.progress",
    "transformers.models.auto.modeling_auto",
)
OUTPUTS = st.sampled_from(["out", "deep/er/out", "named.gguf"])
TYPES = st.sampled_from(["f16", "bf16"])
MODELS = st.sampled_from(["first", "second"])
MOST_CHANGES = 14
"""A run changes files and folders eleven to fourteen times."""


def lose_weights(folder):
    """Take the weights away."""
    (folder / "model.safetensors").unlink()


def cut_weights(folder):
    """Cut the weights in the middle."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoil_configuration(folder):
    """Write no JSON as config.json."""
    (folder / "config.json").write_text("{")


def lose_tokenizer(folder):
    """Take the tokenizer away."""
    (folder / "tokenizer.json").unlink()


def leftovers(place):
    """What killed runs left of a file of this name."""
    return list(place.parent.glob(f".{place.name}.*"))


def is_left_over(path):
    """Whether a file is in what a killed run left."""
    return any(part.endswith(".fanformer-new") for part in path.parts)


class QuantizeLifecycle(RuleBasedStateMachine):
    """Two models, three places to write to, and whatever may happen to a process on the way."""

    warm: WarmParent
    models: Path
    """Folder of the models `first` and `second`, whose weights differ."""
    whole: dict[tuple[str, str, str], bytes]
    """What a run writes that nothing disturbs, by (model, name of its folder, type)."""

    def __init__(self):
        super().__init__()
        self.top = Path(tempfile.mkdtemp(prefix="quantize-lifecycle-"))
        self.cwd = self.top / "work"
        shutil.copytree(self.models, self.cwd)
        self.folders = {"first": "first", "second": "second"}
        self.held = {}  # what every file that there should be holds

    def teardown(self):
        shutil.rmtree(self.top)

    def start(self, source, output, kind, *words, **how):
        command = ["quantize", source, "--format", "gguf", "--type", kind, "--output-dir", output, *words]
        return self.warm.start(command, self.cwd, **how)

    def place(self, output, kind):
        return self.cwd / output if output.endswith(".gguf") else self.cwd / output / f"model-{kind}.gguf"

    def expected(self, model, kind):
        key = model, self.folders[model], kind
        if key not in self.whole:
            place = self.top / "expected.gguf"
            process = self.start(self.folders[model], place, kind)
            assert process.wait() == 0, process.stderr.read_text()
            assert load(place, device="cpu").model.num_parameters() > 0
            self.whole[key] = place.read_bytes()
            place.unlink()
            place.with_suffix(".json").unlink()
        return self.whole[key]

    def files(self):
        return {path: path.read_bytes() for path in self.cwd.rglob("*") if path.is_file()}

    def assert_refused(self, process, before):
        code, error = process.wait(), process.stderr.read_text()
        assert (code, error[:7], error.count("\n")) == (2, "error: ", 1), (code, error)
        assert self.files() == before
        return error

    @rule(model=MODELS, output=OUTPUTS, kind=TYPES, overwrite=st.booleans())
    def quantize(self, model, output, kind, overwrite):
        """Left alone, it writes the file, or says that one is there."""
        wanted, place, before = self.expected(model, kind), self.place(output, kind), self.files()
        process = self.start(self.folders[model], output, kind, *["--overwrite"] * overwrite)
        if place in before and not overwrite:
            assert "is there already" in self.assert_refused(process, before)
            return
        assert (process.wait(), process.stderr.read_text()) == (0, "")
        assert place.read_bytes() == wanted
        assert json.loads(place.with_suffix(".json").read_text())["bytes"] == len(wanted)
        assert not leftovers(place)
        self.held[place] = wanted

    @rule(
        model=MODELS,
        output=OUTPUTS,
        kind=TYPES,
        number=st.sampled_from([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]),
        moment=st.integers(1, MOST_CHANGES) | st.floats(0, 0.3),
    )
    def quantize_until_a_signal(self, model, output, kind, number, moment):
        """Ended before its Nth change of a file, or after a while, it leaves what was there or all of the new file."""
        wanted, place = self.expected(model, kind), self.place(output, kind)
        strike = Strike(number, moment) if isinstance(moment, int) else None
        process = self.start(self.folders[model], output, kind, "--overwrite", strike=strike)
        if strike is None:
            time.sleep(moment)
            process.kill(number)
        code, content = process.wait(), place.read_bytes() if place.exists() else None
        endings = (0, -number, 130) if number == signal.SIGINT else (0, -number)  # -SIGINT when the work is done
        assert (code in endings, process.stderr.read_text()) == (True, ""), code
        assert content == wanted if code == 0 else content in (wanted, self.held.get(place))
        if content is not None:
            self.held[place] = content

    @rule(damage=st.sampled_from([lose_weights, cut_weights, spoil_configuration, lose_tokenizer]), output=OUTPUTS)
    def quantize_what_is_damaged(self, damage, output):
        """A source that is of no use is refused, whatever the output holds."""
        damaged = shutil.copytree(self.cwd / self.folders["first"], self.cwd / "damaged")
        damage(damaged)
        self.assert_refused(self.start("damaged", output, "f16", "--overwrite"), self.files())
        shutil.rmtree(damaged)

    @rule(model=MODELS, output=OUTPUTS, kind=TYPES, share=st.floats(0, 0.99))
    def quantize_to_a_full_disk(self, model, output, kind, share):
        """Where a file may not grow beyond a share of what is to be written, what was there stays."""
        limit = 4096 + int(share * (len(self.expected(model, kind)) - 4096))  # the error has to fit
        before = {path: content for path, content in self.files().items() if not is_left_over(path)}
        process = self.start(self.folders[model], output, kind, "--overwrite", limits={"RLIMIT_FSIZE": limit})
        process.wait()
        left = {path: content for path, content in self.files().items() if path not in before}
        assert all(map(is_left_over, left))
        assert "file is too large" in self.assert_refused(process, before | left)
        assert not leftovers(self.place(output, kind))

    @rule(model=MODELS, name=st.sampled_from(["moved", "moved again"]))
    def move_the_source(self, model, name):
        """A folder of another name is as good, and the old name is refused in one line."""
        old, new = self.folders[model], f"{model} {name}"
        if old == new:
            return
        (self.cwd / old).rename(self.cwd / new)
        self.folders[model] = new
        self.assert_refused(self.start(old, "elsewhere", "f16"), self.files())

    @invariant()
    def every_output_is_what_it_should_be(self):
        """Files that were whole are there byte for byte; no others have an output's name."""
        assert {path: path.read_bytes() for path in self.cwd.rglob("*.gguf")} == self.held
        for path in self.held:
            if path.with_suffix(".json").exists():
                json.loads(path.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model, tiny_tokenizer):
    """A folder of two tiny models."""
    folder = tmp_path_factory.mktemp("lifecycle")
    for seed, name in enumerate(["first", "second"]):
        save(folder / name, tiny_model(seed, vocab_size=320, eos_token_id=0, bos_token_id=0), tiny_tokenizer)
    return folder


@pytest.mark.ci
def test_no_output_is_ever_lost_or_half_there(models):
    with WarmParent(*WARM) as warm:
        QuantizeLifecycle.warm, QuantizeLifecycle.models, QuantizeLifecycle.whole = warm, models, {}
        run_lifecycle(QuantizeLifecycle, examples=3, steps=7)
