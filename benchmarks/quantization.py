"""Measure GGUF files of one model: what they lose, how large they are, how fast they decode, and in how much memory.

    python benchmarks/quantization.py MODEL --text FILE [--types q8_0,q4_k] [--tokens 20000] [--rounds 5]
        [--threads N] [--calibration SPEC] [--llama-cpp PYTHON] [--folders gptq4,gptq8,awq4] [--write]

Bits per byte: the folder on torch, the dequantized file on torch, and the file on the engine, on the same rows of
held-out text. Speed: tokens per second of one text, in a process of its own for every file and round, in turns with the
folder in bfloat16 on torch, and with `--llama-cpp` with llama.cpp on a Llama of SmolLM2-135M's shape in the same type;
figures are ratios of runs of the same round, the load is told. Memory: resident, above the process before loading.
`--llama-cpp` names a Python that has llama-cpp-python. `--folders` adds compressed-tensors folders (extra `quantize`):
bits per byte on torch, and size; `--types ''` leaves GGUF files out.
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS, NEW_TOKENS, WARM_UP_TOKENS = 16, 64, 8
BANDWIDTH_BYTES = 1 << 28


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
    from fanformer.inference.ggml_generation import load_engine
    from fanformer.inference.ggml_runtime import library

    library()
    before = resident_bytes()
    engine, tokenizer = load_engine(path, threads)
    engine.begin(1, PROMPT_TOKENS + WARM_UP_TOKENS + NEW_TOKENS + 1)
    found: dict[str, Any] = time_decoding(lambda ids: int(engine.forward([ids])[0][0][: tokenizer.known].argmax()))
    found |= {"resident_bytes": resident_bytes() - before, "cache_bytes": engine.cache_bytes}
    return found | {"weight_bytes": engine.weight_bytes, "torch_imported": "torch" in sys.modules}


def decode_folder(path: str, threads: int) -> dict[str, Any]:
    """Time the folder in bfloat16 on torch, in this process."""
    import torch

    from fanformer.inference.loading import load_model

    torch.set_num_threads(threads)
    before = resident_bytes()
    model, cache = load_model(path, "cpu", "bfloat16"), None

    @torch.inference_mode()
    def step(ids: list[int]) -> int:
        nonlocal cache
        output = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        return int(output.logits[0, -1].argmax())

    return {**time_decoding(step), "resident_bytes": resident_bytes() - before}


def in_a_process(python: str, *words: str) -> dict[str, Any]:
    """Run this script in a process of its own and return the JSON that it prints last."""
    done = subprocess.run([python, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rows_of(tokenizer: Any, texts: Sequence[str], length: int, most_tokens: int) -> tuple[list[list[int]], int]:
    """Return rows of ids of at most `length`, each with a start token in front, and the bytes that they stand for."""
    from fanformer.data.tokenizer import encode_documents, start_token_id

    start, rows, num_bytes, left = start_token_id(tokenizer), [], 0, most_tokens
    for text in texts:
        ids = encode_documents(tokenizer, [text])[0]
        if len(ids) > left:
            break
        left, num_bytes = left - len(ids), num_bytes + len(text.encode())
        rows += [[start, *ids[at : at + length - 1]] for at in range(0, len(ids), length - 1)]
    return [row for row in rows if len(row) > 1], num_bytes


def bits_per_byte(logits_of: Callable[[list[int]], np.ndarray], rows: list[list[int]], num_bytes: int) -> float:
    """Return the bits that predicting every id of the rows but the first takes, over the bytes."""
    nats = 0.0
    for row in rows:
        logits = logits_of(row)[:-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        nats += float((np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), row[1:]]).sum())
    return nats / math.log(2) / num_bytes


def on_torch(model: Any) -> Callable[[list[int]], np.ndarray]:
    """Return a function from ids to logits (T, V)."""
    import torch

    def logits_of(row: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor([row]), use_cache=False).logits[0].float().numpy()

    return logits_of


def on_engine(path: Path, threads: int) -> Callable[[list[int]], np.ndarray]:
    """Return a function from ids to logits (T, V)."""
    from fanformer.inference.ggml_engine import Engine

    engine = Engine.open(path, threads)

    def logits_of(row: list[int]) -> np.ndarray:
        engine.begin(1, engine.config.max_position_embeddings)
        return engine.forward([row], every=True)[0]

    return logits_of


def measure_quality(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the files and return size and bits per byte of each, and of the folder as `folder`."""
    import torch

    from fanformer.data.documents import open_source
    from fanformer.inference.loading import load, load_model
    from fanformer.quantization.gguf_export import Settings, export_gguf

    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments.model, "cpu", "float32")
    texts = (document.text for document in open_source(arguments.text))
    rows, num_bytes = rows_of(tokenizer, texts, model.config.max_position_embeddings, arguments.tokens)
    if not rows:
        sys.exit(f"{arguments.text} begins with a document of more than {arguments.tokens} tokens: give --tokens")
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    before = bits_per_byte(on_torch(model), rows, num_bytes)
    found: dict[str, dict[str, Any]] = {"folder": {"torch": before, "bytes": num_bytes, "sha256": digest}}
    for kind in kinds(arguments.types):
        settings = Settings(kind, calibration=arguments.calibration if kind.startswith("q4") else None)
        report = export_gguf(arguments.model, folder, settings)
        path = folder / report.file
        embedding = next(item.bytes for item in report.tensors if item.name == "token_embd.weight")
        tied = all(item.name != "output.weight" for item in report.tensors)
        found[kind] = {
            "file_bytes": report.bytes,
            "read_bytes": sum(item.bytes for item in report.tensors) - (0 if tied else embedding),
            "bits_per_weight": report.bits_per_weight,
            "torch": bits_per_byte(on_torch(load_model(path, "cpu")), rows, num_bytes),
            "engine": bits_per_byte(on_engine(path, arguments.threads), rows, num_bytes),
        }
        show_quality(kind, found)
    for name in kinds(arguments.folders):
        found[name] = measure_folder(arguments, folder / name, rows, num_bytes)
        change = 100 * (found[name]["torch"] / before - 1)
        size, torch_bits = found[name]["file_bytes"], found[name]["torch"]
        print(f"{name:<6} {size:>12,} bytes of weights  torch {torch_bits:.5f} ({change:+.3f}%)")
    return found


def kinds(words: str) -> list[str]:
    """Return the names of a list that commas divide."""
    return [word for word in words.split(",") if word]


def measure_folder(
    arguments: argparse.Namespace, folder: Path, rows: list[list[int]], num_bytes: int
) -> dict[str, Any]:
    """Write a compressed-tensors folder, named by its method and bits, and return its size and bits per byte."""
    from fanformer.inference.loading import load_model
    from fanformer.quantization.compressed_tensors import Settings, export_compressed

    method, bits = folder.name.rstrip("0123456789"), folder.name.lstrip("abcdefghijklmnopqrstuvwxyz")
    if not bits:
        sys.exit(f"--folders {folder.name}: expected a method and bits, such as gptq4 or awq4")
    report = export_compressed(arguments.model, folder, Settings(method, int(bits), calibration=arguments.calibration))
    return {"file_bytes": report.bytes, "torch": bits_per_byte(on_torch(load_model(folder, "cpu")), rows, num_bytes)}


def show_quality(kind: str, found: dict[str, dict[str, Any]]) -> None:
    """Print a row of the first table."""
    row, base = found[kind], found["folder"]["torch"]
    print(
        f"{kind:<6} {row['file_bytes']:>12,} bytes  {row['bits_per_weight']:>6.2f} bits  torch {row['torch']:.5f} "
        f"({100 * (row['torch'] / base - 1):+.3f}%)  engine {row['engine']:.5f} "
        f"({100 * (row['engine'] / row['torch'] - 1):+.3f}% of torch's)"
    )


def measure_speed(arguments: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return every round's figures of the folder, of each file and of llama.cpp, taken in turns."""
    contestants: dict[str, tuple[str, ...]] = {"folder": (sys.executable, "--decode", arguments.model)}
    for kind in kinds(arguments.types):
        contestants[kind] = sys.executable, "--decode", str(folder / f"model-{kind}.gguf")
        if arguments.llama_cpp is not None:
            from quantization_llama import write_llama

            path = write_llama(folder / f"llama-{kind}.gguf", kind)
            contestants[f"llama.cpp {kind}"] = arguments.llama_cpp, "--decode-llama", str(path)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(arguments.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            python, *words = contestants[name]
            load = os.getloadavg()[0]
            found[name].append(in_a_process(python, *words, "--threads", str(arguments.threads)) | {"load": load})
    return found


def show_speed(quality: dict[str, dict[str, Any]], speed: dict[str, list[dict[str, Any]]], bandwidth: float) -> None:
    """Print the second table."""
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    for name, rounds in speed.items():
        rates = [item["tokens_per_second"] for item in rounds]
        line = f"{name:<16} {statistics.median(rates):>8.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f})"
        pairs = [item["tokens_per_second"] / base["tokens_per_second"] for item, base in zip(rounds, speed["folder"],
                                                                                            strict=True)]  # fmt: skip
        line += f"  {statistics.median(pairs):.2f} times bf16 on torch"
        if f"llama.cpp {name}" in speed:
            pairs = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(rounds, speed[f"llama.cpp {name}"],
                                                                                     strict=True)]  # fmt: skip
            line += f", {statistics.median(pairs):.2f} times llama.cpp's"
        if name in quality and name != "folder":
            row = quality[name]
            least = row["read_bytes"] / bandwidth
            memory = max(item["resident_bytes"] - item["cache_bytes"] for item in rounds) / row["file_bytes"]
            line += (
                f", {1 / statistics.median(rates) / least:.2f} times the time to read it, {memory:.2f} files of memory"
            )
        print(line)


def to_result(quality: dict[str, dict[str, Any]], speed: dict[str, list[dict[str, Any]]], bandwidth: float) -> Any:
    """Return the figures of the ledger."""
    from fanformer.evaluation.ledger import EXACT, Figure, range_of

    result = {"bits_per_byte": Figure(quality["folder"]["torch"], "bits per byte", interval=EXACT)}
    for kind, row in quality.items():
        if kind == "folder":
            continue
        result[f"file_bytes_{kind}"] = Figure(row["file_bytes"], "bytes", interval=EXACT)
        for where in [where for where in ("torch", "engine") if where in row]:
            result[f"bits_per_byte_{kind}_{where}"] = Figure(row[where], "bits per byte", interval=EXACT)
    for name, rounds in speed.items():
        key = name.replace(" ", "_").replace(".", "_")
        result[f"tokens_per_second_{key}"] = range_of([item["tokens_per_second"] for item in rounds], "tokens/s")
        if "cache_bytes" in rounds[0]:
            memory = [item["resident_bytes"] - item["cache_bytes"] for item in rounds]
            result[f"resident_bytes_{key}"] = range_of(memory, "bytes without the cache")
    if speed:
        result["read_bandwidth"] = Figure(bandwidth, "bytes/s")
    return result


def write(arguments: argparse.Namespace, result: Any, details: dict[str, Any]) -> None:
    """Add the run to the ledger."""
    from fanformer.evaluation.ledger import Entry, command_line, hardware, versions, write_entry

    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    packages = ["ggml-python"] * bool(arguments.types) + ["llmcompressor"] * bool(arguments.folders)
    entry = Entry(
        name=f"gguf-{Path(arguments.model).absolute().name}-{day}",
        what=f"GGUF files of {Path(arguments.model).name}: bits per byte, size, decoding and memory",
        kind="benchmark",
        command=command_line(["python", *sys.argv]),
        date=day,
        seeds=[],
        configuration={
            "types": arguments.types,
            "folders": arguments.folders,
            "tokens": arguments.tokens,
            "threads": arguments.threads,
        },
        data={"source": Path(arguments.text).name, "fingerprint": details["quality"]["folder"]["sha256"]},
        hardware=hardware(),
        versions=versions() | {package: version(package) for package in packages},
        result=result,
        details=details,
    )
    write_entry(RESULTS, entry)


def main() -> None:
    """Measure, print two tables, and write them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="model folder")
    parser.add_argument("--text", help="held-out text: a file, glob or hf:NAME")
    parser.add_argument("--types", default="f16,q8_0,q6_k,q5_k,q4_k,q4_0")
    parser.add_argument("--folders", default="", help="compressed-tensors folders, such as gptq4,gptq8,awq4")
    parser.add_argument("--tokens", type=int, default=20_000, help="most tokens of the text (default 20000)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="processes for every file; 0 leaves speed out (default 5)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--calibration", metavar="SPEC", help="text that weighs the 4-bit types' errors")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python with llama-cpp-python, to compare with")
    parser.add_argument("--decode", metavar="PATH", help=argparse.SUPPRESS)
    parser.add_argument("--decode-llama", metavar="PATH", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/gguf-MODEL-DATE.json")
    arguments = parser.parse_args()
    if arguments.decode_llama is not None:
        from quantization_llama import decode_llama

        print(json.dumps(decode_llama(arguments.decode_llama, arguments.threads, time_decoding)))
        return
    if arguments.decode is not None:
        decode = decode_file if arguments.decode.endswith(".gguf") else decode_folder
        print(json.dumps(decode(arguments.decode, arguments.threads)))
        return
    if arguments.model is None or arguments.text is None:
        parser.error("MODEL and --text are needed")
    with tempfile.TemporaryDirectory() as folder:
        quality = measure_quality(arguments, Path(folder))
        speed = measure_speed(arguments, Path(folder)) if arguments.rounds else {}
    bandwidth = read_bandwidth(arguments.threads) if speed else 0.0
    if speed:
        show_speed(quality, speed, bandwidth)
    if arguments.write:
        details = {"quality": quality, "speed": speed, "bandwidth": bandwidth}
        write(arguments, to_result(quality, speed, bandwidth), details)


if __name__ == "__main__":
    main()
