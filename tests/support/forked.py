"""`python -m metawrap` without the seconds that a new interpreter needs to import torch."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo  # The first optimizer of a process imports it, which takes seconds.

import metawrap
from metawrap.cli import main
from metawrap.training import comparison

# Autograd has a thread for each GPU, which a fork would lack.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn")


class Forked:
    """What `subprocess.Popen` makes of such a command, as a fork of this process; it reads nothing and prints text."""

    def __init__(self, command, cwd=".", env=None, **_):
        assert command[:3] == [sys.executable, "-m", "metawrap"]
        self._printed = tempfile.TemporaryDirectory()
        self._process = CONTEXT.Process(
            target=_run, args=(command[3:], cwd, env or dict(os.environ), self._printed.name)
        )
        self._process.start()

    returncode = property(lambda self: self._process.exitcode)

    def poll(self):
        return self.returncode

    def send_signal(self, sent):
        os.kill(self._process.pid, sent)

    def communicate(self, timeout=None):
        self._process.join(timeout)
        assert self.returncode is not None, "the process did not end in time"
        with self._printed as folder:
            return tuple(Path(folder, name).read_bytes().decode() for name in ("stdout", "stderr"))

    def __enter__(self):
        self.stderr = io.StringIO(self.communicate()[1])
        return self

    def __exit__(self, *_):
        pass


def compare_in_forks(patch, but=""):
    """From now on the runs of a comparison or a study are forks, except the one in the folder `but`."""

    def popen(command, **given):
        out = Path(command[command.index("--out") + 1])
        return (subprocess.Popen if out.name == but else Forked)(command, **given)

    patch.setattr(comparison, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": popen}))


def _run(arguments, cwd, env, printed):
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    warnings.simplefilter("default")
    # A shell's background job, as CI may be, ignores Ctrl-C and hands that down; a user's terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(printed, name), os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True))
    sys.argv = [str(Path(metawrap.__file__).with_name("__main__.py")), *arguments]
    status = 70
    try:
        status = main(arguments)
    finally:
        os._exit(status)  # The interpreter's own end would wait for threads of the parent.
