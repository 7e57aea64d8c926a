"""What a comparison shows people: a page with figures and tables."""
