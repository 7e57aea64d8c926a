"""The layer over ggml's C library: what would end the process there is an exception here."""

import numpy as np
import pytest

from fanformer.gguf.blocks import TYPES

pytest.importorskip("ggml", reason="needs the extra `gguf` (ggml-python)")

from fanformer.gguf.runtime import F16, F32, I32, I64, Graph, Memory, Runtime, quantize


@pytest.fixture
def graph():
    return Graph(Runtime(1), 40)


def test_graph_computes_what_numpy_does(graph):
    memory = Memory(graph._runtime, {"w": (F32, (8, 3)), "n": (F32, (8,))})
    rng = np.random.default_rng(0)
    w, n, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 8), (8,), (5, 8)))
    memory.raw("w").view(np.float32)[:] = w.ravel()
    memory.raw("n").view(np.float32)[:] = n
    given = graph.input("x", F32, 8, 5)
    normed = graph.normalise(given, memory.nodes["n"], 1e-5)
    both = graph.concat([graph.apply("cos", normed), graph.apply("silu", graph.slice_rows(normed, 2, 3))])
    graph.finish(graph.concat([graph.matmul(memory.nodes["w"], normed), both]))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * n
    part = expected[:, 2:5]
    expected = np.concatenate([expected @ w.T, np.cos(expected), part / (1 + np.exp(-part))], axis=1)
    for _ in range(2):
        np.testing.assert_allclose(graph.run({"x": x})[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda g, x, y, i: g.matmul(x, y),
        lambda g, x, y, i: g.add(x, y),
        lambda g, x, y, i: g.add(x, i),
        lambda g, x, y, i: g.rows(x, y),
        lambda g, x, y, i: g.normalise(x, y, 1e-5),
        lambda g, x, y, i: g.put_rows(x, y, i),
        lambda g, x, y, i: g.concat([x, g.reshape(y, 3, 10)]),
        lambda g, x, y, i: g.reshape(x, 7, 7),
        lambda g, x, y, i: g.view(x, (8, 6), (32,), 0),
        lambda g, x, y, i: g.view(x, (8, 5), (32,), 4),
        lambda g, x, y, i: g.view(x, (8, 5), (32,), -4),
        lambda g, x, y, i: g.slice_rows(x, 6, 3),
        lambda g, x, y, i: g.permute(x, 0, 0, 1, 2),
        lambda g, x, y, i: g.rope(x, y, 10000.0, 1.0),
        lambda g, x, y, i: g.softmax(x, y, 1.0),
        lambda g, x, y, i: g.swiglu(g.reshape(y, 3, 10), "silu"),
        lambda g, x, y, i: g.apply("tanh", x),
        lambda g, x, y, i: g.finish(i),
        lambda g, x, y, i: [g.apply("cos", x) for _ in range(99)],
        lambda g, x, y, i: g.run({}),
    ],
)
def test_what_ggml_would_only_assert_is_refused(graph, misuse):
    x, y, index = graph.input("x", F32, 8, 5), graph.input("y", F32, 6, 5), graph.input("i", I32, 5)
    with pytest.raises(AssertionError, match=r"a graph that does not fit together: expected"):
        misuse(graph, x, y, index)


def test_inputs_must_all_be_given(graph):
    x = graph.input("x", F32, 4)
    graph.finish(graph.apply("cos", x))
    with pytest.raises(AssertionError, match=r"expected the inputs x"):
        graph.run({"z": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=r"cannot reshape"):
        graph.run({"x": np.zeros(5, np.float32)})


def test_memory_of_no_size_is_refused(graph):
    for shape in ((0,), (), (1, 1, 1, 1, 1), (4, -1)):
        with pytest.raises(AssertionError, match=r"expected a shape"):
            Memory(graph._runtime, {"a": (F16, shape)})
    assert not Memory(graph._runtime, {"a": (I64, (3,))}).raw("a").any()


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "iq4_nl"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_packed_matrices_give_the_products_of_plain_ones(kind, tokens):
    runtime, shape, number = Runtime(2), (256, 24), TYPES[kind].number
    if not runtime.packs(number, shape):
        pytest.skip(f"this processor does not pack {kind}")
    rng = np.random.default_rng(0)
    raw = quantize(rng.standard_normal(shape[::-1]).astype(np.float32), TYPES[kind])
    x = rng.standard_normal((tokens, shape[0])).astype(np.float32)
    found = []
    for packed in (False, True):
        memory, graph = Memory(runtime, {"w": (number, shape)}, packed=packed), Graph(runtime, 9)
        memory.write("w", raw)
        graph.finish(graph.matmul(memory.nodes["w"], graph.input("x", F32, shape[0], tokens)))
        found.append(graph.run({"x": x})[0, 0])
    # activations are rounded to 8 bits, by another rule for several tokens of q4_k
    assert np.linalg.norm(found[1] - found[0]) < 0.02 * np.linalg.norm(found[0])
    assert np.linalg.norm(found[0]) > 10
    with pytest.raises(AssertionError, match=r"expected a tensor whose bytes lie as they were written"):
        memory.raw("w")
    with pytest.raises(AssertionError, match=r"expected \d+ bytes"):
        memory.write("w", raw[1:])


def test_only_matrices_that_ggml_packs_are_packed(graph):
    runtime = graph._runtime
    assert not runtime.packs(F32, (256, 24))
    assert not runtime.packs(TYPES["q4_0"].number, (256, 23))  # eight rows lie side by side
    with pytest.raises(AssertionError, match=r"expected a matrix to pack"):
        Memory(runtime, {"w": (F32, (256, 24))}, packed=True)


def test_ggml_logs_warnings_alone(graph, capfd):
    runtime, number = graph._runtime, TYPES["q4_0"].number
    if not runtime.packs(number, (256, 24)):
        pytest.skip("this processor does not pack q4_0, which ggml would log")
    Memory(runtime, {"w": (number, (256, 24))}, packed=True).write("w", np.zeros(24 * 8 * 18, np.uint8))
    assert capfd.readouterr().err == ""


def test_graph_whose_memory_moved_is_of_no_use_any_more():
    runtime = Runtime(1)
    small, large = Graph(runtime, 9), Graph(runtime, 9)
    small.finish(small.apply("cos", small.input("x", F32, 4)))
    assert small.usable
    large.finish(large.apply("cos", large.input("x", F32, 4096, 64)))
    assert large.usable
    assert not small.usable
    with pytest.raises(AssertionError, match=r"whose memory has not moved"):
        small.run({"x": np.zeros(4, np.float32)})


def test_rows_that_do_not_fill_blocks_are_refused():
    with pytest.raises(AssertionError, match=r"rows of 33 for q8_0"):
        quantize(np.zeros((2, 33), np.float32), TYPES["q8_0"])
    with pytest.raises(AssertionError, match=r"an importance for every column"):
        quantize(np.zeros((2, 32), np.float32), TYPES["q4_0"], np.zeros(3, np.float32))
