"""Rows for training on answers: conversations packed whole, each with its own positions and its own labels.

Plain texts may stand among them, which are learnt whole, as the base has learnt text.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from fanformer.data.conversations.chatml import ChatML
from fanformer.data.conversations.examples import Example, Message
from fanformer.data.packing import IGNORED_LABEL
from fanformer.errors import ConfigError, DataError


@dataclass(frozen=True)
class MaskedDocument:
    """A conversation up to the last token that is learnt, or a plain text.

    Attributes:
        ids: (N + 1,) int32: N inputs, and the label of the last of them.
        trained: (N,) bool, whether the token after each input is learnt.
        num_bytes: UTF-8 bytes of the answers, or of the text, that are learnt.
    """

    ids: np.ndarray
    trained: np.ndarray
    num_bytes: int

    def __len__(self) -> int:
        """Return N, how many places of a row it takes."""
        return len(self.trained)


@dataclass(frozen=True)
class TokenizedExamples:
    """Examples as tokens, and what became of those that do not fit.

    Attributes:
        documents: of each example that is learnt from: one, or two of a preference, chosen and rejected. A plain text
            that is longer than a row has several of one.
        sources: the index of each of these examples.
        too_long: examples left out, since the last question with its answer fills more than a row.
        unanswered: examples left out, since nothing of them is learnt.
        shortened: examples that lost their oldest questions and answers.
        forgotten: messages that these lost.
    """

    documents: tuple[tuple[MaskedDocument, ...], ...]
    sources: tuple[int, ...]
    too_long: int
    unanswered: int
    shortened: int
    forgotten: int


def masked_document(chatml: ChatML, messages: Sequence[Message], given: int = 0) -> MaskedDocument | None:
    """Return a conversation's tokens as inputs and labels, or None where nothing of it is learnt.

    Args:
        chatml: writes it.
        messages: the conversation.
        given: how many of its first messages hold nothing to learn.
    """
    encoded = chatml.encode(messages, given)
    trained = np.array(encoded.trained, dtype=bool)
    if not trained.any():
        return None
    last = int(np.flatnonzero(trained)[-1])
    learnt = [message.content for message in messages[given:] if message.role == "assistant"]
    num_bytes = sum(len(content.encode()) for content in learnt)
    return MaskedDocument(np.array(encoded.ids[: last + 1], dtype=np.int32), trained[1 : last + 1], num_bytes)


def plain_documents(chatml: ChatML, text: str, ends: tuple[int, int], sequence_length: int) -> Iterator[MaskedDocument]:
    """Yield a text's tokens as inputs and labels, all of which are learnt, in pieces of at most a row.

    Args:
        chatml: encodes it.
        text: what it says; no token of it is a control token.
        ends: the tokens that open and end documents.
        sequence_length: T, the tokens of a row.
    """
    ids = np.array([ends[0], *chatml.encode_plain(text), ends[1]], dtype=np.int32)
    places, num_bytes = len(ids) - 1, len(text.encode())
    for start in range(0, places, sequence_length):
        stop = min(start + sequence_length, places)
        share = num_bytes * stop // places - num_bytes * start // places  # in equal parts over the tokens
        yield MaskedDocument(ids[start : stop + 1], np.ones(stop - start, dtype=bool), share)


def shorten(chatml: ChatML, example: Example, sequence_length: int) -> Example | None:
    """Return an example without as many of its oldest questions and answers as a row cannot hold.

    What is left begins with the system message, if there is one, and a question; its end is never cut. Where it is a
    preference, a row holds the prompt twice, with either end.

    Args:
        chatml: writes it.
        example: a conversation.
        sequence_length: T, the tokens of a row.

    Returns:
        The example itself where it fits, and None where the last question and answer do not.
    """
    system, ends = 1 if example.messages[0].role == "system" else 0, [example.messages[example.given :]]
    if example.rejected:
        ends.append(example.rejected)
    prompt = example.messages[: example.given]
    whole = sum(_places(chatml, (*prompt, *end)) for end in ends)
    # a prompt ends with its question, a conversation that is learnt from with question and answer
    droppable = len(example.messages) - system - 2 if not prompt else len(prompt) - system - 1
    for dropped in range(0, droppable + 1, 2):
        if whole <= sequence_length:
            kept = (*example.messages[:system], *example.messages[system + dropped :])
            return example if not dropped else _without(example, kept, dropped)
        oldest = example.messages[system + dropped : system + dropped + 2]
        whole -= len(ends) * sum(chatml.count(one) for one in oldest)
    return None


def _without(example: Example, kept: tuple[Message, ...], dropped: int) -> Example:
    return replace(example, messages=kept, given=max(example.given - dropped, 0))


def _places(chatml: ChatML, messages: Sequence[Message]) -> int:
    """Return how many inputs a conversation takes up to its last answer's end."""
    return len(chatml.encode(messages).ids) - 1 - len(chatml.line_end)


def tokenize_examples(
    chatml: ChatML,
    examples: Sequence[Example],
    sequence_length: int,
    note: Callable[[str], None],
    *,
    preference: bool = False,
    ends: tuple[int, int] | None = None,
) -> TokenizedExamples:
    """Return what of the examples is learnt from, as tokens.

    Args:
        chatml: writes them.
        examples: the conversations.
        sequence_length: T, the tokens of a row.
        note: is told in one line of each example that is left out, and at the end how many were shortened.
        preference: whether the rejected answers are wanted too; else only the chosen ones are learnt.
        ends: the tokens that open and end documents; needed where an example is a plain text.

    Raises:
        DataError: if none is left.
    """
    documents: list[tuple[MaskedDocument, ...]] = []
    sources: list[int] = []
    too_long = unanswered = shortened = forgotten = 0
    for index, example in enumerate(examples):
        if example.text:
            assert ends is not None, "whoever has plain texts says how documents begin and end"
            pieces = list(plain_documents(chatml, example.text, ends, sequence_length))
            documents += [(piece,) for piece in pieces]
            sources += [index] * len(pieces)
            continue
        where = example.place or f"example {index + 1}"
        wanted = example if preference else replace(example, rejected=())
        found, lost = _documents(chatml, wanted), 0
        if sum(map(len, found)) > sequence_length:
            short = shorten(chatml, wanted, sequence_length)
            if short is None:
                too_long += 1
                what = "its last question with both answers" if wanted.rejected else "its last question with its answer"
                note(f"{where}: {what} has more tokens than a row, {sequence_length}; left out")
                continue
            found, lost = _documents(chatml, short), len(example.messages) - len(short.messages)
        if not found:
            unanswered += 1
            note(f"{where}: nothing of it is an answer to learn; left out")
            continue
        shortened, forgotten = shortened + bool(lost), forgotten + lost
        documents.append(found)
        sources.append(index)
    if shortened:
        note(f"{shortened} examples lost their oldest {forgotten} messages to fit rows of {sequence_length} tokens")
    if not documents:
        raise DataError(
            f"none of {len(examples)} examples can be learnt from in rows of {sequence_length} tokens, {too_long} are "
            "too long: use a larger `--sequence-length` or other data"
        )
    return TokenizedExamples(tuple(documents), tuple(sources), too_long, unanswered, shortened, forgotten)


def _documents(chatml: ChatML, example: Example) -> tuple[MaskedDocument, ...]:
    """Return an example with each of its ends, or nothing where one of them has nothing to learn."""
    ends = [example.messages]
    if example.rejected:
        ends.append((*example.messages[: example.given], *example.rejected))
    found = [masked_document(chatml, end, example.given) for end in ends]
    return tuple(document for document in found if document is not None) if None not in found else ()


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Put things into as few rows as best-fit decreasing finds: the longest first, each where least room is left over.

    Args:
        lengths: of each, from 1 to `room`.
        room: of a row.

    Returns:
        For each row which things it holds, by their indices.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows by the room that is left in them
    rooms: list[int] = []  # that some row has left, ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, left = len(rows), room - length
            rows.append([])
        else:
            row, left = with_room[rooms[place]].pop(), rooms[place] - length
            if not with_room[rooms[place]]:
                rooms.pop(place)
        rows[row].append(index)
        if left:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(row)
    return rows


def _fit_by_group(lengths: Sequence[int], room: int, groups: Sequence[int] | None) -> list[list[int]]:
    """Return what `best_fit` makes of the things of each group, one group after another."""
    if groups is None:
        return best_fit(lengths, room)
    rows = []
    for group in sorted(set(groups)):
        members = [index for index, own in enumerate(groups) if own == group]
        packed = best_fit([lengths[index] for index in members], room)
        rows += [[members[index] for index in row] for row in packed]
    return rows


class ConversationRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of T tokens, each holding one or several whole examples and a rest of filler.

    `labels` are shifted already: `labels[t]` is what follows `input_ids[t]` where that is learnt, and IGNORED_LABEL
    elsewhere; every row has one that counts. `position_ids` begin at 0 with every conversation and with the filler, so
    that a model that derives its mask from them keeps them apart. Rows of preferences have `document_ids` besides: 2n
    where the chosen answer of the row's n-th pair is with its prompt, 2n + 1 where the rejected one is, -1 at filler.
    """

    digested = ("input_ids", "labels")
    """What tells two rows apart: equal ids may teach other answers."""

    def __init__(
        self,
        examples: Iterable[Sequence[MaskedDocument]],
        sequence_length: int,
        filler_id: int,
        groups: Sequence[int] | None = None,
    ) -> None:
        """Pack the examples; equal ones in equal order give equal rows.

        Args:
            examples: the documents of each, as `tokenize_examples` gives them: one of each, or two of each.
            sequence_length: T, tokens per row.
            filler_id: what fills rows up; never a label.
            groups: of each example, none of which may be without a token to learn then: those of one group share rows.

        Raises:
            ConfigError: if `sequence_length` is not positive.
            DataError: if there is nothing to learn, an example is longer than a row, or pairs are mixed with others.
        """
        if sequence_length < 1:
            raise ConfigError(f"`sequence_length` must be at least 1, got {sequence_length}")
        given = [tuple(example) for example in examples]
        kept = [example for example in given if all(document.trained.any() for document in example)]
        self.left_out = len(given) - len(kept)
        """Examples without a token to learn."""
        lengths = [sum(map(len, example)) for example in kept]
        if not kept or max(lengths) > sequence_length:
            got = f"one of {max(lengths)}" if kept else "none"
            raise DataError(
                f"`examples` must have 1 to {sequence_length} tokens with some to learn, got {got}: "
                "shorten them, or use a larger `--sequence-length`"
            )
        if len(sizes := {len(example) for example in kept}) > 1 or not sizes <= {1, 2}:
            raise DataError(f"`examples` must all have one document or all two, got {sizes}: keep them in two files")
        self.tokens_per_row = sequence_length
        self._filler_id = filler_id
        self._documents_each = sizes.pop()
        documents = [document for example in kept for document in example]
        self.num_labels = sum(int(document.trained.sum()) for document in documents)
        """Tokens that the rows teach."""
        self._ids = np.concatenate([document.ids for document in documents])
        self._trained = np.concatenate([document.trained for document in documents])
        self._starts = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
        self._bytes = np.array([document.num_bytes for document in documents], dtype=np.int64)
        self._rows = _fit_by_group(lengths, sequence_length, groups)
        self.num_examples = len(kept)
        self.most_examples = max(map(len, self._rows))
        """Examples of the row that holds most."""
        self.fraction_filled = sum(lengths) / (len(self._rows) * sequence_length)
        """Share of the places that hold conversations; the rest is filler."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """A digest of all rows: equal where they are."""
        digest = hashlib.sha256(f"{self.tokens_per_row},{self._filler_id},{self._documents_each}".encode())
        digest.update(self._starts.astype("<i8").tobytes())
        digest.update(self._ids.astype("<i4").tobytes())
        digest.update(self._trained.tobytes())
        return digest.hexdigest()

    def batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return several rows, each tensor (B, T) int64."""
        rows = [self[index] for index in indices]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def document_starts(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return where documents begin in rows of this, the filler being one too: (B, T) bool.

        Args:
            batch: `position_ids` among them, (B, T).
        """
        return batch["position_ids"] == 0

    def document_bytes(self) -> list[list[int]]:
        """Return for each row the bytes of the answers in each of its documents, 0 for the filler at its end."""
        each, found = self._documents_each, []
        for examples in self._rows:
            numbers = [each * example + part for example in examples for part in range(each)]
            used = sum(int(self._starts[number + 1] - self._starts[number]) for number in numbers)
            found.append([int(self._bytes[number]) for number in numbers] + [0] * (used < self.tokens_per_row))
        return found

    def examples_of(self, index: int) -> list[int]:
        """Return which examples a row holds, in its order, counted without those left out."""
        return list(self._rows[index])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels` and `position_ids` of a row, each (T,) int64, and of pairs `document_ids`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row must be in [0, {len(self)}), got {index}")
        length, each = self.tokens_per_row, self._documents_each
        inputs = np.full(length, self._filler_id, dtype=np.int64)
        labels = np.full(length, IGNORED_LABEL, dtype=np.int64)
        documents = np.full(length, -1, dtype=np.int64)
        positions = np.empty(length, dtype=np.int64)
        place = 0
        numbers = [each * example + part for example in self._rows[index] for part in range(each)]
        for within, number in enumerate(numbers):
            start, end = int(self._starts[number]), int(self._starts[number + 1])
            here = slice(place, place + end - start)
            ids = self._ids[start + number : end + number + 1]  # each has one id more than places
            inputs[here] = ids[:-1]
            labels[here] = np.where(self._trained[start:end], ids[1:], IGNORED_LABEL)
            positions[here] = np.arange(end - start)
            documents[here] = within
            place = here.stop
        positions[place:] = np.arange(length - place)
        row = {"input_ids": inputs, "labels": labels, "position_ids": positions}
        if each == 2:
            row["document_ids"] = documents
        return {name: torch.from_numpy(values) for name, values in row.items()}
