"""Mutated real files: the readers end in one clear error or a whole model, never in a crash, a hang or much memory.

The cases follow from the test alone (`derandomize`), so a run finds again what an earlier one found. Cases that once
broke something stand as `@example`.
"""

import contextlib
import dataclasses
import io
import json
import os
import resource
import struct
import warnings

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis of requirements-dev.txt")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fanformer.errors import CheckpointError
from fanformer.generation.loading import check_weights
from fanformer.gguf.architecture import open_model
from fanformer.gguf.file import GGUFFile
from fanformer.gguf.tokenizer import GGUFTokenizer
from fanformer.loading import load, load_config
from tests.gguf_models import export, save

MANY, FEW = 20_000, 300
MOST_BYTES = 256 << 20
"""What reading a file of 100 kB may take at most, address space included."""
EXTREMES = [0, 1, 2, 3, 31, 32, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


@dataclasses.dataclass(frozen=True)
class Edit:
    """One change of a file; places are shares of its length, so that they fit any."""

    kind: str
    place: float
    number: int
    length: int

    def apply(self, content: bytes) -> bytes:
        """Return the changed content."""
        at = int(self.place * len(content))
        if self.kind == "cut":
            return content[:at]
        if self.kind == "byte":
            return content[:at] + bytes([self.number & 255]) + content[at + 1 :]
        if self.kind == "bit":
            return content[:at] + bytes(b ^ 1 << (self.number & 7) for b in content[at : at + 1]) + content[at + 1 :]
        if self.kind == "number32":
            return content[:at] + struct.pack("<I", self.number & 0xFFFFFFFF) + content[at + 4 :]
        if self.kind == "number64":
            return content[:at] + struct.pack("<Q", self.number) + content[at + 8 :]
        if self.kind == "delete":
            return content[:at] + content[at + self.length :]
        if self.kind == "repeat":
            return content[: at + self.length] + content[at : at + self.length] + content[at + self.length :]
        other = self.number % max(len(content), 1)  # "copy": a piece from elsewhere
        piece = content[other : other + self.length]
        return content[:at] + piece + content[at + len(piece) :]


KINDS = ("cut", "byte", "bit", "number32", "number64", "delete", "repeat", "copy")
EDITS = st.lists(
    st.builds(
        Edit,
        st.sampled_from(KINDS),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(EXTREMES) | st.integers(0, 2**64 - 1),
        st.integers(1, 64),
    ),
    min_size=1,
    max_size=4,
)


def fuzzing(count):
    """Settings of a run of `count` cases that are always the same."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def little_memory():
    """Let this process take MOST_BYTES more than it has; more is a MemoryError, which no reader may end in."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Folder of a model of one layer, with a GGUF file of it: most bytes of both are header and tokenizer."""
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 304, "tie_word_embeddings": True}
    folder = save(tmp_path_factory.mktemp("small") / "model", tiny_model(**fields), tiny_tokenizer)
    export(folder, "f16")
    return folder


def header_end(path):
    """Where the tensors of a GGUF file begin."""
    return min(item.offset for item in GGUFFile(path).tensors.values())


def read_all(path):
    """Read everything of a GGUF file that the loader and the engine read before they compute."""
    file, model = open_model(str(path))
    GGUFTokenizer(file, model.vocab_size)
    for info in file.tensors.values():
        file.read_floats(info)
    return file, model


def check_clear(error):
    """Check that an error is one line that names the file, with nothing of Python in it."""
    text = str(error)
    assert "\n" not in text, text
    assert "fuzzed" in text, text
    assert "object at 0x" not in text, text
    assert len(text) < 1500, text


def fuzz_gguf(path, folder, edits, in_header):
    content = path.read_bytes()
    if in_header:  # where nearly every byte is a claim
        end = header_end(path)
        head = content[:end]
        for edit in edits:
            head = edit.apply(head)
        content = head + content[end:]
    else:
        for edit in edits:
            content = edit.apply(content)
    target = folder / "fuzzed.gguf"
    target.write_bytes(content)
    with little_memory():
        try:
            read_all(target)
        except CheckpointError as error:
            check_clear(error)


def run_gguf(count, small, tmp_path):
    path = small / "model-f16.gguf"
    read_all(path)

    @fuzzing(count)
    @given(edits=EDITS, in_header=st.booleans())
    @example(edits=[Edit("number64", 8 / 20000, 2**62, 1)], in_header=True)
    def run(edits, in_header):
        fuzz_gguf(path, tmp_path, edits, in_header)

    run()


def test_mutated_gguf_files_end_in_a_clear_error(small, tmp_path):
    run_gguf(FEW, small, tmp_path)


@pytest.mark.ci
@pytest.mark.timeout(1800)
def test_twenty_thousand_mutated_gguf_files_end_in_a_clear_error(small, tmp_path):
    run_gguf(MANY, small, tmp_path)


def test_the_mutations_reach_every_part_of_the_reader(small, tmp_path):
    """Fuzzing that is refused at the first byte would prove nothing: the refusals are of many kinds, and some pass."""
    path, seen = small / "model-f16.gguf", set()

    @fuzzing(FEW)
    @given(edits=EDITS, in_header=st.booleans())
    def run(edits, in_header):
        try:
            fuzz_gguf(path, tmp_path, edits, in_header)
            seen.add("no error")
            read_all(tmp_path / "fuzzed.gguf")
        except CheckpointError as error:
            seen.add(" ".join(str(error).split(":", 1)[1].split()[:3]))

    run()
    assert "no error" in seen
    assert len(seen) > 15, seen


def run_checkpoint(count, full, small, tmp_path):
    """Mutate the weights' header or config.json; `full` loads what the checks let pass."""
    names = ("model.safetensors", "config.json")
    contents = {name: (small / name).read_bytes() for name in names}
    folder = tmp_path / "fuzzed"
    folder.mkdir(exist_ok=True)
    for file in small.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    length = 8 + struct.unpack("<Q", contents[names[0]][:8])[0]

    @fuzzing(count)
    @given(edits=EDITS, name=st.sampled_from(names), in_header=st.booleans())
    def run(edits, name, in_header):
        content = contents[name]
        if name == names[0] and in_header:
            head = content[:length]
            for edit in edits:
                head = edit.apply(head)
            content = head + content[length:]
        else:
            for edit in edits:
                content = edit.apply(content)
        for other in names:
            (folder / other).write_bytes(content if other == name else contents[other])
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(), little_memory():
            warnings.simplefilter("ignore")
            try:
                load_config(folder)
                check_weights(folder)
                if full:
                    load(folder, device="cpu")
            except CheckpointError as error:
                check_clear(error)

    run()


def test_mutated_checkpoints_end_in_a_clear_error(small, tmp_path):
    run_checkpoint(FEW // 3, True, small, tmp_path)


@pytest.mark.ci
@pytest.mark.timeout(1800)
def test_twenty_thousand_mutated_checkpoints_end_in_a_clear_error(small, tmp_path):
    run_checkpoint(MANY, False, small, tmp_path)
    run_checkpoint(1000, True, small, tmp_path)


@pytest.mark.ci
@pytest.mark.timeout(1800)
def test_mutated_gguf_files_never_end_the_engines_process(small, tmp_path):
    """What the reader lets pass, the engine runs: other numbers, but no crash."""
    pytest.importorskip("ggml", reason="needs the extra `gguf` (ggml-python)")
    from fanformer.gguf.engine import Engine

    ran = []

    @fuzzing(2000)
    @given(edits=EDITS, kind=st.sampled_from(("f32", "q8_0", "q4_0")))
    def run(edits, kind):
        path = small / f"model-{kind}.gguf"
        content = (path if path.exists() else export(small, kind)).read_bytes()
        for edit in edits:
            content = edit.apply(content)
        target = tmp_path / "fuzzed.gguf"
        target.write_bytes(content)
        try:
            engine = Engine.open(target, 1)
        except CheckpointError as error:
            check_clear(error)
            return
        engine.begin(1, min(8, engine.model.max_position_embeddings))
        assert engine.forward([[1]])[0].shape == (1, engine.model.vocab_size)
        ran.append(kind)

    run()
    assert len(ran) > 100


def test_files_of_random_bytes_are_refused(tmp_path):
    for length in (0, 1, 3, 4, 23, 24, 100, 10_000):
        target = tmp_path / "fuzzed.gguf"
        target.write_bytes(os.urandom(length))
        with pytest.raises(CheckpointError):
            GGUFFile(target)
        target.write_bytes(b"GGUF\x03\0\0\0" + os.urandom(length))
        with pytest.raises(CheckpointError):
            GGUFFile(target)


def test_json_that_nests_too_deeply_is_refused(small, tmp_path):
    for name in ("config.json", "model.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        for file in small.iterdir():
            if file.suffix in (".json", ".safetensors"):
                (folder / file.name).write_bytes(file.read_bytes())
        nested = b"[" * 200_000
        (folder / name).write_bytes(nested if name == "config.json" else struct.pack("<Q", len(nested)) + nested)
        with pytest.raises(CheckpointError, match=r"is damaged|is corrupt"):
            load(folder, device="cpu")
    assert json.loads((small / "config.json").read_text())["vocab_size"] == 304


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("num_hidden_layers", r"`num_hidden_layers` is 10000000, but they are \d+ tensors"),
        ("hidden_size", r"`model.embed_tokens.weight` is \(304, 16\), expected \(304, 10000000\)"),
        (
            "intermediate_size",
            r"`model.layers.0.mlp.down_proj.input.factor.weight` is \(40, 16\), expected \(40, 10000000\)",
        ),
        ("vocab_size", r"`vocab_size` is 10000000, but `model.embed_tokens.weight` has 304 rows"),
    ],
)
def test_configuration_that_lies_is_refused_before_memory_is_taken(small, tmp_path, field, message):
    for file in small.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, field: 10_000_000}))
    with little_memory(), pytest.raises(CheckpointError, match=message):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize(("old", "new"), [(b'"F32"', b'"F33"'), (b'"shape":[304,', b'"shape":[403,'), (b"0,", b"8,")])
def test_weights_whose_header_lies_are_refused(small, tmp_path, old, new):
    for file in small.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    content = (tmp_path / "model.safetensors").read_bytes()
    assert old in content
    (tmp_path / "model.safetensors").write_bytes(content.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=r"model.safetensors is corrupt: .*; copy it again"):
        load(tmp_path, device="cpu")
    (tmp_path / "model.safetensors").write_bytes(content.replace(b'"F32"', b'"U32"', 1))
    with pytest.raises(CheckpointError, match=r"is stored as U32, expected one of F64, F32, F16, BF16"):
        load(tmp_path, device="cpu")
