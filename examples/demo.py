"""The demo: train the nano preset on Python's own standard library for five minutes, then let it write Python.

Fails if the held-out text is not coded in fewer bits per byte than `gzip -9` needs for the same bytes.
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path

import click

from fanformer.cli.failure import quiet_libraries, run_program
from fanformer.cli.train import run_and_report
from fanformer.training.configuration import resolve_run
from fanformer.training.schedule import is_finished

COMPLETIONS = 20
SHOWN, SHOWN_LINES = 3, 3
GO_ON = "the same command goes on"


def cut_to_last_statement(source: str) -> str:
    """Return `source` up to the end of its last complete statement, or "" where none is complete.

    What the length limit cut off is not counted: the last logical line where its newline is missing, and headers
    (`if x:`) in front of it that wait for their body.
    """
    ends = [0]  # line numbers at which a logical line ends
    headers = {0: False}
    previous = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NEWLINE and token.string:  # an implied newline at the end has no text
                ends.append(token.end[0] if token.end[1] else token.end[0] - 1)
                headers[ends[-1]] = previous == ":"
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE):
                previous = token.string
    except IndentationError:
        return source  # a mistake of the text, not of the cut
    except (tokenize.TokenError, SyntaxError):
        pass  # the cut, inside brackets or a string
    while headers[ends[-1]]:
        ends.pop()
    return "\n".join(source.split("\n")[: ends[-1]])


def parses(source: str) -> bool:
    """Return whether `source` is Python once cut to its last complete statement."""
    complete = cut_to_last_statement(source)
    try:
        ast.parse(complete)
    except (SyntaxError, ValueError):
        return False
    return bool(complete.strip())


def main() -> int:
    """Train unless that is done, print completions and the verdict, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--max-time", type=float, default=300.0, help="seconds of training")
    arguments = parser.parse_args()
    quiet_libraries()
    folder: Path = arguments.output_dir
    if is_finished(folder):
        print(f"{folder} holds a finished run: using it (delete the folder to train again)")
    else:
        started = (folder / "run.yaml").is_file()
        overrides = {"preset": "nano", "output_dir": str(folder), "max_time": arguments.max_time, "resume": started}
        try:
            run_and_report(resolve_run(None, overrides), to_go_on=GO_ON)
        except click.exceptions.Exit as stopped:
            return stopped.exit_code

    from fanformer.generation.settings import GenerationSettings
    from fanformer.loading import load_text_model
    from fanformer.training.folder import read_records, read_run_file

    settings = GenerationSettings(max_length=96, seed=0)
    completions = load_text_model(folder).complete(["def "] * COMPLETIONS, settings, batch_size=COMPLETIONS)
    texts = [completion.prompt + completion.text for completion in completions]
    for text in texts[:SHOWN]:
        print("-" * 80, *text.splitlines()[:SHOWN_LINES], sep="\n")
    print("-" * 80)
    parsed = sum(map(parses, texts))
    print(f"{parsed} of {COMPLETIONS} completions of `def ` parse once cut to the last complete statement")

    held_out = read_run_file(folder)["data"]["metadata"]["splits"]["heldout"]
    ours = next(record["val_bits_per_byte"] for record in reversed(read_records(folder)) if "val_loss" in record)
    print(f"held-out bits per byte: {ours:.4f}")
    verdicts = []
    for name in ("gzip", "xz"):
        bits = 8 * held_out[f"{name}_bytes"] / held_out["bytes"]
        verdicts.append(ours < bits)
        print(f"  {name} -9 on the same bytes: {bits:.4f} ({'beaten' if ours < bits else 'not beaten'})")
    print(f"loss curve: {folder / 'loss.png'}")
    return 0 if verdicts[0] else 1


if __name__ == "__main__":
    run_program(main)
