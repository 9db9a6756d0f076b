"""Matrix multiplication: the model writes a function on lists of lists."""
