"""The engine on ggml: the dequantized model's logits, from any cut of the text, in any batch, for every switch."""

import itertools
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fanformer.errors import CheckpointError, ConfigError
from fanformer.gguf.engine import CHUNK, Engine, bucket
from fanformer.loading import load
from tests.gguf_models import STATIC_ROPES, VARIANTS, export, save
from tests.tiny_models import every_rank

pytest.importorskip("ggml", reason="needs the extra `gguf` (ggml-python)")
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # FAN without a part

# The largest error over the logits' standard deviation; activations are rounded to what a type multiplies with.
TOLERANCE = {"f32": 1e-3, "f16": 5e-3, "bf16": 5e-3}
QUANTIZED = ("q8_0", "q4_0", "q4_k", "q5_k", "q6_k")
CPU_INFO = Path("/proc/cpuinfo")
BY_TILES = "amx_int8" in (CPU_INFO.read_text() if CPU_INFO.is_file() else "")
"""Whether ggml multiplies several tokens of 8 and 4 bits by another rule than one: seen on an Intel Xeon with AMX."""


def assert_same(kind, found, expected):
    """Whether logits are equal to the last bit, or, where ggml rounds by two rules, as near as rounding leaves them."""
    if kind in QUANTIZED and BY_TILES:
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.03
    else:
        np.testing.assert_array_equal(found, expected)


def engine_logits(path, rows, cuts=(), threads=1):
    """Logits (T, V) of each row of ids, all of them in one batch, handed over in pieces that end at `cuts`."""
    engine = Engine.open(path, threads)
    engine.begin(len(rows), max(map(len, rows)))
    found = [[] for _ in rows]
    edges = [0, *cuts, max(map(len, rows))]
    for start, stop in itertools.pairwise(edges):
        parts = [row[start:stop] for row in rows]
        for stream, logits in enumerate(engine.forward(parts, every=True)):
            found[stream].append(logits)
    return [np.concatenate(pieces) for pieces in found]


def torch_logits(path, row):
    with torch.no_grad():
        return load(path, device="cpu").model(torch.tensor([row])).logits[0].numpy()


def error(found, expected):
    """The largest error over the logits' standard deviation."""
    return np.abs(found - expected).max() / expected.std()


def nats(logits, labels):
    """Mean surprise of the labels."""
    chances = torch.from_numpy(logits).double().log_softmax(-1)
    return -float(chances[torch.arange(len(labels)), labels].mean())


def ids(count, seed=0, vocab_size=300):
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Folder of a model whose matrices have rows of 256, so that every type is used as it is."""
    fields = {
        "hidden_size": 256,
        **every_rank(256),
        "intermediate_size": 512,
        "head_dim": 64,
        "max_position_embeddings": 256,
    }
    return save(tmp_path_factory.mktemp("wide") / "model", tiny_model(vocab_size=320, **fields), tiny_tokenizer)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_float32_logits_are_the_models_for_every_switch(tiny_model, tiny_tokenizer, tmp_path, fields):
    model = tiny_model(**{"vocab_size": 320, **fields})
    path = export(save(tmp_path / "model", model, tiny_tokenizer))
    row = ids(100)
    with torch.no_grad():
        expected = model(torch.tensor([row])).logits[0].numpy()
    # measured: 1e-6 to 3e-5
    assert error(engine_logits(path, [row])[0], expected) < 2e-4


def test_a_file_from_before_each_kind_of_layer_had_a_rank_gives_its_logits(repository):
    io = load_file(repository / "tests/legacy/io.safetensors")
    for row, expected in zip(io["input_ids"].tolist(), io["logits"].numpy(), strict=True):
        found = engine_logits(repository / "tests/legacy/model-f16.gguf", [row])[0]
        assert error(found, expected) < TOLERANCE["f16"]


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("name", ["default", "tuned", "tied", "separate-inputs", "writers-silu", "llama"])
def test_floats_are_within_the_tolerance_of_the_dequantized_model(tiny_model, tiny_tokenizer, tmp_path, kind, name):
    fields = {"vocab_size": 320, **VARIANTS[name]}
    path = export(save(tmp_path / "model", tiny_model(**fields), tiny_tokenizer), kind)
    row = ids(100)
    assert error(engine_logits(path, [row])[0], torch_logits(path, row)) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_logits_are_near_the_dequantized_models(wide, kind):
    path, row = export(wide, kind), ids(100)
    found, expected = engine_logits(path, [row])[0], torch_logits(path, row)
    # ggml rounds activations to 8 bits, in blocks: under 1% of each sum. A wrong row or scale would be off by 100%.
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.03
    assert found.argmax(-1).tolist() != [found.argmax(-1)[0]] * len(row)
    # the bits of a text are nearly the same: errors of both signs cancel over the tokens
    ours, theirs = (nats(logits[:-1], row[1:]) for logits in (found, expected))
    assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_logits_do_not_depend_on_how_the_text_is_cut(wide, kind):
    path, row = export(wide, kind), ids(150)
    assert len(row) > 2 * CHUNK
    whole = engine_logits(path, [row])[0]
    for cuts in (range(1, 150), (1, 3, 70, 71), (64, 128), (149,)):
        # the same sums in the same order: not one bit differs
        assert_same(kind, engine_logits(path, [row], cuts)[0], whole)


def test_logits_of_q4_k_depend_on_the_cut_as_little_as_on_rounding(wide):
    """Where ggml packs q4_k, it rounds the activations of four tokens by another rule than those of one."""
    path, row = export(wide, "q4_k"), ids(150)
    whole = engine_logits(path, [row])[0]
    for cuts in (range(1, 150), (1, 3, 70, 71)):
        found = engine_logits(path, [row], cuts)[0]
        assert np.linalg.norm(found - whole) / np.linalg.norm(whole) < 0.03
        assert nats(found[:-1], row[1:]) == pytest.approx(nats(whole[:-1], row[1:]), rel=2e-3)


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_logits_do_not_depend_on_the_batch(wide, kind):
    path = export(wide, kind)
    rows = [ids(90, 1), ids(3, 2), ids(64, 3), ids(1, 4)]
    together = engine_logits(path, rows, cuts=(2, 40))
    for row, logits in zip(rows, together, strict=True):
        assert_same(kind, logits, engine_logits(path, [row])[0])


def test_logits_do_not_depend_on_the_number_of_threads(wide):
    path, row = export(wide, "q8_0"), ids(70)
    np.testing.assert_array_equal(engine_logits(path, [row], threads=2)[0], engine_logits(path, [row])[0])


def test_last_logits_are_the_last_of_all(wide):
    path, rows = export(wide, "f16"), [ids(90, 1), ids(5, 2)]
    engine = Engine.open(path, 1)
    engine.begin(3, 120)
    last = engine.forward([*rows, []])
    assert [logits.shape for logits in last] == [(1, 320), (1, 320), (0, 320)]
    for row, logits in zip(rows, last, strict=False):
        np.testing.assert_array_equal(logits, engine_logits(path, [row])[0][-1:])


def test_streams_begin_anew(wide):
    path, row = export(wide, "f32"), ids(100)
    whole = engine_logits(path, [row])[0]
    engine = Engine.open(path, 1)
    engine.begin(2, 100)
    engine.forward([ids(100, 5), ids(40, 6)])
    engine.begin(2, 100)  # what is left in the cache must not be seen
    np.testing.assert_array_equal(engine.forward([row[:30], []], every=True)[0], whole[:30])
    np.testing.assert_array_equal(engine.forward([row[30:], [1]], every=True)[0], whole[30:])
    engine.begin(1, 100)  # another number of streams
    np.testing.assert_array_equal(engine.forward([row], every=True)[0], whole)


def test_graphs_are_built_once_for_a_bucket(wide, monkeypatch):
    from fanformer.gguf import engine as ggml_engine

    built = []
    build = ggml_engine._Builder.build
    monkeypatch.setattr(ggml_engine._Builder, "build", lambda self, every: built.append(self._s) or build(self, every))
    engine = Engine.open(export(wide, "q8_0"), 1)
    engine.begin(1, 128)
    engine.forward([ids(60)])
    for token in ids(60, 2):
        engine.forward([[token]])
    # the largest first, the prompt, then one token at a time below 64 and below 128 positions
    assert built == [128, 64, 64, 128]


def noted(monkeypatch):
    """Note every graph that is built: its tokens, and a reference that does not keep it."""
    from fanformer.gguf import engine as ggml_engine

    built, build = [], ggml_engine._Builder.build

    def noting(self, every):
        graph = build(self, every)
        built.append((self._t, weakref.ref(graph)))
        return graph

    monkeypatch.setattr(ggml_engine._Builder, "build", noting)
    return built


def kept(built):
    return [tokens for tokens, graph in built if graph() is not None]


def test_only_the_graphs_that_ran_last_are_kept(wide, monkeypatch):
    path, row = export(wide, "f32"), ids(16)
    whole = engine_logits(path, [row])[0]
    built = noted(monkeypatch)
    monkeypatch.setattr("fanformer.gguf.engine._MOST_GRAPHS", 3)
    engine = Engine.open(path, 1)
    engine.begin(1, 128)
    found = [
        engine.forward([row[start:stop]], every=True)[0] for start, stop in itertools.pairwise([0, 1, 3, 7, 8, 16])
    ]
    np.testing.assert_array_equal(np.concatenate(found), whole)
    assert [tokens for tokens, _ in built] == [CHUNK, 1, 2, 4, 8]
    assert kept(built) == [1, 4, 8]  # that of one token ran again before that of 8 was built


def test_graphs_whose_memory_moved_are_dropped(wide, monkeypatch):
    built = noted(monkeypatch)
    engine = Engine.open(export(wide, "f32"), 1)
    engine.begin(1, 128)
    for count in (1, 2):
        engine.forward([ids(count)])
    assert kept(built) == [CHUNK, 1, 2]
    engine._runtime.generation += 1  # as a larger graph does
    engine.forward([ids(2)])
    assert kept(built) == [2]


def test_buckets_hold_what_they_are_for():
    assert [bucket(count) for count in (1, 64, 65, 128, 129, 256, 257, 512, 513, 1024)] == [
        64, 64, 128, 128, 256, 256, 512, 512, 768, 1024,
    ]  # fmt: skip


@pytest.mark.parametrize("rope", STATIC_ROPES.values(), ids=STATIC_ROPES)
def test_positions_that_the_engine_cannot_turn_are_refused(tiny_model, tiny_tokenizer, tmp_path, rope):
    path = export(save(tmp_path / "model", tiny_model(vocab_size=320, rope_parameters=rope), tiny_tokenizer))
    with pytest.raises(ConfigError, match=r"RoPE types default and linear, got '(llama3|yarn)' in .*load the file"):
        Engine.open(path)


def test_what_does_not_fit_is_refused_before_ggml_sees_it(wide):
    engine = Engine.open(export(wide, "q8_0"), 1)
    with pytest.raises(ConfigError, match=r"`begin` must come before tokens"):
        engine.forward([[1]])
    with pytest.raises(ConfigError, match=r"`positions` must be from 1 to the model's 256, got 257"):
        engine.begin(1, 257)
    engine.begin(2, 60)
    with pytest.raises(ConfigError, match=r"`tokens` must be of 2 streams, got 1"):
        engine.forward([[1]])
    with pytest.raises(ConfigError, match=r"and not all empty"):
        engine.forward([[], []])
    for token in (-1, 320):
        with pytest.raises(ConfigError, match=rf"token ids must be in \[0, 320\), got {token} to {token}"):
            engine.forward([[1], [token]])
    engine.forward([ids(60), [1]])
    with pytest.raises(ConfigError, match=r"`begin` made room for 64 positions, got 65: ask for more"):
        engine.forward([ids(5), [1]])


def test_threads_are_as_many_as_the_weights_are_worth(wide, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("fanformer.machine.threads.free_cores", lambda: 2)
    path = export(wide, "q8_0")
    assert Engine.open(path).threads == 1
    monkeypatch.setattr("fanformer.gguf.engine._BYTES_A_THREAD", 1000)
    assert Engine.open(path).threads == 2


def test_weights_that_are_not_finite_are_refused(saved_model, tmp_path):
    path = export(saved_model, "q8_0")
    engine = Engine.open(path, 1)
    assert engine.threads == 1
    from fanformer.gguf.file import GGUFFile

    content, info = bytearray(path.read_bytes()), GGUFFile(path).tensors["blk.1.attn_output.weight"]
    content[info.offset : info.offset + 2] = b"\0\x7c"  # the first block's scale is infinite
    (tmp_path / "spoilt.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"`blk.1.attn_output.weight` holds values that are not finite"):
        Engine.open(tmp_path / "spoilt.gguf", 1)


def test_bfloat16_that_float16_lacks_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model(vocab_size=320)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 1e6
    path = export(save(tmp_path / "model", model, tiny_tokenizer), "bf16")
    with pytest.raises(CheckpointError, match=r"`output.weight` holds values above 65504, which the engine's F16"):
        Engine.open(path, 1)


def test_process_that_runs_the_engine_never_imports_torch(saved_model, repository):
    program = (
        "import sys\n"
        "from fanformer.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'imported'\n"
        "sys.exit(code)\n"
    )
    path = export(saved_model, "q8_0")
    words = ("generate", str(path), "the cat", "def ", "--max-length", "5", "--threads", "1")
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the cat")
    words = ("chat", str(path), "--max-length", "5", "--threads", "1")
    done = subprocess.run(
        [sys.executable, "-c", program, *words], input="the cat\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
