"""Judging programs that nobody has read: jobs in, results out, each program alone in a process behind several walls.

    protocol.py    Job, Result, Outcome, Limits: what travels
    pool.py        SandboxPool: warm sandboxes, one thread each; SandboxError when the sandbox itself fails
    channel.py     what backends share: one socket to the supervisor, one reply a job
    container.py   the backend docker; attached.py is a running container and its standard streams
    keeper.py      sandboxes that listen, for stages in containers, which reach them through sockets.py
    local.py       the backend local, for machines without Docker
    image.py       the container's image and where it comes from
    attacks/       the attacks that any backend must survive, one file each; corpus.py reads them
    self_check.py  attacks a pool with them, and looks for the proof that each ran

The code inside is containers/sandbox, the same for both backends. Walls, from the program outwards:

1. Every program, both backends: a forked process of its own; no builtins that reach files; a system call filter that
   leaves read and write on its two pipes, memory that is not executable, futex, clock_gettime, getrandom and exit;
   limits on address space, CPU and output; no further process, thread or file. The verdict is computed in another
   process, and the judge's data never enter the program's.
2. docker: another uid than the supervisor's; seccomp.json for the whole container (an allow-list: of moby's default
   what a supervisor needs; io_uring, ptrace, userfaultfd, keyctl, bpf, perf_event_open and further namespaces are not
   in it, clone3 is answered ENOSYS); no network, no device but Docker's harmless ones, a read-only root, all
   capabilities dropped but SETUID, SETGID and KILL, no new privileges, limits of the container's memory, CPU and
   processes.
   local: the same by the kernel's own means (containers/sandbox/jail.py): user, pid, mount, net, ipc and uts namespaces
   with an empty read-only root, Landlock, and a filter as narrow as seccomp.json; without namespaces Landlock and the
   filters. With one uid for supervisor and programs (no root, no newuidmap) a Landlock domain for every case, process
   1 of the pid namespace as supervisor and PR_SET_DUMPABLE 0 stand in for the second uid.

Both protect from a program that wants a reward it did not earn, or to reach the judge, other programs' verdicts, the
network, the disk or the host through system calls. Neither protects from

- a hole in the few system calls that are left, or in the processor (side channels between programs and supervisor);
  with docker sandbox.runtime=runsc puts gVisor's kernel between, and `dockerd --userns-remap=default` makes the
  container's root an ordinary user of the host. Nothing here needs to be changed for either; the tests run neither;
- a program that is slow on purpose: it costs its CPU limit each time;
- whoever may talk to the Docker daemon, who is root there.

local protects less in these points (local.LIMITATIONS): no limit of memory or share of the CPU for supervisor and case
together; this machine's Python instead of an image's; without namespaces the network and other processes are behind
the filters and Landlock only. An out-of-memory killer finds sandboxes first (oom_score_adj 500). Its sandboxes end with
the process that opened the pool, also when that is killed. local is only ever used when sandbox.backend=local says so.
"""

from stages.sandbox.pool import SandboxPool, open_pool, reap
from stages.sandbox.protocol import PROTOCOL_VERSION, Job, Limits, Outcome, Result, SandboxError

__all__ = ["PROTOCOL_VERSION", "Job", "Limits", "Outcome", "Result", "SandboxError", "SandboxPool", "open_pool", "reap"]
