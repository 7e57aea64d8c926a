"""How many times as fast training is on packed rows as on padded ones, at the lengths of real documents.

    python benchmarks/speed/packing.py --data '../shared/data/text-large/train-*.jsonl.xz' [--rounds 3] [--write]

The same documents, cut to a row's length: one document a row, padded to the longest of its batch as a collator does it,
and packed without padding, documents apart from each other. The rate counts real tokens. Preset nano, float32, eager,
since every padded batch has a length of its own. It should be as many times faster as padding wastes.
"""

from functools import partial
from itertools import islice

import numpy as np
import torch
from speed import Trainee, arguments_of, finish, in_turns, times_faster
from torch import Tensor

from fanformer.comparison.ledger import Figure, range_of
from fanformer.data.packing import PackedRows
from fanformer.data.prepared import TokenStream
from fanformer.data.sources.documents import open_source
from fanformer.data.tokenizer import encode_documents, start_token_id, train_tokenizer
from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.training.configuration import load_preset


def padded_batches(documents: list[list[int]], rows: int) -> list[dict[str, Tensor]]:
    """Return batches of `rows` documents each, padded on the right."""
    batches = []
    for begin in range(0, len(documents), rows):
        group = documents[begin : begin + rows]
        ids = torch.zeros(len(group), max(map(len, group)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, document in enumerate(group):
            ids[row, : len(document)] = torch.tensor(document)
            mask[row, : len(document)] = 1
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


def packed_batches(documents: list[list[int]], length: int, rows: int, start_id: int) -> list[dict[str, Tensor]]:
    """Return batches of `rows` full rows of the same documents, as training has them."""
    tokens = np.concatenate([np.asarray(document, dtype=np.uint16) for document in documents])
    stream = TokenStream(tokens, start_id, start_id, num_documents=len(documents), num_bytes=1)
    packed = PackedRows(stream, length)
    batches = []
    for begin in range(0, len(packed) - rows + 1, rows):
        items = [packed[index] for index in range(begin, begin + rows)]
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        batches.append({**batch, "shift_labels": batch["labels"]})
    return batches


def train_on(trainee: Trainee, batches: list[dict[str, Tensor]]) -> None:
    """Take a step on each batch."""
    for batch in batches:
        trainee.step(**batch)


def main() -> None:
    """Measure and print."""
    arguments = arguments_of(__doc__ or "", data="stdlib", documents=160, length=256, rows=8, rounds=3)
    texts = [document.text for document in islice(open_source(arguments.data), arguments.documents)]
    tokenizer = train_tokenizer(texts, 4096)
    start_id = start_token_id(tokenizer)
    documents = [[start_id, *ids][: arguments.length] for ids in encode_documents(tokenizer, texts)]
    model = FANformerForCausalLM(FANformerConfig(**load_preset("nano").model))
    trainee = Trainee(model, compiled=False)
    padded = padded_batches(documents, arguments.rows)
    packed = packed_batches(documents, arguments.length, arguments.rows, start_id)
    real = {
        "padded": sum(int(batch["attention_mask"].sum()) for batch in padded),
        "packed": sum(batch["input_ids"].numel() for batch in packed),
    }
    batches = {"padded": padded, "packed": packed}
    seconds = in_turns({name: partial(train_on, trainee, rows) for name, rows in batches.items()}, arguments.rounds)
    a_token = {name: [value / real[name] for value in values] for name, values in seconds.items()}
    computed = sum(batch["input_ids"].numel() for batch in padded)
    waste = computed / real["padded"]
    over = [b / a / waste for a, b in zip(a_token["packed"], a_token["padded"], strict=True)]
    result = {
        "times_faster_packed": times_faster(a_token, "packed", "padded"),
        "times_faster_over_waste": range_of(over, "times"),
        "positions_per_token_padded": Figure(waste, "positions", interval="exact"),
        "positions_per_token_packed": Figure(1.0, "positions", interval="exact"),
    }
    for name, values in a_token.items():
        result[f"tokens_per_second_{name}"] = range_of([1 / value for value in values], "tokens/s")
    lengths = sorted(map(len, documents))
    details = {"median_length": lengths[len(lengths) // 2], "cut": sum(n == arguments.length for n in lengths)}
    data = {"source": arguments.data, "fingerprint": f"first {arguments.documents} documents"}
    what = "training on packed and on padded rows"
    finish("speed-packing", what, arguments, result, details, data, scale="nano")


if __name__ == "__main__":
    main()
