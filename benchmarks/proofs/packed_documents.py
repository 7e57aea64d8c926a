"""Show that documents packed into one row have the logits and gradients that each has alone.

    python benchmarks/proofs/packed_documents.py [--preset 92m] [--length 1024] [--documents 12] [--write]

Token ids and weights of seed 0, float32, by every way to attend that a CPU has: SDPA, eager, and blocks of queries, as
compiled training has them. Matrices are drawn with variance 1 / columns, since fresh ones of the writers are zero, and
blocks that write nothing agree whatever they read. The control is the same row without positions, where documents see
each other.
"""

import argparse
import itertools
from pathlib import Path

import torch
from torch import Tensor

from fanformer.comparison.ledger import EXACT, Figure, measured_today, write_entry
from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.training.attention import attend_in_blocks
from fanformer.training.configuration import load_preset

RESULTS = Path(__file__).parents[1] / "results"
WAYS = ("sdpa", "eager", "blocks")


def build(fields: dict[str, object], way: str) -> FANformerForCausalLM:
    """Return a model of seed 0 that attends in a way of WAYS and drops nothing, in training mode."""
    torch.manual_seed(0)
    model = FANformerForCausalLM(FANformerConfig(**{**fields, "dropout": 0.0})).train()
    with torch.no_grad():
        for matrix in (parameter for parameter in model.parameters() if parameter.ndim == 2):
            matrix.normal_(0.0, matrix.shape[1] ** -0.5)
    model.set_attn_implementation("eager" if way == "eager" else "sdpa")
    return model


def cut(length: int, number: int) -> list[Tensor]:
    """Return the positions of `number` documents of different lengths that fill a row of `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.randperm(length - 1, generator=generator)[: number - 1].sort().values + 1
    bounds = [0, *inner.tolist(), length]
    return [torch.arange(end - begin) for begin, end in itertools.pairwise(bounds)]


def gradients(model: FANformerForCausalLM, logits: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Return the gradients of (logits weight).sum()."""
    model.zero_grad()
    (logits * weight).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare(model: FANformerForCausalLM, way: str, length: int, number: int) -> dict[str, float]:
    """Return the largest differences of logits and gradients, and that of logits where documents see each other."""
    generator, vocabulary = torch.Generator().manual_seed(1), model.config.vocab_size
    ids = torch.randint(vocabulary, (1, length), generator=generator)
    weight = torch.randn(length, vocabulary, generator=generator) / vocabulary
    positions = cut(length, number)
    parts = ids.split([len(one) for one in positions], dim=1)
    alone = torch.cat([model(part, use_cache=False).logits[0] for part in parts])
    expected = gradients(model, alone, weight)
    if way == "blocks":
        attend_in_blocks(model)
        for layer in model.model.layers:
            layer.compile(dynamic=False, backend="aot_eager")  # only compiled code attends in blocks
    packed = model(ids, position_ids=torch.cat(positions)[None], use_cache=False).logits[0]
    found = gradients(model, packed, weight)
    with torch.no_grad():
        leaking = model(ids, use_cache=False).logits[0]
    apart = [(found[name] - right).abs().max() / right.abs().max() for name, right in expected.items()]
    return {
        "logit_difference": float((packed - alone).detach().abs().max()),
        "gradient_difference": float(torch.stack(apart).max()),
        "leaking_difference": float((leaking - alone).detach().abs().max()),
    }


def main() -> None:
    """Compare, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="92m")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the row")
    parser.add_argument("--documents", type=int, default=12, help="documents in it")
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    arguments = parser.parse_args()
    fields = load_preset(arguments.preset).model
    found: dict[str, dict[str, float]] = {}
    for way in WAYS:
        found[way] = compare(build(fields, way), way, arguments.length, arguments.documents)
        print(f"| {way} | " + " | ".join(f"{value:.2e}" for value in found[way].values()) + " |", flush=True)
    largest = {name: max(one[name] for one in found.values()) for name in ("logit_difference", "gradient_difference")}
    result = {
        "largest_logit_difference": Figure(largest["logit_difference"], "logits", interval=EXACT),
        "largest_gradient_difference": Figure(largest["gradient_difference"], "of a weight's largest", interval=EXACT),
    }
    if arguments.write:
        entry = measured_today(
            "packing-{date}",
            what="documents packed into one row beside each alone",
            seeds=[0],
            configuration={"preset": arguments.preset, "length": arguments.length, "documents": arguments.documents},
            result=result,
            details=found,
        )
        print(f"written to {write_entry(RESULTS, entry)}")


if __name__ == "__main__":
    main()
