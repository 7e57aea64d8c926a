"""What a run shows people: a page with curves, samples and tables."""
