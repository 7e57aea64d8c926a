"""Training tokens a second on the CPU: ours beside Llama in SmolLM2-135M's shape and a Llama of as many parameters.

    python benchmarks/speed/training.py [--batch 2] [--length 512] [--rounds 5] [--write]

The same loss code, fused AdamW, attention and compiled blocks for all, float32, steps in turns. Beside the ratios it
says how much of the machine each step reaches: its operations, as `footprint.OPERATIONS` counts them, over those of a
large matrix product in the same time.
"""

from speed import (
    EQUAL,
    OURS,
    THEIRS,
    Trainee,
    arguments_of,
    build,
    ceilings,
    finish,
    in_turns,
    random_ids,
    times_faster,
)

from fanformer.comparison.ledger import Figure, range_of
from fanformer.model.footprint import footprint


def main() -> None:
    """Measure and print."""
    arguments = arguments_of(__doc__ or "", batch=2, length=512, rounds=5)
    ids = random_ids(arguments.batch, arguments.length)
    trainees = {name: Trainee(build(name)) for name in (OURS, THEIRS, EQUAL)}
    counts = {name: trainee.model.num_parameters() for name, trainee in trainees.items()}
    ceiling = ceilings()
    steps = {
        name: lambda trainee=trainee: trainee.step(input_ids=ids, labels=ids) for name, trainee in trainees.items()
    }
    seconds = in_turns(steps, arguments.rounds, warm_up=2)
    result = {
        "times_smollm2_135m": times_faster(seconds, OURS, THEIRS),
        "times_equal_parameters": times_faster(seconds, OURS, EQUAL),
    }
    for name, measured in seconds.items():
        rates = [ids.numel() / value for value in measured]
        work = 3 * footprint(trainees[name].model.config).forward_operations_at(arguments.length)
        key = name.replace("-", "_")
        result[f"tokens_per_second_{key}"] = range_of(rates, "tokens/s")
        result[f"share_of_product_rate_{key}"] = range_of(
            [rate * work / ceiling["product_gflops"] / 1e9 for rate in rates], "of the rate of a large product"
        )
        result[f"operations_per_token_{key}"] = Figure(work, "operations", interval="exact")
    finish(
        "speed-training",
        "training tokens a second on the CPU beside Llama",
        arguments,
        result,
        {"ceilings": ceiling, "parameters": counts, "seconds": seconds},
    )


if __name__ == "__main__":
    main()
