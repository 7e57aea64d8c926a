"""A FANformer on ggml: logits of token ids, with a key-value cache, straight from a GGUF file; never imports torch.

The arithmetic is that of model/modeling_fanformer.py, in ggml's order of dimensions. A graph is built for every number
of tokens (rounded up to a power of two) and of cached positions (rounded up to a bucket), and run again with other
inputs: where a token's key and value go, and what it sees, are inputs too. The graphs that ran last are kept.

Shapes as there, with B streams (texts that go on together) of T tokens each, N = B T.
"""

import itertools
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fanformer.errors import ConfigError
from fanformer.gguf.architecture import Architecture, open_model
from fanformer.gguf.blocks import Floats
from fanformer.gguf.embedding import Embedding
from fanformer.gguf.file import GGUFFile
from fanformer.gguf.runtime import F16, F32, I32, I64, Graph, Memory, Node, Runtime
from fanformer.gguf.weights import Weights
from fanformer.machine.threads import choose_threads

CHUNK = 64
"""Most tokens of a stream that one graph takes."""
_CACHE_BUCKETS = (64, 128, 256)
_CACHE_STEP = 256
_NODES_PER_LAYER = 128
_MOST_GRAPHS = 96
"""Graphs that are kept: the descriptions of one's operations take 0.4 MB and more."""
_BYTES_A_THREAD = 4 << 20
"""Weights, read for every token, from which a thread more is worth that all wait for each other after every operation.

A nano model of 2 MB decodes 1.18 times as fast on one thread as on two, one of 16 MB 1.3 times as fast on two.
"""


class Engine:
    """A model of a GGUF file, ready to run on the CPU."""

    def __init__(
        self, file: GGUFFile, model: Architecture, threads: int | None = None, num_steps: int | None = None
    ) -> None:
        """Load the weights.

        Args:
            file: what `open_model` read and checked.
            model: its architecture.
            threads: how many compute at once; None chooses the free cores, fewer for a small model.
            num_steps: how often a recurrent depth runs its core; None is the mean of its training.

        Raises:
            CheckpointError: if a weight is not finite.
            ConfigError: if the engine cannot do the model's kind of RoPE, that many threads, or that many steps.
            DependencyError: if the extra `gguf` is not installed.
            EngineError: if there is not enough memory.
        """
        self.model, self.num_steps = model, model.check_steps(num_steps)
        rope = self.model.rope_parameters
        if rope["rope_type"] not in ("default", "linear"):
            raise ConfigError(
                f"the engine turns positions of the RoPE types default and linear, got {rope['rope_type']!r} in "
                f"{file.path}: load the file with fanformer.loading.load."
            )
        sizes = {name: info.num_bytes for name, info in file.tensors.items()}
        unread = 0 if model.tie_word_embeddings else sizes["token_embd.weight"]
        self.threads = choose_threads(threads, useful=(sum(sizes.values()) - unread) // _BYTES_A_THREAD)
        self._runtime = Runtime(self.threads)
        self._weights = Weights(self._runtime, file, self.model)
        self._embedding = Embedding(file, file.tensors["token_embd.weight"])
        # beside weights that are rounded to few bits, a cache of 11 is exact enough
        quantized = any(info.kind.block_elements > 1 for info in file.tensors.values())
        self._cache_kind = F16 if quantized else F32
        self._state: _State | None = None
        self.texts = 0
        """How many times texts have begun: what `keep` of `begin` refers to is that of the last."""

    @classmethod
    def open(cls, path: str | Path, threads: int | None = None, num_steps: int | None = None) -> "Engine":
        """Load the file at `path`; raises as `open_model` and `Engine`."""
        return cls(*open_model(os.fspath(path)), threads, num_steps)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return self._weights.num_bytes

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values, of the streams that have begun; what padding tokens write is in it."""
        return 0 if self._state is None else self._state.num_bytes

    def begin(self, streams: int, positions: int, keep: int = 0) -> int:
        """Forget all streams, and make room for new ones.

        Args:
            streams: B, texts that go on together.
            positions: tokens that each of them has at most.
            keep: first tokens of a single stream that the new one begins with.

        Returns:
            How many of those are still there: none where more room had to be made.

        Raises:
            ConfigError: if the model has fewer positions.
            EngineError: if there is not enough memory.
        """
        if not 1 <= positions <= self.model.max_position_embeddings or streams < 1:
            raise ConfigError(
                f"`positions` must be from 1 to the model's {self.model.max_position_embeddings}, got {positions} for "
                f"{streams} streams."
            )
        cells = bucket(positions)
        if self._state is None or self._state.streams != streams or self._state.cells < cells:
            self._state = None  # frees the old cache before the new one is made
            self._state = _State(self, streams, cells)
            keep = 0
        assert not keep or (streams == 1 and keep <= self._state.lengths[0])
        self._state.lengths = [keep] * streams
        self.texts += 1
        return keep

    def length(self, stream: int) -> int:
        """Return how many tokens a stream has."""
        return self._begun().lengths[stream]

    def forget(self, stream: int, length: int) -> None:
        """Keep only the first `length` tokens of a stream."""
        state = self._begun()
        assert 0 <= length <= state.lengths[stream]
        state.lengths[stream] = length

    def wipe(self, stream: int) -> None:
        """Forget a stream, and put zeros where its keys and values were: one that is no number spoils what it meets."""
        state = self._begun()
        state.lengths[stream] = 0
        state.wipe(stream)

    def forward(self, tokens: Sequence[Sequence[int]], every: bool = False) -> list[Floats]:
        """Add tokens to the streams and return logits.

        Args:
            tokens: for each stream the ids that follow what it has; one may have none.
            every: whether to return logits for all of them, or for the last of each stream.

        Returns:
            For each stream (T, V) float32, T its number of new tokens with `every`, else 1 (0 where it has none).

        Raises:
            ConfigError: if there are more tokens than `begin` made room for, or if an id is not the model's.
        """
        state = self._begun()
        _check_tokens(tokens, state, self.model.vocab_size)
        found: list[list[Floats]] = [[] for _ in tokens]
        longest = max(map(len, tokens))
        for start in range(0, longest, CHUNK):
            parts = [row[start : start + CHUNK] for row in tokens]
            ends = [not every and 0 < len(row) - start <= CHUNK for row in tokens]
            first, logits = state.step(parts, every)
            for stream, part in enumerate(parts):
                if every and part:
                    found[stream].append(logits[stream - first, : len(part)])
                elif ends[stream]:
                    found[stream].append(logits[stream - first, :1])
        empty = np.empty((0, self.model.vocab_size), dtype=np.float32)
        return [np.concatenate(rows) if rows else empty for rows in found]

    def _begun(self) -> "_State":
        if self._state is None:
            raise ConfigError("`begin` must come before tokens, got none: say how many streams there are.")
        return self._state


def bucket(positions: int) -> int:
    """Return the number of cached positions, at least `positions`, that a graph is made for."""
    for size in _CACHE_BUCKETS:
        if positions <= size:
            return size
    return -(-positions // _CACHE_STEP) * _CACHE_STEP


def _check_tokens(tokens: Sequence[Sequence[int]], state: "_State", vocab_size: int) -> None:
    if len(tokens) != state.streams or not any(tokens):
        raise ConfigError(f"`tokens` must be of {state.streams} streams, got {len(tokens)}, and not all empty.")
    for row, length in zip(tokens, state.lengths, strict=True):
        if length + len(row) > state.cells:
            raise ConfigError(f"`begin` made room for {state.cells} positions, got {length + len(row)}: ask for more.")
        if row and not 0 <= min(row) <= max(row) < vocab_size:
            raise ConfigError(f"token ids must be in [0, {vocab_size}), got {min(row)} to {max(row)}.")


class _State:
    """Keys and values of B streams, and the graphs that read and write them."""

    def __init__(self, engine: Engine, streams: int, cells: int) -> None:
        self.streams, self.cells = streams, cells
        self.lengths = [0] * streams
        # not the engine itself, which would keep the memory of both until the next collection of garbage
        model, kind, runtime = engine.model, engine._cache_kind, engine._runtime
        self._model, self._weights, self._embedding, self._runtime = model, engine._weights, engine._embedding, runtime
        self._width = model.num_key_value_heads * model.head_dim
        # behind the cells that are read, a place for the keys and values of tokens that only fill up a graph
        self._all_cells = cells + CHUNK
        prelude, core, coda = model.parts()
        self.num_steps = engine.num_steps
        # keys and values for every block that runs, in the order of running
        self.blocks = len(prelude) + self.num_steps * len(core) + len(coda)
        shapes = {}
        for place in range(self.blocks):
            shapes[f"k{place}"] = kind, (self._width, self._all_cells * streams)
            # values lie the other way round, so that the sum over positions reads them one after the other
            shapes[f"v{place}"] = kind, (1, self._all_cells * self._width * streams)
        self._cache = Memory(runtime, shapes)
        self.num_bytes = self._cache.total_bytes
        self._graphs: OrderedDict[tuple[int, int, int, int, bool], Graph] = OrderedDict()  # the last ran last
        self._graph(0, streams, CHUNK, cells, False)  # the largest first: it decides how much memory the others share

    def step(self, parts: Sequence[Sequence[int]], every: bool) -> tuple[int, Floats]:
        """Add at most CHUNK tokens to each stream; only a block of streams that has all which get some is computed.

        Returns:
            The first stream of the block, and logits (B, T, V), B its streams, T padded, or (B, 1, V) of the last.
        """
        busy = [stream for stream, part in enumerate(parts) if part]
        first, count = _block(busy[0], busy[-1], self.streams)
        longest = max(map(len, parts))
        width = 1 << (longest - 1).bit_length()
        used = bucket(max(length + len(part) for length, part in zip(self.lengths, parts, strict=True)))
        used = min(used, self.cells)
        shape = (count, width)
        tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        cells = np.broadcast_to(self.cells + np.arange(width), shape).copy()
        last = np.arange(count, dtype=np.int32) * width
        for stream in busy:
            row, length, new = stream - first, self.lengths[stream], len(parts[stream])
            tokens[row, :new] = parts[stream]
            positions[row, :new] = cells[row, :new] = np.arange(length, length + new)
            last[row] += new - 1
            self.lengths[stream] = length + new
        inputs = {
            "embedded": self._embedding.rows(tokens.ravel()),
            "positions": positions,
            "mask": np.where(np.arange(used) <= positions[..., None], np.float32(0), np.float32(-np.inf)),
            **self._places(first, cells),
        }
        if not every:
            inputs["outputs"] = last
        logits = self._graph(first, count, width, used, every).run(inputs)
        return first, logits.reshape(count, width if every else 1, -1)

    def wipe(self, stream: int) -> None:
        """Put zeros where the keys and values of a stream are."""
        for name in self._cache.nodes:
            raw = self._cache.raw(name)
            size = len(raw) // self.streams
            raw[size * stream : size * (stream + 1)] = 0

    def _places(self, first: int, cells: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return where keys (rows) and values (single numbers) of tokens at `cells` (B, T) go."""
        stream = first + np.arange(len(cells))[:, None]
        channels = np.arange(self._width)
        starts = (stream[..., None] * self._width + channels) * self._all_cells
        return {"k_rows": stream * self._all_cells + cells, "v_rows": starts + cells[..., None]}

    def _graph(self, first: int, count: int, width: int, used: int, every: bool) -> Graph:
        key = first, count, width, used, every
        graph = self._graphs.get(key)
        if graph is None or not graph.usable:
            graph = self._graphs[key] = _Builder(self, first, count, width, used).build(every)
            for other in [one for one, made in self._graphs.items() if not made.usable]:
                del self._graphs[other]
        self._graphs.move_to_end(key)
        while len(self._graphs) > _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return graph


def _block(low: int, high: int, streams: int) -> tuple[int, int]:
    """Return start and length of the smallest block of streams with both: a power of two that starts at a multiple.

    So that few graphs are made; the last block ends with the last stream.
    """
    size = 1
    while low // size != high // size:
        size *= 2
    first = low // size * size
    return first, min(size, streams - first)


class _Builder:
    """Builds the graph for T tokens of each of B streams from `first` on that see the first S cached positions."""

    def __init__(self, state: _State, first: int, count: int, width: int, used: int) -> None:
        self._state, self._first, self._b, self._t, self._s = state, first, count, width, used
        self._model, self._weights = state._model, state._weights
        self._n = count * width
        self._graph = Graph(state._runtime, 32 + _NODES_PER_LAYER * state.blocks)
        self._places = itertools.count()

    def build(self, every: bool) -> Graph:
        """Return the graph; with `every` its output is the logits of all tokens, else those of the input `outputs`."""
        g, model, kv = self._graph, self._model, self._state._width
        x = g.input("embedded", F32, model.hidden_size, self._n)  # [D, N]
        self._positions = g.input("positions", I32, self._n)
        self._mask = g.input("mask", F32, self._s, self._t, 1, self._b)
        self._k_rows = g.input("k_rows", I64, self._n)
        self._v_rows = g.input("v_rows", I64, self._n * kv)
        x = self._decoder(x)
        if not every:
            x = g.rows(x, g.input("outputs", I32, self._b))
        x = self._norm(x, "output_norm")
        head = "token_embd" if model.tie_word_embeddings else "output"
        g.finish(self._linear(x, head))
        return g

    def _decoder(self, x: Node) -> Node:
        """Return what all blocks make of `x`; those of a core run several times."""
        prelude, core, coda = self._model.parts()
        e = self._blocks(prelude, x)
        state = self._blocks(core, e)
        for _ in range(self._state.num_steps - 1):
            state = self._blocks(core, self._bridge(state, e))
        return self._blocks(coda, state)

    def _blocks(self, layers: range, x: Node) -> Node:
        for layer in layers:
            x = self._layer(x, layer)
        return x

    def _bridge(self, state: Node, e: Node) -> Node:
        """Return what the core reads from its second step on: a h + Norm(e), or W [h, Norm(e)]."""
        g = self._graph
        e = self._norm(e, "bridge_norm")
        if "bridge" in self._weights:
            return self._linear(g.concat([state, e]), "bridge")
        scale = self._weights.nodes.get("bridge_scale.weight")
        return g.add(state if scale is None else g.multiply(state, scale), e)

    def _norm(self, x: Node, name: str) -> Node:
        """Return `x` normalised by the norm of that name; where the model has none, as it is."""
        weight = self._weights.nodes.get(f"{name}.weight")
        return x if weight is None else self._graph.normalise(x, weight, self._model.rms_norm_eps)

    def _linear(self, x: Node, name: str) -> Node:
        """Return the outputs of all linear layers that are joined under `name`."""
        g, linear, parts = self._graph, self._weights.linear(name), []
        for matrix in linear.matrices:
            y = g.matmul(matrix.node, x)
            parts.append(y if y.shape[0] == matrix.rows else g.contiguous(g.slice_rows(y, 0, matrix.rows)))
        y = g.concat(parts)
        return y if linear.bias is None else g.add(y, linear.bias)

    def _first_factor(self, x: Node, name: str) -> list[Node]:
        """Return what stands between the factors for each reader of `x` that has its own; at full rank, `x`."""
        g, factors = self._graph, self._weights.factors.get(name.rpartition(".")[2])
        if factors is None:
            return [x]
        rank, count = factors.rank, factors.count
        hidden = g.reshape(self._linear(x, f"{name}_a"), rank - factors.periodic, count * self._n)
        hidden = self._norm(hidden, f"{name}_a_norm")
        hidden = self._circles(hidden, factors.periodic, factors.activation)
        hidden = g.reshape(hidden, rank * count, self._n)
        return [g.slice_rows(hidden, rank * index, rank) for index in range(count)] if count > 1 else [hidden]

    def _circles(self, hidden: Node, periodic: int, activation: str) -> Node:
        """Return [cos(p), sin(p), act(g)] of the rows [p, g], p of P channels; without p, act(g)."""
        g = self._graph
        if periodic == 0:
            return self._activate(hidden, activation)
        p = g.contiguous(g.slice_rows(hidden, 0, periodic))
        parts = [g.apply("cos", p), g.apply("sin", p)]
        if hidden.shape[0] > periodic:
            rest = g.slice_rows(hidden, periodic, hidden.shape[0] - periodic)
            parts.append(self._activate(rest, activation))
        return g.concat(parts)

    def _activate(self, x: Node, activation: str) -> Node:
        g = self._graph
        if activation == "residual":
            x = g.contiguous(x)
            return g.add(x, g.apply("silu", x))
        return g.apply(activation, x)

    def _writer(self, x: Node, name: str) -> Node:
        return self._linear(self._first_factor(x, name)[0], name)

    def _residual(self, x: Node, branch: Node, name: str) -> Node:
        gate = self._weights.nodes.get(f"{name}.weight")
        return self._graph.add(x, branch if gate is None else self._graph.multiply(branch, gate))

    def _layer(self, x: Node, layer: int) -> Node:
        block = f"blk.{layer}"
        h = self._norm(x, f"{block}.attn_norm")
        y = self._residual(x, self._attention(h, block), f"{block}.attn_residual_gate")
        z = self._norm(y, f"{block}.ffn_norm")
        base = y if self._model.norm_placement == "pre" else z
        return self._residual(base, self._feed_forward(z, block), f"{block}.ffn_residual_gate")

    def _feed_forward(self, z: Node, block: str) -> Node:
        g, model = self._graph, self._model
        inputs = self._first_factor(z, f"{block}.ffn_gate_up")
        names = [f"{block}.ffn_gate", f"{block}.ffn_up"] if len(inputs) > 1 else [f"{block}.ffn_gate_up"]
        both = g.concat([self._linear(u, name) for u, name in zip(inputs, names, strict=True)])
        return self._writer(g.swiglu(both, model.hidden_act), f"{block}.ffn_down")

    def _attention(self, h: Node, block: str) -> Node:
        g, model = self._graph, self._model
        width, heads = model.head_dim, model.num_attention_heads
        q, k, v = self._projections(self._fan_layer(h, block), block)
        q, k, v = (self._heads(x, block, part) for x, part in ((q, "q"), (k, "k"), (v, "v")))
        rope = model.rope_parameters
        scale = 1.0 / rope["factor"] if rope["rope_type"] == "linear" else 1.0
        q, k = (g.rope(x, self._positions, rope["rope_theta"], scale) for x in (q, k))
        keys, values = self._remember(k, v)  # [K, S, G, B], [S, K, G, B]
        q = g.permute(g.reshape(q, width, heads, self._t, self._b), 0, 2, 1, 3)  # [K, T, H, B]
        weights = g.softmax(g.matmul(keys, q), self._mask, width**-0.5)  # [S, T, H, B]
        attended = g.permute(g.matmul(values, weights), 0, 2, 1, 3)  # [K, H, T, B]
        attended = g.reshape(g.contiguous(attended), width * heads, self._n)
        return self._writer(attended, f"{block}.attn_output")

    def _fan_layer(self, h: Node, block: str) -> Node:
        """Return [cos(p), sin(p), g] of the paper's FANLayer', where the model has it."""
        if f"{block}.attn_fan" not in self._weights:
            return h
        y = self._linear(h, f"{block}.attn_fan")
        return self._circles(y, h.shape[0] - y.shape[0], "linear")

    def _projections(self, h: Node, block: str) -> list[Node]:
        """Return Q `[H K, N]`, K and V `[G K, N]`."""
        inputs = self._first_factor(h, f"{block}.attn_qkv")
        if len(inputs) == 1:
            y = self._linear(inputs[0], f"{block}.attn_qkv")
            return self._cut(y, self._weights.linear(f"{block}.attn_qkv").widths)
        own = len(inputs) // 3  # of each of Q, K and V: one for p and one for g, or one
        ends = ((inputs[own * i], inputs[own * i + own - 1]) for i in range(3))
        return [self._fan(u, v, f"{block}.attn_{part}") for part, (u, v) in zip("qkv", ends, strict=True)]

    def _cut(self, y: Node, widths: tuple[int, ...]) -> list[Node]:
        """Return Q, K and V of the outputs of all their linear layers: p of all three first, where there are any."""
        g = self._graph
        starts = np.cumsum([0, *widths]).tolist()
        plain = [[g.slice_rows(y, starts[i], widths[i])] if widths[i] else [] for i in range(len(widths))]
        found: list[list[Node]] = [[], [], []]
        turning = starts[3]
        if turning:
            p = g.contiguous(g.slice_rows(y, 0, turning))
            for values in (g.apply("cos", p), g.apply("sin", p)):
                for i in range(3):
                    found[i] += [g.slice_rows(values, starts[i], widths[i])] if widths[i] else []
        return [g.concat([*found[i], *plain[3 + i]]) for i in range(3)]

    def _fan(self, u: Node, v: Node, name: str) -> Node:
        """Return [cos(p), sin(p), g] of a FAN projection with an input for p and one for g."""
        g, found = self._graph, []
        if self._weights.linear(f"{name}_fan").matrices:
            p = self._linear(u, f"{name}_fan")
            found = [g.apply("cos", p), g.apply("sin", p)]
        if self._weights.linear(name).matrices:
            found.append(self._linear(v, name))
        return g.concat(found)

    def _heads(self, x: Node, block: str, part: str) -> Node:
        """Return `x` by heads, `[K, H or G, N]`, normalised where the model does."""
        x = self._graph.contiguous(x)
        x = self._graph.reshape(x, self._model.head_dim, x.shape[0] // self._model.head_dim, self._n)
        return self._norm(x, f"{block}.attn_{part}_norm")

    def _remember(self, k: Node, v: Node) -> tuple[Node, Node]:
        """Write keys and values `[K, G, N]` to the cache; return what is visible, `[K, S, G, B]` and `[S, K, G, B]`."""
        g, model, state, place = self._graph, self._model, self._state, next(self._places)
        cells, width = state._all_cells, state._width
        keys, values = state._cache.nodes[f"k{place}"], state._cache.nodes[f"v{place}"]
        g.put_rows(keys, g.reshape(g.contiguous(k), width, self._n), self._k_rows)
        g.put_rows(values, g.reshape(g.contiguous(v), 1, width * self._n), self._v_rows)
        size = keys.strides[0]
        start = size * width * cells * self._first
        shape = (model.head_dim, self._s, model.num_key_value_heads, self._b)
        seen = g.view(keys, shape, (size * width, size * model.head_dim, size * width * cells), start)
        shape = (self._s, model.head_dim, model.num_key_value_heads, self._b)
        strides = (size * cells, size * cells * model.head_dim, size * cells * width)
        return seen, g.view(values, shape, strides, start)
