"""Runs scripts in new processes that need not import torch and its like again.

To import torch, transformers and the package takes several seconds of a core. One process does so
once, and forks a child for every script. The child runs the script as ``python script.py`` does,
and ends as Python does: with its atexit functions, its threads joined and its exit status.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

IMPORTS = [
    "accelerate",
    "datasets",
    "manualloop.loop",
    "manualloop.verify",
    "safetensors.torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.nn.parallel.distributed",
    "torchmetrics",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.optimization",
]


class Script:
    """A script in a process of its own, which leads a session; the interface is that of Popen.

    Args:
        path: The script.
        args: Its arguments.
        env: All of its environment; that of this process by default.
        cwd: Its working directory.
        is_merged: Whether ``errors`` go to ``output``.
        terminal: The file descriptor of a terminal that it writes to, instead of both.
    """

    def __init__(self, path, *args, env=None, cwd=None, is_merged=True, terminal=None):
        self.returncode = None
        number = 1 if is_merged else 2
        self._files = [tempfile.TemporaryFile("w+") for _ in range(number)]  # noqa: SIM115
        self._connection, theirs = socket.socketpair()
        with theirs:
            written = [file.fileno() if terminal is None else terminal for file in self._files]
            fds = [theirs.fileno(), written[0], written[-1]]
            socket.send_fds(_forker()[0], [b"!"], fds)
        request = {
            "argv": [str(path), *map(str, args)],
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
        }
        content = json.dumps(request).encode()
        self._connection.sendall(struct.pack("i", len(content)) + content)
        (self.pid,) = struct.unpack("i", _receive(self._connection, 4))

    def poll(self):
        """The exit status, negative for a signal; None while the script runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            (status,) = struct.unpack("i", _receive(self._connection, 4))
            self.returncode = os.waitstatus_to_exitcode(status)
            self._connection.close()
        return self.returncode

    def wait(self, timeout):
        """Wait so many seconds at most; return the exit status."""
        if self.poll() is None:
            select.select([self._connection], [], [], timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self, timeout):
        """Wait for the end; return whether it came by itself, and was not enforced.

        A script that hangs is asked to print where, in all of its threads. Whatever it has started
        ends with it.
        """
        is_over = True
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            is_over = False
            self.send_signal(signal.SIGCONT)
            self.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(600)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(600)
        for file in self._files:
            file.seek(0)
        self.output, self.errors = self._files[0].read(), self._files[-1].read()
        for file in self._files:
            file.close()
        return is_over


def run(path, *args, timeout=600, **options):
    """Run a script to its end; return it, with its ``returncode``, ``output`` and ``errors``."""
    script = Script(path, *args, **options)
    assert script.end(timeout), f"{path} hangs:\n{script.output}\n{script.errors}"
    return script


def wait_until(condition, timeout=600):
    """Ask until the condition holds; the limit is there for what never happens."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not so within {timeout} s"
        time.sleep(0.01)


def _receive(connection, size):
    content = b""
    while len(content) < size:
        chunk = connection.recv(size - len(content))
        if not chunk:
            raise EOFError("the process that starts scripts has ended")
        content += chunk
    return content


@functools.cache
def _forker():
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # Its children hash strings in another way than this process, whatever that was told.
            env=os.environ | {"PYTHONHASHSEED": "random"},
            start_new_session=True,
        )

    @atexit.register
    def end():
        ours.close()
        process.wait()

    return ours, process


def _serve(connection):
    """Fork a child for every request, and return in that child only: what it is to run."""
    while True:
        message, fds, _, _ = socket.recv_fds(connection, 1, 3)
        if not message:
            os._exit(0)  # the tests have ended
        if os.fork():
            for fd in fds:
                os.close(fd)
            os.waitpid(-1, 0)  # the middle one below, which ends at once
            continue
        # A grandchild stays to wait for the script, so that this process never has to.
        if os.fork():
            os._exit(0)
        connection.close()
        client = socket.socket(fileno=fds[0])
        (size,) = struct.unpack("i", _receive(client, 4))
        request = json.loads(_receive(client, size))
        pid = os.fork()
        if pid:
            client.sendall(struct.pack("i", pid))
            _, status = os.waitpid(pid, 0)
            with contextlib.suppress(OSError):
                client.sendall(struct.pack("i", status))
            os._exit(0)
        client.close()
        os.setsid()
        os.dup2(fds[1], 1)
        os.dup2(fds[2], 2)
        for fd in fds[1:]:
            os.close(fd)
        return request


def _run(request):
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv[:] = request["argv"]
    path = sys.argv[0]
    sys.path[0] = str(Path(path).parent)
    folders = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in folders if folder and folder not in sys.path]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__file__ = path
    exec(compile(Path(path).read_text(), path, "exec"), main.__dict__)


if __name__ == "__main__":
    for name in IMPORTS:
        __import__(name)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    gc.freeze()
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
