"""Scores of answers about pictures and sound, linear probes on a tower, the base's text, and what adapters cost."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from multimodal_data import Task
from transformers import DynamicCache

from fanformer.comparison.ledger import EXACT, Figure, range_of
from fanformer.data.multimodal.messages import MediaExample, read_media_examples
from fanformer.evaluation.loss import evaluate_documents
from fanformer.generation.media_model import MediaModel, load_media_model
from fanformer.generation.settings import GenerationSettings
from fanformer.loading import load

TEXT = Path(__file__).parents[2] / "docs" / "math.md"
"""Whose bits per byte must not change: of its first characters, since they must not change at all."""
_TEXT_CHARACTERS = 10_000
_SPARE_TOKENS = 4
_ROUTES = {"text": 0, "picture": 1, "recording": 2, "both": 3}
"""Rows by what they hold, as `modality_ids` say it."""


def exact(said: Sequence[str], right: Sequence[str]) -> float:
    """Return the share of answers that are right to the letter."""
    return fmean(one == other for one, other in zip(said, right, strict=True))


def words(said: Sequence[str], right: Sequence[str]) -> float:
    """Return one less the word error rate; below 0 where more words are wrong than there are."""
    errors = sum(word_errors(one.split(), other.split()) for one, other in zip(said, right, strict=True))
    return 1 - errors / sum(len(one.split()) for one in right)


def word_errors(said: Sequence[str], right: Sequence[str]) -> int:
    """Return the fewest insertions, deletions and substitutions between two lists of words (Levenshtein)."""
    before = list(range(len(right) + 1))
    for number, word in enumerate(said, 1):
        now = [number]
        for place, other in enumerate(right, 1):
            now.append(min(before[place] + 1, now[-1] + 1, before[place - 1] + (word != other)))
        before = now
    return before[-1]


def keywords(said: Sequence[str], right: Sequence[str]) -> float:
    """Return the mean share of a picture's keywords that are named."""
    return fmean(
        len(keywords_of(one) & keywords_of(other)) / len(keywords_of(other))
        for one, other in zip(said, right, strict=True)
    )


def keywords_of(answer: str) -> set[str]:
    """Return the keywords that an answer names, apart by commas."""
    return {word.strip() for word in answer.split(",") if word.strip()}


SCORES: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact": exact,
    "words": words,
    "keywords": keywords,
}


def answers(model: MediaModel, examples: Sequence[MediaExample]) -> list[str]:
    """Return what greedy decoding answers to each question."""
    longest = max(len(model.tokenizer.encode(one.answer, add_special_tokens=False)) for one in examples)
    settings = GenerationSettings(max_length=longest + _SPARE_TOKENS, temperature=0.0)
    questions = [question_of(example) for example in examples]
    return [one.text for one in model.ask(questions, [one.media for one in examples], settings, batch_size=32)]


def question_of(example: MediaExample) -> str:
    """Return what is asked behind the media."""
    return str(example.messages[0].parts[-1])


def measure(folder: Path, data: Path, task: Task, blind: bool, device: str) -> dict[str, Any]:
    """Return what a model gets right, what probes on its tower do, and what its media cost in tokens.

    Args:
        folder: of the model.
        data: folder of the task's rows.
        task: what was learnt.
        blind: whether the model is, of which only what it can guess is of interest.
        device: to answer on.
    """
    model = load_media_model(folder, device)
    found: dict[str, Any] = {"scores": {}, "probes": {}, "held_out": {}, "said": {}}
    for name, held_out in task.held_out.items():
        if blind and held_out.chance is not None:
            continue
        examples = read_media_examples(data / held_out.file)
        said = answers(model, examples)
        right = [one.answer for one in examples]
        found["scores"][name] = SCORES[held_out.score](said, right)
        found["held_out"][name] = len(examples)
        found["said"][name] = [list(pair) for pair in zip(said[:5], right, strict=False)]
        if held_out.probed and not blind:
            learnt = read_media_examples(data / task.stages[0].file)
            alike = [one for one in learnt if question_of(one) == question_of(examples[0])]
            found["probes"][name] = PROBES[held_out.score](model, alike, examples, said)
    config = model.model.config
    if config.vision_config is not None:
        found["tokens_per_picture"] = config.image_seq_length
    if config.audio_config is not None:
        found["tokens_per_second_of_sound"] = 100 / config.frames_per_audio_token
    return found


@torch.no_grad()
def features(model: MediaModel, examples: Sequence[MediaExample]) -> np.ndarray:
    """Return the means over patches of the vision tower's states: (examples, W)."""
    found = []
    for start in range(0, len(examples), 64):
        shown = [example.media[0] for example in examples[start : start + 64]]
        pixels = model.store.inputs(shown)["pixel_values"].to(model.model.device)
        found.append(model.model.model.vision_tower(pixels).last_hidden_state.mean(1).float().cpu().numpy())
    return np.concatenate(found)


def probe_of_one(
    model: MediaModel, learnt: Sequence[MediaExample], held_out: Sequence[MediaExample], said: Sequence[str]
) -> float:
    """Return the share of answers that logistic regression on a tower's states gets right; `said` is not used."""
    classifier = _classifier(features(model, learnt), [one.answer for one in learnt])
    return float(np.mean(classifier.predict(features(model, held_out)) == [one.answer for one in held_out]))


def probe_of_several(
    model: MediaModel, learnt: Sequence[MediaExample], held_out: Sequence[MediaExample], said: Sequence[str]
) -> float:
    """Return the recall of keywords by a logistic regression for each, which names as many as the model did."""
    of_learnt = [keywords_of(one.answer) for one in learnt]
    states, asked = features(model, learnt), features(model, held_out)
    known = sorted(set.union(*of_learnt))
    chances = np.ones((len(held_out), len(known)))
    for place, word in enumerate(known):
        has = [word in one for one in of_learnt]
        if not all(has):
            chances[:, place] = _classifier(states, has).predict_proba(asked)[:, 1]
    found = []
    for chance, answer in zip(chances, said, strict=True):
        count = max(1, len(keywords_of(answer)))
        found.append(", ".join(known[place] for place in np.argsort(-chance)[:count]))
    return keywords(found, [one.answer for one in held_out])


PROBES = {"exact": probe_of_one, "keywords": probe_of_several}


def _classifier(states: np.ndarray, labels: Sequence[Any]) -> Any:
    """Return logistic regression on standardized states, fitted; one that knows a single label says that one."""
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    last = LogisticRegression(max_iter=2000) if len(set(labels)) > 1 else DummyClassifier()
    return make_pipeline(StandardScaler(), last).fit(states, labels)


def text_bits(folder: Path) -> float:
    """Return the bits per byte that the language model of a folder needs for the beginning of docs/math.md."""
    model, tokenizer = load(folder, "cpu")
    return (
        evaluate_documents(model, tokenizer, [TEXT.read_text(encoding="utf-8")[:_TEXT_CHARACTERS]])
        .figures()
        .bits_per_byte
    )


def adapter_costs(base: Path, folder: Path, rounds: int) -> dict[str, Figure]:
    """Return sizes of towers, projectors and adapters, and times on the CPU of rows by what they hold over the base's.

    Args:
        base: folder of the language model.
        folder: of the same with towers and adapters for pictures and sound.
        rounds: in which the base and each kind of row take turns.
    """
    plain, whole = load(base, "cpu").model, load_media_model(folder, "cpu").model
    sizes = dict.fromkeys(("language_model", "towers", "projectors", "adapters"), 0)
    for name, parameter in whole.named_parameters():
        part = "adapters" if ".lora_" in name else "towers" if "_tower." in name else "projectors"
        part = "language_model" if part == "projectors" and ".projectors." not in name else part
        sizes[part] += parameter.numel()
    found = {f"{part}_parameters": Figure(count, "parameters", interval=EXACT) for part, count in sizes.items()}
    share = sizes["adapters"] / sizes["language_model"]
    found["adapters_over_language_model"] = Figure(share, "ratio", interval=EXACT)
    ways: dict[str, Callable[[], tuple[float, float]]] = {"base": lambda: _times(plain)}
    for name, number in _ROUTES.items():
        ways[name] = lambda number=number: _times(whole, modality_ids=torch.full((4,), number))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            taken[name].append(way())
    for name in _ROUTES:  # the first round warms up
        for place, kind in enumerate(("prefill", "decode")):
            pairs = zip(taken[name][1:], taken["base"][1:], strict=True)
            found[f"{kind}_time_{name}"] = range_of([ours[place] / theirs[place] for ours, theirs in pairs], "ratio")
    return found


@torch.inference_mode()
def _times(model: Any, **route: Any) -> tuple[float, float]:
    """Return the seconds of reading 4 rows of 64 tokens, and the median of 8 steps of writing behind them."""
    ids = torch.arange(1, 257).view(4, 64) % 200 + 1
    cache = DynamicCache(config=model.config.get_text_config())
    began = time.perf_counter()
    model(ids, past_key_values=cache, use_cache=True, **route)
    read = time.perf_counter() - began
    steps = []
    for _ in range(8):
        began = time.perf_counter()
        model(ids[:, :1], past_key_values=cache, use_cache=True, **route)
        steps.append(time.perf_counter() - began)
    return read, statistics.median(steps)
