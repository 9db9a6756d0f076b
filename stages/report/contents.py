"""What a report shows, as plain records: collect.py fills them from a run, the sections draw them, tests make them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.artifacts.history import Iteration
from stages.report.replay import Replay


@dataclass(frozen=True)
class Share:
    """A second figure of a player, a share with its 95 % interval: games won, programs right."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Player:
    """One row of an evaluation's summary: the policy after some updates, or a baseline.

    updates: how many updates the policy has had; None for a baseline
    cases: on how many it was judged; score: the task's first figure; shares: its others
    tiles: largest tile -> number of games that ended with it, or another histogram that Words names; empty without one
    Example: Player(label="greedy", updates=None, programs=1, distinct_programs=1, cases=64, score=2900.0, ...)
    """

    label: str
    updates: int | None
    programs: int
    distinct_programs: int
    cases: int
    score: float
    score_low: float
    score_high: float
    shares: list[Share]
    tiles: Mapping[int | str, int]


@dataclass(frozen=True)
class Words:
    """What the task calls things (stages/tasks/base.py); shares: title, and short title, of each of a player's shares.

    Example: Words("games", "player", "play", "played", score="mean score", shares=[("games won", "won")])
    """

    cases: str
    player: str
    meet: str
    met: str
    score: str
    shares: list[tuple[str, str]]
    tally: str = "Largest tile of a game"
    tally_note: str = "Share of games that ended with it."
    tallied: str = "games"
    bins: tuple[str, ...] = ()  # of the histogram, in order; the numbers there are, where it is empty


@dataclass(frozen=True)
class Achieved:
    """One figure of the task over the iterations of training; low and high are quartiles, empty for a share.

    Example: Achieved("speed-up", "times three loops", share=False, mean=[0.8, 1.3], low=[0.0, 1.1], high=[1.2, 1.6])
    """

    title: str
    unit: str
    share: bool
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]


@dataclass(frozen=True)
class Program:
    """One judged completion with its program, for the gallery of best and worst.

    results: its cases in one line; checks: what its answers depend on, None where it is unknown; state_kept: what it
    may keep between calls; cases: heads and rows of a table of its cases, where the task records no moves to replay
    """

    completion_id: str
    reward: float
    rewards: dict[str, float]
    outcome: str
    detail: str
    source: str | None
    results: str
    checks: dict[str, bool | None] = field(default_factory=dict)
    state_kept: str = ""
    cases: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Game:
    """One game to replay and the program that played it."""

    title: str
    completion_id: str
    replay: Replay
    program: str


@dataclass(frozen=True)
class Cost:
    """Time of one kind of stage over the whole run.

    parts: what the stage itself timed, in seconds; they need not add up to `seconds`
    peak_bytes, tokens_per_s: 0 where nobody measured them
    """

    stage: str
    seconds: float
    parts: dict[str, float]
    peak_bytes: int
    tokens_per_s: float


@dataclass(frozen=True)
class Export:
    """One exported model; None where the format is not judged, or where training had gained nothing to keep.

    kl: to the policy it was made of, nats per token; gain_kept: share of the held-out gain
    with_residual: the same share with the residual adapter that lies beside it
    """

    format: str
    bytes: int
    kl: float | None
    score: float | None
    gain_kept: float | None
    with_residual: float | None


@dataclass(frozen=True)
class Contents:
    """Everything on the page. Lists are empty where the run has not come so far."""

    name: str
    task: str
    words: Words
    model: str
    preset: str
    planned_iterations: int
    iterations: list[Iteration]
    policies: list[Player]
    baselines: list[Player]
    best: list[Program] = field(default_factory=list)
    worst: list[Program] = field(default_factory=list)
    games: list[Game] = field(default_factory=list)
    achieved: list[Achieved] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    exports: list[Export] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> Player | None:
        """The untrained model, when it was evaluated."""
        return next((player for player in self.policies if player.updates == 0), None)

    @property
    def after(self) -> Player | None:
        """The model with the most updates that was evaluated, when there is one beside the untrained."""
        trained = [player for player in self.policies if player.updates]
        return max(trained, key=lambda player: player.updates or 0, default=None)
