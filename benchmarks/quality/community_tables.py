"""What the cells of the community benchmark come to: figures for the ledger, tables for the page."""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from community_attacks import ATTACKS

from fanformer.comparison.ledger import EXACT, Figure, interval_over_seeds, ratio_over_seeds

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Of every arm the results of its seeds, in the order of the seeds."""
PUBLISHED = {"30x2": 0.7, "30x4": 2.0, "30x8": 3.9}
"""Per cent above data-parallel training of DiLoCo with 35M parameters, rounds of 30 steps (arXiv:2503.09799)."""
REFERENCES = {"loss": "sync", "attacks": "clean", "coding": "8bit", "uneven": "even"}
"""Arm of each part that the others are compared with, seed by seed."""
ROUND_STEPS, MEMBERS = (30, 100, 500), (2, 4, 8)
WAYS = {
    "8 bits, base in float32": ("update_8", "base_float32"),
    "4 bits, base in float16": ("update_4", "base_float16"),
}
WORDS = {
    "sync": "synchronous training", "clean": "five honest members", "four": "four honest members, nobody false",
    "nan": "not a number", "scaled": "scaled by 100", "flipped": "sign flipped", "random": "random, of the same norm",
    "replayed": "replayed", "oversized": "oversized", "shapes": "wrong shapes",
    "stale": "made three rounds ago, labelled as of today", "bias": "a small consistent bias", "8bit": "8 bits",
    "4bit": "4 bits", "4bit-forgetful": "4 bits, what coding loses is lost",
    "fragments": "three fragments in turn, a round every 10 steps", "even": "four equal members",
    "slow": "one of the four ten times slower", "three": "three members, without the slow one",
    "coming-and-going": "eight, each there in half of the rounds, of which one in ten dies",
}  # fmt: skip


def payload_sizes(model: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of real payloads for a model, and how many parameters they are about.

    Args:
        model: fields of FANformerConfig.
    """
    import torch

    from fanformer.community.updates import Source, Update, encode_update, encode_weights, shapes_of
    from fanformer.model import FANformerConfig, FANformerForCausalLM
    from fanformer.training.state import model_tensors

    with torch.device("meta"):
        shapes = shapes_of(model_tensors(FANformerForCausalLM(FANformerConfig(**model))))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    update = Update(tensors, 100, "0" * 64, "member-0", 10**6, 3.0, (Source("stdlib", "PSF-2.0", 10**6),))
    sizes: dict[str, int] = {"parameters": sum(tensor.numel() for tensor in tensors.values())}
    sizes |= {f"update_{bits}": len(encode_update(update, bits)) for bits in (8, 4)}
    return sizes | {f"base_{dtype}": len(encode_weights(tensors, dtype)) for dtype in ("float32", "float16")}


def ddp_bytes(parameters: int, members: int) -> float:
    """Return what goes through a member's link, both ways, in a step of data-parallel training by a ring, in float32.

    Each sends 2 (N - 1) / N times the gradient, and gets as much.
    """
    return 2 * 2 * (members - 1) / members * 4 * parameters


def bytes_ratio(sizes: Mapping[str, int], way: str, round_steps: int, members: int) -> float:
    """Return how many times fewer bytes go through a member's link, both ways, than in data-parallel training."""
    update, base = WAYS[way]
    return ddp_bytes(sizes["parameters"], members) * round_steps / (sizes[update] + sizes[base])


def figures(part: str, found: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures of a part's entry."""
    if part == "bytes":
        return {
            f"{model}_{round_steps}x{members}_{WAYS[way][0]}_{WAYS[way][1]}": Figure(
                bytes_ratio(sizes, way, round_steps, members), "times fewer bytes", interval=EXACT
            )
            for model, sizes in found.items()
            for way in WAYS
            for round_steps in ROUND_STEPS
            for members in MEMBERS
        }
    told = {f"loss_{arm}": interval_over_seeds(_losses(results), "nats per token") for arm, results in found.items()}
    ratios = _ratios(part, found)
    told |= {f"ratio_{arm}": ratio_over_seeds(values) for arm, values in ratios.items()}
    attacks = [values for arm, values in ratios.items() if arm in ATTACKS]
    if attacks:
        told["ratio_worst"] = ratio_over_seeds(max(attacks, key=statistics.geometric_mean))
    if "slow" in ratios and "three" in ratios:
        told["slow_over_three"] = ratio_over_seeds(
            [mine / its for mine, its in zip(ratios["slow"], ratios["three"], strict=True)]
        )
    return told


def _losses(results: Sequence[Mapping[str, Any]]) -> list[float]:
    return [result["loss"] for result in results]


def _ratios(part: str, found: Results) -> dict[str, list[float]]:
    """Return of every arm, seed by seed, its loss over that of the part's reference."""
    reference = REFERENCES[part]
    if reference not in found:
        return {}
    return {
        arm: [mine / its for mine, its in zip(_losses(results), _losses(found[reference]), strict=True)]
        for arm, results in found.items()
        if arm != reference
    }


def table(part: str, found: Mapping[str, Any]) -> str:
    """Return a part's table for the page."""
    if part == "bytes":
        return _bytes_table(found)
    heads = ["", "held-out loss", f"over {WORDS[REFERENCES[part]]}"]
    if part == "loss":
        heads.append("published, 35M parameters")
    if part == "attacks":
        heads += ["its reports dropped", "clipped", "others' dropped", "rounds rejected"]
    lines = [heads, ["---"] * len(heads)]
    ratios = _ratios(part, found)
    for arm, results in found.items():
        line = [_words(arm), f"{statistics.fmean(_losses(results)):.4f}", _percent(ratios.get(arm))]
        if part == "loss":
            line.append(f"+{PUBLISHED[arm]:.1f}%" if arm in PUBLISHED else "")
        if part == "attacks":
            shares = [statistics.fmean(result[name] for result in results) for name in _SHARES]
            rejected, rounds = (sum(result[name] for result in results) for name in ("rejected_rounds", "rounds"))
            line += [f"{share:.0%}" for share in shares] + [f"{rejected} of {rounds}"]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_SHARES = ("false_dropped", "false_clipped", "honest_dropped")


def _words(arm: str) -> str:
    if match := re.fullmatch(r"(\d+)x(\d+)", arm):
        return f"{match[2]} members, rounds of {match[1]} steps"
    return WORDS[arm]


def _percent(ratios: Sequence[float] | None) -> str:
    """Return by how many per cent ratios are above 1, with the ends of their interval where they are several."""
    if ratios is None:
        return ""
    figure = ratio_over_seeds(ratios)
    told = f"{100 * (figure.value - 1):+.2f}%"
    if figure.low is None or figure.high is None:
        return told
    return f"{told} ({100 * (figure.low - 1):+.2f} to {100 * (figure.high - 1):+.2f})"


def _bytes_table(found: Mapping[str, Mapping[str, int]]) -> str:
    lines = [["", "inner steps in a round", *(f"{members} members" for members in MEMBERS)]]
    lines.append(["---"] * len(lines[0]))
    for model, sizes in found.items():
        for way, (update, base) in WAYS.items():
            sent = f"{model}, {sizes['parameters']:,} parameters, {way}: {sizes[update]:,} up, {sizes[base]:,} down"
            for round_steps in ROUND_STEPS:
                ratios = [f"{bytes_ratio(sizes, way, round_steps, members):,.0f} times" for members in MEMBERS]
                lines.append([sent if round_steps == ROUND_STEPS[0] else "", str(round_steps), *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def insert_table(page: Path, part: str, text: str) -> None:
    """Put a part's table between its marks in a page, in the place of what is there.

    Raises:
        SystemExit: if the page has no marks for it.
    """
    begin, end = f"<!-- table: {part} -->", f"<!-- end: {part} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} must have the marks {begin} and {end}, one of them is missing: the table goes there")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
