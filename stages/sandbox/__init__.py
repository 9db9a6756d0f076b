"""Judging programs that nobody has read: jobs in, results out, each program alone in a process inside a Docker
container.

    protocol.py    Job, Result, Outcome, Limits: what travels
    pool.py        SandboxPool: warm containers, one thread each; SandboxError when the sandbox itself fails
    container.py   one container: how it is locked, its one socket, one reply a job
    image.py       the image and where it comes from
    attacks/       the attacks that any backend must survive, one file each; corpus.py reads them
    self_check.py  attacks a pool with them, and looks for the proof that each ran

What it protects from: a program that wants a reward it did not earn, or to reach the judge, other programs' verdicts,
the network, the disk or the host through system calls. What it does not: a hole in the kernel's few system calls that
a case may make (read, write, memory, futex, clock_gettime, getrandom, exit), or in the processor; set sandbox.runtime
to runsc where that matters. The code inside the container is containers/sandbox.
"""

from stages.sandbox.pool import SandboxPool, open_pool, reap
from stages.sandbox.protocol import PROTOCOL_VERSION, Job, Limits, Outcome, Result, SandboxError

__all__ = ["PROTOCOL_VERSION", "Job", "Limits", "Outcome", "Result", "SandboxError", "SandboxPool", "open_pool", "reap"]
