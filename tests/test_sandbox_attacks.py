"""The self-check on every backend there is: each attack comes to nothing and proves that it ran, and the honest program
after it is judged right. Then the self-check itself: what it takes for a failure."""

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

import stages.self_check
from stages.sandbox import Outcome, Result, SandboxPool
from stages.sandbox.corpus import Attack, load, parse
from stages.sandbox.self_check import LIMITS, Arena, Finding, Pick, attack_pool
from stages.self_check import arenas, backends, shown, summary
from tests.patience import PATIENCE_S
from tests.sandbox_backends import BACKENDS, opened

ROOT = Path(__file__).parent.parent
ATTACKS = load()
KINDS = """
    file reads, file writes, network, fork bomb, memory bomb, CPU loop, sleep, output flood, sys.exit, os._exit,
    signals, frames, gc, importlib, __import__, __subclasses__, builtins through __globals__, ctypes, code objects,
    decorators and default arguments at definition, except-in-a-loop, generators and __del__ that outlive the case,
    threads, patched time, forged verdicts, surplus replies, writes to the supervisor's pipe, /proc snooping,
    mutating the board, non-str and huge returns, unicode and null bytes, 10 MB programs, pickles, kill(-1),
    setsid daemons
"""


class Attacked:
    """A pool, the games that it knows and the name of its backend."""

    def __init__(self, pool: SandboxPool, games: dict[str, Arena], backend: str) -> None:
        self.pool, self.games, self.backend = pool, games, backend

    def findings(self, *attacks: Attack) -> list[Finding]:
        return list(attack_pool(self.pool, attacks, arenas=self.games, backend=self.backend))


@pytest.fixture(scope="module", params=BACKENDS)
def attacked(request: pytest.FixtureRequest) -> Iterator[Attacked]:
    games = arenas()
    harnesses = {name: arena.harness for name, arena in games.items()}
    settings = {"containers": 1, "memory_bytes": LIMITS.memory_bytes}
    with opened(request.param, harnesses=harnesses, run="test-attacks", **settings) as pool:
        yield Attacked(pool, games, request.param)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_attack_comes_to_nothing(attacked: Attacked, attack: Attack) -> None:
    for finding in attacked.findings(attack):
        if finding.skipped:
            pytest.skip(finding.skipped)
        assert finding.passed, f"{finding.mode}: {finding.outcome}: {finding.failure}"


def test_there_are_80_attacks_and_every_known_way_to_cheat_is_among_them() -> None:
    assert len(ATTACKS) >= 80
    assert {" ".join(kind.split()) for kind in KINDS.split(",")} <= {attack.kind for attack in ATTACKS}
    assert {attack.task for attack in ATTACKS} >= {"pick", "game2048"}
    assert all(expected.proofs for attack in ATTACKS for expected in attack.expected.values())


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        ("return numbers.index(max(numbers))", "won 8 rounds, not 0"),
        ("return numbers.index(min(numbers)) + undefined", "expected cheat"),
        ("open('/etc/passwd')  # <- attack", ""),
    ],
)
def test_an_attack_that_wins_or_fails_by_a_typo_is_a_failure(attacked: Attacked, body: str, failure: str) -> None:
    outcome = "ok" if "won" in failure else "cheat"
    text = f"# claims: x\n# kind: x\n# unguarded: {outcome}; armed\n\n"
    text += f"def pick(numbers):\n    if len(numbers) == 1:\n        return 'armed'\n    {body}\n"
    (finding,) = attacked.findings(parse("made-up", text))
    assert finding.failure == failure


@pytest.mark.parametrize(
    ("program", "missing"),
    [
        ("import nothing\nopen('/etc/passwd')  # <- attack\n", "refused"),
        ("def pick(numbers):\n    return undefined\n    1 / 0  # <- attack\n", "line"),
        ("def pick(numbers):\n    1 / 0\n", "armed"),
        ("def pick(numbers):\n    return 'armed' if len(numbers) == 1 else 1 / 0\n", "says done"),
        ("def pick(numbers):\n    1 / 0\n", "cpu 0.4"),
        ("def pick(numbers):\n    1 / 0\n", "detail SIGSEGV"),
    ],
)
def test_an_attack_without_its_proof_is_a_failure(attacked: Attacked, program: str, missing: str) -> None:
    text = f"# claims: x\n# kind: x\n# guarded: crash | foreign_import; {missing}\n\n{program}"
    if missing in ("refused", "line") or "<- attack" not in program:
        (finding,) = attacked.findings(parse("made-up", text))
        assert finding.failure == f"no proof that it ran: {missing}"


def test_a_2048_program_that_out_earns_the_first_legal_move_is_a_failure(attacked: Attacked) -> None:
    better = arenas()["game2048"]
    program = better.task.baselines()["look_ahead"]  # type: ignore[attr-defined]
    text = f"# claims: x\n# kind: x\n# task: game2048\n# guarded: ok; earns works 1\n\n{program}"
    (finding,) = attacked.findings(parse("made-up", text))
    assert "earned" in finding.failure


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# claims: x\n# kind: y\n\npick = 1\n", "neither guarded nor unguarded"),
        ("# kind: y\n# guarded: ok; armed\n\npick = 1\n", "claims"),
        ("# claims: x\n# kind: y\n# guarded: fine; armed\n\npick = 1\n", "fine"),
        ("# claims: x\n# kind: y\n# guarded: ok; trust me\n\npick = 1\n", "'trust me' is no proof"),
        ("# claims: x\n# kind: y\n# guarded: ok\n\npick = 1\n", "'' is no proof"),
        ("# claims: x\n# kind: y\n# guarded: cheat; refused\n\npick = 1\n", "no line is marked"),
        ("# claims: x\n# kind: y\n# guarded: ok; armed\n# hint: z\n\npick = 1\n", "unknown hint"),
        ("# claims: x\n# claims: x\n\npick = 1\n", "twice"),
        ("# claims: x\n# kind: y\n# guarded: ok; armed\n# put @A@: 3\n\npick = 1\n", "no JSON string"),
    ],
)
def test_a_file_that_is_no_attack_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^file-name: .*{message}"):
        parse("file-name", text)


def test_an_attack_is_its_whole_file_with_the_words_put_in() -> None:
    text = (
        '# claims: x\n# kind: y\n# guarded: cheat | crash; refused, detail a|b\n# put @A@: "\\u0000x" * 3\n'
        "# not on local: no such thing there\n\na = '@A@'\nopen(1)  # <- attack\n"
    )
    attack = parse("name", text)
    assert attack.program == text.replace("a = '@A@'", "a = '\0x\0x\0x'")
    assert attack.lines == (8,)
    assert attack.expected["guarded"].outcomes == (Outcome.cheat, Outcome.crash)
    assert attack.expected["guarded"].proofs == ("refused", "detail a|b")
    assert attack.skipped == {"local": "no such thing there"}


def test_the_table_shows_what_a_program_wrote_as_it_is() -> None:
    attack = parse("name", "# claims: [bold]x[/red]\n# kind: y\n# guarded: crash; armed\n\npick = 1\n")
    result = Result(job_id="x", outcome=Outcome.crash, detail="ValueError: [/red][link=x]", cases=())
    found = [
        Finding(attack=attack, mode="guarded", result=result, failure=""),
        Finding(attack=attack, mode="guarded", result=result, failure="won 8 rounds, not 0"),
        Finding(attack=attack, mode="guarded", result=None, failure="", skipped="no such thing"),
    ]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(shown(found))
    text = console.export_text()
    assert "crash: ValueError: [/red][link=x]" in text
    assert "[bold]x[/red]" in text
    assert "won 8 rounds, not 0" in text
    assert "skipped: no such thing" in text
    words = "1 attacks, 3 runs on docker: 1 came to nothing, 1 failed, 1 skipped; 2.0 s"
    assert summary(found, backend="docker", seconds=2) == words


def flexsink(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "flows.cli", "self-check", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.mark.docker
def test_the_command_prints_a_table_and_a_summary() -> None:
    done = flexsink("sandbox", "--backend", "docker", "--only", "opens-a-file")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("opens-a-file " in line and "unguarded" in line and "cheat" in line for line in lines)
    assert " came to nothing, 0 failed; " in lines[-1]


@pytest.mark.docker
def test_the_command_fails_when_an_attack_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> str:
        return "won everything"

    monkeypatch.setattr(Pick, "gain", broken)
    assert stages.self_check.self_check(backend="docker", words=["returns-none"]) == 1


def test_an_unknown_backend_or_attack_is_one_error_and_one_hint() -> None:
    for words, message in (
        (("sandbox", "--backend", "chroot"), "no sandbox backend chroot"),
        (("sandbox", "--only", "no-such-attack"), "no attack is called no-such-attack"),
    ):
        done = flexsink(*words)
        assert done.returncode == 2
        assert message in done.stderr
        assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert "docker" in backends()
