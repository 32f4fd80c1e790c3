import contextlib
import functools
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl.environment.tools import LocalSandbox, PythonInterpreterTool, Ran, python_process
from trl.environment.tools import sandbox as local

SECRET = "the-secret-of-the-trainer"
EVERY_LOCK = {"all": ("limits", "kernel", "modules", "hook"), "no kernel": ("limits", "modules", "hook")}
SINGLE_LOCK = {"kernel": ("kernel",), "limits and kernel": ("limits", "kernel")}


@pytest.fixture(scope="module")
def run() -> PythonInterpreterTool:
    return PythonInterpreterTool(timeout=20)


def locked(locks, timeout: float = 20) -> PythonInterpreterTool:
    tool = PythonInterpreterTool(timeout=timeout)
    tool.sandbox._locks = locks
    return tool


shared = functools.cache(locked)
"""the same interpreters for all attacks: they do not get at those that come after them either"""


@pytest.fixture(scope="module", autouse=True)
def _forget_shared():
    yield
    shared.cache_clear()


# --- what it is for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        ("1 + 1", "2"),
        ("print('a', end='')", "a"),
        ("x = 3\nprint(x)\nx * 2", "3\n6"),
        ("None", ""),
        ("", ""),
        ("def solution():\n    return sum(range(10))\nsolution()", "45"),
        ("import math\nfrom collections import Counter\nprint(math.pi, Counter('aab')['a'])", "3.141592653589793 2"),
        ("from datetime import datetime\ndatetime.strptime('2020-02-03', '%Y-%m-%d').day", "3"),
        ("class A:\n    pass\nA.__module__", "'__main__'"),
        ("'ü' + chr(128512)", "'ü😀'"),
        ("import sys\nprint('x', file=sys.stderr)\nsys.exit(3)", "x"),
        ("print('before')\n1 / 0", "before\nZeroDivisionError: division by zero (line 2)"),
        ("x = 1\ndef f(:", "SyntaxError: invalid syntax (line 2)"),
        ("raise ValueError", "ValueError (line 1)"),
        ("input()", "EOFError: EOF when reading a line (line 1)"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy' in this interpreter (line 1)"),
    ],
)
def test_answers(run, program, answer):
    assert run(program) == answer


def test_answers_are_the_same_every_time(run):
    program = "import random\nprint(random.random(), {'a', 'b', 'c', 'd', 'e'})"
    assert run(program) == run(program)


def test_programs_share_nothing(run):
    run("import math\nmath.pi = 3\nglobals()['x'] = 1")
    assert run("import math\nprint(math.pi, 'x' in globals())") == "3.141592653589793 False"


def test_further_modules():
    tool = PythonInterpreterTool(timeout=60, memory=1024, modules=["numpy"])
    assert tool("import numpy as np\n(np.arange(6.0).reshape(2, 3) @ np.ones(3)).tolist()") == "[3.0, 12.0]"
    with pytest.raises(ValueError, match="modules: 'not_there' is not installed"):
        PythonInterpreterTool(modules=["not_there"])


@pytest.mark.parametrize("field", ["timeout", "memory", "max_output"])
def test_limits_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        PythonInterpreterTool(**{field: 0})


def test_an_interpreter_serves_many_programs_and_ends_with_its_tool():
    tool = PythonInterpreterTool(timeout=20, processes=1)
    assert tool("import sys\nsys.x = 1") == ""
    (interpreter,) = tool.sandbox._idle
    assert tool("import sys\nhasattr(sys, 'x')") == "False"
    assert tool.sandbox._idle == [interpreter]
    tool("while True: print(1)")
    assert not tool.sandbox._idle
    assert not interpreter.usable
    assert tool("2") == "2"
    (interpreter,) = tool.sandbox._idle
    os.kill(interpreter._child.pid, 9)
    assert tool("3") == "3"
    (interpreter,) = tool.sandbox._idle
    del tool
    assert not interpreter.usable


def test_many_at_once():
    tool = PythonInterpreterTool(timeout=30, processes=2)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tool, [f"{i} * {i}" for i in range(12)])) == [str(i * i) for i in range(12)]


@pytest.fixture
def no_seccomp(monkeypatch):
    local._refusal.cache_clear()
    run = local.Interpreter.run
    with monkeypatch.context() as patched:
        refused = (b"Traceback\nOSError: [Errno 22] seccomp was refused\n", "exited")
        patched.setattr(local.Interpreter, "run", lambda *args, **kwargs: refused)
        assert local._refusal() == "OSError: [Errno 22] seccomp was refused"
    assert local.Interpreter.run is run
    yield
    local._refusal.cache_clear()


def test_without_seccomp_nothing_runs(no_seccomp):
    """C9"""
    with pytest.raises(RuntimeError, match=r"cannot hold programs \(OSError: .*refused\): use Linux .* `unsafe=True`"):
        PythonInterpreterTool()
    with pytest.raises(RuntimeError, match="cannot hold programs"):
        LocalSandbox()


def test_without_seccomp_it_takes_unsafe(no_seccomp, monkeypatch):
    """C9: then the environment of the trainer is not the program's, and no file opens."""
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", SECRET)
    with pytest.warns(UserWarning, match="unsafe=True: the kernel of this system cannot hold programs"):
        tool = PythonInterpreterTool(timeout=20, unsafe=True)
    assert (tool.isolation, tool.sandbox._locks) == ("audit hook", ("limits", "modules", "hook"))
    assert tool("1 + 1") == "2"
    assert tool("import os\nSECRET in os.environ.values() or len(os.environ)".replace("SECRET", repr(SECRET))) in "4567"


@pytest.mark.skipif(os.uname().machine != "x86_64" or os.uname().sysname != "Linux", reason="numbers of x86_64")
def test_a_kernel_that_really_refuses():
    """C9: a process that may set no filter, as in some containers."""
    code = """
import ctypes, struct
steps = [(0x20, 0, 0, 0), (0x15, 0, 3, 157), (0x20, 0, 0, 16), (0x15, 0, 1, 22), (6, 0, 0, 0x50016)]
steps += [(6, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("HBBI", *step) for step in steps)  # prctl(PR_SET_SECCOMP) fails with EINVAL
held = ctypes.create_string_buffer(code, len(code))
program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(held)), 16)
prctl = ctypes.CDLL(None).prctl
prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
assert not prctl(38, 1, 0, 0, 0) and not prctl(22, 2, ctypes.addressof(program), 0, 0)
from trl.environment.tools import PythonInterpreterTool
try:
    PythonInterpreterTool()
except RuntimeError as error:
    print(error)
print(PythonInterpreterTool(timeout=20, unsafe=True)("6 * 7"))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    refusal, answer = ran.stdout.splitlines()
    assert "(OSError: [Errno 22] seccomp was refused)" in refusal
    assert answer == "42"
    assert "can delete your files" in ran.stderr


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="limits of Linux")
def test_limits_alone_open_nothing(outside):
    """C9: native code, and descriptors that were closed first."""
    program = """
        import ctypes, os
        library = ctypes.CDLL(None, use_errno=True)
        for fd in (0, 2):
            os.close(fd)
        paths = [SECRET, '/etc/passwd', f'/proc/{PARENT}/environ', '/proc/self/environ', NEW]
        print([library.open(path.encode(), flags, 0o666) for path in paths for flags in (0, 1, 0o101)])
        print(library.socket(2, 1, 0), library.memfd_create(b'x', 0), library.fork())
        """
    tool = PythonInterpreterTool(timeout=20, modules=["ctypes"])
    tool.sandbox._locks = ("limits",)
    answer = tool(outside.program(program))
    assert set(answer.replace("[", " ").replace("]", " ").replace(",", " ").split()) == {"-1"}
    outside.check(answer)


# --- sandboxes of the user ----------------------------------------------------------------------------------------


class Elsewhere:
    def __init__(self, answer) -> None:
        self.answer, self.asked = answer, []

    def run(self, program, *, timeout, memory, max_output):
        self.asked.append((program, timeout, memory, max_output))
        return self.answer


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("3\n", "3\n"[:1]),
        (Ran("3\n"), "3"),
        (Ran("in\n", "timed out"), "in\nTimeoutError: stopped after 2 s"),
        (Ran("", "SIGKILL"), "The process died: SIGKILL"),
        ("x" * 30, "x" * 20 + "\nOutput cut after 20 characters."),
    ],
)
def test_a_sandbox_of_the_user(answer, text, no_seccomp):
    sandbox = Elsewhere(answer)
    tool = PythonInterpreterTool(timeout=2, memory=64, max_output=20, sandbox=sandbox)
    assert tool("1 + 2") == text
    assert sandbox.asked == [("1 + 2", 2, 64, 20)]
    assert tool.isolation == "Elsewhere"


def test_what_a_sandbox_of_the_user_cannot_be():
    for setting in ({"modules": ["math"]}, {"processes": 2}, {"unsafe": True}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}=.*: the sandbox that you give has settings"):
            PythonInterpreterTool(sandbox=Elsewhere(""), **setting)
    with pytest.raises(ValueError, match="sandbox=3: it has no method `run`"):
        PythonInterpreterTool(sandbox=3)


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="seccomp is Linux's")
def test_the_kernel_holds_programs_here(run):
    assert run.isolation == "kernel"


# --- limits -------------------------------------------------------------------------------------------------------


def test_an_endless_loop_is_stopped():
    began = time.monotonic()
    tool = PythonInterpreterTool(timeout=1)
    assert tool("print('in')\nwhile True: pass") == "in\nTimeoutError: stopped after 1 s"
    assert tool("import time\ntime.sleep(60)") == "TimeoutError: stopped after 1 s"
    assert tool("2 ** 10 ** 10 ** 10").startswith(("TimeoutError", "MemoryError"))
    assert tool("1") == "1"
    assert time.monotonic() - began < 10


def test_a_program_that_catches_everything_is_stopped():
    program = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    assert PythonInterpreterTool(timeout=1)(program) == "TimeoutError: stopped after 1 s"


def test_a_program_that_closes_its_output_is_stopped():
    tool = PythonInterpreterTool(timeout=1)
    assert tool("import sys\nprint(1)\nsys.stdout.close()\nwhile True: pass") == "1\nTimeoutError: stopped after 1 s"
    assert tool("import sys\nprint(1)\nsys.stdout.close()") == "1"


@pytest.mark.parametrize("output", ["None", "5", "type('', (), {'write': 1 .__truediv__})()"])
def test_a_program_that_replaces_its_output_learns_no_paths(output):
    answer = PythonInterpreterTool()(f"import sys\nprint(1)\nsys.stdout = {output}\nprint(2)\n0 / 0")
    assert answer in ("1", "1\nan error that cannot be shown")


def test_a_program_is_stopped_also_when_nobody_looked_at_the_clock(monkeypatch):
    readable = python_process._readable

    def late(*args, **kwargs):
        time.sleep(2.5)  # the limit of CPU time kills the program meanwhile
        return readable(*args, **kwargs)

    tool = PythonInterpreterTool(timeout=1)
    assert tool("1") == "1"
    monkeypatch.setattr(python_process, "_readable", late)
    assert tool("while True: pass") == "TimeoutError: stopped after 1 s"


def test_huge_output_is_cut(run):
    tool = PythonInterpreterTool(timeout=20, max_output=100)
    assert tool("while True: print('x' * 1000)") == "x" * 100 + "\nOutput cut after 100 characters."
    assert tool("print('y' * 101)") == "y" * 100 + "\nOutput cut after 100 characters."
    assert tool("print('y' * 99)") == "y" * 99
    assert len(run("import sys\nsys.stdout.buffer.write(b'\\xff' * 10**8)")) < 4100


@pytest.mark.parametrize("program", ["'a' * 10**10", "x = []\nwhile True: x.append(bytearray(10**7))"])
def test_memory_is_limited(program):
    assert PythonInterpreterTool(timeout=20, memory=100)(program) == "MemoryError: out of memory"


def test_a_crash_is_an_answer():
    tool = PythonInterpreterTool(timeout=20, memory=4000)
    program = "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)"
    assert tool(program).startswith(("The process died: SIGSEGV", "RecursionError"))


def test_a_program_must_fit(run):
    assert run("x" * 70_000) == "SyntaxError: the program is longer than 60000 bytes"
    assert run("'\ud800'").startswith("'\\ud800'")


# --- hostile programs ---------------------------------------------------------------------------------------------


class Outside:
    """What a program must not reach: a secret, a folder, a port, this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o777)
        self.secret = folder / "secret"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o666)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(0)
        self.names = {
            "SECRET": str(self.secret), "NEW": str(folder / "new"), "FOLDER": str(folder), "PARENT": os.getpid(),
            "PORT": self.listener.getsockname()[1],
        }  # fmt: skip

    def program(self, text: str) -> str:
        return "".join(f"{name} = {value!r}\n" for name, value in self.names.items()) + textwrap.dedent(text)

    def check(self, answer: str) -> None:
        assert SECRET not in answer
        assert sorted(self.folder.iterdir()) == [self.secret]
        assert self.secret.read_text() == SECRET
        with contextlib.suppress(BlockingIOError):
            self.listener.accept()[0].close()
            pytest.fail("it connected")
        assert not workers()


def workers() -> list[int]:
    """Forks that run programs and are still there, or orphans of them. Interpreters that wait have no children."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"python_worker.py" in entry.read_bytes():
                parents[int(entry.parent.name)] = _parent(entry)
    ours = {pid for pid, parent in parents.items() if parent == os.getpid()}
    return [pid for pid, parent in parents.items() if parent in ours or parent == 1]


def _parent(entry: Path) -> int:
    return int(entry.with_name("stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    world = Outside(tmp_path_factory.mktemp("outside"))
    yield world
    world.listener.close()


ATTACKS = {
    "read": "print(open(SECRET).read())",
    "read raw": "import os\nprint(os.read(os.open(SECRET, os.O_RDONLY), 100))",
    "read by io": "import io\nprint(io.FileIO(SECRET).read(), io.open_code(SECRET).read())",
    "read by pathlib": "import pathlib\nprint(pathlib.Path(SECRET).read_text())",
    "read by opener": "print(open('x', opener=lambda path, flags: SECRET).read())",
    "read as a module": "import sys\nsys.path.insert(0, FOLDER)\nimport secret",
    "read as source": "import linecache\nprint(linecache.getlines(SECRET))",
    "write": "open(NEW, 'w').write('x')",
    "write raw": "import os\nos.open(NEW, os.O_CREAT | os.O_WRONLY)",
    "overwrite": "open(SECRET, 'r+').write('x')",
    "remove": "import os\nos.remove(SECRET)",
    "rename": "import os\nos.rename(SECRET, NEW)",
    "link": "import os\nos.symlink(SECRET, NEW)",
    "pipe file": "import os\nos.mkfifo(NEW)",
    "folder": "import os\nos.mkdir(NEW)",
    "list": "import os\nassert 'secret' not in os.listdir(FOLDER)",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', PORT))",
    "connect raw": "import _socket\n_socket.socket().connect(('127.0.0.1', PORT))",
    "fetch": "from urllib.request import urlopen\nurlopen(f'http://127.0.0.1:{PORT}')",
    "fork": "import os\nos.fork()\nos.open(NEW, os.O_CREAT)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "shell": "import os\nos.system(f'touch {NEW}')",
    "popen": "import subprocess\nsubprocess.run(['touch', NEW])",
    "exec": "import os\nos.execv('/bin/touch', ['touch', NEW])",
    "spawn": "import os\nos.posix_spawn('/bin/touch', ['touch', NEW], {})",
    "fork_exec": "import _posixsubprocess",
    "kill": "import os\nos.kill(PARENT, 9)",
    "kill group": "import os\nos.killpg(os.getpgid(PARENT), 9)",
    "kill all": "import signal, os\nos.kill(-1, 9)",
    "threads": "import _thread\nwhile True: _thread.start_new_thread(input, ())",
    "ctypes": "import ctypes\nctypes.CDLL(None).system(b'true')",
    "ctypes raw": "import _ctypes\n_ctypes.dlopen(None, 0)",
    "trace": "import sys\nsys.settrace(print)",
    "new code": "f = lambda: 1\nf.__code__ = f.__code__.replace(co_consts=(1, 2, 3))\nopen(SECRET)",
    "importlib": "import importlib\nimportlib.import_module('socket').create_connection(('127.0.0.1', PORT))",
    "__import__": "__import__('os').system(f'touch {NEW}')",
    "builtins": "__builtins__.__dict__['__import__']('subprocess').run(['touch', NEW])",
    "loader": "__loader__.load_module('_posixsubprocess')",
    "loader of posix": "__loader__.load_module('posix').open(NEW, 64)",
    "builtin of the importer": "import sys\nsys.modules['_imp'].create_builtin(__spec__)",
    "extension by path": """
        import sys, importlib.machinery as m, importlib.util as u, math
        loader = m.ExtensionFileLoader('_posixsubprocess', math.__file__)
        print(u.module_from_spec(u.spec_from_loader('_posixsubprocess', loader)))
        """,
    "frames": """
        import sys
        frame = sys._getframe()
        while frame:
            for name in ('os', 'resource', 'ctypes', 'leave', 'write'):
                found = frame.f_globals.get(name) or frame.f_locals.get(name)
                getattr(found, 'system', print)(f'touch {NEW}')
            frame = frame.f_back
        """,
    "subclasses": """
        for kind in ().__class__.__base__.__subclasses__():
            scope = getattr(kind.__init__, '__globals__', {})
            for name in ('os', 'sys', '_os', 'posix', 'subprocess', 'io'):
                module = scope.get(name)
                for attack in ('system', 'popen'):
                    try:
                        getattr(module, attack)(f'touch {NEW}')
                    except Exception:
                        pass
        for kind in ().__class__.__base__.__subclasses__():
            if kind.__name__ in ('FileLoader', 'SourceFileLoader', '_RawIOBase', 'FileIO'):
                try:
                    print(kind('x', SECRET).get_data(SECRET))
                except TypeError:
                    pass
        """,
    "the hook's own frame": """
        import builtins, sys
        try:
            open(SECRET)
        except Exception as error:
            trace = error.__traceback__
            while trace:
                trace.tb_frame.f_globals['watch'] = print
                trace.tb_frame.f_locals['event'] = 'compile'
                trace = trace.tb_next
        builtins.PermissionError = print
        print(open(SECRET).read())
        """,
    "a string that lies": """
        class Name(str):
            def __eq__(self, other): return True
            __hash__ = str.__hash__
        print(open(Name(SECRET), Name('r')).read())
        """,
    "garbage collector": "import gc\n[f for f in gc.get_objects() if callable(f)]",
    "undoing the limits": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (99, 99))",
    "restored os": "import os, importlib\nimportlib.reload(os)\nos.system(f'touch {NEW}')",
    "exec of text": 'exec("import os\\nos.sys" + "tem(\'touch \' + NEW)")',
    "pickle": "import pickle\npickle.loads(b'cposix\\nsystem\\n(S\"true\"\\ntR.')",
    "memory file": "import os\nos.memfd_create('x')",
    "mapped file": "import mmap\nmmap.mmap(0, 100)",
    "at exit": "import atexit, os\natexit.register(os.system, f'touch {NEW}')",
    "destructor": "class A:\n    def __del__(self): open(NEW, 'w')\nA()",
    "daemon": "import os\nos.setsid()\nif os.fork() == 0: os.setsid()\nopen(NEW, 'w')",
    "the worker's output": "import os\nfor fd in range(64):\n    try: os.close(fd)\n    except OSError: pass",
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("locks", EVERY_LOCK)
def test_attacks_fail(outside, attack, locks):
    outside.check(shared(EVERY_LOCK[locks])(outside.program(ATTACKS[attack])))


@pytest.mark.parametrize("attack", ["read", "read by io", "write raw", "connect", "shell", "exec", "restored os"])
def test_without_locks_they_would_succeed(tmp_path, attack):
    outside = Outside(tmp_path)
    answer = locked(())(outside.program(ATTACKS[attack]))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        outside.check(answer)
    outside.listener.close()


KERNEL_ATTACKS = (
    "read", "read raw", "read by io", "write", "write raw", "overwrite", "remove", "rename", "link", "pipe file",
    "folder", "list", "connect", "fork", "shell", "exec", "spawn", "kill", "kill group", "kill all", "memory file",
    "daemon", "restored os", "destructor", "frames", "__import__",
)  # fmt: skip


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="seccomp is Linux's")
@pytest.mark.parametrize("attack", KERNEL_ATTACKS)
@pytest.mark.parametrize("locks", SINGLE_LOCK)
def test_the_kernel_alone_holds_them(outside, attack, locks):
    outside.check(shared(SINGLE_LOCK[locks])(outside.program(ATTACKS[attack])))


def test_it_says_why(run, outside):
    assert run("open('/etc/passwd')") == "PermissionError: not allowed in this interpreter: open (line 1)"
    assert run("import os\nos.fork()") == "PermissionError: os.fork is not available in this interpreter (line 2)"
    assert run("import socket") == "ModuleNotFoundError: No module named 'socket' in this interpreter (line 1)"
    kernel = locked(SINGLE_LOCK["kernel"])
    assert kernel("import os\nos.fork()") == "PermissionError: [Errno 1] Operation not permitted (line 2)"


def test_a_killed_program_leaves_nothing_behind(outside):
    tool = PythonInterpreterTool(timeout=1)
    threads = threading.active_count()
    tool("while True: pass")
    outside.check("")
    assert threading.active_count() == threads


lines = st.one_of(
    st.sampled_from(sorted(ATTACKS.values())),
    st.sampled_from(
        ["while True: pass", "print('x' * 10**7)", "x = 'a' * 10**9", "def f(): f()\nf()", "1 / 0", "exit()"]
    ),
    st.text(max_size=40),
)


def wrapped(inner):
    def under(head):
        return lambda body: head + "\n" + textwrap.indent(textwrap.dedent(body), "    ")

    return st.one_of(
        inner.map(lambda body: under("try:")(body) + "\nexcept BaseException as error:\n    print(error)"),
        inner.map(under("for _ in range(3):")),
        inner.map(lambda body: under("def f():")(body) + "\nf()"),
        inner.map(lambda body: f"exec({textwrap.dedent(body)!r})"),
        inner.map(under("class A:")),
        st.tuples(inner, inner).map(lambda two: "\n".join(map(textwrap.dedent, two))),
    )


programs = st.recursive(lines, wrapped, max_leaves=4)
HOSTILE = {"deadline": None, "suppress_health_check": list(HealthCheck)}


AT_ONCE = 10


def stay_inside(outside: Outside, batch: list[str]) -> None:
    """Programs that run at the same time, in interpreters that go on to run others."""

    def answer(program: str) -> str:
        said = shared(EVERY_LOCK["all"], 0.3)(outside.program(program))
        if said.startswith("TimeoutError: not started"):  # a busy machine; it has to have its chance
            said = shared(EVERY_LOCK["all"], 5)(outside.program(program))
        return said

    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(answer, batch))
    assert time.monotonic() - began < 5 * len(batch)
    outside.check("\n".join(answers))


batches = st.lists(programs, min_size=AT_ONCE, max_size=AT_ONCE)


@settings(max_examples=3, **HOSTILE)
@given(batches)
def test_hostile_programs(outside, batch):
    stay_inside(outside, batch)


@pytest.mark.slow
@settings(max_examples=1000 // AT_ONCE, **HOSTILE)
@given(batches)
def test_a_thousand_hostile_programs(outside, batch):
    stay_inside(outside, batch)
