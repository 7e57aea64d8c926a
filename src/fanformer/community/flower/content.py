"""What Flower's messages carry: offers to members, and updates or refusals back.

All bytes travel as arrays of bytes and plain values; nothing in a message is code, and nothing is unpickled. A message
from a member is a stranger's: reading one gives its payload, or DataError.
"""

from importlib.metadata import version
from typing import Any

from fanformer.community.offers import Sealed
from fanformer.errors import DataError, DependencyError, import_extra

SUPPORTED = "1.41"
"""The line of Flower whose connection and port are known here; both change from one to the next."""
_OFFER, _FILES, _BASE, _UPDATE, _REFUSAL = "offer", "files", "base", "update", "refusal"
_PAYLOAD = "payload"
_LONGEST_REASON = 500


def flower(module: str) -> Any:
    """Return a module of Flower.

    Raises:
        DependencyError: if it is not installed.
    """
    return import_extra(f"flwr.{module}" if module else "flwr", "a community run", extra="community")


def require_flower() -> None:
    """Refuse to begin without the packages of a community run.

    Raises:
        DependencyError: if Flower or `cryptography` is missing, or Flower is of another line than SUPPORTED.
    """
    import_extra("cryptography", "a community run", extra="community")
    import_extra("flwr", "a community run", extra="community")
    found = version("flwr")
    if found.rpartition(".")[0] != SUPPORTED:
        raise DependencyError(
            f"a community run needs Flower {SUPPORTED}, whose connection it uses, got {found}: pip install "
            "'fanformer[community]'"
        )


def _bytes_record(content: dict[str, bytes]) -> Any:
    app = flower("app")
    arrays = {
        name: app.Array(dtype="uint8", shape=(len(body),), stype="bytes", data=body) for name, body in content.items()
    }
    return app.ArrayRecord(arrays)


def _read_bytes(record: Any) -> dict[str, bytes]:
    return {str(name): bytes(array.data) for name, array in record.items()}


def offer_content(sealed: Sealed, base: bytes | None) -> Any:
    """Return the content of a message with an offer.

    Args:
        sealed: the offer.
        base: the weights to begin with, None where nothing is to be trained.
    """
    app = flower("app")
    words = {"text": sealed.text, "signature": sealed.signature, "public_key": sealed.public_key}
    records = {_OFFER: app.ConfigRecord(words), _FILES: _bytes_record(dict(sealed.files))}
    if base is not None:
        records[_BASE] = _bytes_record({_PAYLOAD: base})
    return app.RecordDict(records)


def read_offer(content: Any) -> tuple[Sealed, bytes | None]:
    """Return the offer in a message, unopened, and the weights beside it.

    Raises:
        DataError: if there is none.
    """
    try:
        words = content[_OFFER]
        files = _read_bytes(content[_FILES]) if _FILES in content else {}
        base = _read_bytes(content[_BASE])[_PAYLOAD] if _BASE in content else None
        sealed = Sealed(str(words["text"]), str(words["signature"]), str(words["public_key"]), files)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"the host's message has no offer ({error}): is this a community run of fanformer?") from error
    return sealed, base


def update_content(payload: bytes) -> Any:
    """Return the content of a message with an update."""
    return flower("app").RecordDict({_UPDATE: _bytes_record({_PAYLOAD: payload})})


def refusal_content(reason: str) -> Any:
    """Return the content of a message that says why there is no update."""
    app = flower("app")
    return app.RecordDict({_REFUSAL: app.ConfigRecord({"reason": reason[:_LONGEST_REASON]})})


def read_reply(content: Any) -> tuple[bytes | None, str]:
    """Return the update in a member's message, or None and why there is none.

    Raises:
        DataError: if it has neither.
    """
    try:
        if _REFUSAL in content:
            return None, ascii(str(content[_REFUSAL]["reason"])[:_LONGEST_REASON])
        return _read_bytes(content[_UPDATE])[_PAYLOAD], ""
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"a reply must hold an update or a refusal, got neither ({error}).") from error
