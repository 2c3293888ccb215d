"""Kernels for chapters, forked from a process that has imported what every chapter does: imports are half of a chapter's time.

Each is a process of its own with nothing in it but modules, as a kernel that Jupyter starts. Jupyter finds this way of starting one
by the name `NAME` (`pyproject.toml` gives it).
"""

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, cast

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import LocalProvisioner

NAME = "sae-stability-forked"
SERVER, PRELOADED = multiprocessing.get_context("forkserver"), ["sae_stability.book.preloaded"]
SERVER.set_forkserver_preload(PRELOADED)


class Forked(LocalProvisioner):
    """Starts a kernel as a fork."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """`cmd` is what would start it: an interpreter, `-m`, the kernel's module and its arguments. It does where the server can't
        be had, such as for a folder of temporary files whose path is longer than that of a socket may be."""
        process = SERVER.Process(target=_serve, args=(cmd[3:], kwargs["env"], str(kwargs.get("cwd") or os.getcwd())))
        try:
            process.start()
        except (OSError, EOFError):
            return await super().launch_kernel(cmd, **kwargs)
        self.process, self.pid, self.cwd = cast(Any, _Started(process)), process.pid, kwargs.get("cwd")
        return self.connection_info


def _serve(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Be a kernel."""
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()  # an interrupt at the terminal is for who waits for the kernel
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"  # a kernel's own, for which pyplot came too early
    Thread(target=_end_with_the_caller, daemon=True).start()
    IPKernelApp.launch_instance(arguments)


def _end_with_the_caller() -> None:
    """Whoever asked for a kernel may be killed, and would leave it behind."""
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os._exit(1)


class _Started:
    """A process, as Jupyter handles one that `subprocess` started."""

    stdin = stdout = stderr = None

    def __init__(self, process: BaseProcess):
        self._process, self.pid = process, process.pid
        self.kill, self.terminate = process.kill, process.terminate

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self.pid is not None:
            os.kill(self.pid, number)
