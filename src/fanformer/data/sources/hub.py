"""The Hugging Face hub as a source of documents, and a quick answer where it cannot be reached."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from fanformer.data.sources.documents import Document, DocumentSource
from fanformer.data.sources.readers import (
    Fields,
    Record,
    parquet_records,
    record_of,
    replace_undecodable,
    require_columns,
)
from fanformer.errors import DataError, FANformerError, did_you_mean, import_extra

HUB_TIMEOUT_SECONDS = 5.0
"""How long to wait for the hub's first answer; the packages themselves would retry for 25 seconds and more."""
MAX_FAILURES = 12
"""Failures in a row after which a stream is given up; the packages' own retries lie within one of them."""
FIRST_WAIT_SECONDS = 2.0
"""Wait after the first failure in a row; each further one doubles it."""
LONGEST_WAIT_SECONDS = 300.0
LONGEST_OUTAGE_SECONDS = 3600.0
"""Time without a single row after which a stream is given up."""

_Result = TypeVar("_Result")
_logger = logging.getLogger(__name__)


def require_hub(purpose: str, remedy: str) -> None:
    """Return if the hub answers, within HUB_TIMEOUT_SECONDS.

    Args:
        purpose: what the hub is needed for, as the subject of a sentence.
        remedy: how to go on without it.

    Raises:
        DataError: if HF_HUB_OFFLINE is set or the hub (HF_ENDPOINT where that is set) does not answer.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{purpose} needs the hub, and HF_HUB_OFFLINE=1 forbids it: unset it, or {remedy}")
    problem = _probe(constants.ENDPOINT)
    if problem:
        raise DataError(f"{purpose} needs the hub, and {constants.ENDPOINT} does not answer ({problem}): {remedy}")


def _probe(endpoint: str) -> str | None:
    """Return what is wrong with the connection to the hub, None if it answers."""
    from huggingface_hub import get_session

    outcome: list[str | None] = []

    def ask() -> None:
        try:
            response = get_session().head(endpoint, timeout=HUB_TIMEOUT_SECONDS)
            outcome.append(f"HTTP status {response.status_code}" if response.status_code >= 500 else None)
        # the hub client's HTTP library changes with its version, so its errors have no common name to catch
        except Exception as error:
            outcome.append(str(error).partition("\n")[0] or type(error).__name__)

    # in a thread of its own, since looking up a name has no timeout
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS + 1)
    return outcome[0] if outcome else f"no answer within {HUB_TIMEOUT_SECONDS:g} s"


class _Outage:
    """Failures in a row: how often, since when, and how long to wait before the next try."""

    def __init__(self) -> None:
        self.failures = 0
        self._began = 0.0

    def end(self) -> None:
        """Forget the failures, since something has come through."""
        self.failures = 0

    def wait(self, reason: str) -> bool:
        """Count a failure and wait; return False, without a wait, where it is time to give up."""
        if not self.failures:
            self._began = time.monotonic()
        self.failures += 1
        pause = min(FIRST_WAIT_SECONDS * 2 ** (self.failures - 1), LONGEST_WAIT_SECONDS)
        if self.failures >= MAX_FAILURES or time.monotonic() + pause - self._began > LONGEST_OUTAGE_SECONDS:
            return False
        _logger.warning("%s: trying again in %g s (failure %d of %d)", reason, pause, self.failures, MAX_FAILURES)
        time.sleep(pause)
        return True


def is_temporary(error: BaseException | None) -> bool:
    """Return whether an error of the hub's packages, or one that caused it, is of the network or the hub's load."""
    from huggingface_hub.errors import HfHubHTTPError

    # the HTTP library changes with the version of the hub's client; the base of its errors is a base of this one
    http_error = HfHubHTTPError.__bases__[0]
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status in (408, 429) or status >= 500
        if isinstance(error, (http_error, ConnectionError, TimeoutError)):
            return True
        error = error.__cause__ or error.__context__
    return False


class HubSource(DocumentSource):
    """The split `train` of a dataset on the hub, streamed, at the revision that was newest when it was opened.

    A part is one data file. A stream that breaks goes on at the row where it broke.
    """

    def __init__(self, spec: str, fields: Fields) -> None:
        """Find the dataset, fix its revision and list its files.

        Args:
            spec: hf:NAME or hf:NAME:CONFIG.
            fields: columns to read.

        Raises:
            DataError: if the hub does not answer, has no such dataset or configuration, or denies access.
            DependencyError: if the package `datasets` is not installed.
        """
        self.spec = spec
        self._fields = fields
        self._name, _, config = spec.removeprefix("hf:").partition(":")
        if not self._name:
            raise DataError(f"data `{spec}` must be hf:NAME or hf:NAME:CONFIG, got no NAME")
        require_hub(f"data `{spec}`", "go on offline with --data FILE (or --data stdlib)")
        import_extra("datasets", f"data `{spec}`")
        self._revision, self._licence = self._opened(self._information)
        self._builder = self._opened(lambda: self._open(config or None))
        files = self._builder.config.data_files
        if not files.get("train"):
            splits = ", ".join(name for name in files if files[name]) or "none"
            raise DataError(f"data `{spec}` must have files of a split `train`, got {splits}: name another dataset")
        self._urls = list(files["train"])
        self._root = f"hf://datasets/{self._name}@{self._revision}/"
        self.parts = [url.removeprefix(self._root) for url in self._urls]

    def _information(self) -> tuple[str, str | None]:
        """Return the newest revision and the licence, after a check that the files may be read."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

        api = HfApi()
        try:
            found = api.dataset_info(self._name, timeout=10 * HUB_TIMEOUT_SECONDS)
            if found.gated:
                api.auth_check(self._name, repo_type="dataset")
        except HFValidationError as error:
            raise DataError(f"data `{self.spec}` must be hf:OWNER/NAME[:CONFIG], got {_first_line(error)}") from error
        except GatedRepoError as error:
            raise DataError(
                f"data `{self.spec}`: access to `{self._name}` must be asked for: do so at "
                f"{api.endpoint}/datasets/{self._name}, then log in with `hf auth login` or set HF_TOKEN"
            ) from error
        except RepositoryNotFoundError as error:
            raise DataError(
                f"data `{self.spec}`: the hub has no dataset `{self._name}` that you may read: check the name, or log "
                "in with `hf auth login` or HF_TOKEN if it is private"
            ) from error
        card = found.card_data.to_dict() if found.card_data is not None else {}
        licence = card.get("license_name") or card.get("license")
        return found.sha, ", ".join(licence) if isinstance(licence, list) else licence

    def _open(self, config: str | None) -> Any:
        """Return the builder of the dataset, which knows its files."""
        datasets = import_extra("datasets", f"data `{self.spec}`")
        remote = f"hf://datasets/{self._name}"  # so that a folder of this name here is not taken for it
        try:
            return datasets.load_dataset_builder(remote, config, revision=self._revision)
        except ValueError as error:
            if is_temporary(error):
                raise
            names = datasets.get_dataset_config_names(remote, revision=self._revision)
            if config is None and len(names) > 1:
                reason = f"must name one of its configurations, as hf:{self._name}:{names[0]}; it has"
                raise DataError(f"data `{self.spec}` {reason} {', '.join(names)}") from error
            if config is not None and config not in names:
                raise DataError(
                    f"data `{self.spec}`: `{self._name}` has no configuration `{config}`: {did_you_mean(config, names)}"
                ) from error
            raise
        except RuntimeError as error:  # a script in the repository
            raise DataError(
                f"data `{self.spec}` cannot be opened ({_first_line(error)}): name a dataset of parquet or jsonl files"
            ) from error

    def _opened(self, action: Callable[[], _Result]) -> _Result:
        """Return what `action` returns, trying again while the hub fails."""
        return next(self._persist(lambda row: [action()], lambda row: "while it was opened"))

    def _persist(
        self, rows: Callable[[int], Iterable[_Result]], where: Callable[[int], str], row: int = 0
    ) -> Iterator[_Result]:
        """Yield rows; where the hub fails, wait and go on after the last one that came.

        Args:
            rows: gives the rows after the first few.
            where: says after how many it broke, for messages.
            row: how many to leave out.

        Raises:
            DataError: where trying again cannot help, or was done for long enough.
        """
        outage = _Outage()
        while True:
            try:
                for found in rows(row):
                    row += 1
                    outage.end()
                    yield found
                return
            except FANformerError:
                raise
            # anything may come out of three packages and their dependencies
            except Exception as error:
                reason = f"data `{self.spec}`, {where(row)}: {_first_line(error)}"
                if not is_temporary(error):
                    raise DataError(f"{reason}: check the dataset on the hub, or name another") from error
                if not outage.wait(reason):
                    raise DataError(
                        f"{reason} ({outage.failures} failures in a row): once the hub answers, the same command goes "
                        "on there"
                    ) from error

    def read_part(self, number: int, skip: int = 0) -> Iterator[Document]:
        """Yield the rows of one file.

        Row groups of a parquet file before `skip` are not fetched; other files are fetched from their beginning.

        Raises:
            DataError: if a row holds no text, the file is damaged, or the hub fails for long.
        """
        part = self.parts[number]
        for record in self._persist(lambda row: self._rows(number, row), lambda row: f"{part} after row {row}", skip):
            text, replaced_bytes = replace_undecodable(record.text)
            yield Document(text, f"{self._name}/{part}{record.suffix}", replaced_bytes, record.source, record.licence)

    def _rows(self, number: int, skip: int) -> Iterator[Record]:
        """Yield the rows of a part after the first `skip`."""
        url, part = self._urls[number], self.parts[number]
        where = f"data `{self.spec}`, {part}"
        if url.startswith(self._root) and url.endswith(".parquet"):
            from huggingface_hub import HfFileSystem

            with HfFileSystem().open(url, "rb") as file:
                yield from parquet_records(file, where, self._fields, skip)
            return
        stream = self._builder.as_streaming_dataset("train").shard(len(self.parts), number)
        row = skip
        for batch in stream.skip(skip).with_format("arrow").iter(batch_size=1024):
            require_columns(batch.schema, where, self._fields)
            for values in batch.to_pylist():
                row += 1
                yield record_of(values, self._fields, row, f"{where}:{row}")

    def describe(self) -> dict[str, Any]:
        """Return the dataset's name, configuration, revision, files and licence."""
        return {
            "kind": "hub",
            "dataset": self._name,
            "config": self._builder.config.name,
            "split": "train",
            "revision": self._revision,
            "licence": self._licence,
            **self._fields._asdict(),
            "parts": list(self.parts),
        }


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__
