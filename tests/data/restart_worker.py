"""Prepare a folder in a process that tests start and kill: a journal entry a batch, small batches and shards."""

import time
from pathlib import Path


def main(spec: str, output_dir: str, tokenizer: str, workers: str, delay: str) -> None:
    from fanformer.data.preparation import journal, selection
    from fanformer.data.preparation import prepare as shards
    from fanformer.data.preparation import workers as pool
    from fanformer.data.sources.documents import open_source
    from fanformer.data.tokenizer import load_tokenizer

    journal.INTERVAL_SECONDS = 0.0
    selection.BATCH_CHARACTERS = 20_000
    pool.POOL_AFTER_BYTES = 50_000
    print("begun", flush=True)

    def progress(done: int, total: int | None) -> None:
        print("encoding", flush=True)
        time.sleep(float(delay))

    shards.prepare(
        open_source(spec, source_field="origin"),
        Path(output_dir),
        tokenizer=load_tokenizer(tokenizer) if tokenizer else None,
        vocab_size=600,
        filters=("min-words",),
        deduplicate=True,
        workers=int(workers),
        shard_tokens=30_000,
        progress=progress,
    )
    print("done", flush=True)
