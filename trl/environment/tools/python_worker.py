"""The child process of `PythonInterpreterTool`: it runs, behind locks, the programs that arrive on its standard input.

This is a script that imports nothing from the package. It first loads the modules that programs may use. Then each
program gets a fork of the process, in which these doors are closed before it runs:

1. rlimits: CPU time, memory, no files written, no new descriptors (so no file opens and no socket is made), no
   processes; root becomes nobody.
2. The kernel (seccomp, Linux): no system call that opens, creates, connects, forks, executes, signals or traces.
   A program can still read its memory, write to the pipe and read the clock.
3. The functions of `os` that reach outside the process are replaced; importers are removed.
4. An audit hook refuses every event that is not known to be harmless.

Where the kernel has no seccomp, 1, 3 and 4 remain, and it takes `unsafe=True` to run anything: they are good against
accidents and simple attacks. A program that means harm can still delete files and read other processes' memory.
"""

import ast
import builtins
import errno
import importlib
import json
import os
import resource
import select
import struct
import sys

READY = b"\x06"
"""written to the output once everything is locked, before the program runs"""

MODULES = """
    __future__ abc array base64 binascii bisect calendar cmath collections collections.abc contextlib copy csv
    dataclasses datetime _strptime decimal difflib enum fractions functools graphlib hashlib heapq hmac io itertools
    json keyword math numbers operator pprint random re reprlib secrets statistics string struct textwrap time types
    typing unicodedata warnings zlib
    encodings.ascii encodings.latin_1 encodings.utf_16 encodings.utf_32 encodings.idna encodings.hex_codec
"""

HIDDEN = "ctypes _ctypes resource _posixsubprocess subprocess gc select signal _signal socket threading"

NOBODY = 65534

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SYSTEM_CALLS = {  # what a running program needs: the numbers on x86_64 and aarch64
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "close": (3, 57),
    "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "mremap": (25, 216), "madvise": (28, 233), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "futex": (202, 98), "set_robust_list": (273, 99),
    "rseq": (334, 293), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "nanosleep": (35, 101),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "gettimeofday": (96, 169),
    "times": (100, 153), "getrusage": (98, 165), "getpid": (39, 172), "gettid": (186, 178), "getrandom": (318, 278),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip

OS_KEPT = """
    error environ environb name sep pathsep linesep curdir pardir extsep altsep devnull path fspath fsencode fsdecode
    PathLike strerror cpu_count getpid urandom times times_result uname_result stat_result terminal_size DirEntry
    get_exec_path getenv getenvb supports_bytes_environ
"""


def limit(seconds: int, memory: int) -> None:
    """Close door 1. `seconds`: of CPU time, more than the clock allows; `memory`: bytes beyond what is in use now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as numbers:
            in_use = int(numbers.read().split()[0]) * resource.getpagesize()
    except OSError:
        in_use = 0
    limits = {"CPU": seconds, "AS": in_use + memory, "FSIZE": 0, "CORE": 0, "NOFILE": 0, "NPROC": 0, "MEMLOCK": 0}
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        except OSError:
            pass
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is not None:
            hard = resource.getrlimit(which)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                resource.setrlimit(which, (value, value))
            except (OSError, ValueError):
                if name != "AS":  # macOS has no limit on memory
                    raise


def filter_program(architecture: int, allowed: list[int]) -> bytes:
    """A classic BPF program that allows these system calls and fails every other with EPERM."""
    load, jump_equal, give = 0x20, 0x15, 0x06
    kill, fail, allow = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
    code = [(load, 0, 0, 4), (jump_equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    code += [(jump_equal, len(allowed) - i, 0, number) for i, number in enumerate(allowed)]
    code += [(give, 0, 0, fail), (give, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def lock_kernel() -> None:
    """Close door 2 and test it; OSError if it does not hold."""
    ctypes = sys.modules["ctypes"]
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in ARCHITECTURES:
        raise OSError("no list of system calls for this system")
    column = list(ARCHITECTURES).index(machine)
    instructions = filter_program(ARCHITECTURES[machine], [numbers[column] for numbers in SYSTEM_CALLS.values()])
    held = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("HP", len(instructions) // 8, ctypes.addressof(held))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    pointer = ctypes.create_string_buffer(program, len(program))
    set_no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    if prctl(set_no_new_privileges, 1, 0, 0, 0) or prctl(set_seccomp, mode_filter, ctypes.addressof(pointer), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp was refused")
    try:
        os.open("/", os.O_RDONLY)
    except PermissionError:
        return
    raise OSError("seccomp is set, yet a file could be opened")


class Importer:
    """The only importer that remains: it refuses every import."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        raise ModuleNotFoundError(f"No module named {name!r} in this interpreter", name=name)


def disarm() -> None:
    """Close door 3."""
    for name in list(sys.modules):
        if name.split(".")[0] in HIDDEN.split():
            del sys.modules[name]
    imp = sys.modules["_imp"]
    for name in ("create_builtin", "create_dynamic", "exec_builtin", "exec_dynamic"):
        if hasattr(imp, name):
            delattr(imp, name)
    sys.meta_path[:] = [Importer]
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    posix = sys.modules["posix"]
    for module in (os, posix):
        for name in set(dir(module)) - set(OS_KEPT.split()):
            if not name.startswith("__") and callable(getattr(module, name)):
                setattr(module, name, refusal(name))


def refusal(name: str) -> object:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(f"os.{name} is not available in this interpreter")

    return refuse


def watch(event: str, args: object) -> None:
    """Door 4, the audit hook. It uses constants only, because a program could change names."""
    if event not in {
        "array.__new__", "builtins.breakpoint", "builtins.id", "builtins.input", "builtins.input/result", "compile",
        "exec", "import", "object.__delattr__", "object.__getattr__", "object.__setattr__", "pickle.find_class",
        "sys._getframe", "sys._current_exceptions", "sys.excepthook", "sys.unraisablehook", "time.sleep",
        "sys.set_asyncgen_hooks_firstiter", "sys.set_asyncgen_hooks_finalizer",
    }:  # fmt: skip
        raise PermissionError("not allowed in this interpreter: " + event)


def report(error: BaseException) -> None:
    """Print one line with the error and its place in the program."""
    if isinstance(error, MemoryError):
        print("MemoryError: out of memory")
        return
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<program>":
            line = trace.tb_lineno
        trace = trace.tb_next
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    print(f"{type(error).__name__}{': ' if text else ''}{text}{f' (line {line})' if line else ''}")


def run(program: str) -> None:
    """Run the program. Like a shell, print the value of the last line if it is an expression."""
    scope = {"__name__": "__main__", "__builtins__": builtins}
    tree = ast.parse(program, "<program>")
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    exec(compile(tree, "<program>", "exec"), scope)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "<program>", "eval"), scope)
        if value is not None:
            print(repr(value))


def load(settings: dict) -> None:
    """Load the modules that programs may use, and those that the locks need."""
    for name in [*MODULES.split(), *settings["modules"], "signal"]:
        importlib.import_module(name)
    if "kernel" in settings["locks"]:
        importlib.import_module("ctypes")  # now, because later no file can be opened


def read_exactly(size: int) -> bytes:
    """Read so many bytes from the standard input; empty at its end."""
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            return b""
        data += more
    return data


def serve(settings: dict) -> None:
    """Run each program that arrives in a fork of this process; write the exit code of each fork."""
    control = settings["control"]
    os.write(control, READY)
    while header := read_exactly(4):
        program = read_exactly(struct.unpack("<I", header)[0]).decode()
        child = os.fork()
        if not child:
            os.close(control)
            nothing, end = os.pipe()
            os.close(end)
            os.dup2(nothing, 0)
            os.close(nothing)
            run_locked(program, settings)
        kill_if_alone(child)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(control, struct.pack("<i", code))


def kill_if_alone(child: int) -> None:
    """Wait for the fork to end; kill it if the process that wants its answer has ended (needs `pidfd_open`)."""
    if not hasattr(os, "pidfd_open"):
        return
    try:
        ended = os.pidfd_open(child)
    except OSError:
        return
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(0, 0)  # the next program comes only after this one's end, so an event here is a hangup
    if ended not in [file for file, _ in poll.poll()]:
        os.kill(child, 9)
    os.close(ended)


def run_locked(program: str, settings: dict) -> None:
    """Close the doors, run the program, and exit."""
    locks = settings["locks"]
    sys.modules["random"].seed(0)
    sys.argv[:] = [""]
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    leave, write = os._exit, os.write
    sys.modules["signal"].alarm(settings["seconds"] + 60)  # in case its parent has ended
    if "limits" in locks:
        limit(settings["seconds"], settings["memory"])
    if "kernel" in locks:
        lock_kernel()
    if "modules" in locks:
        disarm()
    if "hook" in locks:
        sys.addaudithook(watch)
    write(1, READY)
    try:
        run(program)
    except SystemExit:
        pass
    except BaseException as error:
        try:
            report(error)
        except BaseException:
            write(1, b"an error that cannot be shown\n")  # the program may have replaced the standard output
    try:
        sys.stdout.flush()
    finally:
        leave(0)


def main() -> None:
    settings = json.loads(sys.argv[1])
    load(settings)
    serve(settings)


if __name__ == "__main__":
    main()
