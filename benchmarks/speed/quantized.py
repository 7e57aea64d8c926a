"""How fast GGUF files decode on the engine, and in how much memory, beside torch and llama.cpp.

    python benchmarks/speed/quantized.py [--types q8_0 q4_k q4_0] [--rounds 5] [--threads N]
        [--llama-cpp PYTHON] [--write]

The default model with random weights, whose values no speed depends on, and a tokenizer of 49,152 tokens trained on the
standard library. Every file and round has a process of its own, in turns with the folder in bfloat16 on torch, and with
`--llama-cpp` with llama.cpp on a Llama of SmolLM2-135M's shape in the same type; figures are ratios of runs of the same
round. The share of the bandwidth is what a token must read, the file without the embedding, over what was measured.
Memory is resident, above the process with the engine imported, without the key-value cache. `--llama-cpp` names a
Python that has llama-cpp-python; files need the extra `gguf`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS, NEW_TOKENS, WARM_UP_TOKENS = 16, 64, 8
BANDWIDTH_BYTES = 1 << 28
DECODE = "--decode"


def resident_bytes() -> int:
    """Return this process's resident memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def read_bandwidth(threads: int) -> float:
    """Return bytes per second that so many threads read together from memory, the best of five."""
    parts = [np.ones(BANDWIDTH_BYTES // threads // 4, dtype=np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, BANDWIDTH_BYTES / (time.perf_counter() - start))
    return best


def time_decoding(step: Callable[[list[int]], int]) -> dict[str, float]:
    """Time a function that takes new ids and returns the next one."""
    token = step(list(range(1, PROMPT_TOKENS + 1)))
    seconds = []
    for _ in range(WARM_UP_TOKENS + NEW_TOKENS):
        start = time.perf_counter()
        token = step([token])
        seconds.append(time.perf_counter() - start)
    timed = seconds[WARM_UP_TOKENS:]
    return {"tokens_per_second": 1 / statistics.median(timed), "best_tokens_per_second": 1 / min(timed)}


def decode_file(path: str, threads: int) -> dict[str, Any]:
    """Time the engine on a GGUF file, in this process."""
    from fanformer.gguf.ggml_model import GgmlModel
    from fanformer.gguf.runtime import library

    library()
    before = resident_bytes()
    model = GgmlModel(path, threads)
    engine, tokenizer = model.engine, model.tokenizer
    engine.begin(1, PROMPT_TOKENS + WARM_UP_TOKENS + NEW_TOKENS + 1)
    found: dict[str, Any] = time_decoding(lambda ids: int(engine.forward([ids])[0][0][: tokenizer.known].argmax()))
    found |= {"resident_bytes": resident_bytes() - before, "cache_bytes": engine.cache_bytes}
    return found | {"weight_bytes": engine.weight_bytes, "torch_imported": "torch" in sys.modules}


def decode_folder(path: str, threads: int) -> dict[str, Any]:
    """Time the folder in bfloat16 on torch, in this process."""
    import torch

    from fanformer.loading import load_model
    from fanformer.model.recurrence_fanformer import CACHE

    torch.set_num_threads(threads)
    before = resident_bytes()
    model, cache = load_model(path, "cpu", "bfloat16"), None

    @torch.inference_mode()
    def step(ids: list[int]) -> int:
        nonlocal cache
        output = model(torch.tensor([ids]), use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        return int(output.logits[0, -1].argmax())

    return {**time_decoding(step), "resident_bytes": resident_bytes() - before}


def decode(way: str, path: str, threads: int) -> dict[str, Any]:
    """Time what `path` holds, in this process."""
    if way != DECODE:
        from quantized_llama import decode_llama

        return decode_llama(path, threads, time_decoding)
    return decode_file(path, threads) if path.endswith(".gguf") else decode_folder(path, threads)


def in_a_process(python: str, *words: str) -> dict[str, Any]:
    """Run this script in a process of its own and return the JSON that it prints last."""
    done = subprocess.run([python, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_folder(name: str, folder: Path) -> None:
    """Write a model that `speed.build` knows in bfloat16, with a tokenizer as large as its vocabulary."""
    from itertools import islice

    import torch
    from speed import build

    from fanformer.data.sources.documents import open_source
    from fanformer.data.tokenizer import train_tokenizer

    model = build(name)
    model.to(torch.bfloat16).save_pretrained(folder)
    texts = [document.text for document in islice(open_source("stdlib"), 1200)]
    train_tokenizer(texts, model.config.vocab_size).save_pretrained(folder)


def write_models(folder: Path, types: list[str], llama: bool) -> dict[str, dict[str, int]]:
    """Write the folder `model`, its files, and llama.cpp's beside them; return the bytes of each and of a token."""
    from quantized_llama import write_llama
    from speed import OURS

    from fanformer.gguf.export import Settings, export_gguf

    write_folder(OURS, folder / "model")
    sizes = {}
    for kind in types:
        report = export_gguf(folder / "model", folder, Settings(kind))
        embedding = next(item.bytes for item in report.tensors if item.name == "token_embd.weight")
        sizes[kind] = {"file": report.bytes, "read": sum(item.bytes for item in report.tensors) - embedding}
        if llama:
            write_llama(folder / f"llama-{kind}.gguf", kind)
    return sizes


def measure(folder: Path, types: list[str], rounds: int, threads: int, llama: str | None) -> dict[str, list[Any]]:
    """Return every round's figures of the folder, of each file and of llama.cpp, taken in turns."""
    contestants: dict[str, tuple[str, ...]] = {"folder": (sys.executable, DECODE, str(folder / "model"))}
    for kind in types:
        contestants[kind] = sys.executable, DECODE, str(folder / f"model-{kind}.gguf")
        if llama is not None:
            contestants[f"llama_cpp_{kind}"] = llama, f"{DECODE}-llama", str(folder / f"llama-{kind}.gguf")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            python, *words = contestants[name]
            load = os.getloadavg()[0]
            found[name].append(in_a_process(python, *words, "--threads", str(threads)) | {"load": load})
    return found


def main() -> None:
    """Measure and print."""
    if len(sys.argv) > 1 and sys.argv[1].startswith(DECODE):
        _, way, path, _, threads = sys.argv
        print(json.dumps(decode(way, path, int(threads))))
        return
    from speed import arguments_of, finish, times_faster

    from fanformer.comparison.ledger import EXACT, Figure, range_of

    arguments = arguments_of(__doc__ or "", types=("q8_0", "q4_k", "q4_0"), rounds=5, llama_cpp="")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = write_models(folder, arguments.types, bool(arguments.llama_cpp))
        found = measure(folder, arguments.types, arguments.rounds, arguments.threads, arguments.llama_cpp or None)
    arguments.llama_cpp = bool(arguments.llama_cpp)  # where it lies on this machine says nothing
    bandwidth = read_bandwidth(arguments.threads)
    result = {"bandwidth": Figure(bandwidth / 1e9, "GB/s")}
    seconds = {name: [1 / item["tokens_per_second"] for item in rounds] for name, rounds in found.items()}
    for name, values in seconds.items():
        result[f"tokens_per_second_{name}"] = range_of([1 / value for value in values], "tokens/s")
    for kind, size in sizes.items():
        result[f"times_torch_bfloat16_{kind}"] = times_faster(seconds, kind, "folder")
        if f"llama_cpp_{kind}" in seconds:
            result[f"times_llama_cpp_{kind}"] = times_faster(seconds, kind, f"llama_cpp_{kind}")
        shares = [size["read"] / bandwidth / value for value in seconds[kind]]
        result[f"share_of_bandwidth_{kind}"] = range_of(shares, "of the measured bandwidth")
        memory = [(item["resident_bytes"] - item["cache_bytes"]) / size["file"] for item in found[kind]]
        result[f"files_of_memory_{kind}"] = range_of(memory, "times the file")
        result[f"file_bytes_{kind}"] = Figure(size["file"], "bytes", interval=EXACT)
        imported = any(item["torch_imported"] for item in found[kind])
        unit = "1 if the engine's process imports torch"
        result[f"torch_imported_{kind}"] = Figure(float(imported), unit, interval=EXACT)
    finish("quantization-speed", "decoding GGUF files beside torch and llama.cpp", arguments, result, {"rounds": found})


if __name__ == "__main__":
    main()
