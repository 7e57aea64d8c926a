"""How documents become rows of token ids: choosing, splitting, encoding, writing."""
