"""What GGUF files and quantized folders of one model lose, and how large they are.

    python benchmarks/quality/quantization.py MODEL --text FILE [--types q8_0,q4_k] [--folders gptq4,gptq8,awq4]
        [--tokens 20000] [--threads N] [--calibration SPEC] [--write]

Bits per byte: the folder on torch, the dequantized file on torch, and the file on the engine, on the same rows of
held-out text. Files need the extra `gguf`, folders the extra `quantize`, and gptq-v1-4 and gptq-v1-8 the extra `gptq`,
in environments of their own; `--types ''` leaves files out.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fanformer.comparison.ledger import EXACT, Figure, measured_today, write_entry
from fanformer.machine.versions import versions

RESULTS = Path(__file__).parents[1] / "results"


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
    from fanformer.gguf.engine import Engine

    engine = Engine.open(path, threads)

    def logits_of(row: list[int]) -> np.ndarray:
        engine.begin(1, engine.model.max_position_embeddings)
        return engine.forward([row], every=True)[0]

    return logits_of


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Write the files; return size and bits per byte of each, and of the folder as `folder`, and its parameters."""
    import torch

    from fanformer.data.sources.documents import open_source
    from fanformer.gguf.export import Settings, export_gguf
    from fanformer.loading import load, load_model

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
        found[kind] = {
            "file_bytes": report.bytes,
            "bits_per_weight": report.bits_per_weight,
            "torch": bits_per_byte(on_torch(load_model(path, "cpu")), rows, num_bytes),
            "engine": bits_per_byte(on_engine(path, arguments.threads), rows, num_bytes),
        }
        show(kind, found)
    for name in kinds(arguments.folders):
        found[name] = measure_folder(arguments, folder / name, rows, num_bytes)
        change = 100 * (found[name]["torch"] / before - 1)
        size, torch_bits = found[name]["file_bytes"], found[name]["torch"]
        print(f"{name:<6} {size:>12,} bytes of weights  torch {torch_bits:.5f} ({change:+.3f}%)")
    return found, model.num_parameters()


def kinds(words: str) -> list[str]:
    """Return the names of a list that commas divide."""
    return [word for word in words.split(",") if word]


def measure_folder(
    arguments: argparse.Namespace, folder: Path, rows: list[list[int]], num_bytes: int
) -> dict[str, Any]:
    """Write a quantized folder, named by its method and bits, and return its size and bits per byte."""
    from fanformer.loading import load_model
    from fanformer.quantization.compressed_tensors import export_compressed
    from fanformer.quantization.gptq_v1 import METHOD, export_gptq_v1
    from fanformer.quantization.quantized_folder import Settings

    asked = re.fullmatch(r"([a-z]+|gptq-v1(?=-))-?(\d+)", folder.name)
    if asked is None:
        sys.exit(f"--folders {folder.name}: expected a method and bits, such as gptq4, awq4 or gptq-v1-4")
    settings = Settings(asked[1], int(asked[2]), calibration=arguments.calibration)
    export = export_gptq_v1 if settings.method == METHOD else export_compressed
    report = export(arguments.model, folder, settings)
    return {"file_bytes": report.bytes, "torch": bits_per_byte(on_torch(load_model(folder, "cpu")), rows, num_bytes)}


def show(kind: str, found: dict[str, dict[str, Any]]) -> None:
    """Print a row of the first table."""
    row, base = found[kind], found["folder"]["torch"]
    print(
        f"{kind:<6} {row['file_bytes']:>12,} bytes  {row['bits_per_weight']:>6.2f} bits  torch {row['torch']:.5f} "
        f"({100 * (row['torch'] / base - 1):+.3f}%)  engine {row['engine']:.5f} "
        f"({100 * (row['engine'] / row['torch'] - 1):+.3f}% of torch's)"
    )


def to_result(found: dict[str, dict[str, Any]]) -> dict[str, Figure]:
    """Return the figures of the ledger: of a file the engine's loss counts, of a folder torch's."""
    before = found["folder"]["torch"]
    result = {"bits_per_byte": Figure(before, "bits per byte", interval=EXACT)}
    for kind, row in found.items():
        if kind == "folder":
            continue
        result[f"file_bytes_{kind}"] = Figure(row["file_bytes"], "bytes", interval=EXACT)
        for where in [where for where in ("torch", "engine") if where in row]:
            result[f"bits_per_byte_{kind}_{where}"] = Figure(row[where], "bits per byte", interval=EXACT)
        after = row.get("engine", row["torch"])
        result[f"loss_ratio_{kind}"] = Figure(after / before, "times the folder's", interval=EXACT)
    return result


def write(arguments: argparse.Namespace, found: dict[str, dict[str, Any]], parameters: int) -> None:
    """Add the run to the ledger."""
    model = Path(arguments.model).absolute().name
    classic = [name for name in kinds(arguments.folders) if name.startswith("gptq-v1")]
    asked = {
        "gguf": bool(arguments.types),
        "folders": len(classic) < len(kinds(arguments.folders)),
        "gptq-v1": bool(classic),
    }
    libraries = {"gguf": "ggml-python", "folders": "llmcompressor", "gptq-v1": "gptqmodel"}
    what = [name for name, wanted in asked.items() if wanted]
    entry = measured_today(
        f"quantization-loss-{'-'.join(what)}-{model}-{{date}}",
        what=f"what a trained model loses as {' and '.join(what)}",
        configuration={
            "model": model,
            "scale": f"{parameters / 1e6:.3g}M parameters",
            "types": arguments.types,
            "folders": arguments.folders,
            "tokens": arguments.tokens,
            "threads": arguments.threads,
        },
        data={"source": Path(arguments.text).name, "fingerprint": found["folder"]["sha256"]},
        versions=versions() | {libraries[name]: version(libraries[name]) for name in what},
        result=to_result(found),
        details=found,
    )
    write_entry(RESULTS, entry)


def main() -> None:
    """Measure, print a table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("--text", required=True, help="held-out text: a file, glob or hf:NAME")
    parser.add_argument("--types", default="f16,q8_0,q6_k,q5_k,q4_k,q4_0")
    parser.add_argument("--folders", default="", help="quantized folders, such as gptq4,gptq8,awq4")
    parser.add_argument("--tokens", type=int, default=20_000, help="most tokens of the text (default 20000)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--calibration", metavar="SPEC", help="text for the 4-bit types' weights, and for the folders")
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, parameters = measure(arguments, Path(folder))
    if arguments.write:
        write(arguments, found, parameters)


if __name__ == "__main__":
    main()
