"""The walls around a supervisor where there is no Docker, and then the supervisor, on the host's own Python.

    python3 -P -s -S jail.py namespaces|landlock [--probe]

Standard input and output are one socket to the pool. The first process stays outside as the warden: when the pool's end
of the socket closes, or the pool's thread dies, it kills everything and goes. Its child is the supervisor.

namespaces: user, pid, mount, net, ipc and uts namespaces. The supervisor is process 1 of its pid namespace: nothing in
there can signal it, and all dies with it. Its root is an empty read-only tmpfs with the standard library and the
directories of the shared libraries mapped in; no /proc, no /dev. Its uids are mapped to ones that own nothing: by root
or newuidmap three of them (supervisor, case, sweep), else there is one, without any capability.
landlock: no namespaces. The supervisor may read the same directories and nothing else; root with CAP_SETUID gives the
cases a uid of their own. The warden is the subreaper of what the supervisor leaves.

Both: no new privileges, bpf.py's supervisor filter, Landlock where the kernel has it, no core, no ptrace (not
dumpable), oom_score_adj 500. With one uid each case enters a Landlock domain of its own in which nothing is allowed: it
may not trace or signal what is outside, which another uid would deny as well. --probe puts the walls up, writes as JSON
what they are made of, and ends.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import NoReturn

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, FOLDER)

import bpf  # noqa: E402
import case as cases  # noqa: E402
import supervisor  # noqa: E402

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
NEW_NS, NEW_CGROUP, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 0x1000, 0x4000, 1 << 18, 2
MOUNT_RDONLY, MOUNT_NOSUID, MOUNT_NODEV, AT_FDCWD, AT_RECURSIVE = 1, 2, 4, -100, 0x8000
MOUNT_SETATTR, CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 442, 444, 445, 446  # the same on every architecture
CAPABILITIES = 0xE0  # KILL, SETGID, SETUID
CAPABILITY_VERSION = 0x20080522
NEW_ROOT = "/dev"  # every machine has it, and nothing that is mapped in lies below
HIGHEST_UID = 0x7FFF0000
MAX_SANDBOXES = 4096
# Landlock (linux/landlock.h): how many of the file system's rights an ABI knows; the rights to read.
FILE_RIGHTS = (0, 13, 14, 15, 15, 16)
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3
TCP_RIGHTS, SCOPES = 0b11, 0b11  # bind, connect; abstract sockets, signals

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


def done(result: int, what: str) -> int:
    """Returns a C function's result; OSError when it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def control(option: int, first: int, second: int = 0) -> None:
    done(libc.prctl(option, first, second, 0, 0), f"prctl({option})")


def readable_folders() -> list[str]:
    """Returns where the standard library and the shared libraries lie that this Python uses."""
    with open("/proc/self/maps") as file:
        mapped = {line.split(maxsplit=5)[5].rstrip("\n") for line in file if ".so" in line}
    folders = {os.path.dirname(path) for path in mapped if path.startswith("/")}
    folders |= {os.path.abspath(path) for path in sys.path if path and os.path.isdir(path)} - {FOLDER}
    return sorted(name for name in folders if not any(name.startswith(other + "/") for other in folders))


def reserve_uids() -> tuple[socket.socket, int]:
    """Returns the first of three uids that no other sandbox here uses, and the lock that says so while it is open.

    They are the highest of the largest range that there is: no account has them. LookupError when there is none.
    """
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    start, _, size = max(ranges, key=lambda part: part[2])
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for number in range(1, min(MAX_SANDBOXES, size // 8)):
        first = min(start + size, HIGHEST_UID) - 4 * number
        with contextlib.suppress(OSError):
            lock.bind(f"\0flexsink-sandbox-{first}")
            return lock, first
    raise LookupError("no uid is left for another sandbox")


# --- namespaces -----------------------------------------------------------------------------------------------------


def map_ids(pid: int) -> int:
    """Gives a process in a new user namespace its uids and gids, from outside; returns how many (3 or 1)."""
    inside = (0, cases.CASE_UID, cases.SWEEP_UID)
    if os.geteuid() == 0:
        with contextlib.suppress(OSError, LookupError):
            lock, first = reserve_uids()
            lock.close()  # uids in a namespace meet no others: any will do
            for name in ("gid_map", "uid_map"):
                write(f"/proc/{pid}/{name}", "".join(f"{uid} {first + n} 1\n" for n, uid in enumerate(inside)))
            return 3
    if map_with_newuidmap(pid):
        return 3
    write(f"/proc/{pid}/setgroups", "deny")
    write(f"/proc/{pid}/gid_map", f"{cases.CASE_UID} {os.getegid()} 1\n")
    write(f"/proc/{pid}/uid_map", f"{cases.CASE_UID} {os.geteuid()} 1\n")
    return 1


def map_with_newuidmap(pid: int) -> bool:
    """Maps this user and two of his subordinate ids (/etc/subuid, /etc/subgid); False when there are none."""
    for tool, table, own in (("newgidmap", "/etc/subgid", os.getegid()), ("newuidmap", "/etc/subuid", os.geteuid())):
        first = subordinate(table)
        if not (first and shutil.which(tool, path="/usr/bin:/bin")):
            return False
        triples = [f"0 {own} 1", f"{cases.CASE_UID} {first} 1", f"{cases.SWEEP_UID} {first + 1} 1"]
        command = [tool, str(pid), *" ".join(triples).split()]
        if subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True).returncode:
            return False
    return True


def subordinate(table: str) -> int:
    """Returns the first of this user's subordinate ids; 0 when the table gives him fewer than two."""
    import pwd

    with contextlib.suppress(OSError, KeyError, ValueError):
        names = {str(os.getuid()), pwd.getpwuid(os.getuid()).pw_name}
        with open(table) as file:
            for line in file:
                name, first, count = line.strip().split(":")
                if name in names and int(count) >= 2:
                    return int(first)
    return 0


def write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def enter_namespaces() -> int:
    """Puts this process into namespaces of its own, its children into a pid namespace; returns the number of uids."""
    asked, ask = os.pipe()
    answered, answer = os.pipe()
    pid = os.getpid()
    helper = os.fork()
    if not helper:
        os.close(ask)
        try:
            if os.read(asked, 1):
                os.write(answer, str(map_ids(pid)).encode())
        except BaseException as error:
            os.write(answer, f"the uid map: {error}".encode())
        finally:
            os._exit(0)
    os.close(answer)
    flags = NEW_USER | NEW_NS | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS | NEW_CGROUP
    try:
        done(libc.unshare(flags), "unshare")
        os.write(ask, b"+")
        said = os.read(answered, 1000).decode()
    finally:
        for descriptor in (ask, asked, answered):
            os.close(descriptor)
        os.waitpid(helper, 0)
    if not said.isdigit():
        raise OSError(said or "the uid map: no answer")
    return int(said)


def change_root(folders: list[str], num_uids: int) -> None:
    """Makes a read-only tmpfs with nothing but these folders the root."""
    done(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount private")
    # Opened while this is still a user who may: the folders may lie in his home.
    opened = {name: os.open(name, os.O_PATH | os.O_DIRECTORY) for name in folders}
    if num_uids > 1:
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    done(
        libc.mount(b"none", NEW_ROOT.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=64k,nr_inodes=256,mode=755"),
        "mount tmpfs",
    )
    for name, descriptor in opened.items():
        os.makedirs(NEW_ROOT + name)
        source = f"/proc/self/fd/{descriptor}".encode()
        done(libc.mount(source, (NEW_ROOT + name).encode(), None, MS_BIND | MS_REC, None), f"mount {name}")
        os.close(descriptor)
    attributes = struct.pack("<4Q", MOUNT_RDONLY | MOUNT_NOSUID | MOUNT_NODEV, 0, 0, 0)
    done(libc.syscall(MOUNT_SETATTR, AT_FDCWD, NEW_ROOT.encode(), AT_RECURSIVE, attributes, 32), "mount_setattr")
    os.chdir(NEW_ROOT)
    pivot_root = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    done(libc.syscall(pivot_root, b".", b"."), "pivot_root")
    done(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")


# --- privileges -----------------------------------------------------------------------------------------------------


def keep_capabilities(kept: int) -> None:
    """Gives up every capability but those of the mask, for good."""
    for number in range(64):
        # Fails beyond the kernel's last one, and for whoever has none to give up.
        if not kept >> number & 1:
            libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    header = struct.pack("<II", CAPABILITY_VERSION, 0)
    done(libc.capset(header, struct.pack("<6I", kept, kept, 0, 0, 0, 0)), "capset")


def has_capabilities(wanted: int) -> bool:
    with open("/proc/self/status") as file:
        (effective,) = (int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return effective & wanted == wanted


def landlock_version() -> int:
    """Returns the kernel's Landlock ABI; 0 where it has none or has it switched off."""
    version: int = max(0, libc.syscall(CREATE_RULESET, None, 0, 1))
    return version


def make_ruleset(folders: list[str]) -> int:
    """Returns a descriptor of a Landlock ruleset: reading below these folders, and nothing else that Landlock knows."""
    version = landlock_version()
    rights = (1 << FILE_RIGHTS[min(version, len(FILE_RIGHTS) - 1)]) - 1
    attributes = struct.pack("<3Q", rights, TCP_RIGHTS if version >= 4 else 0, SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = done(libc.syscall(CREATE_RULESET, attributes, size, 0), "landlock_create_ruleset")
    for name in folders:
        folder = os.open(name, os.O_PATH | os.O_DIRECTORY)
        rule = struct.pack("<Qi", READ_FILE | READ_FOLDER, folder)
        done(libc.syscall(ADD_RULE, ruleset, 1, rule, 0), "landlock_add_rule")
        os.close(folder)
    return ruleset


def close_in(folders: list[str], *, kept: int) -> int:
    """Closes the supervisor in, but for its filter; returns the ruleset for cases, -1 without Landlock."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    keep_capabilities(kept)
    control(PR_SET_DUMPABLE, 0)
    control(cases.PR_SET_NO_NEW_PRIVS, 1)
    if not landlock_version():
        return -1
    own, for_cases = make_ruleset(folders), make_ruleset([])
    done(libc.syscall(RESTRICT_SELF, own, 0), "landlock_restrict_self")
    os.close(own)
    return for_cases


def filter_supervisor() -> None:
    """Installs the supervisor's filter, which all that it forks inherits."""
    program = cases.Filter(bpf.assemble_supervisor(os.uname().machine))
    control(cases.PR_SET_SECCOMP, cases.SECCOMP_MODE_FILTER, ctypes.addressof(program))


# --- the two processes ----------------------------------------------------------------------------------------------


def supervise(walls: str, folders: list[str], proc: int, *, first_uid: int, num_uids: int, probe: bool) -> NoReturn:
    """The inner process's life: up go the walls that a process can only put up for itself, then it is the supervisor.

    first_uid: the case's uid.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    control(PR_SET_PDEATHSIG, signal.SIGKILL)
    family = os.open("thread-self/children", os.O_RDONLY, dir_fd=proc)
    ticks = os.open("stat", os.O_RDONLY, dir_fd=proc)
    os.close(proc)
    ruleset = close_in(folders, kept=CAPABILITIES if num_uids > 1 else 0)
    control(PR_SET_PDEATHSIG, signal.SIGKILL)  # again: a change of privileges takes it away
    facts = {"walls": walls, "uids": num_uids, "landlock": landlock_version()}
    filter_supervisor()
    if probe:
        os.write(1, json.dumps(facts).encode())
        os._exit(0)
    sweep = "uid" if num_uids > 1 else "namespace" if walls == "namespaces" else "children"
    place = cases.Place(
        case_uid=first_uid if num_uids > 1 else None,
        sweep_uid=first_uid + 1,
        sweep=sweep,
        compile_filter=bpf.assemble(os.uname().machine, compiling=True),
        run_filter=bpf.assemble(os.uname().machine, compiling=False),
        landlock=ruleset,
        family=family,
        ticks=ticks,
    )
    supervisor.main(place)
    os._exit(0)


def guard(child: int, told: int) -> None:
    """The warden's life: returns when the supervisor has ended or the pool is gone, and then nothing is left.

    told: where a signal writes. A handler that raised would end the warden, and not the rest, if SIGTERM came before it
    waits: on a busy machine a case can run by then.
    """
    descriptor = os.pidfd_open(child)
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    waiting.register(told, select.POLLIN)
    waiting.register(0, select.POLLRDHUP)
    waiting.poll()
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    end_orphans()


def end_orphans() -> None:
    """Reaps every child, and kills those that the supervisor's death made this process's own."""
    with contextlib.suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
            for name in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(name), signal.SIGKILL)
            time.sleep(0.005)  # the kernel's list may have missed one


def children() -> list[str]:
    """Returns this process's children; none in a changed root, where the pid namespace takes care of them."""
    with contextlib.suppress(FileNotFoundError), open("/proc/thread-self/children") as file:
        return file.read().split()
    return []


def main() -> None:
    walls, probe = sys.argv[1], "--probe" in sys.argv
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.suppress(OSError):
        write("/proc/self/oom_score_adj", "500")
    folders = readable_folders()
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    first_uid, num_uids = cases.CASE_UID, 1
    lock = None
    if walls == "namespaces":
        num_uids = enter_namespaces()
        change_root(folders, num_uids)
    else:
        if not landlock_version():
            raise OSError("the kernel has no Landlock")
        control(supervisor.PR_SET_CHILD_SUBREAPER, 1)
        if os.geteuid() == 0 and has_capabilities(CAPABILITIES):
            with contextlib.suppress(LookupError):
                lock, first_uid = reserve_uids()
                num_uids = 3
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGTERM, lambda *_: None)
    control(PR_SET_PDEATHSIG, signal.SIGTERM)
    child = os.fork()
    if not child:
        signal.set_wakeup_fd(-1)
        os.close(told)
        os.close(tell)
        if lock:
            lock.close()
        supervise(walls, folders, proc, first_uid=first_uid, num_uids=num_uids, probe=probe)
    os.close(proc)
    control(PR_SET_DUMPABLE, 0)
    guard(child, told)


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyError) as error:
        sys.exit(f"{error.strerror if isinstance(error, OSError) and error.strerror else error}")
