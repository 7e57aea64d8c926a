"""Instruction data: rows of messages, how they become token ids, and which of these are learnt."""
