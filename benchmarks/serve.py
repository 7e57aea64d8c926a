"""The server under load on loopback: tokens a second, time to the first one, and whether every answer is right.

    python benchmarks/serve.py [--engine torch|ggml] [--clients 1 8 16 32 64] [--requests 2000] [--write]
    python benchmarks/serve.py --dry-run

A model with random weights (`92m`, in float32 on torch, in q8_0 on ggml) is served by `fanformer serve` in a process of
its own. For each number of clients, with streams and without, each client asks again and again: half of it greedy, half
sampled with a seed, of prompts that were continued offline before; a share of requests is malformed, or hung up on.
An answer must have all its tokens, and be the offline one. Where it differs, the first other token is looked at: if it
would be drawn offline too were it --margin nats likelier, rounding decided, and it is counted apart as a near tie.
Before each load every slot is made to hold a text that no prompt begins with, so that prompts are read.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent / "speed"))

from speed import finish

from fanformer.comparison.ledger import Figure, range_of
from fanformer.generation.sampling import Sampling, TokenSampler
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.text_model import TextModel, row_seed
from fanformer.server.slots import Slots

_TOKEN = re.compile(r"w(\d+);")
BYTES = range(1, 257)
"""Ids of single bytes, which are no whole characters: prompts and answers have none."""
SAMPLED = {"temperature": 0.8, "top_p": 0.95}
WAYS = ("stream", "whole")
RIGHT, NEAR_TIE, WRONG, LOST = "right", "near tie", "wrong", "lost, mixed or repeated"


@dataclasses.dataclass
class Case:
    """A prompt with what must come of it."""

    ids: list[int]
    seed: int | None
    """None is greedy."""
    expected: list[int]


@dataclasses.dataclass
class Tally:
    """What came of one load."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = dataclasses.field(default_factory=list)
    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    differing: list[tuple[Case, list[int]]] = dataclasses.field(default_factory=list)


def save_model(folder: Path, dry: bool) -> None:
    """Save a model with random weights, and a tokenizer whose every token can be told from the text."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from fanformer.model import FANformerConfig, FANformerForCausalLM

    small: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "qkv_rank": 48, "o_rank": 32, "gate_up_rank": 32,
        "down_rank": 48,
    }  # fmt: skip
    torch.manual_seed(0)
    config = FANformerConfig(dropout=0.0, eos_token_id=0, bos_token_id=0, **(small if dry else {}))
    model = FANformerForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # branches end in zeros, and such a model says the same whatever it read
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        # logits of standard deviation 5 have few near ties, and leave bytes, whose logit is 0, to no answer
        model.lm_head.weight.normal_(std=5 * config.hidden_size**-0.5)[BYTES.start : BYTES.stop] = 0
    model.save_pretrained(folder)
    letters = pre_tokenizers.ByteLevel.alphabet()
    words = ["<|endoftext|>", *sorted(letters)]
    words += [f"w{number};" for number in range(len(words), config.vocab_size)]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(words[0], special=True)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=words[0], eos_token=words[0]).save_pretrained(folder)


def make_cases(model: TextModel, count: int, prompt_tokens: int, new: int, vocabulary: int) -> list[Case]:
    """Continue `count` prompts offline, every second one sampled."""
    draw, cases = random.Random(0), []
    for index in range(count):
        ids = [0, *(draw.randrange(BYTES.stop, vocabulary) for _ in range(prompt_tokens - 1))]
        seed = index if index % 2 else None
        sampling = {"temperature": 0.0} if seed is None else SAMPLED
        how = {"top_p": 1.0, **sampling}
        settings = GenerationSettings(max_length=new, min_length=new, top_k=0, seed=seed or 0, **how)
        cases.append(Case(ids, seed, tokens_of(model.complete_ids(ids, "", settings).text)))
    return cases


def tokens_of(text: str) -> list[int]:
    """Return the ids that a text of the benchmark's tokenizer stands for; -1 stands for what is none."""
    found = [int(number) for number in _TOKEN.findall(text)]
    return found if "".join(f"w{number};" for number in found) == text else [*found, -1]


class Load:
    """Clients that ask one server."""

    def __init__(self, port: int, cases: list[Case], new: int, bad_share: float) -> None:
        self.port, self.cases, self.new, self.bad_share = port, cases, new, bad_share
        self._load = ""

    async def run(self, clients: int, requests: int, stream: bool) -> Tally:
        """Let so many clients send so many requests in all."""
        tally, turns = Tally(), iter(range(requests))
        self._load = f"{clients} {stream}"
        began = time.perf_counter()
        await asyncio.gather(*(self._client(turns, stream, tally) for _ in range(clients)))
        tally.seconds = time.perf_counter() - began
        return tally

    async def _client(self, turns: Any, stream: bool, tally: Tally) -> None:
        for turn in turns:
            draw = random.Random(f"{self._load} {turn}")
            case = self.cases[turn % len(self.cases)]
            bad = draw.random() < self.bad_share
            if bad and draw.random() < 0.5:
                tally.outcomes["malformed " + str(await self._malformed(draw))] += 1
            elif bad:
                seconds = draw.random() * 0.5
                await self._leave(case, stream, None if stream and draw.random() < 0.5 else seconds)
                tally.outcomes["left"] += 1
            else:
                await self._ask(case, stream, tally)

    @contextlib.asynccontextmanager
    async def _sent(self, body: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, int]]:
        """Send a request, and give what follows the head of its answer, and its status; the connection ends after."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22)
        try:
            head = (
                "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
            status = int((await reader.readline()).split()[1])
            while (await reader.readline()).strip():
                pass
            yield reader, status
        finally:
            writer.close()

    async def _malformed(self, draw: random.Random) -> int:
        body = draw.choice([b"{", b"[]", b'{"model": "none"}', b'{"model": "model", "n": "two"}', b"\xff" * 100])
        try:
            async with self._sent(body) as (_, status):
                return status
        except (OSError, ValueError, LookupError):  # no answer
            return 0

    def _body(self, case: Case, stream: bool) -> bytes:
        fields: dict[str, Any] = {"model": "model", "prompt": case.ids, "max_tokens": self.new, "min_tokens": self.new}
        fields |= {"temperature": 0} if case.seed is None else {**SAMPLED, "seed": case.seed}
        return json.dumps({**fields, "stream": stream}).encode()

    async def _leave(self, case: Case, stream: bool, seconds: float | None) -> None:
        """Hang up when the answer begins, or after so many seconds where that is earlier."""
        with contextlib.suppress(OSError, ValueError, LookupError):
            async with asyncio.timeout(seconds), self._sent(self._body(case, stream)) as (reader, _):
                await reader.read(64)

    async def _ask(self, case: Case, stream: bool, tally: Tally) -> None:
        try:
            status, data, first = await self._answer(case, stream)
            if status != 200:
                tally.outcomes[f"refused {status}"] += 1
                return
            text = streamed_text(data) if stream else json.loads(unchunked(data))["choices"][0]["text"]
        except (OSError, ValueError, LookupError):  # no answer, or not a whole one
            tally.outcomes[LOST] += 1
            return
        found = tokens_of(text)
        tally.tokens += len(found) - found.count(-1)
        if stream:
            tally.first.append(first)
        if found == case.expected:
            tally.outcomes[RIGHT] += 1
        elif len(found) != self.new or -1 in found:
            tally.outcomes[LOST] += 1
        else:
            tally.differing.append((case, found))

    async def _answer(self, case: Case, stream: bool) -> tuple[int, bytes, float]:
        """Return status and body of an answer, and after how many seconds its first text came."""
        began, data, first = time.perf_counter(), b"", 0.0
        async with self._sent(self._body(case, stream)) as (reader, status):
            while piece := await reader.read(1 << 16):
                data += piece
                if not first and b"data: " in data:  # and not a ping, which says only that it waits
                    first = time.perf_counter() - began
        return status, data, first


def metrics(port: int) -> dict[str, float]:
    """Return the numbers that a server of one model tells, by their names without labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {re.split("[{ ]", line)[0]: float(line.rpartition(" ")[2]) for line in lines}


def prompt_tokens(port: int) -> dict[str, int]:
    """Return how many tokens of prompts there were so far, and how many of them a slot still held."""
    told = metrics(port)
    return {name: round(told[f"fanformer_{name}_tokens_total"]) for name in ("prompt", "cached")}


def fill_slots(port: int, slots: int) -> None:
    """Let every slot hold a text that no case begins with, else a prompt that comes again need not be read."""
    while metrics(port)["fanformer_answers_running"]:  # whom nobody waits for any more
        time.sleep(0.05)
    body = json.dumps({"model": "model", "prompt": [[0] * 16] * slots, "max_tokens": 1}).encode()
    url, kind = f"http://127.0.0.1:{port}/v1/completions", {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, body, kind), timeout=600) as answer:
        assert len(json.loads(answer.read())["choices"]) == slots


def unchunked(data: bytes) -> bytes:
    """Return a body that was sent in chunks, or as it is."""
    if not re.match(rb"[0-9a-f]+\r\n", data):
        return data
    parts, rest = [], data
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        if not int(size, 16):
            break
        parts.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return b"".join(parts)


def streamed_text(data: bytes) -> str:
    """Return the text of a stream; what ends without [DONE] is none."""
    events = [event[6:] for event in unchunked(data).decode().split("\n\n") if event.startswith("data: ")]
    if not events or events.pop() != "[DONE]":
        return "cut off"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def one_slot(model: TextModel, known: int, positions: int) -> Slots:
    """Return a slot of the offline model, whose steps can be looked at one by one."""
    from fanformer.gguf.ggml_model import GgmlModel

    if isinstance(model, GgmlModel):
        from fanformer.server.ggml_slots import GgmlSlots

        return GgmlSlots(model.engine, known, 1, positions)
    from fanformer.server.torch_slots import TorchSlots

    return TorchSlots(model.model, known, 1, positions)  # type: ignore[attr-defined]


class Judge:
    """Tells near ties from wrong answers."""

    def __init__(self, slot: Slots, known: int, end_ids: Sequence[int], margin: float) -> None:
        """Begin.

        Args:
            slot: of the offline model.
            known: how many ids it has.
            end_ids: that end a text.
            margin: in nats, of a near tie.
        """
        self._slot, self._known, self._end_ids, self._margin = slot, known, end_ids, margin

    def judge(self, tally: Tally) -> None:
        """Count the answers that differ as what they are."""
        for case, found in tally.differing:
            tally.outcomes[NEAR_TIE if self.is_near_tie(case, found) else WRONG] += 1

    def is_near_tie(self, case: Case, found: list[int]) -> bool:
        """Return whether the first other token of an answer would be drawn offline too, were it likelier by the margin.

        Of a sampled answer the random numbers are its seed's. Which tokens `top_p` keeps is near a tie as well: it is
        tried with a share that is smaller and larger by the margin.
        """
        pairs = enumerate(zip(case.expected, found, strict=True))
        place = next(index for index, (expected, other) in pairs if expected != other)
        ids = [*case.ids, *case.expected[:place]]
        self._slot.cut(0, 0)
        logits = self._slot.forward({0: ids})[0][-1].copy()
        logits[found[place]] += self._margin
        top_p, least = SAMPLED["top_p"], {"min_tokens": len(found)}
        settings = [Sampling(temperature=0, **least)]
        if case.seed is not None:
            sampled = Sampling(SAMPLED["temperature"], seed=row_seed(case.seed, 0), **least)
            shares = (top_p * (1 - self._margin), top_p, min(top_p * (1 + self._margin), 1.0))
            settings = [dataclasses.replace(sampled, top_p=share) for share in shares]
        return any(self._draw(one, ids, place, logits) == found[place] for one in settings)

    def _draw(self, sampling: Sampling, ids: list[int], place: int, logits: Any) -> int:
        noise = self._slot.noise(sampling.seed)
        for _ in range(place):  # what the tokens before it took
            noise()
        return TokenSampler(sampling, noise, self._known, self._end_ids, ids).draw(logits)


def generate_batch_rate(model: Any, cases: list[Case], new: int) -> float:
    """Return the tokens a second of transformers' own continuous batching, greedy, of all prompts at once.

    Nothing else runs meanwhile, and there is no HTTP: the comparison is to its advantage.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # room for all of them; by itself it takes, and fills with zeros, more than half of the machine's memory
    length = len(cases[0].ids)
    room = {"page_size": length + new, "num_blocks": 2 * len(cases), "max_batch_tokens": len(cases) * length}

    def rate(chosen: Sequence[Case]) -> float:
        began = time.perf_counter()
        found = model.generate_batch(
            inputs=[case.ids for case in chosen], generation_config=settings, progress_bar=False,
            continuous_batching_config=ContinuousBatchingConfig(**room),
        )  # fmt: skip
        tokens = sum(len(one.generated_tokens) for one in found.values())
        assert tokens == new * len(chosen), f"generate_batch wrote {tokens} tokens of {new * len(chosen)}"
        return tokens / (time.perf_counter() - began)

    rate(cases[:2])  # what is made at its first call
    return rate(cases)


def start_server(path: Path, *words: Any) -> tuple[subprocess.Popen[str], int]:
    """Start `fanformer serve` with a model called `model`; return the process and its port.

    Args:
        path: of a folder or file.
        *words: more of the command.
    """
    given = [f"model={path}", "--port", "0", "--log-file", os.devnull, *words]
    if path.is_dir():
        given += ["--device", "cpu"]
    command = [sys.executable, "-m", "fanformer.cli.main", "serve", *map(str, given)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("listening at "):
            return process, int(line.rpartition(":")[2].removesuffix("/v1\n"))
    raise SystemExit("the server did not start")


def figures_of(name: str, tally: Tally) -> dict[str, Figure]:
    """Return what is told of one load."""
    found = {f"tokens_per_second_{name}": Figure(tally.tokens / tally.seconds, "tokens/s")}
    if tally.first:
        seconds = sorted(tally.first)
        found[f"first_token_p50_{name}"] = Figure(statistics.median(seconds), "s")
        found[f"first_token_p99_{name}"] = Figure(seconds[min(int(0.99 * len(seconds)), len(seconds) - 1)], "s")
    for outcome in (RIGHT, NEAR_TIE, WRONG, LOST):
        key = outcome.replace(",", "").replace(" ", "_")
        found[f"{key}_{name}"] = Figure(tally.outcomes[outcome], "answers", interval="exact")
    return found


def parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("torch", "ggml"), default="torch")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--requests", type=int, default=2000, help="in all, spread over the loads; default 2000")
    parser.add_argument("--prompts", type=int, default=32, help="different ones; default 32")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default 128")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer; default 64")
    parser.add_argument("--slots", type=int, default=16, help="default 16")
    parser.add_argument("--bad-share", type=float, default=0.2, help="malformed or hung up on; default 0.2")
    parser.add_argument("--margin", type=float, default=0.01, help="of a near tie, in nats; default 0.01")
    parser.add_argument("--generate-batch", action="store_true", help="also transformers' own batching, on torch")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model and little load")
    parser.add_argument("--part", help="what is measured of it: the entry is then NAME-PART-DATE")
    parser.add_argument("--write", action="store_true", help="write the entry to benchmarks/results")
    arguments = parser.parse_args()
    if arguments.generate_batch and arguments.engine != "torch":
        parser.error("--generate-batch is for --engine torch")
    if arguments.dry_run:
        if arguments.write:
            parser.error("--write has no effect with --dry-run, whose figures mean nothing: leave it out")
        small = {"clients": [1, 4], "requests": 48, "prompts": 6, "prompt_tokens": 24, "new": 12, "slots": 3}
        vars(arguments).update(small)
    return arguments


def main() -> int:
    """Measure and print; return 1 where an answer was wrong or lost."""
    arguments = parse()
    from fanformer.loading import load_config, load_text_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(path, arguments.dry_run)
        vocabulary = load_config(path).vocab_size
        if arguments.engine == "ggml":
            from fanformer.gguf.export import Settings, export_gguf

            file = path / "model-q8_0.gguf"
            export_gguf(path, file, Settings("q8_0"))
            path = file
        model = load_text_model(path, device="cpu")
        cases = make_cases(model, arguments.prompts, arguments.prompt_tokens, arguments.new, vocabulary)
        slot = one_slot(model, vocabulary, arguments.prompt_tokens + arguments.new)
        rate = None
        if arguments.generate_batch:  # first: should it fail, an hour of load is not lost
            slot.close()
            rate = generate_batch_rate(model.model, cases, arguments.new)  # type: ignore[attr-defined]
            slot = one_slot(model, vocabulary, arguments.prompt_tokens + arguments.new)
        judge = Judge(slot, vocabulary, model.end_ids, arguments.margin)
        process, port = start_server(path, "--slots", arguments.slots, "--queue-size", 4096)
        try:
            result = measure(Load(port, cases, arguments.new, arguments.bad_share), judge, process, arguments)
        finally:
            process.terminate()
            process.wait(60)
        if rate is not None:
            result["tokens_per_second_generate_batch"] = Figure(rate, "tokens/s")
            for clients in arguments.clients:
                ours = [result[f"tokens_per_second_{clients}_clients_{way}"].value / rate for way in WAYS]
                result[f"times_generate_batch_{clients}_clients"] = range_of(ours, "times")
    finish(f"serve-{arguments.engine}", "the server under load on loopback", arguments, result)
    return 1 if result["wrong_or_lost"].value else 0


def measure(
    load: Load, judge: Judge, process: subprocess.Popen[str], arguments: argparse.Namespace
) -> dict[str, Figure]:
    """Run every load; return the figures."""
    result: dict[str, Figure] = {}
    outcomes: Counter[str] = Counter()
    memory, growth, prompts = psutil.Process(process.pid), [], Counter()
    each = max(arguments.requests // (2 * len(arguments.clients)), 1)
    asyncio.run(load.run(max(arguments.clients), 2 * max(arguments.clients), True))  # graphs and buffers are made
    before = memory.memory_info().rss
    for clients in arguments.clients:
        for way in WAYS:
            fill_slots(load.port, arguments.slots)
            prompts.subtract(prompt_tokens(load.port))
            tally = asyncio.run(load.run(clients, each, way == "stream"))
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode} under {clients} clients")
            prompts.update(prompt_tokens(load.port))
            judge.judge(tally)
            name = f"{clients}_clients_{way}"
            result |= figures_of(name, tally)
            outcomes += tally.outcomes
            growth.append((memory.memory_info().rss - before) / 2**20)
            print(f"{name}: {tally.tokens / tally.seconds:.1f} tokens/s, {dict(tally.outcomes)}", flush=True)
    for clients in [count for count in arguments.clients if count > 1 and 1 in arguments.clients]:
        rates = [[result[f"tokens_per_second_{count}_clients_{way}"].value for count in (clients, 1)] for way in WAYS]
        result[f"times_one_client_{clients}_clients"] = range_of([many / one for many, one in rates], "times")
    result["memory_growth"] = range_of(growth, "MiB")
    result["requests"] = Figure(sum(outcomes.values()), "requests", interval="exact")
    result["wrong_or_lost"] = Figure(wrong_or_lost(outcomes), "answers", interval="exact")
    result["prompt_tokens_not_read"] = Figure(prompts["cached"] / prompts["prompt"], "of all", interval="exact")
    return result


def wrong_or_lost(outcomes: Counter[str]) -> int:
    """Return how many answers were wrong or missing: refused ones too, and malformed requests without a 4xx."""
    bad = [outcome for outcome in outcomes if outcome in (WRONG, LOST) or outcome.startswith("refused")]
    bad += [outcome for outcome in outcomes if re.match("malformed (?!4)", outcome)]
    return sum(outcomes[outcome] for outcome in bad)


if __name__ == "__main__":
    raise SystemExit(main())
