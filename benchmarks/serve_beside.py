"""Our server beside llama.cpp's: tokens a second of each under the same load, in turns.

    python benchmarks/serve_beside.py --llama-server PATH [--type q8_0] [--clients 1 16] [--rounds 3] [--write]

Ours serves the default `92m` on ggml, llama-server a Llama in SmolLM2-135M's shape; both have random weights of the
same type, the same threads, and as many slots as there are clients at most. In each round one server after the other is
started, and asked by as many clients as `--clients` says, again and again. Every prompt is another one, so that neither
has anything to remember, and an answer has all its tokens. `make llama-server` builds the other server from the source
inside the sdist of llama-cpp-python; this needs the extra `gguf`.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "speed"))

from quantized_llama import VOCABULARY, write_llama
from serve import save_model, start_server, unchunked
from speed import finish

from fanformer.comparison.ledger import Figure, range_of

OURS, THEIRS = "fanformer", "llama_server"
_START_SECONDS = 120.0
Server = tuple[subprocess.Popen[Any], int]
Rates = dict[tuple[str, int], list[float]]


class Asker:
    """Clients that ask a server to continue prompts that nobody asked before."""

    def __init__(self, port: int, vocabulary: int, prompt_tokens: int, new: int, fields: dict[str, Any]) -> None:
        """Begin.

        Args:
            port: of the server.
            vocabulary: ids are drawn below.
            prompt_tokens: of every prompt.
            new: tokens of every answer.
            fields: more of the requests.
        """
        self._port, self._vocabulary, self._prompt_tokens = port, vocabulary, prompt_tokens
        self._draw = random.Random(0)
        settings = {"model": "model", "max_tokens": new, "temperature": 0, "stream": True}
        self._fields = {**settings, "stream_options": {"include_usage": True}, **fields}
        self._new = new

    async def rate(self, clients: int, requests: int) -> float:
        """Return the new tokens a second that so many clients get for so many requests in all."""
        turns = iter(range(requests))
        began = time.perf_counter()
        counts = await asyncio.gather(*(self._client(turns) for _ in range(clients)))
        return sum(counts) / (time.perf_counter() - began)

    async def _client(self, turns: Any) -> int:
        return sum([await self._ask() for _ in turns])

    async def _ask(self) -> int:
        """Return how many tokens an answer had, as its usage tells.

        Raises:
            SystemExit: if the server refuses, or the answer is shorter than asked for.
        """
        # the first 257 ids of the benchmark's own tokenizer are its end token and single bytes
        ids = [self._draw.randrange(257, self._vocabulary) for _ in range(self._prompt_tokens)]
        body = json.dumps({**self._fields, "prompt": ids}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        status, _, rest = answer.partition(b"\r\n\r\n")
        if b" 200 " not in status.split(b"\r\n")[0]:
            raise SystemExit(f"a server refused: {answer[:500]!r}")
        count = usage_of(unchunked(rest).decode())
        if count != self._new:
            raise SystemExit(f"an answer must have {self._new} tokens, got {count}.")
        return count


def usage_of(stream: str) -> int:
    """Return the new tokens that the usage in a stream of events tells."""
    events = [event[6:] for event in stream.split("\n\n") if event.startswith("data: {")]
    found = [usage["completion_tokens"] for event in events if (usage := json.loads(event).get("usage"))]
    return int(found[-1]) if found else 0


def start_llama_server(program: str, path: Path, threads: int, slots: int, positions: int) -> Server:
    """Start llama-server; return the process and its port once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--model", path, "--host", "127.0.0.1", "--port", port, "--threads", threads, "--threads-batch", threads]
    words += ["--parallel", slots, "--ctx-size", slots * positions]
    log = subprocess.DEVNULL
    process = subprocess.Popen([program, *map(str, words)], stdout=log, stderr=log)
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return process, port
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    process.kill()
    raise SystemExit(f"llama-server did not start: {' '.join([program, *map(str, words)])}")


def measure(
    starts: dict[str, Callable[[], Server]], arguments: argparse.Namespace
) -> dict[tuple[str, int], list[float]]:
    """Return the rates of each server at each number of clients, one a round."""
    found: Rates = {}
    fields = {OURS: {"min_tokens": arguments.new}, THEIRS: {"ignore_eos": True}}
    for _ in range(arguments.rounds):
        for name, start in starts.items():
            process, port = start()
            try:
                vocabulary = arguments.vocabulary if name == OURS else VOCABULARY
                asker = Asker(port, vocabulary, arguments.prompt_tokens, arguments.new, fields[name])
                for clients in arguments.clients:
                    asyncio.run(asker.rate(clients, clients))  # graphs and buffers are made
                    rate = asyncio.run(asker.rate(clients, clients * arguments.requests))
                    found.setdefault((name, clients), []).append(rate)
                    print(f"{name}, {clients} clients: {rate:.1f} tokens/s", flush=True)
            finally:
                process.terminate()
                process.wait(60)
    return found


def parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", required=True, metavar="PATH", help="the program")
    parser.add_argument("--type", default="q8_0", help="of both files; default q8_0")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16], help="default 1 16")
    parser.add_argument("--requests", type=int, default=8, help="of each client in a round; default 8")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default 128")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer; default 64")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default all cores")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model of ours, and little load")
    parser.add_argument("--part", help="what is measured of it: the entry is then NAME-PART-DATE")
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    arguments = parser.parse_args()
    if arguments.dry_run:
        if arguments.write:
            parser.error("--write has no effect with --dry-run, whose figures mean nothing: leave it out")
        vars(arguments).update({"clients": [1, 3], "requests": 2, "rounds": 1, "prompt_tokens": 24, "new": 12})
    return arguments


def main() -> int:
    """Measure and print."""
    arguments = parse()
    from fanformer.gguf.export import Settings, export_gguf
    from fanformer.loading import load_config

    slots, positions = max(arguments.clients), arguments.prompt_tokens + arguments.new + 8
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", arguments.dry_run)
        arguments.vocabulary = load_config(folder / "model").vocab_size
        ours, theirs = folder / "model.gguf", folder / "llama.gguf"
        export_gguf(folder / "model", ours, Settings(arguments.type))
        write_llama(theirs, arguments.type)
        words = ("--slots", slots, "--context", positions, "--queue-size", 4 * slots, "--threads", arguments.threads)
        rates = measure(
            {
                OURS: lambda: start_server(ours, *words),
                THEIRS: lambda: start_llama_server(arguments.llama_server, theirs, arguments.threads, slots, positions),
            },
            arguments,
        )
    result: dict[str, Figure] = {}
    for clients in arguments.clients:
        pairs = list(zip(rates[OURS, clients], rates[THEIRS, clients], strict=True))
        for server in (OURS, THEIRS):
            result[f"tokens_per_second_{server}_{clients}_clients"] = range_of(rates[server, clients], "tokens/s")
        result[f"times_llama_server_{clients}_clients"] = range_of([mine / other for mine, other in pairs], "times")
    arguments.llama_server = True  # where it lies on this machine says nothing
    finish("serve-beside", "our server beside llama.cpp's on loopback", arguments, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
