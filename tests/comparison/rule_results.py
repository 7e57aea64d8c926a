"""Results of a rule's trainings that are made rather than trained."""

from fanformer.comparison.rule_learning import RulePoint, RuleResult, rule_fields
from fanformer.comparison.rule_score import Accuracy, Grid, RuleScore
from fanformer.comparison.rules import create_task

MODULUS = 11


def result(task, score, seed=0):
    """A training with the given score; everything that no report reads is the same."""
    return RuleResult(
        task=task.to_dict(),
        settings=rule_fields(task, max_steps=5, seed=seed),
        model_type="fanformer",
        parameters=1200,
        block_parameters=1000,
        steps=5,
        reached_end=True,
        stopped_by=None,
        seconds=1.0,
        examples_per_second=5.0,
        curve=[RulePoint(5, 0.1, 1.0, 0.5, 0.0, 1.0)],
        score=score,
    )


def on_plane(side, inside, outside=1.0, seed=0):
    task = create_task("modular-addition", modulus=MODULUS, hole_side=side)
    first, last = task.hole

    def value(a, b):
        return inside if first <= a <= last and first <= b <= last else outside

    plane = range(MODULUS)
    grid = Grid(
        task.hole,
        [[round(100 * value(a, b)) for b in plane] for a in plane],
        ["".join(str(round(value(a, b))) for b in plane) for a in plane],
    )
    train, test = Accuracy(outside, outside, len(task.train)), Accuracy(inside, inside / 2, len(task.test))
    return result(task, RuleScore(train, test, grid=grid), seed)


def over_periods(longer, seed=0):
    task = create_task("periodic", trained_period=5, longest_period=8, num_symbols=10, num_train_rows=90)
    accuracy = {period: Accuracy(1.0 if period <= 5 else longer, longer, 100) for period in range(3, 9)}
    return result(task, RuleScore(Accuracy(1.0, 1.0, 90), Accuracy(longer, longer, 300), by_period=accuracy), seed)
