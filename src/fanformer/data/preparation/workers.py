"""Encode batches of documents on several cores; what comes out does not depend on how many."""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process, resource_tracker

import numpy as np
import psutil

from fanformer.data.preparation.encoding import DocumentEncoder
from fanformer.data.preparation.selection import Batch
from fanformer.data.token_files import lay_out
from fanformer.errors import ConfigError, DataError
from fanformer.machine.threads import allowed_cores

POOL_AFTER_BYTES = 1 << 22
"""Text that is encoded before worker processes are started: below this, starting them takes longer than it saves."""
_AHEAD = 2
"""Batches that wait for a worker, for each worker."""
_MOST_ON_WINDOWS = 61
"""Processes that one can wait for there; Python refuses to make a pool of more."""


def usual_workers() -> int:
    """Return how many processes encode where nobody says how many: one for each core that may be used."""
    return min(allowed_cores(), _MOST_ON_WINDOWS) if sys.platform == "win32" else allowed_cores()


def check_workers(workers: int) -> None:
    """Raise ConfigError if there cannot be so many processes."""
    if workers < 1:
        raise ConfigError(f"`workers` must be at least 1, got {workers}")
    if sys.platform == "win32" and workers > _MOST_ON_WINDOWS:
        raise ConfigError(f"`workers` must be at most {_MOST_ON_WINDOWS} on Windows, got {workers}")


@dataclass(frozen=True)
class Encoded:
    """The streams of one batch.

    Attributes:
        streams: bytes of the training and of the held-out stream.
        num_tokens: of each document, start and end tokens included.
        num_bytes: UTF-8 bytes of each document's text.
        process: number of the process that encoded it.
        peak_bytes: most memory which that process has had.
    """

    streams: tuple[bytes, bytes]
    num_tokens: list[int]
    num_bytes: list[int]
    process: int
    peak_bytes: int


@dataclass(frozen=True)
class BatchEncoder:
    """Encodes and lays out the documents of a batch; travels to worker processes.

    Attributes:
        encoder: gives the ids.
        start_id: token in front of every document.
        end_id: token after every document.
        vocab_size: all ids are below it.
        dtype: of the streams, such as "<u2".
    """

    encoder: DocumentEncoder
    start_id: int
    end_id: int
    vocab_size: int
    dtype: str

    @property
    def closing(self) -> bytes:
        """What ends a stream: the end token, where it is not there already."""
        return np.array([self.end_id] if self.start_id == self.end_id else [], dtype=self.dtype).tobytes()

    def encode(self, documents: list[tuple[bool, str, str]]) -> Encoded:
        """Return the streams of documents, each given as (held out, name, text).

        Raises:
            ConfigError: if tokens of a text are the start or end token, which only separate documents, or lie outside
                the vocabulary, or if the tokenizer fails.
        """
        try:
            ids = self.encoder.encode([text for _, _, text in documents])
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the Rust side raises plain Exception, and a panic is no Exception at all
            raise ConfigError(
                f"the tokenizer fails at a text of {documents[0][1]} or after it ({str(error).strip()[:200]}): "
                "use another --tokenizer"
            ) from error
        self._check([name for _, name, _ in documents], ids)

        def stream(wanted: bool) -> bytes:
            chosen = [tokens for (held_out, _, _), tokens in zip(documents, ids, strict=True) if held_out == wanted]
            return lay_out(chosen, self.start_id, self.end_id, np.dtype(self.dtype), close=False).tobytes()

        separators = 1 if self.start_id == self.end_id else 2
        return Encoded(
            streams=(stream(False), stream(True)),
            num_tokens=[len(tokens) + separators for tokens in ids],
            num_bytes=[len(text.encode()) for _, _, text in documents],
            process=os.getpid(),
            peak_bytes=peak_bytes(),
        )

    def _check(self, names: list[str], ids: list[np.ndarray]) -> None:
        tokens = np.concatenate(ids)
        bad = (tokens == self.start_id) | (tokens == self.end_id) | (tokens >= self.vocab_size)
        if not bad.any():
            return
        position = int(np.argmax(bad))
        document = int(np.searchsorted(np.cumsum([len(part) for part in ids]), position, side="right"))
        if tokens[position] >= self.vocab_size:
            raise ConfigError(
                f"the tokenizer gives the token {tokens[position]} and says that it has {self.vocab_size}: "
                "use another --tokenizer"
            )
        raise ConfigError(
            f"the tokenizer turns text of {names[document]} into its start or end token (id {self.start_id} or "
            f"{self.end_id}), which must only separate documents: use another --tokenizer"
        )


def peak_bytes() -> int:
    """Return the most memory that this process has had, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


_encoder_of_process: BatchEncoder | None = None


def _start_worker(encoder: BatchEncoder) -> None:
    global _encoder_of_process
    _encoder_of_process = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the main process is gone: killed, it cannot say so, and a worker would wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(documents: list[tuple[bool, str, str]]) -> Encoded:
    assert _encoder_of_process is not None, "a worker begins with _start_worker"
    return _encoder_of_process.encode(documents)


def encode_in_order(
    batches: Iterator[Batch], encoder: BatchEncoder, workers: int
) -> Generator[tuple[Batch, Encoded], None, None]:
    """Encode batches and yield them in order.

    The first POOL_AFTER_BYTES, or everything where `workers` is 1, are encoded in this process. No more than a few
    batches for each worker are in memory at once.

    Args:
        batches: the documents.
        encoder: encodes a batch.
        workers: worker processes, at least 1.

    Raises:
        DataError: if a worker process dies.
    """
    encoded_bytes = 0
    for batch in batches:
        encoded = encoder.encode(_plain(batch))
        encoded_bytes += sum(encoded.num_bytes)
        yield batch, encoded
        if workers > 1 and encoded_bytes >= POOL_AFTER_BYTES:
            yield from _encode_in_pool(batches, encoder, workers)


def _plain(batch: Batch) -> list[tuple[bool, str, str]]:
    return [(held_out, document.name, document.text) for held_out, document in batch.documents]


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Keep Ctrl-C waiting until the end of the block; processes that are started in it never get one.

    It goes to all processes of a terminal, and one that had not come as far as `_start_worker` wrote a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # where it is not, multiprocessing starts it, and lets Ctrl-C through after that
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _encode_in_pool(batches: Iterator[Batch], encoder: BatchEncoder, workers: int) -> Iterator[tuple[Batch, Encoded]]:
    # a fresh interpreter for each: a fork would copy the locks of torch's and tokenizers' threads
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(encoder,))
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    try:
        for batch in batches:
            with _ctrl_c_held_back():  # the first of these starts the processes
                waiting.append((batch, pool.submit(_encode_in_worker, _plain(batch))))
            if len(waiting) > (1 + _AHEAD) * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that encodes text died, got no word why (it may have been killed for its memory): "
            f"give fewer than {workers} workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
