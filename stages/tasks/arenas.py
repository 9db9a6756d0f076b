"""The real tasks as games that the self-check attacks: no attack may earn more there than a program that does nothing
clever and cheats nobody.

To have another task attacked, add what that program is to FLOORS and name the task in an attack's header.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from stages.config import UserError
from stages.sandbox.corpus import Attack
from stages.sandbox.protocol import Job, Limits, Outcome, Result
from stages.sandbox.self_check import Arena
from stages.tasks import registry
from stages.tasks.base import Score, Task

GAMES = 2
TOLERANCE = 1e-9
MEASURED = ("speed",)  # reward functions that depend on the machine: not the same twice

# What no attack may out-earn: in 2048 the first letter that moves something, in matmul the first matrix as it is.
FLOORS: Mapping[str, Callable[[Task], str]] = {
    "game2048": lambda task: task.baselines()["fixed_order"],
    "matmul": lambda task: "def matmul(A, B):\n    return A\n",
}


@dataclass
class TaskArena:
    """A task as an arena. honest and floor are programs; their first verdicts are what later ones are held against."""

    task: Task
    floor: str
    harness: str
    seeds: list[int]
    floor_result: Result | None = None
    honest_score: Score | None = None
    entered: list[str] = field(default_factory=list)

    def job(self, program: str, *, limits: Limits, guarded: bool = True) -> Job:
        job = self.task.job("self-check", program, self.seeds, limits)
        return Job(**{**vars(job), "guarded": guarded})

    def honest(self) -> str:
        return self.floor

    def judged_right(self, result: Result) -> bool:
        """Says whether the verdict is ok and, but for what is measured, the same as the first."""
        score = self.task.score(result)
        if self.floor_result is None:
            self.floor_result = result
        if self.honest_score is None:
            self.honest_score = score
        return result.outcome is Outcome.ok and steady(score) == steady(self.honest_score)

    def gain(self, attack: Attack, result: Result) -> str:
        assert self.honest_score is not None, "the honest program is judged first"
        earned, most = self.task.score(result).reward, self.honest_score.reward
        return f"earned {earned:.3f}, more than {most:.3f}" if earned > most + TOLERANCE else ""

    def proves(self, proof: str, value: str, result: Result) -> bool:
        if proof == "floor":
            return self.floor_result is not None and result.cases == self.floor_result.cases
        if proof == "plays":
            return bool(result.cases) and str(result.cases[0].get("letters", "")).startswith(value)
        if proof == "earns":
            name, _, amount = value.partition(" ")
            return abs(self.task.score(result).rewards[name] - float(amount)) < TOLERANCE
        return False


def steady(score: Score) -> dict[str, float]:
    """Returns the rewards that no measurement is in."""
    return {name: value for name, value in score.rewards.items() if name not in MEASURED}


def task_arenas() -> dict[str, Arena]:
    """Returns an arena for each task that can be judged."""
    arenas: dict[str, Arena] = {}
    for name, floor in FLOORS.items():
        task = registry.get(name)
        try:
            seeds = task.held_out_seeds(GAMES)
            arenas[name] = TaskArena(task=task, floor=floor(task), harness=task.harness_source(), seeds=seeds)
        except UserError:
            continue  # it has no judge
    return arenas
