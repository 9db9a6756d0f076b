"""A finished part of a run, read back and summed up: what `inspect`, `runs` and the report show.

It reads whole columns and never a text column, so that a run of 100 000 completions is summed up in seconds. Reading
checks every page it touches; a damaged file raises what `read_table` raises.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Iteration:
    """What one scored iteration gave.

    reward_low, reward_high, tokens_low, tokens_high: the 10th and 90th percentile over completions
    spread: standard deviation of the rewards inside a group, averaged over groups
    silent_groups: groups whose rewards are all equal, which teach nothing
    truncated: share of completions that ran into max_new_tokens
    metrics: means over the iteration's optimizer steps; empty while the update has not finished
    """

    index: int
    completions: int
    groups: int
    silent_groups: int
    reward: float
    reward_low: float
    reward_high: float
    spread: float
    outcomes: dict[str, int]
    tokens: float
    tokens_low: float
    tokens_high: float
    truncated: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class PlayedGame:
    """One game of a verdict; letters is empty where a task records no moves.

    Example: PlayedGame(seed=7, moves=40, max_tile=64, score=340, state="won", letters="AWSW...")
    """

    seed: int
    moves: int
    max_tile: int
    score: int
    state: str
    letters: str = ""
