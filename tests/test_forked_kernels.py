"""Kernels that chapters run in: processes of their own that begin with what chapters import, and otherwise as Jupyter's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient.exceptions import DeadKernelError

from sae_stability.book import kernels


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Executes cells in a forked kernel, and gives the text or the types of what each one shows."""
    monkeypatch.setenv("JUPYTER_DEFAULT_PROVISIONER_NAME", kernels.NAME)

    def shown(*cells: str) -> list[str]:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nbformat.write(notebook, tmp_path / "given.ipynb")
        papermill.execute_notebook(
            tmp_path / "given.ipynb", tmp_path / "done.ipynb", kernel_name="python3", progress_bar=False, cwd=tmp_path
        )
        done = nbformat.read(tmp_path / "done.ipynb", as_version=4).cells
        return ["".join(out.get("text") or ",".join(sorted(out["data"])) for out in cell.outputs) for cell in done]

    return shown


def test_a_kernel_begins_with_what_chapters_import_and_with_no_name_of_another_one(execute):
    begun = "import sys; print('sae_stability.book.page' in sys.modules, 'left' in globals())"
    assert execute(begun, "left = 1") == ["True False\n", ""]
    assert execute(begun) == ["True False\n"]


def test_a_kernel_runs_in_its_folder_with_the_environment_of_the_caller_and_in_a_process_of_its_own(execute, tmp_path, monkeypatch):
    asked = "import os; print(os.getcwd(), os.environ.get('TOLD'), os.getpid(), os.getpgid(0))"
    monkeypatch.setenv("TOLD", "this")
    folder, told, pid, group = execute(asked)[0].split()
    assert (Path(folder), told) == (tmp_path, "this")
    assert pid == group != str(os.getpid())
    monkeypatch.delenv("TOLD")
    assert execute(asked)[0].split()[1] == "None"


def test_a_figure_is_shown_as_by_any_kernel(execute):
    assert execute("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()") == ["image/png,text/plain"]


def test_where_no_server_can_be_had_kernels_start_as_jupyter_starts_them(execute, monkeypatch):
    class Unstarted:
        def start(self):
            raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(kernels.SERVER, "Process", lambda **_: Unstarted())
    assert execute("import sys; print('sae_stability.book.page' in sys.modules)") == ["False\n"]


def test_what_is_preloaded_asks_for_no_study_that_a_checkout_may_lack(tmp_path):
    (tmp_path / "studies").mkdir()
    environment = {**os.environ, "SAE_STABILITY_ROOT": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import sae_stability.book.preloaded"], env=environment, check=True)


def test_errors_and_the_death_of_a_kernel_are_told(execute):
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        execute("1 / 0")
    with pytest.raises(DeadKernelError):
        execute("import os; os._exit(3)")


def test_a_kernel_ends_with_the_process_that_asked_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_DEFAULT_PROVISIONER_NAME", kernels.NAME)
    start = (
        "from jupyter_client.manager import start_new_kernel;"
        "manager, client = start_new_kernel(kernel_name='python3', extra_arguments=['--log-level=50']);"
    )
    tell = "client.execute_interactive('import os; print(os.getpid(), flush=True)'); import time; time.sleep(600)"
    caller = subprocess.Popen([sys.executable, "-c", start + tell], stdout=subprocess.PIPE, text=True)
    kernel = int(caller.stdout.readline())
    assert os.getpgid(kernel) == kernel
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{kernel}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{kernel}").exists()
