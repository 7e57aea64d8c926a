"""Which token comes next, from logits in numpy: the same steps as generation.py's, in the same order; torch-free."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fanformer.errors import CheckpointError
from fanformer.generation.settings import GenerationSettings
from fanformer.gguf.blocks import Floats

_TINY = np.finfo(np.float32).tiny


class Sampler:
    """Draws the tokens of one text; its random stream is its own, so that a seed reproduces the text."""

    def __init__(
        self,
        settings: GenerationSettings,
        seed: int,
        known: int,
        end_ids: Sequence[int],
        excluded_first: NDArray[np.bool_] | None = None,
    ) -> None:
        """Begin a text.

        Args:
            settings: how to draw.
            seed: of the random stream.
            known: ids from here on only fill up the vocabulary and are never drawn.
            end_ids: what ends a text; not drawn among the first `settings.min_length` tokens.
            excluded_first: (known) True where a token cannot be the first one.
        """
        self._settings = settings
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._known, self._end_ids, self._excluded = known, list(end_ids), excluded_first
        self._drawn = 0

    def draw(self, logits: Floats) -> int:
        """Return the next token.

        Args:
            logits: (V) float32.

        Raises:
            CheckpointError: if a logit is no number, which would otherwise come out as arbitrary text.
        """
        if np.isnan(logits).any():
            raise CheckpointError("the model computes values that are no numbers: its file is of no use.")
        scores = logits[: self._known].astype(np.float32)
        if self._drawn == 0 and self._excluded is not None:
            scores[self._excluded] = -np.inf
        if self._drawn < self._settings.min_length:
            scores[[number for number in self._end_ids if number < self._known]] = -np.inf
        self._drawn += 1
        if self._settings.is_greedy:
            return int(scores.argmax())
        with np.errstate(over="ignore"):  # less the largest, only what is as good as impossible overflows, to -inf
            scores = (scores - scores.max()) / np.float32(self._settings.temperature)
        kept = nucleus(most_likely(scores, self._settings.top_k), scores, self._settings.top_p)
        # noise for every id, so that a token's noise does not depend on which others are kept
        noise = self._random.standard_exponential(self._known, dtype=np.float32)[kept]
        return int(kept[(scores[kept] - np.log(np.maximum(noise, _TINY))).argmax()])


def most_likely(scores: Floats, count: int) -> NDArray[np.int64]:
    """Return the ids of the `count` largest of `scores` (V) and of those equal to the last of them; 0 is all."""
    if not 0 < count < len(scores):
        return np.arange(len(scores))
    least = np.partition(scores, -count)[-count]
    return np.flatnonzero(scores >= least)


def nucleus(ids: NDArray[np.int64], scores: Floats, share: float) -> NDArray[np.int64]:
    """Return the fewest of `ids` that have at least `share` of the probability of all of them, in order of id.

    Source: top-p sampling, arXiv:1904.09751, section 3.1.
    """
    if share >= 1:
        return ids
    order = np.argsort(scores[ids], kind="stable")  # least likely first
    values = scores[ids][order].astype(np.float64)
    weights = np.exp(values - values[-1])
    before = np.cumsum(weights / weights.sum())
    kept = before > 1 - share
    kept[-1] = True
    return np.sort(ids[order[kept]])
