"""Judges jobs in one local sandbox and prints what came of them; run by test_sandbox_local.py, also as another user.

    python local_sandbox_driver.py KIND [open] < JOBS      (from the root of a copy of the project)
    python local_sandbox_driver.py KIND attack < {}        prints what came of every known attack

KIND: namespaces or landlock. open: the cases' own filters allow everything and their limits of processes and files are
off, so that what stands behind is seen. JOBS: {"harnesses": {...}, "jobs": [{name: value}]} as JSON; when a job named
"endless" has run for a second, the number of processes is printed.
"""

import json
import os
import sys
import time

sys.path.insert(0, os.getcwd())

from stages.config import SandboxConfig
from stages.sandbox import Job, Limits, SandboxError, local, open_pool, pool

OPEN = """
import struct, sys
sys.argv[0] = {jail!r}
sys.path.insert(0, {folder!r})
import bpf, case, resource
setrlimit = resource.setrlimit
spared = (resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE)
resource.setrlimit = lambda which, limits: None if which in spared else setrlimit(which, limits)
bpf.assemble = lambda machine, *, compiling: struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000)
import jail
jail.main()
"""


def mine() -> list[str]:
    """Returns the processes that were started from this folder, but for this one."""
    found = []
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                text = file.read().decode()
        except (OSError, UnicodeDecodeError):
            continue
        if name.isdigit() and os.getcwd() in text and int(name) != os.getpid():
            found.append(name)
    return found


def grown(wanted: int) -> int:
    """How many of these there are once there have been so many at two looks, 0.2 s apart, or after a minute."""
    deadline = time.monotonic() + 60
    before, now = 0, len(mine())
    while (before, now) != (wanted, wanted) and time.monotonic() < deadline:
        time.sleep(0.2)
        before, now = now, len(mine())
    return now


def attack() -> dict[str, str]:
    """Returns the attacks that failed to come to nothing, and why."""
    from stages.sandbox.corpus import load
    from stages.sandbox.self_check import LIMITS, Pick, attack_pool
    from stages.tasks.arenas import task_arenas

    arenas = {"pick": Pick(), **task_arenas()}
    harnesses = {name: arena.harness for name, arena in arenas.items()}
    config = SandboxConfig(backend="local", containers=1, memory_bytes=LIMITS.memory_bytes)
    with open_pool(config, harnesses=harnesses, labels={}) as sandboxes:
        findings = list(attack_pool(sandboxes, load(), arenas=arenas, backend="local"))
    assert len(findings) > 200
    return {finding.attack.name: finding.failure for finding in findings if not finding.passed and not finding.skipped}


def main() -> None:
    kind, opened = sys.argv[1], "open" in sys.argv
    order = json.load(sys.stdin)
    facts = local.try_walls(kind)
    walls = local.Walls(kind=kind, uids=facts["uids"], landlock=facts["landlock"], lacking={})
    pool.find_walls = lambda: walls
    if "attack" in sys.argv:
        print(json.dumps(attack()))
        return
    if opened:
        folder = str(local.FOLDER)
        script = OPEN.format(folder=folder, jail=f"{folder}/jail.py")
        local.command = lambda kind: [sys.executable, "-P", "-s", "-S", "-B", "-c", script, kind]
    answers = {"walls": str(walls), "uids": walls.uids, "landlock": walls.landlock}
    config = SandboxConfig(backend="local", containers=1)
    with open_pool(config, harnesses=order["harnesses"], labels={}) as sandboxes:
        for job in order["jobs"]:
            name, limits = job.pop("name"), Limits(**job.pop("limits", {"cpu_s": 1.0, "wall_s": 20.0}))
            future = sandboxes.submit(Job(job_id=name, limits=limits, **job))
            if name == "endless":
                print("running", grown(4), flush=True)
            try:
                result = future.result()
                answers[name] = {"outcome": result.outcome, "detail": result.detail, "cases": result.cases}
            except SandboxError as error:
                answers[name] = {"outcome": "failed", "detail": str(error), "cases": []}
        answers["started"], answers["processes"] = sandboxes.num_started, len(mine())
    answers["left"] = len(mine())
    print(json.dumps(answers))


main()
