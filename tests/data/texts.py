"""Texts that tests prepare, and how to read a stream back."""

import itertools

import numpy as np

from fanformer.data.sources.documents import Document, DocumentSource

SMALL_SHARD_TOKENS = 1200
"""Gives a text of few kilobytes several shards."""
CODE = "def f{0}(x):\n    return x + {0}  # äöü 漢字\n"


class Texts(DocumentSource):
    def __init__(self, texts):
        self.spec, self.parts, self.texts = "texts", ("texts",), texts

    def describe(self):
        return {"kind": "texts"}

    def read_part(self, number, skip=0):
        for index, text in enumerate(self.texts[skip:], start=skip):
            yield Document(text, self.name(index), replaced_bytes=text.count("\ufffd"))

    def name(self, index):
        return f"document {index}"


MANY = [CODE.format(i) * (1 + i % 5) for i in range(200)]


def read_back(data, name):
    """Cut a stream into documents again, from the layout's description alone."""
    stream, tokenizer = data.split(name), data.tokenizer()
    tokens = np.asarray(stream.tokens).tolist()
    starts = [i for i, token in enumerate(tokens) if token == stream.start_id]
    if stream.start_id == stream.end_id:
        assert tokens[-1] == stream.end_id
        return [tokenizer.decode(tokens[a + 1 : b]) for a, b in itertools.pairwise(starts)]
    ends = [i for i, token in enumerate(tokens) if token == stream.end_id]
    assert [end + 1 for end in ends] == [*starts[1:], len(tokens)]
    return [tokenizer.decode(tokens[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]
