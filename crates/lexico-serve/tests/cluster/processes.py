"""Processes of a small cluster on loopback: all of them end with the script, however it ends."""

import atexit
import contextlib
import ctypes
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

WORK = pathlib.Path(tempfile.mkdtemp(prefix="lexico-cluster-"))
PATIENCE = 600


def free_port(least=0, most=0):
    """Any port that is free, or one within bounds."""
    for port in random.sample(range(least, most + 1), 1 + most - least):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return free.getsockname()[1]
    raise SystemExit("no port is free")


class Process:
    """A program with its log; it, and what it starts, ends with this script."""

    running = []

    def __init__(self, name, command, **environment):
        self.log = WORK / f"{name}.log"
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=open(self.log, "a"),
            stderr=subprocess.STDOUT,
            env=os.environ | {key: str(value) for key, value in environment.items()},
            cwd=WORK,
            start_new_session=True,
            # A script that is killed leaves nothing behind either.
            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL) if sys.platform == "linux" else None,
        )
        Process.running.append(self)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self, patience=20):
        self.process.terminate()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def lines(self, word):
        """The lines of its log with a word, without colours."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))
        return [line for line in text.splitlines() if word in line]

    def until(self, ready, what):
        """Waits until it is ready; ends the script, with its log's end, where it is not."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                if (value := ready()) not in (None, False):
                    return value
            time.sleep(0.1)
        raise SystemExit(f"{what} did not come:\n" + self.log.read_text(errors="replace")[-3000:])


@atexit.register
def end_all():
    while Process.running:
        Process.running.pop().kill()


for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: sys.exit(1))


def get(url, timeout=10):
    return urllib.request.urlopen(url, timeout=timeout).read().decode()


def post(url, body, timeout=3600):
    """The answer to a request, a stream of lines."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url}: {error.code} {error.read().decode()[:2000]}") from error


def figure(url, name):
    """The sum of a figure in Prometheus' text; None where it is not there."""
    found = [line.rsplit(" ", 1)[1] for line in get(url).splitlines() if re.match(re.escape(name) + r"[{ ]", line)]
    return sum(map(float, found)) if found else None


def serve(lexico, name, *arguments):
    """`lexico serve` on a free port, once it answers."""
    process = Process(name, [lexico, "serve", "--port", "0", "--log-format", "json", *arguments])

    def base():
        lines = process.lines('"address"')
        address = json.loads(lines[0])["address"]
        get(f"http://{address}/health")
        return f"http://{address}"

    process.base = process.until(lambda: base() if process.lines('"address"') else None, f"lexico serve ({name})")
    return process
