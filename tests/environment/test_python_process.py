"""What programs of `PythonInterpreterTool` could do to the processes around them, in native code too."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl.environment.tools import PythonInterpreterTool
from trl.environment.tools.python_worker import ARCHITECTURES, SYSTEM_CALLS

linux = pytest.mark.skipif(os.uname().sysname != "Linux", reason="seccomp and /proc are Linux's")
x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86_64")


def locked(*locks: str) -> PythonInterpreterTool:
    tool = PythonInterpreterTool(timeout=20)
    tool.sandbox._locks = locks
    return tool


@pytest.fixture(scope="module")
def native() -> PythonInterpreterTool:
    """Held by the kernel alone; programs call the C library at will."""
    return locked("kernel")


@pytest.fixture(scope="module")
def tool() -> PythonInterpreterTool:
    return PythonInterpreterTool(timeout=20, processes=1)


# --- the kernel ---------------------------------------------------------------------------------------------------

EVERY_CALL = """
import ctypes
library, zero = ctypes.CDLL(None, use_errno=True), ctypes.c_long(0)
for base in (0, 2**30):  # and those of the x32 interface
    for number in range(470):
        if base or number not in KNOWN:
            ctypes.set_errno(0)
            if library.syscall(ctypes.c_long(base + number), *[zero] * 6) != -1 or ctypes.get_errno() != 1:
                print('let through:', base, number)
"""

OLD_GATE = """
import ctypes
library = ctypes.CDLL(None, use_errno=True)
library.mmap.restype = ctypes.c_void_p
library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
place = library.mmap(None, 4096, 7, 0x22, -1, 0)
code = bytes([0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3])  # mov eax, getpid of i386; int 0x80; ret
ctypes.memmove(place, code, len(code))
print('let through:', ctypes.CFUNCTYPE(ctypes.c_int)(place)())
"""

# The kernel itself lets uretprobe and uprobe by, and kills whoever calls them from anywhere but a probe.
PROBES = {335, 336}


@linux
@x86
def test_no_other_system_call_gets_through(native):
    column = list(ARCHITECTURES).index("x86_64")
    known = {numbers[column] for numbers in SYSTEM_CALLS.values()} | PROBES
    assert native(f"KNOWN = {known}\n{EVERY_CALL}") == ""


@linux
@x86
def test_the_gate_of_another_architecture_is_death(native):
    assert native(OLD_GATE) == "The process died: SIGSYS"


NATIVE_ATTACKS = {
    "memory of the trainer": "print(ctypes.CDLL(None, use_errno=True).ptrace(16, PARENT, 0, 0))",
    "read its memory": "print(library.process_vm_readv(PARENT, 0, 0, 0, 0, 0))",
    "signals": "print(library.kill(PARENT, 9), library.kill(os.getpid() - 1, 9), library.kill(-1, 9))",
    "leave the group": "print(library.setsid(), library.setpgid(0, 0))",
    "make the shared pipe wait for nobody": "print(library.fcntl(1, 4, 0o4000), library.ioctl(1, 0x5421, b'1'))",
    "make the shared pipe small": "print(library.fcntl(1, 1031, 4096))",
    "undo the limits": "print(library.setrlimit(0, b'\\xff' * 16), library.prctl(36, 1, 0, 0, 0))",
    "more processes": "print(library.fork(), library.vfork(), library.daemon(0, 0))",
    "shared memory": "print(library.shmget(0, 4096, 0o1666), library.memfd_create(b'x', 0))",
}


@linux
@pytest.mark.parametrize("attack", NATIVE_ATTACKS)
def test_native_attacks_fail(native, attack):
    head = f"import ctypes, os\nPARENT = {os.getpid()}\nlibrary = ctypes.CDLL(None, use_errno=True)\n"
    answer = native(head + NATIVE_ATTACKS[attack])
    assert set(answer.split()) == {"-1"}
    assert native("print('next')\nprint('x' * 5000)") == f"next\n{'x' * 3995}\nOutput cut after 4000 characters."


@linux
@pytest.mark.parametrize("name", ["environ", "mem", "maps", "cmdline", "fd/1"])
def test_other_processes_cannot_be_read(native, name, monkeypatch):
    for who in (os.getpid(), "self"):
        assert "PermissionError" in native(f"print(open('/proc/{who}/{name}', 'rb').read(9))")


@linux
def test_a_program_has_its_output_and_nothing_else(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "1")
    look = """
        import os, stat
        found = []
        for file in range(1024):
            try:
                found.append((file, stat.S_ISFIFO(os.fstat(file).st_mode)))
            except OSError:
                pass
        print(found, 'SECRET_OF_THE_TRAINER' in os.environ, os.read(0, 10))
        """
    program = "\n".join(line[8:] for line in look.splitlines())
    with open(__file__), open(os.devnull) as other:
        os.set_inheritable(other.fileno(), True)
        free = locked()  # held by nothing
        assert free(program) == free(program) == "[(0, True), (1, True), (2, True)] False b''"


def test_native_code_by_way_of_types_of_ctypes_is_held_too(tool):
    program = """
import os
kinds, found = [object], []
while kinds:
    kind = kinds.pop()
    found += [kind] if kind.__module__.endswith('ctypes') else []
    kinds += [each for each in type.__subclasses__(kind) if each is not type]
for kind in found:
    if hasattr(kind, '_flags_') and hasattr(kind, '_restype_'):
        try:
            kind(8)()  # a call of whatever is at address 8
        except (TypeError, ValueError):
            pass
print('no way')
"""
    assert tool(program) in ("no way", "The process died: SIGSEGV")
    assert tool("1") == "1"


# --- the next program ---------------------------------------------------------------------------------------------

LEFT_BEHIND = """
import builtins, decimal, json, math, os, random, sys, warnings
builtins.print = builtins.len = lambda *a, **k: 3
builtins.open = sys.stdout = sys.stderr = None
sys.modules['math'] = json
json.dumps = lambda *a: 'mine'
os.environ['X'] = 'mine'
decimal.getcontext().prec = 1
random.random = lambda: 3
str.mine = 1 if hasattr(str, 'mine') else None
"""
FRESH = """
import decimal, json, math, os, random, sys
print(len('ab'), json.dumps([1]), math.pi, 'X' in os.environ, decimal.getcontext().prec, random.random() < 1)
"""


def test_nothing_survives_to_the_next_program(tool):
    first = tool(FRESH)
    assert first == "2 [1] 3.141592653589793 False 28 True"
    (interpreter,) = tool.sandbox._idle
    tool(LEFT_BEHIND)
    assert tool(FRESH) == first
    tool("import sys\nsys.stdout.close()\nsys.stderr.close()")
    assert tool(FRESH) == first
    assert tool.sandbox._idle == [interpreter]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_an_interpreter_that_was_killed_while_it_waited_is_replaced(tool, how):
    assert tool("1") == "1"
    (interpreter,) = tool.sandbox._idle
    os.kill(interpreter._child.pid, how)
    assert tool("2") == "2"
    assert tool.sandbox._idle != [interpreter]


def test_one_that_is_stopped_is_an_answer():
    tool = PythonInterpreterTool(timeout=1, processes=1)
    assert tool("1") == "1"
    os.kill(tool.sandbox._idle[0]._child.pid, signal.SIGSTOP)
    assert tool("2") == "TimeoutError: not started within 1 s"
    assert tool("3") == "3"


# --- the trainer --------------------------------------------------------------------------------------------------

DYING = """
from trl.environment.tools import PythonInterpreterTool
tool = PythonInterpreterTool(timeout=60)
tool("1")
print(tool.sandbox._idle[0]._child.pid, flush=True)
tool("import time\\ntime.sleep(60)")
"""


@linux
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open")
def test_programs_do_not_outlive_a_trainer_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", DYING], stdout=subprocess.PIPE, text=True) as trainer:
        server = int(trainer.stdout.readline())
        children = Path(f"/proc/{server}/task/{server}/children")
        until = time.monotonic() + 20
        while not (running := children.read_text().split()) and time.monotonic() < until:
            time.sleep(0.01)
        assert running
        trainer.kill()
    alive = [Path("/proc", pid) for pid in (str(server), *running)]
    while any(map(_alive, alive)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(_alive, alive))


def _alive(process: Path) -> bool:
    try:
        return process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
