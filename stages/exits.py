"""How every command ends: exit codes, and one line instead of a traceback for what can be expected."""

import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from stages.config import UserError


class Terminated(KeyboardInterrupt):
    """SIGTERM: taken like Ctrl-C, so that everything is closed on the way out."""


def guarded(action: Callable[[], int], *, resume: str = "", pass_errors: bool = False) -> int:
    """The exit code of `action`: 2 after a UserError, 130 after Ctrl-C or SIGTERM, which print a line or two.

    An OSError that a person can do something about is told as a UserError. 141, without a word, where nobody reads
    standard output any more, as behind `| head`.

    pass_errors: a UserError is raised to an outer `guarded` instead, and so is every OSError.
    """
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        code = action()
        sys.stdout.flush()  # now, not at the interpreter's end, where a failure is not caught
        return code
    except UserError as error:
        if pass_errors:
            raise
        return told(error)
    except BrokenPipeError:
        if pass_errors or not reader_is_gone():
            raise
        return 141
    except OSError as error:
        from stages.artifacts.run import explanation

        known = None if pass_errors else explanation(error, Path(), "choose another folder")
        if known is None:
            raise
        return told(known)
    except KeyboardInterrupt as interrupt:
        what = "terminated" if isinstance(interrupt, Terminated) else "interrupted"
        print(f"{what}; go on with: {resume}" if resume else what, file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def told(error: UserError) -> int:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return 2


def reader_is_gone() -> bool:
    """Whether nobody reads standard output any more; what is still to be written goes nowhere then."""
    try:
        output = sys.stdout.fileno()
    except OSError:
        return False  # not a file: a test's
    poll = select.poll()
    poll.register(output, 0)  # errors are told without being asked for
    if not poll.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
    return True


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
