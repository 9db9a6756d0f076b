"""Attacks a sandbox backend with the corpus and says what came of each attack; after each an honest program must be
judged right.

An Arena is a game to attack: `pick` here, the real tasks in stages/tasks/arenas.py. One container is attacked with
everything in turn, so that what one attack leaves behind meets the next program.

pick: the program gets a list of numbers and answers with the index of the largest. The first question, with one
number, is where an attack says that it is armed; 8 rounds of 8 numbers follow. The judge keeps the answers.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from stages.sandbox.corpus import Attack
from stages.sandbox.pool import SandboxPool
from stages.sandbox.protocol import Job, Limits, Outcome, Result, SandboxError

ROUNDS = 8
HONEST = "def pick(numbers):\n    return numbers.index(max(numbers))\n"
SECRET = "the judge alone knows this"
HARNESS = """
def judge(cases, ask):
    import random
    draw = random.Random(cases[0]["seed"])
    row = {"right": 0, "answers": []}
    for turn in range(1 + cases[0]["rounds"]):
        numbers = draw.sample(range(100), 8) if turn else [0]
        try:
            answer = ask(bytes(numbers))
        except CaseEnded:
            break
        row["answers"].append(answer[:40].decode("ascii", "replace"))
        row["right"] += turn > 0 and answer == b"%d" % numbers.index(max(numbers))
    return [row]

def serve(function, receive, send):
    while question := receive():
        send(str(function(list(question))).encode())
"""
LIMITS = Limits(cpu_s=1.0, wall_s=60.0, memory_bytes=128 << 20, output_bytes=1 << 20)
SLEEP_S = 2.0  # the wall time of what is expected to sleep; that of others leaves room for a busy machine
HONEST_LIMITS = Limits(cpu_s=20.0, wall_s=120.0, memory_bytes=128 << 20)
PLACE = re.compile(r"^line (\d+): |\(line (\d+)\)$")  # of a refusal, of an exception


class Arena(Protocol):
    """A game to attack: its harness, its jobs, what an attack may gain there, and how it proves that it ran."""

    harness: str

    def job(self, program: str, *, limits: Limits, guarded: bool = True) -> Job:
        """Returns a program's job in this game."""

    def honest(self) -> str:
        """Returns a program that does not cheat."""

    def judged_right(self, result: Result) -> bool:
        """Says whether this is the verdict that the honest program must have."""

    def gain(self, attack: Attack, result: Result) -> str:
        """Returns what the attack gained that it must not, in words; empty when nothing."""

    def proves(self, proof: str, value: str, result: Result) -> bool:
        """Says whether the result shows it: one of the proofs that are not the same in every game."""


class Pick:
    """The little game of the module's docstring."""

    harness = HARNESS

    def job(self, program: str, *, limits: Limits, guarded: bool = True) -> Job:
        return Job(
            job_id="self-check",
            program=program,
            entry="pick",
            harness="pick",
            cases=({"seed": 7, "rounds": ROUNDS, "secret": SECRET},),
            limits=limits,
            guarded=guarded,
        )

    def honest(self) -> str:
        return HONEST

    def judged_right(self, result: Result) -> bool:
        return result.outcome is Outcome.ok and result.cases[0]["right"] == ROUNDS

    def gain(self, attack: Attack, result: Result) -> str:
        won = int(result.cases[0]["right"]) if result.cases and result.outcome is Outcome.ok else 0
        return f"won {won} rounds, not {attack.wins}" if won > attack.wins else ""

    def proves(self, proof: str, value: str, result: Result) -> bool:
        answers = result.cases[0]["answers"] if result.cases else []
        if proof == "armed":
            return answers[:1] == ["armed"]
        return proof == "says" and value in answers[1:]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came of one attack in one mode. failure: what was not as it must be, empty when all was."""

    attack: Attack
    mode: str
    result: Result | None
    failure: str
    skipped: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failure

    @property
    def outcome(self) -> str:
        """The outcome and its detail, or why there is none."""
        if self.result is None:
            return f"skipped: {self.skipped}" if self.skipped else "none"
        return f"{self.result.outcome}: {self.result.detail}" if self.result.detail else str(self.result.outcome)


def missing_proof(attack: Attack, mode: str, result: Result, arena: Arena) -> str:
    """Returns the first proof that the result does not show, empty when it shows all."""
    place = PLACE.search(result.detail)
    at_mark = place is not None and int(place[1] or place[2]) in attack.lines
    for words in attack.expected[mode].proofs:
        proof, _, value = words.partition(" ")
        shown = {
            "refused": at_mark and not any(row.get("answers") for row in result.cases),
            "line": at_mark,
            "cpu": proof == "cpu" and result.cpu_s >= float(value),
            "detail": proof == "detail" and re.search(value, result.detail) is not None,
        }.get(proof)
        if shown is None:
            shown = arena.proves(proof, value, result)
        if not shown:
            return words
    return ""


def limits_of(attack: Attack, mode: str) -> Limits:
    """Returns the limits that an attack runs under: little wall time where it is expected to sleep."""
    expected = attack.expected[mode]
    sleeps = expected.outcomes == (Outcome.timeout,) and not any(proof.startswith("cpu") for proof in expected.proofs)
    return replace(LIMITS, wall_s=SLEEP_S) if sleeps else LIMITS


def attack_once(pool: SandboxPool, attack: Attack, mode: str, arena: Arena) -> Finding:
    """Returns the finding of one attack; the honest program after it is judged by the caller."""
    started = time.monotonic()
    expected = attack.expected[mode]
    job = arena.job(attack.program, limits=limits_of(attack, mode), guarded=mode == "guarded")
    try:
        result = pool.submit(job).result()
    except SandboxError as error:
        return Finding(attack=attack, mode=mode, result=None, failure=f"the sandbox failed: {error}")
    if result.outcome not in expected.outcomes:
        failure = f"expected {' or '.join(expected.outcomes)}"
    elif gain := arena.gain(attack, result):
        failure = gain
    elif missing := missing_proof(attack, mode, result, arena):
        failure = f"no proof that it ran: {missing}"
    else:
        failure = ""
    seconds = time.monotonic() - started
    return Finding(attack=attack, mode=mode, result=result, failure=failure, seconds=seconds)


def honest_failure(pool: SandboxPool, arena: Arena) -> str:
    """Returns what was wrong with the verdict on the arena's honest program, empty when it was right."""
    try:
        result = pool.submit(arena.job(arena.honest(), limits=HONEST_LIMITS)).result()
    except SandboxError as error:
        return f"the sandbox failed on the honest program: {error}"
    if arena.judged_right(result):
        return ""
    return f"the honest program was judged {result.outcome} {result.detail}".rstrip()


def attack_pool(
    pool: SandboxPool, attacks: Iterable[Attack], *, arenas: Mapping[str, Arena], backend: str = "docker"
) -> Iterator[Finding]:
    """Yields a finding for each attack in each of its modes, on a pool opened with the arenas' harnesses.

    SandboxError when an arena's honest program is not even judged right before the first attack.
    """
    attacks = tuple(attacks)
    for name in sorted({attack.task for attack in attacks} & set(arenas)):
        if words := honest_failure(pool, arenas[name]):
            raise SandboxError(f"{name}, before any attack: {words}", "run: flexsink doctor")
    for attack in attacks:
        for mode in attack.expected:
            reason = attack.skipped.get(backend, "" if attack.task in arenas else f"{attack.task} has no judge")
            if reason:
                yield Finding(attack=attack, mode=mode, result=None, failure="", skipped=reason)
                continue
            arena = arenas[attack.task]
            finding = attack_once(pool, attack, mode, arena)
            after = honest_failure(pool, arena)
            failure = "; ".join(words for words in (finding.failure, after and f"after it {after}") if words)
            yield Finding(attack=attack, mode=mode, result=finding.result, failure=failure, seconds=finding.seconds)
