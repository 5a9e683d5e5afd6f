"""How good a model is, clean and under attack."""
