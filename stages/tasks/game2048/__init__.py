"""2048: the model writes a strategy, the sandbox plays it."""
