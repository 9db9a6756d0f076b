"""What travels between a stage and a sandbox: a Job in, a Result out, both plain data.

An Outcome is always the program's: it is scored. When the sandbox itself fails there is no outcome and no Result but
a SandboxError.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from stages.config import UserError

PROTOCOL_VERSION = 1
MAX_PROGRAM_BYTES = 256 << 10  # a completion of 32 k tokens is about 130 kB
MIN_MEMORY_BYTES = 64 << 20  # an idle case maps 30 MB
KEPT = "what was judged is kept; go on with: flexsink resume RUN"


class SandboxError(UserError):
    """The sandbox failed, not the program: tried again on another container, then raised; never a reward."""

    def __init__(self, message: str, hint: str = f"look at Docker, if programs are judged there; {KEPT}") -> None:
        super().__init__(message, hint)


class Outcome(StrEnum):
    """How a program's job ended: given by the supervisor, but no_program by whoever found none to send."""

    ok = "ok"
    no_program = "no_program"
    syntax_error = "syntax_error"
    foreign_import = "foreign_import"
    cheat = "cheat"
    timeout = "timeout"
    memory = "memory"
    crash = "crash"
    output_limit = "output_limit"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use over all cases of its job."""

    cpu_s: float = 10.0
    # CPU seconds, user and system
    wall_s: float = 60.0
    # seconds of the clock, the judge's own work included
    memory_bytes: int = 256 << 20
    # address space of the program's process
    output_bytes: int = 4 << 20
    # all answers together

    def __post_init__(self) -> None:
        if not (0 < self.cpu_s <= 3600 and 0 < self.wall_s <= 7200):
            raise ValueError(f"limits of {self.cpu_s} s CPU and {self.wall_s} s wall: give 0 to 3600 and 0 to 7200")
        if self.memory_bytes < MIN_MEMORY_BYTES:
            raise ValueError(f"a limit of {self.memory_bytes} bytes of memory: at least {MIN_MEMORY_BYTES} are needed")
        if not 0 < self.output_bytes <= 64 << 20:
            raise ValueError(f"a limit of {self.output_bytes} bytes of output: give 1 to {64 << 20}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One program and the cases to judge it on.

    cases are JSON objects that only the harness's judge sees; entry is the function that the program must define;
    harness is the name of one of the pool's harnesses. guarded=False leaves out the static check and the chosen
    builtins, so that the self-check can attack what lies below.

    Example: Job(job_id="00003-002-005", program="def strategy(board):\\n    return 'W'", entry="strategy",
    harness="game2048", cases=({...},))
    """

    job_id: str
    program: str
    entry: str
    harness: str
    cases: tuple[dict[str, Any], ...]
    limits: Limits = Limits()
    guarded: bool = True

    def to_message(self) -> dict[str, Any]:
        """Returns what the supervisor reads: all but the id."""
        return {name: value for name, value in asdict(self).items() if name != "job_id"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The verdict on a job. cases: the judge's rows, none when it wrote none before the program failed."""

    job_id: str
    outcome: Outcome
    detail: str
    cases: tuple[dict[str, Any], ...]
    notes: str = ""
    # what the static check noted of the program, JSON (containers/sandbox/state.py); "" before the program is loaded
    checks: Mapping[str, Any] = field(default_factory=dict)
    # what the harness's probe found out after the cases
    cpu_s: float = 0.0
    # CPU seconds of the program's process
    supervisor_cpu_s: float = 0.0
    # CPU seconds of the supervisor, the judge's own work included
    wall_s: float = 0.0
    # seconds of the clock from fork to the last process gone
