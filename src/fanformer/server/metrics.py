"""Numbers for Prometheus, in its text format; labels are names of models, routes and outcomes, nothing of requests.

Source: Prometheus' exposition formats, text format 0.0.4.
"""

from collections.abc import Iterable, Mapping

from fanformer.server.gate import Gate
from fanformer.server.models import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_QUANTILES = (0.5, 0.9, 0.99)
_Sample = tuple[Mapping[str, object], float]


def render(models: Iterable[ServedModel], gate: Gate, lost_log_lines: int) -> str:
    """Return all numbers as text."""
    lines: list[str] = []

    def put(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> None:
        lines.append(f"# HELP fanformer_{name} {text}")
        lines.append(f"# TYPE fanformer_{name} {kind}")
        lines.extend(f"fanformer_{name}{_labels(labels)} {value:.10g}" for labels, value in samples)

    served = list(models)
    counters = [({"model": one.name}, one.scheduler) for one in served]
    put(
        "responses_total",
        "counter",
        "Responses by route and status.",
        [({"route": route, "status": status}, count) for (route, status), count in sorted(gate.responses.items())],
    )
    put(
        "answers_total",
        "counter",
        "Answers by what ended them.",
        [
            ({**labels, "outcome": outcome}, count)
            for labels, one in counters
            for outcome, count in one.counters.finished.items()
        ],
    )
    for name, text in (
        ("prompt_tokens", "Tokens of prompts."),
        ("cached_tokens", "Of these, tokens that a slot still held."),
        ("completion_tokens", "Tokens written."),
        ("steps", "Steps computed."),
        ("refused", "Answers refused for want of room in the queue."),
        ("busy_seconds", "Seconds spent computing."),
    ):
        put(f"{name}_total", "counter", text, [(labels, getattr(one.counters, name)) for labels, one in counters])
    put("answers_running", "gauge", "Answers that have a slot.", [(labels, one.running) for labels, one in counters])
    put("answers_waiting", "gauge", "Answers that wait for one.", [(labels, one.waiting) for labels, one in counters])
    put("slots", "gauge", "Slots.", [(labels, one.slots.count) for labels, one in counters])
    put(
        "memory_bytes",
        "gauge",
        "Weights, keys and values.",
        [({"model": one.name}, one.memory_bytes) for one in served],
    )
    first: list[_Sample] = []
    for labels, one in counters:
        seconds = sorted(one.counters.first_token_seconds.copy())
        for quantile in _QUANTILES if seconds else ():
            first.append(
                ({**labels, "quantile": quantile}, seconds[min(int(quantile * len(seconds)), len(seconds) - 1)])
            )
    put("first_token_seconds", "gauge", "From arrival to the first token, of the last 512 answers.", first)
    put("draining", "gauge", "Whether newcomers are sent away.", [({}, float(gate.draining))])
    put("log_lines_lost_total", "counter", "Lines of the log that could not be written.", [({}, lost_log_lines)])
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, object]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
