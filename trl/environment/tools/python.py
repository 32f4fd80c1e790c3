"""Runs Python programs that a model wrote, in a sandbox: without files, network or child processes."""

from __future__ import annotations

from collections.abc import Sequence

from trl.environment.tools.sandbox import LocalSandbox, Ran, Sandbox


class PythonInterpreterTool:
    """Answers a program with what it prints, and with the value of its last line as a Python shell would.

    In the sandbox of this machine every program runs in a fresh fork of an interpreter, with most of the pure standard
    library, seeded `random`, and no input. An error or a time-out is the last line of the answer. Hostile programs get
    an error too: `python_worker` says how they are confined. RuntimeError where this system cannot confine them.
    """

    def __init__(
        self,
        timeout: float = 5.0,
        memory: int = 256,
        max_output: int = 4000,
        modules: Sequence[str] = (),
        processes: int | None = None,
        *,
        sandbox: Sandbox | None = None,
        unsafe: bool = False,
    ) -> None:
        """
        `timeout`: seconds on the clock. `memory`: MiB that a program may take. `max_output`: characters.
        `modules`: further modules that programs can import, such as numpy or sympy.
        `processes`: how many programs run at the same time; None: one for each core.
        `sandbox`: where programs run, such as a container; None: a `LocalSandbox`.
        `unsafe`: run programs also where the kernel cannot hold them (no seccomp).
        """
        for field, value in (("timeout", timeout), ("memory", memory), ("max_output", max_output)):
            if value <= 0:
                raise ValueError(f"{field}={value}: give more than 0")
        own = {"modules": modules, "processes": processes, "unsafe": unsafe}
        for field, given in own.items():
            if sandbox is not None and given:
                raise ValueError(f"{field}={given!r}: the sandbox that you give has settings of its own; leave it out")
        if sandbox is not None and not callable(getattr(sandbox, "run", None)):
            raise ValueError(f"sandbox={sandbox!r}: it has no method `run`; see `trl.environment.tools.Sandbox`")
        self.timeout = timeout
        self.memory = memory
        self.max_output = max_output
        self.sandbox: Sandbox = LocalSandbox(modules, processes, unsafe=unsafe) if sandbox is None else sandbox

    @property
    def isolation(self) -> str:
        """What holds programs: "kernel" (seccomp), "audit hook" (no seccomp, `unsafe=True`), or a sandbox's type."""
        return self.sandbox.isolation if isinstance(self.sandbox, LocalSandbox) else type(self.sandbox).__name__

    def __call__(self, program: str) -> str:
        """What the program printed."""
        ran = self.sandbox.run(program, timeout=self.timeout, memory=self.memory, max_output=self.max_output)
        ran = Ran(ran) if isinstance(ran, str) else ran
        if ran.ended == "too long" or len(ran.output) > self.max_output:
            return f"{ran.output[: self.max_output]}\nOutput cut after {self.max_output} characters."
        if ran.ended == "timed out":
            return f"{ran.output}TimeoutError: stopped after {self.timeout:g} s"
        return ran.output.rstrip("\n") if ran.ended == "exited" else f"{ran.output}The process died: {ran.ended}"
