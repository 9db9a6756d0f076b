"""The longest sequence that still fits, by doubling and then bisection. Every try is a whole step, so few are made."""

import time
from collections.abc import Callable
from typing import NamedTuple

from stages.bench.memory import free_memory
from stages.bench.results import error_words
from stages.config import UserError

RESOLUTION = 16  # bisection ends when what fits is within 1 / 16 of what does not


class Longest(NamedTuple):
    tokens: int  # 0 when nothing that was tried fits
    tried: list[int]
    reason: str  # why no longer one


def longest(fits: Callable[[int], str], *, start: int, limit: int, seconds: float) -> Longest:
    """The largest number of tokens that `fits`, doubling from `start` to no more than `limit`, halving down from it
    where it does not fit, then bisecting until the answer is known to 1 / RESOLUTION or the seconds are over.

    fits: "" when so many tokens fit, else why not.
    """
    deadline = time.monotonic() + seconds
    tried: list[int] = []
    best, over, tokens, why = 0, 0, start, ""
    while True:
        tried.append(tokens)
        reason = fits(tokens)
        if reason:
            over, why = tokens, f"{tokens} tokens: {reason}"
        else:
            best = tokens
        if best >= limit:
            return Longest(best, tried, f"{limit} tokens are the most that is tried")
        if time.monotonic() > deadline:
            return Longest(best, tried, why or f"{seconds:.0f} s were over")
        if over and (over - best) * RESOLUTION <= over:
            return Longest(best, tried, why)
        if not over:
            tokens = min(2 * best, limit)
        elif not best:
            tokens = over // 2
            if tokens < 2:
                return Longest(0, tried, why)
        else:
            tokens = (best + over) // 2


def fits_memory(attempt: Callable[[], None]) -> str:
    """Nothing ("") when `attempt` ends well; the words of its failure when that is a lack of memory, on the card or the
    host, or a trainer's own refusal. Raises any other failure.
    """
    try:
        attempt()
        return ""
    except Exception as error:
        if not isinstance(error, UserError | MemoryError) and "out of memory" not in str(error).lower():
            raise
        return error_words(error)
    finally:
        free_memory()
