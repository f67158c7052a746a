"""Real models around :func:`fastattn.attention`, run by ``python -m fastattn demo``."""
