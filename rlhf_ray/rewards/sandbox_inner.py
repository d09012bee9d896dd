"""What runs inside the sandbox before a sample does: gives up all rights, then runs the sample, or what serves it.

Standard library only, and no import of this package: `sandbox.py` passes this file's text to a bare interpreter.
Arguments: a JSON object (see `main`). Nothing in this process says that a test was passed: a program is judged by
what it prints, a function by what it returns, both outside.
"""

import base64
import ctypes
import json
import marshal
import os
import platform
import resource
import signal
import struct
import sys
import types

# Linux, include/uapi/linux/landlock.h: what each version of the interface can restrict in the file system.
_ACCESS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_READ = 1 | 4 | 8  # execute, read file, read folder
_PATH_BENEATH = 1
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446

# System calls that no test needs: sockets, signals to others, other processes' memory, mounts, namespaces, modules.
_SHARED = {"io_uring_setup": 425, "pidfd_send_signal": 424, "pidfd_getfd": 438}
_FORBIDDEN = {
    "x86_64": (0xC000003E, (41, 62, 200, 129, 101, 310, 311, 165, 166, 155, 272, 308, 321, 298, 250, 248, 249, 323,
                            304, 169, 246, 175, 313, *_SHARED.values())),
    "aarch64": (0xC00000B7, (198, 129, 130, 138, 117, 270, 271, 40, 39, 41, 97, 268, 280, 241, 219, 217, 218, 282,
                             265, 142, 104, 105, 273, *_SHARED.values())),
}  # fmt: skip
_X32_BIT = 0x40000000  # x86-64's second set of system-call numbers

_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
_CAP_DAC_READ_SEARCH, _CAPABILITY_VERSION = 2, 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """`job_fd`: what to run (below). `uid`, `readable`, `landlock`, `seccomp`: what to give up, as far as the tier has
    it. `limits`: resource name -> value.

    The job is a `program`, or `modules` (name, marshalled code) of which the last one's `main` gets the job, and
    `pipes`, which no child of this process inherits.
    """
    settings = json.loads(sys.argv[1])
    with os.fdopen(settings["job_fd"], "rb") as file:
        job = json.loads(file.read())
    for pipe in job["pipes"]:
        os.set_inheritable(pipe, False)
    give_up(settings)
    sys.argv = ["sample"]
    if "modules" in job:
        serve(job)
    else:
        run(job["program"])


def serve(job: dict) -> None:
    for name, code in job.pop("modules"):
        module = sys.modules[name] = types.ModuleType(name)
        exec(marshal.loads(base64.b64decode(code)), module.__dict__)
    module.main(job)
    os._exit(0)


def run(program: str) -> None:
    """As `python program.py` would: its threads end and its exit handlers run before the process does."""
    try:
        exec(compile(program, "<sample>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        raise
    except BaseException as error:
        # No traceback module: the sample may have replaced everything, or used up the memory.
        os.write(2, f"{type(error).__name__}: {error}"[:500].encode("utf-8", "replace"))
        sys.exit(1)


def give_up(settings: dict) -> None:
    """In this order: each step takes away what the ones before it needed."""
    folder, rules = os.getcwd(), -1
    if settings["landlock"]:
        rules = landlock_rules(settings["readable"], folder)
    if settings["uid"] is not None:
        become(settings["uid"], keep_reading=settings["landlock"])
    if sys.platform == "linux":
        # Who waits for this process sees to its time, and may be killed. Another user's process forgets it: not before.
        _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "parent's death")
        _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if rules >= 0:
        _check(_libc.syscall(_RESTRICT_SELF, rules, 0), "landlock")
        os.close(rules)
    if settings["seccomp"]:
        forbid_calls()
    for name, value in settings["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def become(uid: int, *, keep_reading: bool) -> None:
    """Root becomes a user that owns nothing and has no other process.

    `keep_reading`: an interpreter below a private folder stays readable; Landlock says which folders those are.
    """
    if keep_reading:
        _check(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "keepcaps")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if keep_reading:
        header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
        low = 1 << _CAP_DAC_READ_SEARCH
        _check(_libc.capset(header, struct.pack("6I", low, low, 0, 0, 0, 0)), "capset")


def landlock_version() -> int:
    """0 where the kernel has none."""
    return max(0, _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)) if sys.platform == "linux" else 0


def landlock_rules(readable: list, folder: str) -> int:
    """A rule set: read the given paths, write in `folder` only, no TCP, no signals to outside."""
    version = landlock_version()
    handled = (1 << _ACCESS_BITS.get(version, 16)) - 1
    attributes = struct.pack("QQQ", handled, 3 if version >= 4 else 0, 2 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    _check(rules, "landlock rules")
    for path, access in [(folder, handled), ("/dev/null", 2 | 4), *((path, _READ) for path in readable)]:
        try:
            beneath = os.open(path, os.O_PATH)
        except OSError:
            continue  # not on this machine
        if not os.path.isdir(path):
            access &= 1 | 2 | 4
        rule = struct.pack("=Qi", access, beneath)
        _check(_libc.syscall(_ADD_RULE, rules, _PATH_BENEATH, rule, 0), f"landlock rule {path}")
        os.close(beneath)
    return rules


def forbid_calls() -> None:
    """A seccomp filter (Linux, Documentation/userspace-api/seccomp_filter.rst): EPERM for the calls above."""
    architecture, numbers = _FORBIDDEN[platform.machine()]

    def instruction(code: int, yes: int, no: int, value: int) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    filters = [
        instruction(load, 0, 0, 4), instruction(equal, 1, 0, architecture), instruction(leave, 0, 0, kill),
        instruction(load, 0, 0, 0), instruction(at_least, len(numbers), 0, _X32_BIT),
        *(instruction(equal, len(numbers) - 1 - i, 0, number) for i, number in enumerate(numbers)),
        instruction(leave, 0, 0, allow), instruction(leave, 0, 0, refuse),
    ]  # fmt: skip
    # The last comparison and the one for x32 jump over "allow" too.
    for index in range(4, 5 + len(numbers)):
        code, yes, no, value = struct.unpack("HBBI", filters[index])
        filters[index] = instruction(code, len(filters) - 2 - index, no, value)
    text = ctypes.create_string_buffer(b"".join(filters))
    program = struct.pack("HP", len(filters), ctypes.addressof(text))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def seccomp_known() -> bool:
    return sys.platform == "linux" and platform.machine() in _FORBIDDEN


def _check(result: int, what: str) -> None:
    """Half a sandbox is none."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
