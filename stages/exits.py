"""How every command ends: exit codes, and one line instead of a traceback for what can be expected."""

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from stages.config import UserError


class Terminated(KeyboardInterrupt):
    """SIGTERM: taken like Ctrl-C, so that everything is closed on the way out."""


def guarded(action: Callable[[], int], *, resume: str = "", pass_errors: bool = False) -> int:
    """The exit code of `action`: 2 after a UserError, 130 after Ctrl-C or SIGTERM, which print a line or two.

    pass_errors: a UserError is raised to an outer `guarded` instead.
    """
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        return action()
    except UserError as error:
        if pass_errors:
            raise
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        what = "terminated" if isinstance(interrupt, Terminated) else "interrupted"
        print(f"{what}; go on with: {resume}" if resume else what, file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
