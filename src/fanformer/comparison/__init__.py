"""Architectures trained on the same tokens, and what that shows: queues, rules, the ledger of results."""
