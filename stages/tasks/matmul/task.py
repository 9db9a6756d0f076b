"""The matmul task: its prompt."""

PROMPT = """\
Write a Python function matmul(A: list[list[float]], B: list[list[float]]) -> list[list[float]] \
that returns the matrix product of A and B, as fast as pure Python can. \
The matrices have any sizes that fit. Do not change A or B. \
Import only math, random, itertools, collections, functools, heapq, copy or typing. \
Answer with one fenced python code block that holds the function."""
