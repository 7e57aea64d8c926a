"""Importing this makes small texts the work of many batches and shards, each noted in the journal at once.

For processes that tests start, and end at any moment.
"""

from fanformer.data.preparation import journal, selection, workers
from fanformer.data.preparation import prepare as shards
from tests.data.texts import SMALL_SHARD_TOKENS

journal.INTERVAL_SECONDS = 0.0
selection.BATCH_CHARACTERS = 1500
workers.POOL_AFTER_BYTES = 3000
shards.prepare.__kwdefaults__["shard_tokens"] = SMALL_SHARD_TOKENS
