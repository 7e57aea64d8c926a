"""The other side of benchmarks/speed/quantized.py: llama.cpp on a Llama of SmolLM2-135M's shape, with random weights.

Speed does not depend on what the weights are; a random model of the shape needs no download.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, FEED_FORWARD, LAYERS, HEADS, KEY_VALUE_HEADS, VOCABULARY, POSITIONS = 576, 1536, 30, 9, 3, 49152, 8192


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor; the head is the embedding, as in SmolLM2-135M."""
    key_value = KEY_VALUE_HEADS * WIDTH // HEADS
    yield "token_embd.weight", (VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (WIDTH,)
        yield f"{block}.attn_q.weight", (WIDTH, WIDTH)
        yield f"{block}.attn_k.weight", (key_value, WIDTH)
        yield f"{block}.attn_v.weight", (key_value, WIDTH)
        yield f"{block}.attn_output.weight", (WIDTH, WIDTH)
        yield f"{block}.ffn_norm.weight", (WIDTH,)
        yield f"{block}.ffn_gate.weight", (FEED_FORWARD, WIDTH)
        yield f"{block}.ffn_up.weight", (FEED_FORWARD, WIDTH)
        yield f"{block}.ffn_down.weight", (WIDTH, FEED_FORWARD)
    yield "output_norm.weight", (WIDTH,)


def write_llama(path: Path, kind: str) -> Path:
    """Write such a model as a GGUF file; rows that do not fill a type's blocks take the type that they take with us."""
    from fanformer.gguf.blocks import TYPES
    from fanformer.gguf.export import encode_rows
    from fanformer.gguf.plan import fitting_type
    from fanformer.gguf.writer import Value, write_gguf

    text, array, uint32, int32, float32 = 8, 9, 4, 5, 6
    tokens = [f"[PAD{number}]" for number in range(VOCABULARY)]
    metadata: dict[str, Value] = {
        "general.architecture": (text, "llama"),
        "general.name": (text, "random weights of SmolLM2-135M's shape"),
        "llama.vocab_size": (uint32, VOCABULARY),
        "llama.context_length": (uint32, POSITIONS),
        "llama.embedding_length": (uint32, WIDTH),
        "llama.block_count": (uint32, LAYERS),
        "llama.feed_forward_length": (uint32, FEED_FORWARD),
        "llama.attention.head_count": (uint32, HEADS),
        "llama.attention.head_count_kv": (uint32, KEY_VALUE_HEADS),
        "llama.attention.layer_norm_rms_epsilon": (float32, 1e-5),
        "llama.rope.freq_base": (float32, 100000.0),
        "llama.rope.dimension_count": (uint32, WIDTH // HEADS),
        "tokenizer.ggml.model": (text, "gpt2"),
        "tokenizer.ggml.pre": (text, "gpt-2"),
        "tokenizer.ggml.tokens": (array, (text, tokens)),
        "tokenizer.ggml.token_type": (array, (int32, [1] * VOCABULARY)),
        "tokenizer.ggml.merges": (array, (text, [])),
        "tokenizer.ggml.bos_token_id": (uint32, 0),
        "tokenizer.ggml.eos_token_id": (uint32, 0),
    }
    tensors = [(n, s, fitting_type(kind, s[-1])[0] if len(s) > 1 else TYPES["f32"]) for n, s in shapes()]
    random = np.random.default_rng(0)

    def content() -> Iterator[np.ndarray]:
        for _, shape, block in tensors:
            values = np.ones(shape) if len(shape) == 1 else random.standard_normal(shape) * shape[-1] ** -0.5
            yield encode_rows(values.astype(np.float32).reshape(-1, shape[-1]), block)

    write_gguf(path, metadata, tensors, content())
    return path


def decode_llama(path: str, threads: int, time_decoding: Callable[..., dict[str, float]]) -> dict[str, Any]:
    """Time llama.cpp on a GGUF file, in this process."""
    import llama_cpp

    model = llama_cpp.Llama(path, n_ctx=256, n_batch=64, n_threads=threads, n_threads_batch=threads, verbose=False)

    def step(ids: list[int]) -> int:
        model.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(VOCABULARY,)).argmax())

    return {**time_decoding(step), "version": llama_cpp.__version__}
