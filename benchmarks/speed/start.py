"""How long a command takes to begin on a CPU: the help text, and a nano model's first token.

    python benchmarks/speed/start.py [--rounds 7] [--write]

Each is a process of its own, from its start to its end. What importing torch and transformers alone takes stands beside
it: no command that runs a model can be faster.
"""

import subprocess
import sys
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from speed import arguments_of, finish, in_turns

from fanformer.comparison.ledger import range_of
from fanformer.data.sources.documents import open_source
from fanformer.data.tokenizer import train_tokenizer
from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.training.configuration import load_preset


def run(*command: str) -> None:
    """Run a command to its end."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Measure and print."""
    arguments = arguments_of(__doc__ or "", rounds=7)
    fields = load_preset("nano").model
    texts = [document.text for document in islice(open_source("stdlib"), 60)]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(texts, fields["vocab_size"]).save_pretrained(folder)
        FANformerForCausalLM(FANformerConfig(**fields)).save_pretrained(folder)
        command = str(Path(sys.executable).parent / "fanformer")
        imports = "import torch, transformers; transformers.AutoModelForCausalLM"
        ways = {
            "help": partial(run, command, "--help"),
            "first_token": partial(run, command, "generate", folder, "def ", "--max-length", "1"),
            "imports_alone": partial(run, sys.executable, "-c", imports),
        }
        seconds = in_turns(ways, arguments.rounds)
    result = {f"seconds_{name}": range_of(values, "s") for name, values in seconds.items()}
    finish("speed-start", "how long a command takes to begin", arguments, result, scale="nano")


if __name__ == "__main__":
    main()
