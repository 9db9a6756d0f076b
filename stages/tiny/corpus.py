"""What the bundled model is warm-started on: the tasks' own prompts, and completions that the grammars write.

Contract: a completion is `<|channel|>final<|message|>`, a fenced program and `<|return|>`, as harmony has it; prompts
are the tasks' texts, so the model is on familiar ground when a run begins. One prompt in seven asks for another board
or target than the standard game.
"""

import random

from transformers import PreTrainedTokenizerBase

from stages.tasks.game2048.task import PROMPT as GAME_PROMPT
from stages.tasks.game2048.task import TEMPLATE as GAME_TEMPLATE
from stages.tasks.matmul.task import PROMPT as MATMUL_PROMPT
from stages.tiny import matmuls, strategies

OPENING = "<|channel|>final<|message|>"
CLOSING = "<|return|>"
OTHER_GAMES = 1 / 7


def completion(program: str) -> str:
    """Returns the program as the answer of an assistant."""
    return f"{OPENING}```python\n{program}\n```{CLOSING}"


def game_prompt(rng: random.Random) -> str:
    """Returns the prompt of the standard game, or now and then of another."""
    if rng.random() >= OTHER_GAMES:
        return GAME_PROMPT
    return GAME_TEMPLATE.format(size=rng.choice((3, 4, 5, 6)), target=rng.choice((256, 512, 1024, 2048, 4096)))


def game_completion(rng: random.Random) -> str:
    return completion(strategies.write(rng))


def matmul_completion(rng: random.Random) -> str:
    return completion(matmuls.write(rng))


def tokenizer_texts(rng: random.Random, *, count: int) -> list[str]:
    """Returns completions in the mix of the warm start, and the prompts often enough to get tokens of their own."""
    texts = [game_completion(rng) if rng.random() < 0.75 else matmul_completion(rng) for _ in range(count)]
    return texts + [GAME_PROMPT, MATMUL_PROMPT] * max(1, count // 8)


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Returns the token ids of the chat up to where the assistant answers."""
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, reasoning_effort="low", return_dict=False)
    return list(ids)
