"""The Hugging Face hub as a source of documents, and a quick answer where it cannot be reached."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

from fanformer.data.documents import Document, DocumentSource
from fanformer.data.readers import import_extra, replace_undecodable
from fanformer.errors import DataError

HUB_TIMEOUT_SECONDS = 5.0
"""How long to wait for the hub's first answer; the packages themselves would retry for 25 seconds and more."""


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


class HubSource(DocumentSource):
    """The split `train` of a dataset on the hub, streamed, at the revision that was newest when it was opened."""

    def __init__(self, spec: str, text_field: str) -> None:
        """Find the dataset and fix its revision.

        Args:
            spec: hf:NAME or hf:NAME:CONFIG.
            text_field: column that holds the text.

        Raises:
            DataError: if the hub does not answer or has no such dataset.
            DependencyError: if the package `datasets` is not installed.
        """
        self.spec = spec
        self._text_field = text_field
        self._name, _, config = spec.removeprefix("hf:").partition(":")
        self._config = config or None
        self.parts = [self._name]
        if not self._name:
            raise DataError(f"data `{spec}` must be hf:NAME or hf:NAME:CONFIG, got no NAME")
        require_hub(f"data `{spec}`", "go on offline with --data FILE (or --data stdlib)")
        import_extra("datasets", f"data `{spec}`")
        self._revision = self._newest_revision()

    def _newest_revision(self) -> str | None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return HfApi().dataset_info(self._name, timeout=10 * HUB_TIMEOUT_SECONDS).sha
        except (HfHubHTTPError, HFValidationError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(f"data `{self.spec}`: the hub has no dataset `{self._name}` for you ({reason})") from error

    def read_part(self, number: int, skip: int = 0) -> Iterator[Document]:
        """Yield the rows of the split."""
        datasets = import_extra("datasets", f"data `{self.spec}`")
        try:
            rows = datasets.load_dataset(
                self._name, self._config, split="train", revision=self._revision, streaming=True
            )
        except (ValueError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(f"data `{self.spec}` cannot be opened: {reason}") from error
        for number, row in itertools.islice(enumerate(rows, start=1), skip, None):
            if not isinstance(row.get(self._text_field), str):
                names = ", ".join(f"`{name}`" for name in row)
                raise DataError(
                    f"data `{self.spec}`, row {number}: no string in column `{self._text_field}`; it has {names}: "
                    "name the one that holds text"
                )
            text, replaced_bytes = replace_undecodable(row[self._text_field])
            yield Document(text, f"{self._name}:{self._config or 'default'}:{number}", replaced_bytes)

    def describe(self) -> dict[str, Any]:
        """Return the dataset's name, configuration and revision."""
        return {
            "kind": "hub",
            "dataset": self._name,
            "config": self._config,
            "revision": self._revision,
            "text_field": self._text_field,
        }
