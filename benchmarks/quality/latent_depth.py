"""What a trained recurrent depth does: the dial, exit, drafts, caches, code that parses, and plain runs that go on so.

    python benchmarks/quality/latent_depth.py RUN --text FILE [--parts dial,exit,...] [--gguf] [--rounds 5] [--dry-run]
        [--base PLAIN_RUN] [--tokens 500k] [--work runs/latent-depth-parts] [--write]

Parts: `dial` (bits per byte at 1, 2, 4, 8 steps), `exit` (thresholds: steps saved and bits lost, from 8 and from 4),
`cache` (bits of a text read token by token with keys and values of all steps, and of the last), `speed` (greedy tokens
a second at each number of steps, with exit and with drafts, their acceptance, torch and ggml, in turns), `parse` (share
of completions of Python that parse), `retrofit` (a plain run continued plain and as recurrent, on the same tokens).
`--dry-run` does all of it in little and proves nothing.
"""

import argparse
import ast
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from fanformer.comparison.ledger import Figure, measured_today, range_of, write_entry
from fanformer.data.tokenizer import start_token_id
from fanformer.evaluation.loss import evaluate_documents
from fanformer.generation.depth import chosen_depth, set_depth
from fanformer.generation.settings import GenerationSettings
from fanformer.loading import load, load_text_model
from fanformer.training.configuration import parse_count, resolve
from fanformer.training.run import train

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("dial", "exit", "cache", "speed", "parse", "retrofit")
STEPS = (1, 2, 4, 8)
THRESHOLDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
PROMPTS = (
    "def ",
    "class ",
    "import ",
    "for ",
    "if __name__ == ",
    "return ",
    "with open(",
    "@property\n    def ",
    "try:\n",
)
Figures = dict[str, Figure]


def dial(given: argparse.Namespace) -> Figures:
    """Return the bits per byte of the text at every number of steps."""
    model, tokenizer = load(given.run, "cpu", "float32")
    found = {}
    for steps in STEPS:
        with chosen_depth(model, steps):
            bits = evaluate_documents(model, tokenizer, given.texts).figures().bits_per_byte
        found[f"bits_per_byte_{steps}"] = Figure(bits, "bits per byte")
    return found


def exits(given: argparse.Namespace) -> Figures:
    """Return for each threshold the share of steps saved and the bits per byte over those without exit."""
    model, tokenizer = load(given.run, "cpu", "float32")
    found = {}
    for steps in STEPS[2:]:
        with chosen_depth(model, steps):
            whole = evaluate_documents(model, tokenizer, given.texts).figures().bits_per_byte
        for threshold in THRESHOLDS[:: 3 if given.dry_run else 1]:
            with chosen_depth(model, steps, threshold) as told:
                bits = evaluate_documents(model, tokenizer, given.texts).figures().bits_per_byte
            name = f"from_{steps}_at_{threshold:g}"
            found[f"saved_{name}"] = Figure(1 - told["mean_steps"] / steps, "share of steps")
            found[f"bits_ratio_{name}"] = Figure(bits / whole, "ratio")
    return found


@torch.inference_mode()
def bits_by_cache(model: PreTrainedModel, ids: list[int], prompt: int) -> float:
    """Return the mean bits of the tokens behind a prompt, each read alone on the cache."""
    cache, total = DynamicCache(config=model.config), 0.0
    logits = model(torch.tensor([ids[:prompt]]), past_key_values=cache).logits[0, -1]
    for token in ids[prompt:]:
        total -= float(logits.float().log_softmax(-1)[token]) / math.log(2)
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    return total / (len(ids) - prompt)


def caches(given: argparse.Namespace) -> Figures:
    """Return bits a token with keys and values of all steps, and of the last one."""
    model, tokenizer = load(given.run, "cpu", "float32")
    rows, length = (2, 24) if given.dry_run else (32, min(256, model.config.max_position_embeddings))
    start = [start_token_id(tokenizer)]
    encoded = [start + tokenizer.encode(text, add_special_tokens=False)[: length - 1] for text in given.texts]
    encoded = [ids for ids in encoded if len(ids) == length][:rows]
    found = {}
    for name, last in (("all", False), ("last", True)):
        set_depth(model, last_step_cache=last)
        bits = statistics.fmean(bits_by_cache(model, ids, length // 4) for ids in encoded)
        found[f"bits_per_token_{name}_steps_cached"] = Figure(bits, "bits per token")
    ratio = found["bits_per_token_last_steps_cached"].value / found["bits_per_token_all_steps_cached"].value
    return found | {"bits_ratio": Figure(ratio, "ratio")}


def speeds(given: argparse.Namespace) -> Figures:
    """Return tokens a second of each way, measured in turns, over that of four steps, and the drafts' acceptance."""
    settings = GenerationSettings(max_length=16 if given.dry_run else 128, min_length=8, temperature=0)
    ways: dict[str, Any] = {f"torch_{steps}": load_text_model(given.run, "cpu", num_steps=steps) for steps in STEPS}
    ways["torch_8_exit"] = load_text_model(given.run, "cpu", num_steps=8, exit_threshold=0.05)
    ways |= {f"torch_{n}_drafts": load_text_model(given.run, "cpu", num_steps=n, draft_tokens=4) for n in (4, 8)}
    if given.gguf:
        from fanformer.gguf.export import Settings, export_gguf

        file = given.work / "model-f32.gguf"
        export_gguf(given.run, file, Settings("f32", overwrite=True))
        ways |= {f"ggml_{steps}": load_text_model(file, threads=1, num_steps=steps) for steps in STEPS}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {}
    for _ in range(given.rounds + 1):
        for name, model in ways.items():
            began = time.perf_counter()
            done = [next(model.complete([prompt], settings)) for prompt in PROMPTS[: 1 if given.dry_run else 3]]
            rates[name].append(sum(one.tokens for one in done) / (time.perf_counter() - began))
            texts[name] = [one.text for one in done]
    found = {}
    for name, values in rates.items():  # the first round warms up
        ratios = [a / b for a, b in zip(values[1:], rates["torch_4"][1:], strict=True)]
        found[f"rate_{name}"] = range_of(ratios, "ratio")
    for steps in (4, 8):
        speculation = ways[f"torch_{steps}_drafts"].speculation
        found[f"accepted_{steps}"] = Figure(speculation.accepted / speculation.drafted, "share of drafts")
        same = texts[f"torch_{steps}_drafts"] == texts[f"torch_{steps}"]
        found[f"drafts_equal_{steps}"] = Figure(float(same), "1 if equal")
    return found


def parses(text: str) -> bool:
    """Return whether Python parses a text up to its last whole line."""
    try:
        ast.parse(text.rpartition("\n")[0])
    except (SyntaxError, ValueError):
        return False
    return True


def completions(given: argparse.Namespace) -> Figures:
    """Return the share of completions of code that parse at every number of steps."""
    count, found = 9 if given.dry_run else 100, {}
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    for steps in STEPS:
        model = load_text_model(given.run, "cpu", num_steps=steps)
        settings = GenerationSettings(max_length=8 if given.dry_run else 96, seed=0)
        done = list(model.complete(prompts, settings))
        share = statistics.fmean(parses(one.prompt + one.text) for one in done)
        found[f"parse_{steps}"] = Figure(share, "share of texts")
    return found


def retrofit(given: argparse.Namespace) -> Figures:
    """Continue a plain run plain and as recurrent on the same tokens, and return their held-out bits per byte."""
    found, tokens = {}, 2048 if given.dry_run else parse_count(given.tokens)
    plain, _ = load(given.base, "cpu", "float32")
    for name, preset in (("plain", "nano"), ("recurrent", given.preset)):
        folder = given.work / f"retrofit-{name}"
        asked = {"preset": preset, "init_from": str(given.base), "output_dir": str(folder), "tokens": tokens}
        if given.dry_run:
            asked |= {"batch_size": 2, "sequence_length": 32, "max_data_bytes": 100_000, "eval_tokens": 256}
            asked |= {"final_eval_tokens": 256, "compile": "off", "device": "cpu", "precision": "float32"}
        result = train(resolve(overrides={**asked, "overwrite": True}))
        assert result.held_out is not None, "a run that ends is measured"
        found[f"bits_per_byte_{name}"] = Figure(result.held_out.bits_per_byte, "bits per byte")
    from fanformer.training.run_model import recurrent_from

    ids = torch.arange(1, 24)[None]
    config = resolve(overrides={"preset": given.preset, "init_from": str(given.base)})
    deep = recurrent_from(plain, config).eval()
    with torch.no_grad():
        same = torch.equal(deep(ids, num_steps=1).logits, plain(ids).logits)
    return found | {"first_step_is_plain": Figure(float(same), "1 if equal")}


MEASURES: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "dial": dial, "exit": exits, "cache": caches, "speed": speeds, "parse": completions, "retrofit": retrofit,
}  # fmt: skip


def main() -> None:
    """Measure the parts that are asked for, print them, and with --write put them into the ledger."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a trained model with recurrent depth")
    parser.add_argument("--text", type=Path, required=True, help="held-out text, documents apart by blank lines")
    parser.add_argument("--base", type=Path, help="folder of the plain run to continue, for the part `retrofit`")
    parser.add_argument("--preset", default="nano-recurrent", help="whose depth the continued run gets")
    parser.add_argument("--tokens", default="500k", help="of the continued runs")
    parser.add_argument("--parts", default=",".join(PARTS[:-1]))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/latent-depth-parts"))
    for flag in ("--gguf", "--dry-run", "--write"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.texts = [text for text in given.text.read_text(encoding="utf-8").split("\n\n\n") if text.strip()]
    if given.dry_run:
        given.texts, given.rounds = given.texts[:4], 1
    for part in given.parts.split(","):
        figures = MEASURES[part](given)
        for name, figure in figures.items():
            print(f"{part} {name}: {figure.value:.5g} {figure.unit}", flush=True)
        if given.write and not given.dry_run:
            what = f"recurrent depth, {part}, of {given.run.name}"
            configuration = {"part": part, "run": given.run.name, "text": given.text.name, "rounds": given.rounds}
            entry = measured_today(
                f"latent-depth-{part}-{given.run.name}", what=what, configuration=configuration, result=figures
            )
            write_entry(RESULTS, entry)


if __name__ == "__main__":
    main()
