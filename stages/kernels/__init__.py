"""The operations gpt-oss spends its time in: attention with sinks, mixtures of experts, log-probabilities over the
vocabulary.

Each module's public functions validate their input and choose a path; reference.py holds the plain PyTorch oracles that
every path is tested against. Shapes: B batch, N tokens of all rows, T tokens of a row, D hidden, H query heads, K
key/value heads, C head channels, E experts, k experts per token, F expert hidden, V vocabulary, r LoRA rank.
"""
