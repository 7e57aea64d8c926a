"""Which token of one text comes next, from logits in numpy; the noise is the engine's; torch-free.

A GGUF file's texts are drawn by this, and all that the server writes. On torch `TextModel.complete` draws in the same
way: same order of filters, one number of noise for every known id, so that a request with the same settings and seed
writes the same text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fanformer.errors import NotANumberError
from fanformer.generation.settings import SMALLEST_TEMPERATURE, GenerationSettings

_TINY = np.finfo(np.float32).tiny
_FEW = 1024
"""Up to so many scores are simply sorted."""
_BINS, _BINS_PER_NAT = 4096, 128

Floats = NDArray[np.float32]
Noise = Callable[[], Floats]
"""Returns positive numbers (known) float32 of the exponential distribution, new ones at every call."""


def noise_of(seed: int, known: int) -> Noise:
    """Return the random stream of a seed, for texts on ggml."""
    random = np.random.Generator(np.random.PCG64(seed))
    return lambda: random.standard_exponential(known, dtype=np.float32)


@dataclass(frozen=True)
class Sampling:
    """How one text draws its tokens; the defaults take the model's distribution as it is."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token always."""
    top_k: int = 0
    """Draw from this many most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Draw from the fewest likely tokens of this total probability."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the likeliest."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that was written."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for every time that it was written."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in the prompt or written."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids."""
    min_tokens: int = 0
    """The end token is not drawn before."""
    seed: int = 0
    """Of the noise."""

    @classmethod
    def of(cls, settings: GenerationSettings) -> "Sampling":
        """Return what `settings` say of drawing; their seed is not one text's."""
        return cls(settings.temperature, settings.top_k, settings.top_p, min_tokens=settings.min_length)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken always."""
        return self.temperature < SMALLEST_TEMPERATURE


class TokenSampler:
    """Draws the tokens of one text."""

    def __init__(
        self,
        sampling: Sampling,
        noise: Noise,
        known: int,
        end_ids: Sequence[int],
        prompt_ids: Sequence[int],
        excluded_first: NDArray[np.bool_] | None = None,
        never: Sequence[int] = (),
    ) -> None:
        """Begin a text.

        Args:
            sampling: how to draw.
            noise: the random stream, of this text alone.
            known: ids from here on only fill up the vocabulary and are never drawn.
            end_ids: what ends a text.
            prompt_ids: what the repetition penalty counts as written.
            excluded_first: (known) True where a token cannot be the first one.
            never: ids that are never drawn.
        """
        self._sampling, self._noise, self._known, self._excluded = sampling, noise, known, excluded_first
        self._end_ids = [number for number in end_ids if number < known]
        self._never = [number for number in never if number < known]
        self._bias_ids = np.array([number for number in sampling.logit_bias if number < known], dtype=np.int64)
        self._bias = np.array([sampling.logit_bias[int(number)] for number in self._bias_ids], dtype=np.float32)
        self._counts: dict[int, int] = {}
        self._seen = {number for number in prompt_ids if number < known} if sampling.repetition_penalty != 1 else set()
        self._drawn = 0

    def draw(self, logits: Floats) -> int:
        """Return the next token.

        Args:
            logits: (V) float32.

        Raises:
            NotANumberError: if a logit is no number.
        """
        check_numbers(logits)
        scores = self._adjusted(logits[: self._known].astype(np.float32))
        self._drawn += 1
        token = int(scores.argmax()) if self._sampling.is_greedy else self._sample(scores)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._sampling.repetition_penalty != 1:
            self._seen.add(token)
        return token

    def _adjusted(self, scores: Floats) -> Floats:
        """Return `scores` (known) with bias and penalties, and minus infinity where a token cannot be drawn."""
        sampling = self._sampling
        if len(self._bias_ids):
            scores[self._bias_ids] += self._bias
        if self._seen:
            seen = np.fromiter(self._seen, dtype=np.int64)
            values, penalty = scores[seen], np.float32(sampling.repetition_penalty)
            scores[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            written = np.fromiter(self._counts, dtype=np.int64)
            counts = np.fromiter(self._counts.values(), dtype=np.float32)
            scores[written] -= np.float32(sampling.presence_penalty) + counts * np.float32(sampling.frequency_penalty)
        if self._drawn == 0 and self._excluded is not None:
            scores[self._excluded] = -np.inf
        if self._drawn < sampling.min_tokens:
            scores[self._end_ids] = -np.inf
        scores[self._never] = -np.inf
        return scores

    def _sample(self, scores: Floats) -> int:
        sampling = self._sampling
        with np.errstate(over="ignore", invalid="ignore"):  # only what is as good as impossible overflows, to -inf
            scores = (scores - scores.max()) / np.float32(sampling.temperature)
        kept = nucleus(most_likely(scores, sampling.top_k), scores, sampling.top_p)
        if sampling.min_p > 0:
            kept = kept[scores[kept] >= np.log(sampling.min_p)]
        # noise for every id, so that a token's noise does not depend on which others are kept
        noise = self._noise()[kept]
        return int(kept[(scores[kept] - np.log(np.maximum(noise, _TINY))).argmax()])


def most_likely(scores: Floats, count: int) -> NDArray[np.int64]:
    """Return the ids of the `count` largest of `scores` (V) and of those equal to the last of them; 0 is all."""
    if not 0 < count < len(scores):
        return np.arange(len(scores))
    least = np.partition(scores, -count)[-count]
    return np.flatnonzero(scores >= least)


def nucleus(ids: NDArray[np.int64], scores: Floats, share: float) -> NDArray[np.int64]:
    """Return the fewest of `ids` that have at least `share` of the probability of all of them, in order of id.

    Many are not sorted, which takes 1.0 ms instead of 6 of 49,152: their scores are counted into bins; what lies in
    bins above the one where `share` is reached is kept, and only that one is sorted.

    Source: top-p sampling, arXiv:1904.09751, section 3.1.

    Args:
        ids: (N) in ascending order.
        scores: (V) of at most 0.
        share: above 0; 1 is all.
    """
    if share >= 1:
        return ids
    if len(ids) <= _FEW:
        return _by_sorting(ids, scores, share)
    values = scores[ids]
    weights = np.exp(values)
    bins = np.minimum(values * -_BINS_PER_NAT, _BINS).astype(np.int64)
    masses = np.bincount(bins, weights, _BINS + 1).cumsum()  # float64, the most likely first
    wanted = share * masses[-1]
    last = int(np.searchsorted(masses, wanted))
    kept = bins < last
    places = np.flatnonzero(bins == last)
    places = places[np.argsort(-values[places], kind="stable")]
    before = (masses[last - 1] if last else 0.0) + np.cumsum(weights[places], dtype=np.float64) - weights[places]
    kept[places[before < wanted]] = True
    return ids[kept]


def _by_sorting(ids: NDArray[np.int64], scores: Floats, share: float) -> NDArray[np.int64]:
    order = np.argsort(scores[ids], kind="stable")  # least likely first
    values = scores[ids][order].astype(np.float64)
    weights = np.exp(values - values[-1])
    before = np.cumsum(weights / weights.sum())
    kept = before > 1 - share
    kept[-1] = True
    return np.sort(ids[order[kept]])


def check_numbers(logits: Floats) -> None:
    """Raise NotANumberError if one of `logits` (V) is none."""
    if np.isnan(logits).any():
        raise NotANumberError


def log_probabilities(logits: Floats) -> Floats:
    """Return the logarithms of the probabilities that `logits` (T, V) stand for, (T, V) float32, in nats."""
    largest = logits.max(axis=-1, keepdims=True)
    with np.errstate(over="ignore"):
        normalizer = largest + np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))
    return logits - normalizer


def likeliest(row: Floats, count: int, known: int) -> list[tuple[int, float]]:
    """Return the `count` ids of highest log-probability in `row` (V) below `known`, best first, with it."""
    values = row[:known]
    count = min(count, known)
    if count == 0:
        return []
    ids = np.argpartition(values, -count)[-count:]
    ids = ids[np.lexsort((ids, -values[ids]))]
    return [(int(number), float(values[number])) for number in ids]
