"""How a state machine that drives real processes runs: a fixed short form, or random for as long as one is told to."""

import os
import time

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

SECONDS_VARIABLE = "FANFORMER_LIFECYCLE_SECONDS"


def run_lifecycle(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    """Run a state machine.

    The same examples every time, unless SECONDS_VARIABLE is set: then random ones until that many seconds are over.

    Args:
        machine: the class.
        examples: sequences of rules in the short form.
        steps: rules in a sequence.
    """
    common = {
        "stateful_step_count": steps,
        "deadline": None,
        "database": None,
        "suppress_health_check": list(HealthCheck),
        "phases": [Phase.generate],  # shrinking would run many more processes for sequences that are short anyway
        "print_blob": True,
    }
    seconds = os.environ.get(SECONDS_VARIABLE)
    if seconds is None:
        short = settings(max_examples=examples, derandomize=True, **common)
        run_state_machine_as_test(machine, settings=short)
        return
    deadline = time.monotonic() + float(seconds)
    while time.monotonic() < deadline:
        run_state_machine_as_test(machine, settings=settings(max_examples=examples, **common))
