"""The card of the model in the box: what it is, what it read, how it was made, what it writes, and its limits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

import fanformer
from fanformer.data.preparation.prepare import open_prepared
from fanformer.files.durable import replace_text
from fanformer.generation.text_model import TextModel
from fanformer.training.folder import read_run_file

CARD_FILE, MEASURED = "README.md", "\n## Measured\n"
NOTICE = Path(__file__).parents[1] / "NOTICE"
PASSAGE = (
    "An old fisherman lived in a hut by the sea with his two daughters. Every morning he rowed out to the black rock, "
    "and every evening he brought home a basket of herring. One day he found a silver key in the belly of a fish."
)
BEGINNINGS = ("The old house at the end of the road", "In this chapter we will learn")
"""What the model is given to go on with, as plain text."""
QUESTIONS = (
    "Hello",
    "Tell me a short story called The Cat and the Moon.",
    f"{PASSAGE}\n\nWhat did the fisherman find in the belly of a fish?",
    f"{PASSAGE}\n\nWho painted the bridge?",
    "Repeat: lamp river goat",
    "Write JSON with the key dog and the value seven.",
    "What is the capital of France?",
)
"""What it is asked."""
_LENGTH = 100
_TRAININGS = {"base": "base", "mid": "mid-training", "tuned": "tuning"}
_FRONT = """---
language: en
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [fanformer]
---
"""
_LIMITS = """It is very small. What it says about the world is often wrong, and it does not know when. Its stories lose
their thread, and answers about a passage may not be in the passage: the section below has how often, where it is there.
It knows English only, cannot reckon, and repeats what its texts say, prejudice included: a third of them are old books.
It was not tuned to refuse anything. Use it to try the tools, to test and to study; not to learn facts from."""


def write_card(folder: Path, work: Path, results: Mapping[str, Mapping[str, Any]], shares: Mapping[str, float]) -> None:
    """Write README.md into the folder that ships.

    Args:
        folder: with weights, configuration and tokenizer.
        work: with the trainings `base`, `mid` and `tuned`.
        results: of the stages, by their names.
        shares: of the weights of `base` and `mid` in those that ship.
    """
    with safe_open(folder / "model.safetensors", "pt") as weights:
        parameters = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118  # no mapping
    text, base = results["text"], results["base"]
    rows = sum(results[name]["rows"] for name in ("rows-mid", "rows"))
    megabytes = open_prepared(work / "tokens").metadata["splits"]["train"]["bytes"] / 1e6
    about = (
        f"A FANformer of {parameters / 1e6:.1f} million parameters that comes with the package. It tells a short story "
        "from a title, continues English, answers a question about a passage or says that the passage does not hold "
        "the answer, and follows simple instructions.\n\n"
        f"Trained from nothing on {base['tokens'] / 1e6:.1f} million tokens of English (books, textbooks, Wikipedia, "
        f"fairy tales, children's stories; {megabytes:,.0f} MB, a small part of it several times), then on {rows:,} "
        "short conversations, most of them made by rules, and some of these texts. Its answers begin with a "
        "space, which `fanformer chat` leaves out.\n\n"
        "`fanformer chat`, `fanformer.load()` and the other commands take it where no folder is named. It has no code "
        "of its own: `import fanformer.model` before `AutoModelForCausalLM.from_pretrained`.\n\n"
        "Licence: MIT, as the package's. The texts it read have licences of their own, below."
    )
    _, _, sources = NOTICE.read_text(encoding="utf-8").partition("\n\n")
    parts = {
        "Data": f"{_left_out(text)}\n\n{sources.strip()}",
        "Training": f"{training_table(work, results)}\n\n{_mixture(shares)}",
        "What it writes": samples(fanformer.load(folder)),
        "Limits": _LIMITS,
    }
    sections = "\n\n".join(f"## {title}\n\n{content}" for title, content in parts.items())
    replace_text(folder / CARD_FILE, f"{_FRONT}\n# The model in the box\n\n{about}\n\n{sections}\n")


def _mixture(shares: Mapping[str, float]) -> str:
    parts = ", ".join(f"{100 * share:.3g}% {_TRAININGS[name]}" for name, share in shares.items())
    return f"The weights that ship are a mean of these trainings': {parts}, the rest tuning."


def _left_out(text: Mapping[str, Any]) -> str:
    return (
        f"{text['documents']:,} documents, one that is read several times counted as often. {text['left_out']} were "
        "left out, as they name or hold a story of FairytaleQA's validation split, on whose questions it is measured."
    )


def training_table(work: Path, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how base, mid-training and tuning went, as a table; arguments as in `write_card`."""
    lines = [f"| | {' | '.join(_TRAININGS.values())} |", "|---|---|---|---|"]
    runs = {name: read_run_file(work / name) for name in _TRAININGS}
    base = runs["base"]["model"]
    shape = f"{base['num_hidden_layers']} layers of width {base['hidden_size']}, {base['vocab_size']:,} tokens"

    def row(title: str, cells: Sequence[str]) -> None:
        lines.append(f"| {title} | {' | '.join(cells)} |")

    row("shape", [shape, *["the same"] * 2])
    row("tokens", [f"{results[name]['tokens']:,}" for name in runs])
    row("optimizer steps", [f"{results[name]['steps']:,}" for name in runs])
    row("hours", [f"{results[name]['hours']:.1f}" for name in runs])
    machines = [(run["machine"], run["environment"]) for run in runs.values()]
    row("computed in", [f"{decided['precision']}, {decided['threads']} threads" for _, decided in machines])
    row("processor", [str(machine["processor"]) for machine, _ in machines])
    bits = [f"{results[name]['bits_per_byte']:.4f}" for name in runs]
    measured = ("text-small, valid", *["answers, and texts that the base has read"] * 2)
    row("held-out bits per byte", [f"{value} ({name})" for value, name in zip(bits, measured, strict=True)])
    return "\n".join(lines)


def samples(model: TextModel) -> str:
    """Return what a model writes after fixed prompts, the n-th with seed n, as drawn."""
    told = [
        "As drawn by its generation_config.json, 100 tokens, seeds 0, 1, 2 and on; each question begins a conversation."
    ]
    for seed, beginning in enumerate(BEGINNINGS):
        text = model.generate(beginning, max_length=_LENGTH, seed=seed)
        told.append(f"Continued:\n\n{_quoted(beginning + text)}")
    for seed, question in enumerate(QUESTIONS, start=len(BEGINNINGS)):
        asked = model.encode_messages([{"role": "user", "content": question}])
        text = model.complete_ids(asked, question, model.settings(max_length=_LENGTH, seed=seed)).text
        told.append(f"Asked:\n\n{_quoted(question)}\n\nAnswered:\n\n{_quoted(text.strip())}")
    return "\n\n".join(told)


def _quoted(text: str) -> str:
    """Return a text as a block that no sign in it can end."""
    fence = "`" * max(3, 1 + max((len(run) for run in text.split() if set(run) == {"`"}), default=0))
    return f"{fence}text\n{text}\n{fence}"


def with_measured(card: str, table: str) -> str:
    """Return a card with a section of measurements at its end, in place of an older one."""
    return f"{card.partition(MEASURED)[0].rstrip()}\n{MEASURED}\n{table}\n"
