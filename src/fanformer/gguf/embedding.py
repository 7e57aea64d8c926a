"""The embedding of a GGUF file, read from it row by row: a token needs one row, so memory need not hold them all."""

import numpy as np
from numpy.typing import NDArray

from fanformer.errors import CheckpointError
from fanformer.gguf.blocks import Bytes, Floats, dequantize
from fanformer.gguf.file import GGUFFile, TensorInfo, read_at

_ROWS_AT_ONCE = 256


class Embedding:
    """Rows of the embedding, in float32; the file stays open."""

    def __init__(self, file: GGUFFile, info: TensorInfo) -> None:
        """Check all rows.

        Args:
            file: a checked file; only what was opened is kept of it.
            info: the embedding, (V, D).

        Raises:
            CheckpointError: if a number is not finite.
        """
        self._path, self._stream, self._info = file.path, file.stream, info
        self._row_bytes = info.kind.row_bytes(info.shape[-1])
        for first in range(0, info.shape[0], _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, info.shape[0] - first)
            if not np.isfinite(self._numbers(self._read(first, count))).all():
                raise file.fail(f"tensor `{info.name}` holds values that are not finite.")

    def rows(self, ids: NDArray[np.int32]) -> Floats:
        """Return the rows (N, D) of token ids (N,), which must be the model's.

        Raises:
            CheckpointError: if the file has become shorter.
        """
        return self._numbers(np.concatenate([self._read(number, 1) for number in ids.tolist()]))

    def _numbers(self, raw: Bytes) -> Floats:
        return dequantize(raw, self._info.kind, (len(raw) // self._row_bytes, self._info.shape[-1]))

    def _read(self, first: int, count: int) -> Bytes:
        raw = np.empty(count * self._row_bytes, dtype=np.uint8)
        if not read_at(self._stream, self._info.offset + first * self._row_bytes, raw):
            raise CheckpointError(f"{self._path.absolute()} became shorter while it was in use: copy it again.")
        return raw
