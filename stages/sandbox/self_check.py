"""Attacks a sandbox backend with everything in attacks.py and says what came of it; after each attack an honest
program must be judged right.

One container is attacked with all of them in turn, so that what one attack leaves behind meets the next program.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from stages.sandbox.attacks import ATTACKS, HONEST, SECRET, Attack
from stages.sandbox.pool import SandboxPool
from stages.sandbox.protocol import Job, Limits, Outcome, Result, SandboxError

ROUNDS = 8
HARNESS = """
def judge(cases, ask):
    import random
    draw = random.Random(cases[0]["seed"])
    right = 0
    for _ in range(cases[0]["rounds"]):
        numbers = draw.sample(range(100), 8)
        answer = ask(bytes(numbers))
        right += answer == b"%d" % numbers.index(max(numbers))
    return [{"right": right}]

def serve(function, receive, send):
    while question := receive():
        send(str(function(list(question))).encode())
"""
LIMITS = Limits(cpu_s=1.0, wall_s=5.0, memory_bytes=128 << 20, output_bytes=1 << 20)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came of one attack. passed: as expected, and the honest program after it was judged right."""

    attack: Attack
    result: Result | None
    honest_after: bool
    passed: bool
    words: str


def job(name: str, program: str, *, guarded: bool = True) -> Job:
    """Returns a program's job in the self-check's own little game."""
    case = {"seed": 7, "rounds": ROUNDS, "secret": SECRET}
    return Job(
        job_id=name, program=program, entry="pick", harness="self_check", cases=(case,), limits=LIMITS, guarded=guarded
    )


def rounds_right(result: Result) -> int:
    """Returns how many rounds the program won; 0 when the judge wrote no row."""
    return int(result.cases[0]["right"]) if result.cases else 0


def attack_pool(pool: SandboxPool, attacks: tuple[Attack, ...] = ATTACKS) -> Iterator[Finding]:
    """Yields a finding for each attack on a pool that was opened with harnesses={"self_check": HARNESS}."""
    for attack in attacks:
        result = None
        try:
            result = pool.submit(job(attack.name, attack.program, guarded=attack.guarded)).result()
            words = f"{result.outcome}: {result.detail}" if result.detail else str(result.outcome)
            allowed = result.outcome in attack.expected
            won = rounds_right(result) if result.outcome is Outcome.ok else 0
            if won > attack.right:
                allowed, words = False, f"{words}; {won} rounds right"
        except SandboxError as error:
            allowed, words = False, f"the sandbox failed: {error}"
        try:
            honest = pool.submit(job("honest", HONEST)).result()
            honest_after = honest.outcome is Outcome.ok and rounds_right(honest) == ROUNDS
        except SandboxError:
            honest_after = False
        yield Finding(
            attack=attack, result=result, honest_after=honest_after, passed=allowed and honest_after, words=words
        )
