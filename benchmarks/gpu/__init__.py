"""What only a GPU can prove, in one command: `python -m benchmarks.gpu`, see `__main__`."""
