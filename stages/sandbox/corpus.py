"""The attacks that any sandbox backend must survive: one file each in attacks/, read as text, never imported.

An attack is the program itself under a header of `# key: value` comments. The whole file is what is judged, so the
line numbers of a verdict are those of the file.
    claims      the effect that the program is after, in words; needed
    kind        which of the known ways to cheat it is; needed
    task        whose game it plays: pick (the default, of self_check.py) or a task of the registry
    guarded     what must come of it behind the static check and the chosen builtins; one of the two is needed
    unguarded   what must come of it without them: it has the interpreter, and meets process, pipe and container
    wins        rounds of pick that it may win (0)
    put @X@     a JSON string that stands for @X@ in the program, times a number: "\\u0000", "x" * 10485760
    not on B    why the backend B cannot run it: it is shown as skipped
What must come of it: `outcome | outcome; proof, proof`. A proof is something observed that shows that the hostile line
was reached, and not a typo before it:
    refused     the static check names the marked line, and the program never ran
    line        the detail names the marked line: it was run and raised there
    armed       the program answered its first question with the word armed, and did the hostile thing on the second
    says X      it answered X afterwards
    cpu X       it used at least X seconds of CPU
    detail R    the detail matches the regular expression R
    floor       a task's own: the rows are exactly those of the program that no attack may out-earn
    leaves      2048: it played its first game as that program does, and then no longer
    plays X     2048: the moves of its first game begin with X
    earns N X   a task's own: the reward function N gave X
The marked line ends in `# <- attack`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.sandbox.protocol import Outcome

FOLDER = Path(__file__).parent / "attacks"
MARK = "# <- attack"
PROOFS = ("refused", "line", "armed", "says", "cpu", "detail", "plays", "floor", "leaves", "earns")
MODES = ("guarded", "unguarded")
_HEADER = re.compile(r"# ([a-z]+(?: @[A-Z]+@| on [a-z]+)?): (.+)")
_PUT = re.compile(r'("(?:[^"\\]|\\.)*")(?: \* (\d+))?')


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What must come of an attack: one of the outcomes, and every proof."""

    outcomes: tuple[Outcome, ...]
    proofs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One hostile program. lines: those marked, from 1; skipped: why a backend cannot run it, by backend."""

    name: str
    claims: str
    kind: str
    task: str
    program: str
    lines: tuple[int, ...]
    expected: Mapping[str, Expected]
    wins: int
    skipped: Mapping[str, str]

    @property
    def costly(self) -> bool:
        """Says whether it takes seconds: it uses up a limit, or its container is thrown away."""
        spent = (Outcome.timeout, Outcome.memory)
        return any(outcome in spent for expected in self.expected.values() for outcome in expected.outcomes)


def expectation(text: str) -> Expected:
    """Returns what `outcome | outcome; proof, proof` says; ValueError where it says nothing."""
    outcomes, _, proofs = text.partition(";")
    words = tuple(proof.strip() for proof in proofs.split(", "))
    for proof in words:
        if proof.partition(" ")[0] not in PROOFS:
            raise ValueError(f"{proof!r} is no proof: give {', '.join(PROOFS)}")
    return Expected(outcomes=tuple(Outcome(name.strip()) for name in outcomes.split("|")), proofs=words)


def parse(name: str, text: str) -> Attack:
    """Returns the attack that a file's text holds; ValueError names the file and what is wrong."""
    header: dict[str, str] = {}
    puts: dict[str, str] = {}
    for line in text.splitlines():
        match = _HEADER.fullmatch(line)
        if not match:
            break
        key, value = match[1], match[2].strip()
        if key in header:
            raise ValueError(f"{name}: {key} is there twice")
        header[key] = value
    program = text
    for key in [key for key in header if key.startswith("put ")]:
        put = _PUT.fullmatch(header.pop(key))
        if not put:
            raise ValueError(f"{name}: {key} is no JSON string")
        puts[key.removeprefix("put ")] = json.loads(put[1]) * int(put[2] or 1)
    start = len(text.splitlines(keepends=True)[: len(header) + len(puts)])
    lines = text.splitlines(keepends=True)
    body = "".join(lines[start:])
    for word, value in puts.items():
        body = body.replace(word, value)
    program = "".join(lines[:start]) + body
    skipped = {key.removeprefix("not on "): header.pop(key) for key in list(header) if key.startswith("not on ")}
    try:
        expected = {mode: expectation(header.pop(mode)) for mode in MODES if mode in header}
        if not expected:
            raise ValueError("neither guarded nor unguarded")
        attack = Attack(
            name=name,
            claims=header.pop("claims"),
            kind=header.pop("kind"),
            task=header.pop("task", "pick"),
            program=program,
            lines=tuple(number for number, line in enumerate(lines, 1) if line.rstrip().endswith(MARK)),
            expected=expected,
            wins=int(header.pop("wins", "0")),
            skipped=skipped,
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    if header:
        raise ValueError(f"{name}: unknown {', '.join(header)}")
    needs_mark = any(proof in ("refused", "line") for one in expected.values() for proof in one.proofs)
    if needs_mark and not attack.lines:
        raise ValueError(f"{name}: no line is marked {MARK}")
    return attack


def load(folder: Path = FOLDER) -> tuple[Attack, ...]:
    """Returns the attacks of a folder by name; ValueError where a file is none."""
    return tuple(parse(path.stem, path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py")))
