"""How a state machine that drives real processes runs: a fixed short form, or random for as long as one is told to."""

import json
import os
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

SECONDS_VARIABLE = "FANFORMER_LIFECYCLE_SECONDS"
COUNT_VARIABLE = "FANFORMER_LIFECYCLE_COUNT"
"""Names a file that gets the number of sequences of a long form, as `benchmarks/proofs/lifecycle.py` wants it."""


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
    sequences = 0

    class Counted(machine):
        """Counts how often it ends."""

        def teardown(self) -> None:
            nonlocal sequences
            sequences += 1
            super().teardown()

    started = time.monotonic()
    try:
        while time.monotonic() < started + float(seconds):
            run_state_machine_as_test(Counted, settings=settings(max_examples=examples, **common))
    finally:
        count = {"sequences": sequences, "rules_in_each": steps, "seconds": round(time.monotonic() - started)}
        if COUNT_VARIABLE in os.environ:
            Path(os.environ[COUNT_VARIABLE]).write_text(json.dumps(count), encoding="utf-8")
