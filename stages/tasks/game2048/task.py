"""The 2048 task: its prompt."""

TEMPLATE = """\
Write a Python function strategy(board: list[list[int]]) -> str that plays 2048 on a {size}x{size} board and reaches {target}. \
board holds rows of numbers, 0 is empty. Return the next move: 'W' up, 'A' left, 'S' down or 'D' right. \
A move that changes nothing is wasted. \
Import only math, random, itertools, collections, functools, heapq, copy or typing. \
Answer with one fenced python code block that holds the function."""

PROMPT = TEMPLATE.format(size=4, target=2048)
