"""Training together over slow links: coded updates, their defence, the outer step, rounds and members; no transport."""
