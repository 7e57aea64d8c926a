"""What a trained recurrent depth does: the dial, exit, drafts, caches, code that parses, and plain runs that go on so.

    python benchmarks/quality/latent_depth.py RUN ... [--text FILE] [--parts dial,exit,...] [--gguf] [--rounds 5]
        [--base PLAIN_RUN ...] [--tokens 500k] [--work runs/latent-depth-parts] [--dry-run] [--write]

Parts: `dial` (bits per byte at 1, 2, 4, 8 steps), `exit` (thresholds: steps saved and bits lost, from 8 and from 4),
`cache` (bits of a text read token by token with keys and values of all steps, and of the last), `speed` (greedy tokens
a second at each number of steps, with exit and with drafts, their acceptance, torch and ggml, in turns), `parse` (share
of completions of Python that parse), `retrofit` (a plain run continued plain and as recurrent, on the same tokens).
Several runs, or plain runs, are the seeds of one training: figures are then means with their intervals. What is done
stays in the work folder, and the same command goes on. `--dry-run` does all of it in little and proves nothing.
"""

import argparse
import ast
import dataclasses
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from cells import Work
from transformers import DynamicCache, PreTrainedModel

from fanformer.comparison.ledger import (
    EXACT,
    Figure,
    interval_over_seeds,
    measured_today,
    range_of,
    ratio_over_seeds,
    write_entry,
)
from fanformer.data.held_out import held_out_stream
from fanformer.data.sources.documents import open_source
from fanformer.data.tokenizer import start_token_id
from fanformer.evaluation.loss import evaluate_documents
from fanformer.files.durable import hash_files
from fanformer.generation.depth import chosen_depth, set_depth
from fanformer.generation.settings import GenerationSettings
from fanformer.loading import load, load_config, load_text_model, load_tokenizer
from fanformer.training.configuration import parse_count, resolve
from fanformer.training.run import train

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("dial", "exit", "cache", "speed", "parse", "retrofit")
STEPS = (1, 2, 4, 8)
THRESHOLDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
MOST_LOST = 1.002
"""Bits per byte over those without exit up to which a threshold counts as free."""
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


def texts_of(given: argparse.Namespace) -> list[str]:
    """Return the documents of the text that is asked for, else those that the run held out."""
    if given.text is not None:
        return [document.text for document in open_source(str(given.text))]
    tokenizer = load_tokenizer(given.run, load_config(given.run).vocab_size)
    stream = held_out_stream(given.run, tokenizer, None, 1 << 30)
    ids = np.asarray(stream.tokens[:])
    ends = np.flatnonzero(np.isin(ids, [stream.start_id, stream.end_id]))
    parts = [part[1:].tolist() for part in np.split(ids, ends) if len(part) > 1]
    return [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts]


def digest_of(texts: Sequence[str]) -> str:
    """Return a hash of documents."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def dial(given: argparse.Namespace) -> Figures:
    """Return the bits per byte of the text at every number of steps, and each over those at half as many."""
    model, tokenizer = load(given.run, "cpu", "float32")
    bits = {}
    for steps in STEPS:
        with chosen_depth(model, steps):
            bits[steps] = evaluate_documents(model, tokenizer, given.texts).figures().bits_per_byte
    found = {f"bits_per_byte_{steps}": Figure(value, "bits per byte") for steps, value in bits.items()}
    return found | {
        f"bits_ratio_{steps}_over_{steps // 2}": Figure(bits[steps] / bits[steps // 2], "ratio") for steps in STEPS[1:]
    }


def exits(given: argparse.Namespace) -> Figures:
    """Return for each threshold the share of steps saved and the bits per byte over those without exit.

    Every other document chooses the threshold that saves most among those that are as good as free; figures are of the
    others. `saved_from_R` is what the chosen one saves there, 0 where none is free or that one is not.
    """
    model, tokenizer = load(given.run, "cpu", "float32")
    found = {}

    def bits(texts: list[str]) -> float:
        return evaluate_documents(model, tokenizer, texts).figures().bits_per_byte

    for steps in STEPS[2:]:
        halves = given.texts[::2], given.texts[1::2]
        with chosen_depth(model, steps):
            whole = [bits(half) for half in halves]
        best, saved_then = 0.0, 0.0
        for threshold in THRESHOLDS[:: 3 if given.dry_run else 1]:
            ratios, saved = [], []
            for half, alone in zip(halves, whole, strict=True):
                with chosen_depth(model, steps, threshold) as told:
                    ratios.append(bits(half) / alone)
                saved.append(1 - told["mean_steps"] / steps)
            name = f"from_{steps}_at_{threshold:g}"
            found[f"saved_{name}"] = Figure(saved[1], "share of steps")
            found[f"bits_ratio_{name}"] = Figure(ratios[1], "ratio")
            if ratios[0] <= MOST_LOST and saved[0] > best:
                best, saved_then = saved[0], saved[1] if ratios[1] <= MOST_LOST else 0.0
        found[f"saved_from_{steps}"] = Figure(saved_then, "share of steps")
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
    start, encoded = start_token_id(tokenizer), []
    for text in given.texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        encoded += [[start, *ids[at : at + length - 1]] for at in range(0, len(ids) - length + 2, length - 1)]
        if len(encoded) >= rows:
            break
    if not encoded:
        raise SystemExit(f"no document of the text has {length - 1} tokens, which the part `cache` reads: give another")
    encoded, found = encoded[:rows], {}
    for name, last in (("all", False), ("last", True)):
        set_depth(model, last_step_cache=last)
        bits = statistics.fmean(bits_by_cache(model, ids, length // 4) for ids in encoded)
        found[f"bits_per_token_{name}_steps_cached"] = Figure(bits, "bits per token")
    ratio = found["bits_per_token_last_steps_cached"].value / found["bits_per_token_all_steps_cached"].value
    return found | {"bits_ratio": Figure(ratio, "ratio")}


def speeds(given: argparse.Namespace) -> Figures:
    """Return tokens a second of each way, measured in turns, and over that of four steps; and what drafts do."""
    settings = GenerationSettings(max_length=16 if given.dry_run else 128, min_length=8, temperature=0)
    ways: dict[str, Any] = {f"torch_{steps}": load_text_model(given.run, "cpu", num_steps=steps) for steps in STEPS}
    ways["torch_8_exit"] = load_text_model(given.run, "cpu", num_steps=8, exit_threshold=0.05)
    ways |= {f"torch_{n}_drafts": load_text_model(given.run, "cpu", num_steps=n, draft_tokens=4) for n in (4, 8)}
    if given.gguf:
        from fanformer.gguf.export import Settings, export_gguf

        file = given.work / "model-f32.gguf"
        export_gguf(given.run, file, Settings("f32", overwrite=True))
        threads = torch.get_num_threads()  # as many as torch has
        ways |= {f"ggml_{steps}": load_text_model(file, threads=threads, num_steps=steps) for steps in STEPS}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    prompts = PROMPTS[: 1 if given.dry_run else 3]
    for _ in range(given.rounds + 1):
        for name, model in ways.items():
            began = time.perf_counter()
            done = [next(model.complete([prompt], settings)) for prompt in prompts]
            rates[name].append(sum(one.tokens for one in done) / (time.perf_counter() - began))
    found = {}

    def beside(name: str, other: str) -> Figure:  # the first round warms up
        return range_of([a / b for a, b in zip(rates[name][1:], rates[other][1:], strict=True)], "ratio")

    for name in rates:
        found[f"rate_{name}"] = beside(name, "torch_4")
        found[f"tokens_per_second_{name}"] = range_of(rates[name][1:], "tokens/s")
    for steps in (4, 8):
        found[f"drafts_times_faster_{steps}"] = beside(f"torch_{steps}_drafts", f"torch_{steps}")
        speculation = ways[f"torch_{steps}_drafts"].speculation
        found[f"accepted_{steps}"] = Figure(speculation.accepted / speculation.drafted, "share of drafts")
        same = drafts_are_exact(given.run, steps, prompts, settings)
        found[f"drafts_equal_{steps}"] = Figure(float(same), "1 if equal", interval=EXACT)
    return found


def drafts_are_exact(run: Path, steps: int, prompts: Sequence[str], settings: GenerationSettings) -> bool:
    """Return whether drafts leave the text as it is, in float64, where no other order of sums decides about a token."""
    texts = []
    for drafts in (None, 4):
        model: Any = load_text_model(run, "cpu", "float32", num_steps=steps, draft_tokens=drafts)
        model.model.double()
        texts.append([next(model.complete([prompt], settings)).text for prompt in prompts])
    return texts[0] == texts[1]


def parses(text: str) -> bool:
    """Return whether Python parses a text up to its last whole line, of which there must be one that says something."""
    whole = text.rpartition("\n")[0]
    try:
        ast.parse(whole)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(whole.strip())


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
    bits, tokens = {}, 2048 if given.dry_run else parse_count(given.tokens)
    plain, _ = load(given.base, "cpu", "float32")
    for name, preset in (("plain", given.preset.removesuffix("-recurrent")), ("recurrent", given.preset)):
        folder = given.work / f"retrofit-{name}-{given.number}"
        asked = {"preset": preset, "init_from": str(given.base), "output_dir": str(folder), "tokens": tokens}
        asked |= {"precision": "float32", "compile": "off"}  # the same for both, whatever else the machine does
        if given.dry_run:
            asked |= {"batch_size": 2, "sequence_length": 32, "max_data_bytes": 100_000, "eval_tokens": 256}
            asked |= {"final_eval_tokens": 256, "device": "cpu"}
        result = train(resolve(overrides={**asked, "resume": True}))
        if not result.reached_end or result.held_out is None:
            raise SystemExit(f"{folder} was stopped after step {result.step}: the same command goes on")
        bits[name] = result.held_out.bits_per_byte
    from fanformer.training.run_model import recurrent_from

    ids = torch.arange(1, 24)[None]
    config = resolve(overrides={"preset": given.preset, "init_from": str(given.base)})
    deep = recurrent_from(plain, config).eval()
    with torch.no_grad():
        same = torch.equal(deep(ids, num_steps=1).logits, plain(ids).logits)
    return {
        **{f"bits_per_byte_{name}": Figure(value, "bits per byte") for name, value in bits.items()},
        "bits_ratio": Figure(bits["recurrent"] / bits["plain"], "ratio"),
        "first_step_is_plain": Figure(float(same), "1 if equal", interval=EXACT),
    }


MEASURES: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "dial": dial, "exit": exits, "cache": caches, "speed": speeds, "parse": completions, "retrofit": retrofit,
}  # fmt: skip


def over_runs(found: Sequence[Figures]) -> Figures:
    """Return the figures of one run, or those of several as means with intervals; of what must be equal the worst."""
    if len(found) == 1:
        return found[0]
    together = {}
    for name, first in found[0].items():
        values = [figures[name].value for figures in found]
        if first.interval == EXACT:
            together[name] = dataclasses.replace(first, value=min(values))
        elif first.unit == "ratio":
            together[name] = ratio_over_seeds(values)
        else:
            together[name] = interval_over_seeds(values, first.unit)
    return together


def seeds_of(runs: Sequence[Path]) -> list[int]:
    """Return the seeds that runs were begun with, none of folders that tell none."""
    files = [run / "run.yaml" for run in runs]
    if not all(file.is_file() for file in files):
        return []
    return [int(yaml.safe_load(file.read_text(encoding="utf-8"))["configuration"]["seed"]) for file in files]


def measured(given: argparse.Namespace, part: str, runs: Sequence[Path]) -> Figures:
    """Return the figures of a part over the runs, each measured where that is not done."""
    work, found = Work(given.work), []
    for number, run in enumerate(runs):
        cell = f"{part}-{number}"
        if not work.has(cell):
            one = argparse.Namespace(**{**vars(given), "run": run, "base": run, "number": number})
            one.texts = texts_of(one)[: 4 if given.dry_run else None] if part in ("dial", "exit", "cache") else []
            figures = {name: dataclasses.asdict(figure) for name, figure in MEASURES[part](one).items()}
            work.keep(cell, {"figures": figures, "text": digest_of(one.texts)})
        found.append({name: Figure(**content) for name, content in work.read(cell)["figures"].items()})
    return over_runs(found)


def write(given: argparse.Namespace, part: str, runs: Sequence[Path], figures: Figures) -> None:
    """Write a part's entry into the ledger."""
    parameters = load(runs[0], "cpu", "float32").model.num_parameters()
    size = f"{parameters / 1e6:.3g}M"
    configuration = {"part": part, "scale": f"{size} parameters", "runs": [str(run) for run in runs]}
    configuration |= {"rounds": given.rounds, "threads": torch.get_num_threads()} if part == "speed" else {}
    configuration |= {"preset": given.preset, "tokens": given.tokens} if part == "retrofit" else {}
    text = "what the run held out" if given.text is None else given.text.name
    digest = hashlib.sha256("".join(Work(given.work).read(f"{part}-{n}")["text"] for n in range(len(runs))).encode())
    data = {"source": text, "fingerprint": digest.hexdigest()} if part in ("dial", "exit", "cache") else None
    entry = measured_today(
        f"latent-depth-{part}-{size.lower()}-{{date}}",
        what=f"recurrent depth, {part}, over {len(runs)} run{'s' if len(runs) > 1 else ''} of {size} parameters",
        configuration=configuration,
        seeds=seeds_of(runs),
        data=data,
        result=figures,
    )
    print(write_entry(RESULTS, entry), flush=True)


def settings_of(given: argparse.Namespace) -> dict[str, str]:
    """Return all that figures depend on, as text: of folders and of a text what is in them, not their names alone."""
    names = ("text", "preset", "tokens", "rounds", "gguf", "dry_run", "runs", "base")
    weights = [hash_files(run.glob("*.safetensors")) for run in (*given.runs, *given.base)]
    settings = {name: vars(given)[name] for name in names} | {"threads": torch.get_num_threads(), "weights": weights}
    if given.text is not None:  # what a run held out goes with its weights
        settings["text_digest"] = digest_of(texts_of(given))
    return {name: str(value) for name, value in settings.items()}


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what is asked for; what cannot be done ends here, before anything is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of a model trained with its depth")
    parser.add_argument("--text", type=Path, help="held-out text (default: what each run held out)")
    parser.add_argument("--base", metavar="PLAIN_RUN", type=Path, nargs="+", default=[], help="for the part `retrofit`")
    parser.add_argument("--preset", default="nano-recurrent", help="whose depth the continued runs get")
    parser.add_argument("--tokens", default="500k", help="of the continued runs")
    parser.add_argument("--parts", help=f"of {','.join(PARTS)} (default: all, `retrofit` where there is a --base)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/latent-depth-parts"))
    for flag in ("--gguf", "--dry-run", "--write"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args(words)
    given.parts = (given.parts or ",".join(PARTS if given.base else PARTS[:-1])).split(",")
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f"--parts must be of {', '.join(PARTS)}, got {unknown[0]!r}")
    if "retrofit" in given.parts and not given.base:
        parser.error("the part `retrofit` needs --base, the folder of a plain run")
    if given.write and given.dry_run:
        parser.error("--write has no effect with --dry-run, whose figures mean nothing: leave it out")
    for run in given.runs:
        if getattr(load_config(run), "recurrence", None) is None:
            parser.error(f"{run} has no recurrent depth: name the folder of a run of a preset such as nano-recurrent")
    if given.dry_run:
        given.rounds = 1
    return given


def main() -> None:
    """Measure the parts that are asked for, print them, and with --write put them into the ledger."""
    given = parsed()
    Work(given.work).begin(settings_of(given))
    for part in given.parts:
        runs = given.base if part == "retrofit" else given.runs
        figures = measured(given, part, runs)
        for name, figure in figures.items():
            ends = "" if figure.low is None or figure.high is None else f" ({figure.low:.5g} to {figure.high:.5g})"
            print(f"{part} {name}: {figure.value:.5g}{ends} {figure.unit}", flush=True)
        if given.write:
            write(given, part, runs, figures)


if __name__ == "__main__":
    main()
