"""Training and evaluation: the loop and what it needs."""
