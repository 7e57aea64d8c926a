"""Where documents come from, and how they become rows of token ids."""
