"""Every call of ggml's C library, behind functions that check what they are given; used with the extra `gguf`.

A wrong pointer or shape would end the process there, not raise: so no other file touches ggml, every operation checks
here what ggml only asserts, and memory is freed by the objects that own it.

Shapes are ggml's: the row length first, `[K, H, N]`.
"""

import ctypes
import functools
import itertools
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fanformer.errors import DependencyError, FANformerError
from fanformer.gguf.blocks import BY_NUMBER, BlockType, Bytes, Floats

F32, F16, I32, I64 = 0, 1, 26, 27
"""ggml's numbers of the types that graphs compute with."""
_BYTES = {F32: 4, F16: 2, I32: 4, I64: 8}
_DTYPES: dict[int, Any] = {F32: np.float32, F16: np.float16, I32: np.int32, I64: np.int64}
_ROPE_PAIRS_BY_HALVES = 2  # GGML_ROPE_TYPE_NEOX: channels i and i + K/2 turn together
_PACKED = b"CPU_REPACK"
_UNARY = {"silu": "ggml_silu", "gelu": "ggml_gelu_erf", "cos": "ggml_cos", "sin": "ggml_sin"}


class EngineError(FANformerError, RuntimeError):
    """The engine cannot do what it is asked, for want of memory."""


def library() -> ModuleType:
    """Return ggml-python's module.

    Raises:
        DependencyError: if the extra `gguf` is not installed.
    """
    try:
        from ggml import ggml
    except ImportError as error:
        raise DependencyError(
            "k-quants and running a .gguf file need ggml-python, which is not installed: pip install 'fanformer[gguf]'"
        ) from error
    return ggml


def quantize(values: Floats, kind: BlockType, importance: Floats | None = None) -> Bytes:
    """Return the bytes of a matrix in one of ggml's block types.

    Args:
        values: (rows, row length) float32.
        kind: the type; its blocks must fill the rows.
        importance: (row length) float32, how much an error in each column counts; None counts all alike.

    Raises:
        DependencyError: if the extra `gguf` is not installed.
    """
    ggml = library()
    rows, length = values.shape
    _require(length % kind.block_elements == 0, f"rows of {length} for {kind.name}")
    _require(importance is None or importance.shape == (length,), "an importance for every column")
    source = np.ascontiguousarray(values, dtype=np.float32)
    raw = np.empty(rows * kind.row_bytes(length), dtype=np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    pointer = ctypes.POINTER(ctypes.c_float)
    written = ggml.ggml_quantize_chunk(
        kind.number,
        source.ctypes.data_as(pointer),
        raw.ctypes.data_as(ctypes.c_void_p),
        0,
        rows,
        length,
        None if weights is None else weights.ctypes.data_as(pointer),
    )
    _require(written == raw.nbytes, f"{raw.nbytes} bytes of {kind.name}, got {written}")
    return raw


def _require(condition: bool, expected: str) -> None:
    """Raise AssertionError, unlike `assert` always: what is checked here would end the process in C."""
    if not condition:
        raise AssertionError(f"a graph that does not fit together: expected {expected}")


def _size(kind: int, shape: Sequence[int]) -> int:
    count = int(np.prod(shape[1:], dtype=np.int64))
    return count * (BY_NUMBER[kind].row_bytes(shape[0]) if kind in BY_NUMBER else _BYTES[kind] * shape[0])


@dataclass(frozen=True)
class Node:
    """A tensor of ggml: a weight, a cache, or a value that a graph computes."""

    pointer: Any
    kind: int
    shape: tuple[int, ...]
    """Four lengths, the row length first."""
    strides: tuple[int, ...]
    """Bytes from one index to the next, of each dimension."""

    @property
    def contiguous(self) -> bool:
        """Whether the numbers follow each other without gaps."""
        expected = _size(self.kind, (self.shape[0],))
        for length, stride in zip(self.shape[1:], self.strides[1:], strict=True):
            if length != 1 and stride != expected:
                return False
            expected *= length
        return True


def _node(pointer: Any) -> Node:
    _require(bool(pointer), "a tensor")
    tensor = pointer.contents
    return Node(pointer, int(tensor.type), tuple(tensor.ne), tuple(tensor.nb))


def _new_context(size: int, what: str) -> Any:
    """Return room of so many bytes for the descriptions of tensors and graphs, to be freed by `ggml_free`.

    Raises:
        EngineError: if there is no memory for `what`.
    """
    ggml = library()
    context = ggml.ggml_init(ggml.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=True))
    if not context:
        raise EngineError(f"ggml has no memory for {what}: free some.")
    return context


@functools.cache
def _log(ggml: ModuleType) -> Any:
    """Return what ggml calls with a line of its log: warnings and errors go to standard error, the rest nowhere."""

    def write(level: int, text: bytes | None, _: Any) -> None:
        if level >= ggml.GGML_LOG_LEVEL_WARN and level != ggml.GGML_LOG_LEVEL_CONT and text:
            sys.stderr.write(text.decode(errors="replace"))

    return ggml.ggml_log_callback(write)  # kept alive by the cache, for C keeps only its address


def _packed_buffer_type(ggml: ModuleType, register: Any, device: Any) -> Any:
    """Return the kind of memory in which ggml rearranges matrices for this processor; None if it was built without."""
    address = ggml.ggml_backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    found = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    types = itertools.takewhile(bool, map(found.__getitem__, itertools.count()))
    return next((each for each in types if ggml.ggml_backend_buft_name(each) == _PACKED), None)


class Runtime:
    """A CPU with a number of threads, and the memory in which graphs keep what they are computing."""

    def __init__(self, threads: int) -> None:
        """Start ggml's CPU backend.

        Args:
            threads: how many compute at once.
        """
        ggml = library()
        _require(threads >= 1, f"at least one thread, got {threads}")
        self.threads = threads
        ggml.ggml_log_set(_log(ggml), None)
        self.backend = ggml.ggml_backend_cpu_init()
        if not self.backend:
            raise EngineError("ggml's CPU backend does not start: free some memory.")
        weakref.finalize(self, ggml.ggml_backend_free, self.backend)
        ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)
        # ggml_backend_cpu_buffer_type would do, but ggml-python 0.0.45 cuts the pointer that it returns to 32 bits
        self.buffer_type = ggml.ggml_backend_get_default_buffer_type(self.backend)
        register = ggml.ggml_backend_cpu_reg()
        self._device = ggml.ggml_backend_reg_dev_get(register, 0)
        self.packed_type = _packed_buffer_type(ggml, register, self._device)
        self.allocator = ggml.ggml_gallocr_new(self.buffer_type)
        weakref.finalize(self, ggml.ggml_gallocr_free, self.allocator)
        self.generation = 0
        """Counts how often the memory moved: graphs made before that are of no use any more."""
        self._compute_bytes = 0

    def packs(self, kind: int, shape: Sequence[int]) -> bool:
        """Whether this processor multiplies by such a matrix faster when blocks of several rows lie side by side.

        Args:
            kind: ggml type of the matrix.
            shape: of the matrix, the row length first.
        """
        if self.packed_type is None or len(shape) != 2:
            return False
        ggml = library()
        context = _new_context(3 * ggml.ggml_tensor_overhead(), "a product")
        weight = ggml.ggml_new_tensor_2d(context, kind, *shape)
        product = ggml.ggml_mul_mat(context, weight, ggml.ggml_new_tensor_2d(context, F32, shape[0], 1))
        weight.contents.buffer = buffer = ggml.ggml_backend_buft_alloc_buffer(self.packed_type, 0)
        supported = bool(ggml.ggml_backend_dev_supports_op(self._device, product))
        ggml.ggml_backend_buffer_free(buffer)
        ggml.ggml_free(context)
        return supported

    def place(self, graph: Any) -> None:
        """Give the tensors of a graph their memory, which all graphs share."""
        ggml = library()
        if not ggml.ggml_gallocr_alloc_graph(self.allocator, graph):
            raise EngineError("no memory for the model's activations: use a shorter context or fewer prompts at once.")
        now = ggml.ggml_gallocr_get_buffer_size(self.allocator, 0)
        if now > self._compute_bytes:
            self._compute_bytes = now
            self.generation += 1


class Memory:
    """Tensors in one block of memory that starts as zeros, such as a model's weights; freed with this object."""

    def __init__(
        self, runtime: Runtime, tensors: Mapping[str, tuple[int, Sequence[int]]], packed: bool = False
    ) -> None:
        """Make the tensors.

        Args:
            runtime: whose memory it is.
            tensors: ggml type and shape of each name, the row length first.
            packed: whether ggml rearranges what is written, which `Runtime.packs` must say of every tensor.

        Raises:
            EngineError: if there is not enough memory.
        """
        ggml = library()
        self._packed = packed
        size = (len(tensors) + 1) * ggml.ggml_tensor_overhead()
        self._context = _new_context(size, f"the list of {len(tensors)} tensors")
        weakref.finalize(self, ggml.ggml_free, self._context)
        self.nodes: dict[str, Node] = {}
        for name, (kind, shape) in tensors.items():
            _require(all(length > 0 for length in shape) and 1 <= len(shape) <= 4, f"a shape, got {shape}")
            lengths = (ctypes.c_int64 * len(shape))(*shape)
            self.nodes[name] = _node(ggml.ggml_new_tensor(self._context, kind, len(shape), lengths))
            _require(not packed or runtime.packs(kind, shape), f"a matrix to pack, got {shape}")
        buffer_type = runtime.packed_type if packed else runtime.buffer_type
        self._buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self._context, buffer_type)
        if not self._buffer:
            needed = sum(_size(kind, shape) for kind, shape in tensors.values())
            raise EngineError(f"no memory for {needed:,} bytes: free some, or use a smaller model or context.")
        weakref.finalize(self, ggml.ggml_backend_buffer_free, self._buffer)
        ggml.ggml_backend_buffer_clear(self._buffer, 0)

    @property
    def total_bytes(self) -> int:
        """The size of all tensors together."""
        return sum(map(self.num_bytes, self.nodes))

    def num_bytes(self, name: str) -> int:
        """Return the size of a tensor."""
        return _size(self.nodes[name].kind, self.nodes[name].shape)

    def raw(self, name: str) -> Bytes:
        """Return the bytes of a tensor that is not packed, writable, valid as long as this object."""
        _require(not self._packed, "a tensor whose bytes lie as they were written")
        return _bytes_at(self.nodes[name], self.num_bytes(name))

    def write(self, name: str, raw: Bytes) -> None:
        """Fill a tensor with its bytes in the order of the file."""
        _require(raw.nbytes == self.num_bytes(name) and raw.flags.c_contiguous, f"{self.num_bytes(name)} bytes")
        pointer = raw.ctypes.data_as(ctypes.c_void_p)
        library().ggml_backend_tensor_set(self.nodes[name].pointer, pointer, 0, raw.nbytes)


def _bytes_at(node: Node, count: int) -> Bytes:
    address = node.pointer.contents.data
    _require(bool(address), "a tensor with memory")
    return np.frombuffer(memoryview((ctypes.c_uint8 * count).from_address(address)), dtype=np.uint8)


def _array(node: Node) -> NDArray[Any]:
    """Return a value's numbers, writable, its shape the other way round."""
    return _bytes_at(node, _size(node.kind, node.shape)).view(_DTYPES[node.kind]).reshape(node.shape[::-1])


class Graph:
    """A computation that is built once, then run again and again with other inputs; operations check their shapes."""

    def __init__(self, runtime: Runtime, most_nodes: int) -> None:
        """Begin an empty graph.

        Args:
            runtime: what will run it.
            most_nodes: room for so many operations.
        """
        ggml = self._ggml = library()
        self._runtime = runtime
        size = most_nodes * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(most_nodes, False)
        self._context = _new_context(size, "a graph")
        weakref.finalize(self, ggml.ggml_free, self._context)
        self._graph = ggml.ggml_new_graph_custom(self._context, most_nodes, False)
        self._room = most_nodes
        self._inputs: dict[str, Node] = {}
        self._views: dict[str, NDArray[Any]] = {}
        self._result: Floats = np.empty(0, np.float32)
        self._generation = -1

    @property
    def usable(self) -> bool:
        """Whether the memory is still where it was when this graph was finished."""
        return self._generation == self._runtime.generation

    def _make(self, function: str, *arguments: Any) -> Node:
        self._room -= 1
        _require(self._room > 0, "room in the graph")
        return _node(getattr(self._ggml, function)(self._context, *arguments))

    def input(self, name: str, kind: int, *shape: int) -> Node:
        """Return a value that `run` is given by this name."""
        lengths = (ctypes.c_int64 * len(shape))(*shape)
        node = self._make("ggml_new_tensor", kind, len(shape), lengths)
        self._ggml.ggml_set_input(node.pointer)
        self._inputs[name] = node
        return node

    def expand(self, node: Node) -> None:
        """Let `node` be computed before everything that is expanded later."""
        self._ggml.ggml_build_forward_expand(self._graph, node.pointer)

    def finish(self, output: Node) -> None:
        """End the graph: `run` returns `output`, which is float32."""
        _require(output.kind == F32 and output.contiguous, "a contiguous float32 output")
        self._ggml.ggml_set_output(output.pointer)
        for node in self._inputs.values():  # also what no operation reads, so that it has memory to be written to
            self.expand(node)
        self.expand(output)
        self._runtime.place(self._graph)
        self._generation = self._runtime.generation
        self._result = _array(output)
        self._views = {name: _array(node) for name, node in self._inputs.items()}

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Floats:
        """Compute and return the output, its shape the other way round: the row length last.

        Args:
            inputs: an array for every input, of a shape that broadcasts to the input's, row length last.
        """
        _require(self.usable, "a finished graph whose memory has not moved")
        _require(inputs.keys() == self._views.keys(), f"the inputs {', '.join(self._views)}")
        for name, values in inputs.items():
            view = self._views[name]
            view[...] = values.reshape(view.shape)
        status = self._ggml.ggml_backend_graph_compute(self._runtime.backend, self._graph)
        if status != 0:
            raise EngineError(f"ggml could not compute (status {status}): free some memory.")
        return self._result.copy()

    def matmul(self, weight: Node, x: Node) -> Node:
        """Return sum over i of weight[i, j] x[i, n], `[J, N]`; later dimensions of `weight` repeat over `x`'s."""
        fits = weight.shape[0] == x.shape[0] and x.kind == F32
        fits = fits and x.shape[2] % weight.shape[2] == 0 and x.shape[3] % weight.shape[3] == 0
        known = weight.kind in BY_NUMBER and weight.strides[0] == BY_NUMBER[weight.kind].block_bytes
        _require(fits and known and x.strides[0] == 4, f"a product, got {weight.shape} and {x.shape}")
        return self._make("ggml_mul_mat", weight.pointer, x.pointer)

    def rows(self, table: Node, index: Node) -> Node:
        """Return the rows of `table` `[D, V]` that `index` `[N]` (int32) names, `[D, N]` in float32."""
        _require(index.kind == I32 and table.shape[2:] == index.shape[1:3], "an index of rows")
        return self._make("ggml_get_rows", table.pointer, index.pointer)

    def put_rows(self, target: Node, values: Node, index: Node) -> None:
        """Write the rows of `values` `[W, N]` to the rows of `target` that `index` `[N]` (int64) names."""
        fits = target.shape[0] == values.shape[0] and values.shape[1] == index.shape[0] and values.kind == F32
        fits = fits and target.shape[2:] == values.shape[2:] == (1, 1) == index.shape[1:3] and index.kind == I64
        _require(fits and values.strides[0] == 4, f"rows to write, got {values.shape} into {target.shape}")
        self.expand(self._make("ggml_set_rows", target.pointer, values.pointer, index.pointer))

    def normalise(self, x: Node, weight: Node, epsilon: float) -> Node:
        """Return weight * x / sqrt(mean(x^2) + epsilon), the mean over the row."""
        _require(x.kind == F32 and x.strides[0] == 4 and weight.shape[0] == x.shape[0], "a norm of the row's width")
        return self.multiply(self._make("ggml_rms_norm", x.pointer, epsilon), weight)

    def _elementwise(self, function: str, x: Node, y: Node) -> Node:
        fits = x.kind == y.kind == F32 and all(a % b == 0 for a, b in zip(x.shape, y.shape, strict=True))
        _require(fits and x.strides[0] == y.strides[0] == 4, f"values that repeat, got {x.shape} and {y.shape}")
        return self._make(function, x.pointer, y.pointer)

    def add(self, x: Node, y: Node) -> Node:
        """Return x + y; `y` repeats over `x`."""
        return self._elementwise("ggml_add", x, y)

    def multiply(self, x: Node, y: Node) -> Node:
        """Return x * y; `y` repeats over `x`."""
        return self._elementwise("ggml_mul", x, y)

    def apply(self, function: str, x: Node) -> Node:
        """Return one of silu, gelu (exact), cos, sin or linear of every number of `x`."""
        if function == "linear":
            return x
        x = self.contiguous(x)
        _require(x.kind == F32 and function in _UNARY, f"a function of float32, got {function}")
        return self._make(_UNARY[function], x.pointer)

    def contiguous(self, x: Node) -> Node:
        """Return `x`, copied where its numbers do not follow each other."""
        return x if x.contiguous else self._make("ggml_cont", x.pointer)

    def concat(self, parts: Sequence[Node]) -> Node:
        """Return the rows of `parts` one behind the other: `[sum of widths, N]`."""
        joined = parts[0]
        for part in parts[1:]:
            _require(joined.kind == part.kind == F32 and joined.shape[1:] == part.shape[1:], "rows to join")
            joined = self._make("ggml_concat", joined.pointer, part.pointer, 0)
        return joined

    def reshape(self, x: Node, *shape: int) -> Node:
        """Return the numbers of `x`, which must be contiguous, in another shape."""
        lengths = (*shape, 1, 1, 1)[:4]
        _require(x.contiguous and np.prod(lengths) == np.prod(x.shape), f"{shape} of {x.shape}")
        return self._make("ggml_reshape_4d", x.pointer, *lengths)

    def view(self, x: Node, shape: Sequence[int], strides: Sequence[int], offset: int) -> Node:
        """Return a window on `x`.

        Args:
            x: a tensor of a type without blocks.
            shape: up to four lengths.
            strides: bytes from one index to the next of every dimension but the first, whose numbers are adjacent.
            offset: bytes before the window.
        """
        lengths, steps = (*shape, 1, 1, 1)[:4], list(strides)
        while len(steps) < 3:
            steps.append(steps[-1] * lengths[len(steps)] if steps else _BYTES[x.kind] * lengths[0])
        reach = sum((length - 1) * step for length, step in zip(lengths[1:], steps, strict=True))
        end = offset + reach + lengths[0] * _BYTES[x.kind]
        whole = sum((length - 1) * step for length, step in zip(x.shape[1:], x.strides[1:], strict=True))
        inside = offset >= 0 and min(lengths) > 0 and end <= whole + x.shape[0] * _BYTES[x.kind]
        _require(inside and offset % _BYTES[x.kind] == 0, f"a window inside {x.shape}, got {shape} at {offset}")
        return self._make("ggml_view_4d", x.pointer, *lengths, *steps, offset)

    def slice_rows(self, x: Node, start: int, width: int) -> Node:
        """Return `width` numbers from `start` on of every row of `x` `[W, N]`."""
        _require(x.shape[2:] == (1, 1), "a matrix")
        return self.view(x, (width, x.shape[1]), (x.strides[1],), start * _BYTES[x.kind])

    def permute(self, x: Node, *order: int) -> Node:
        """Return `x` with dimension i at place order[i]."""
        _require(sorted(order) == [0, 1, 2, 3], "an order of four")
        return self._make("ggml_permute", x.pointer, *order)

    def rope(self, x: Node, positions: Node, theta: float, scale: float) -> Node:
        """Turn channels i and i + K/2 of `x` `[K, H, N]` by scale * positions `[N]` (int32) * theta^(-2i/K)."""
        fits = x.kind == F32 and positions.kind == I32 and positions.shape[0] == x.shape[2] and x.shape[0] % 2 == 0
        _require(fits and x.strides[0] == 4, f"a position for every token, got {x.shape}")
        return self._make(
            "ggml_rope_ext", x.pointer, positions.pointer, None, x.shape[0], _ROPE_PAIRS_BY_HALVES, 0,
            theta, scale, 0.0, 1.0, 0.0, 0.0,
        )  # fmt: skip

    def softmax(self, scores: Node, mask: Node, scale: float) -> Node:
        """Return the softmax of scale * scores + mask over rows; scores are `[S, T, H, B]`, mask `[S, T, 1, B]`."""
        s, t, _, b = scores.shape
        fits = scores.kind == mask.kind == F32 and mask.shape == (s, t, 1, b)
        _require(fits and scores.contiguous and mask.contiguous, f"scores and mask, got {scores.shape}, {mask.shape}")
        return self._make("ggml_soft_max_ext", scores.pointer, mask.pointer, scale, 0.0)

    def swiglu(self, gate_up: Node, function: str) -> Node:
        """Return function(first half) * second half of every row of `gate_up` `[2 F, N]`, `[F, N]`."""
        width = gate_up.shape[0] // 2
        _require(gate_up.contiguous and gate_up.kind == F32 and gate_up.shape[0] == 2 * width, "two halves")
        if function == "linear":
            gate, up = self.slice_rows(gate_up, 0, width), self.slice_rows(gate_up, width, width)
            return self.multiply(gate, up)
        return self._make({"silu": "ggml_swiglu", "gelu": "ggml_geglu_erf"}[function], gate_up.pointer)
