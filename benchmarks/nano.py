"""FANformer nano beside Llama and Llama with QK-norm of the same parameter count: equal tokens, then equal time.

Every arm trains on the same rows in the same order with the same optimizer, tokenizer and budget, at each learning
rate of the sweep; its best one counts, and runs once more under a time limit. The Llamas get the initialisation that
serves them best (docs/experiments.md): an embedding of standard deviation 1, matrices of 1 / sqrt(inputs) with those
that end a branch divided by sqrt(2 L).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ARMS = ("fanformer", "llama", "llama-qk-norm")
RATES = (0.0025, 0.005)
# 6 layers of width 192 with this FFN have as many parameters in the blocks as FANformer nano; checked at each run.
LLAMA_FFN = 448


def build_llama(fields: dict[str, Any], qk_norm: bool) -> Any:
    """Return HF Llama, or Qwen3 (Llama with QK-norm), of nano's width and depth, initialised at its best."""
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
    )
    shape = {name: fields[name] for name in names} | {"intermediate_size": LLAMA_FFN, "tie_word_embeddings": False}
    model = Qwen3ForCausalLM(Qwen3Config(**shape)) if qk_norm else LlamaForCausalLM(LlamaConfig(**shape))
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
        elif name == "lm_head":
            nn.init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.Linear):
            ends_branch = name.endswith(("o_proj", "down_proj"))
            shrink = (2 * fields["num_hidden_layers"]) ** -0.5 if ends_branch else 1.0
            nn.init.normal_(module.weight, std=shrink * module.in_features**-0.5)
    return model


def train_one(arguments: argparse.Namespace) -> None:
    """Train one arm at one learning rate; its folder holds the figures."""
    from fanformer.cli.report import TerminalReporter
    from fanformer.training.configuration import resolve
    from fanformer.training.run import build_fanformer, train

    overrides: dict[str, Any] = {
        "preset": "nano", "data": str(arguments.data), "output_dir": str(arguments.output), "overwrite": True,
        "learning_rate": arguments.rate, "seed": arguments.seed, "max_steps": arguments.steps,
        "max_time": arguments.seconds, "compile": "on", "eval_tokens": 32768,
    }  # fmt: skip
    builders = {
        "fanformer": build_fanformer,
        "llama": lambda fields: build_llama(fields, qk_norm=False),
        "llama-qk-norm": lambda fields: build_llama(fields, qk_norm=True),
    }
    with TerminalReporter() as reporter:
        train(resolve(overrides=overrides), reporter, builders[arguments.arm])


def measure(work: Path, arm: str, rate: float, seed: int, steps: int | None, seconds: float | None) -> dict[str, Any]:
    """Train in a process of its own, unless that is done, and return the figures."""
    name = f"{arm}-{rate:g}-seed{seed}-" + (f"{steps}steps" if steps else f"{seconds:g}s")
    folder = work / name
    if not (folder / "model.safetensors").is_file():
        command = [sys.executable, __file__, "--arm", arm, "--rate", str(rate), "--seed", str(seed)]
        command += ["--data", str(work / "data"), "--output", str(folder)]
        command += ["--steps", str(steps)] if steps else ["--seconds", str(seconds)]
        print(f"training {name} (load {os.getloadavg()[0]:.1f})", flush=True)
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(record["tokens_per_second"] for record in records if "tokens_per_second" in record)
    import yaml

    run = yaml.safe_load((folder / "run.yaml").read_text())
    return {
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "parameters": run["parameters"],
        "tokens": records[-1]["tokens"],
        "seconds": records[-1]["elapsed_seconds"],
        "tokens_per_second": rates[len(rates) // 2],
        "loss": records[-1]["val_loss"],
        "bits_per_byte": records[-1]["val_bits_per_byte"],
        "curve": [[r["tokens"], r["val_bits_per_byte"]] for r in records if "val_bits_per_byte" in r],
        "data_fingerprint": run["data"]["fingerprint"],
    }


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        f"**{title}**",
        "",
        "| arm | parameters | learning rate | tokens | tokens/s | held-out bits per byte |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['arm']} | {row['parameters']:,} | {row['learning_rate']:g} | {row['tokens']:,} "
            f"| {row['tokens_per_second']:,.0f} | {row['bits_per_byte']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def compare(arguments: argparse.Namespace) -> None:
    """Run the whole comparison and print it."""
    from fanformer.data.documents import is_prepared_folder, open_source
    from fanformer.data.shards import prepare
    from fanformer.training.configuration import load_preset

    work: Path = arguments.work
    if not is_prepared_folder(str(work / "data")):
        size = load_preset("nano").model["vocab_size"]
        prepare(open_source("stdlib"), work / "data", tokenizer=None, vocab_size=size)
    swept = [
        measure(work, arm, rate, arguments.seed, arguments.steps or 240, None)
        for rate in arguments.rates
        for arm in ARMS
    ]
    best = {arm: min((row for row in swept if row["arm"] == arm), key=lambda row: row["loss"]) for arm in ARMS}
    sizes = [row["parameters"] for row in best.values()]
    assert max(sizes) / min(sizes) < 1.01, f"the arms must have equal sizes, got {sizes}"
    timed = []
    if arguments.seconds:
        timed = [
            measure(work, arm, best[arm]["learning_rate"], arguments.seed, None, arguments.seconds) for arm in ARMS
        ]
    print(table("Equal tokens, every learning rate", swept))
    print(table("Equal tokens, each arm's best", list(best.values())))
    print(table(f"Equal time ({arguments.seconds:g} s)", timed) if timed else "equal time: not measured")
    if arguments.write:
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        content = {
            "what": "FANformer nano beside Llama of the same size", "date": date, "command": " ".join(sys.argv),
            "hardware": f"{os.cpu_count()} CPUs, {platform.processor() or platform.machine()}",
            "swept": swept, "best": best, "timed": timed,
        }  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"nano-{date}.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="optimizer steps of every arm  [default: 240]")
    parser.add_argument("--seconds", type=float, default=0.0, help="also run each arm's best for so long")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to sweep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-nano"), help="folder for the runs; restartable")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/nano-DATE.json")
    single = parser.add_argument_group("one training, called by the comparison itself")
    single.add_argument("--arm", choices=ARMS)
    single.add_argument("--rate", type=float)
    single.add_argument("--data", type=Path)
    single.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.arm:
        arguments.seconds = arguments.seconds or None
        train_one(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
