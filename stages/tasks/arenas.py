"""The real tasks as games that the self-check attacks: no attack may earn more there than a program that does nothing
clever and cheats nobody.

To have another task attacked, add what that program is to FLOORS and name the task in an attack's header.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

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
    """A task as an arena. Its honest program is the floor, judged first: later verdicts are held against that one."""

    task: Task
    floor: str
    harness: str
    seeds: list[int]
    first: Result | None = None

    def job(self, program: str, *, limits: Limits, guarded: bool = True) -> Job:
        job = self.task.job("self-check", program, self.seeds, limits)
        return replace(job, guarded=guarded)

    def honest(self) -> str:
        return self.floor

    def judged_right(self, result: Result) -> bool:
        """Says whether the verdict is ok and, but for what is measured, the same as the first."""
        if self.first is None:
            self.first = result
        same = steady(self.task.score(result)) == steady(self.task.score(self.first))
        return result.outcome is Outcome.ok and same

    def gain(self, attack: Attack, result: Result) -> str:
        assert self.first is not None, "the floor is judged before any attack"
        earned, most = self.task.score(result).reward, self.task.score(self.first).reward
        return f"earned {earned:.3f}, more than {most:.3f}" if earned > most + TOLERANCE else ""

    def proves(self, proof: str, value: str, result: Result) -> bool:
        if proof == "floor":
            return self.first is not None and result.cases == self.first.cases
        if proof in ("leaves", "plays"):
            assert self.first is not None, "the floor is judged before any attack"
            letters, floor = (str(cases[0]["letters"]) if cases else "" for cases in (result.cases, self.first.cases))
            if proof == "plays":
                return letters.startswith(value)
            return 0 < len(letters) < len(floor) and floor.startswith(letters)
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
