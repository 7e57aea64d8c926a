"""Count the parameters of preset 92m and of SmolLM2-135M, from which its size is claimed to differ.

    python benchmarks/proofs/parameters.py [--write]

Both are counted on the meta device by the code behind `fanformer info`; the shape of SmolLM2-135M is that of its
published config.json.
"""

import argparse
from pathlib import Path

from transformers import LlamaConfig

from fanformer.comparison.architectures import SMOLLM2_135M
from fanformer.comparison.ledger import EXACT, Figure, measured_today, write_entry
from fanformer.model import FANformerConfig
from fanformer.model.footprint import Footprint, footprint
from fanformer.training.configuration import load_preset

RESULTS = Path(__file__).parents[1] / "results"


def to_result(ours: Footprint, theirs: Footprint) -> dict[str, Figure]:
    """Return both counts and their ratios."""
    counts = {
        "parameters": ours.total,
        "parameters_smollm2_135m": theirs.total,
        "parameters_without_embeddings": ours.without_embeddings,
        "parameters_without_embeddings_smollm2_135m": theirs.without_embeddings,
    }
    result = {name: Figure(count, "parameters", interval=EXACT) for name, count in counts.items()}
    blocks = ours.without_embeddings / theirs.without_embeddings
    return result | {
        "size_ratio": Figure(ours.total / theirs.total, "times SmolLM2-135M", interval=EXACT),
        "size_ratio_without_embeddings": Figure(blocks, "times SmolLM2-135M", interval=EXACT),
    }


def main() -> None:
    """Count, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    arguments = parser.parse_args()
    shape = load_preset("92m").model
    result = to_result(footprint(FANformerConfig(**shape)), footprint(LlamaConfig(**SMOLLM2_135M)))
    for name, figure in result.items():
        print(f"| {name.replace('_', ' ')} | {figure.value:,} |")
    if arguments.write:
        entry = measured_today(
            "parameters-{date}",
            what="parameters of preset 92m and of SmolLM2-135M, which has the same tokenizer",
            configuration={"preset": "92m", "model": shape, "smollm2_135m": SMOLLM2_135M},
            result=result,
        )
        print(f"written to {write_entry(RESULTS, entry)}")


if __name__ == "__main__":
    main()
