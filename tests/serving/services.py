"""Real services on loopback, each in a process of its own."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx2

SECONDS = 60


class Served:
    """A service's process and address."""

    def __init__(self, process, url):
        self.process, self.url = process, url

    def metric(self, name):
        """The sum of a metric's samples."""
        text = httpx2.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (.+)$", text, re.MULTILINE))

    def end(self, by=signal.SIGTERM):
        """Its exit code and what it printed since it was ready."""
        self.process.send_signal(by)
        text, _ = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, text


@contextmanager
def start_service(model, home, *options, code=None):
    """Run `jaxcls serve` (or the program `code` in its place) until the block ends."""
    program = ["-m", "jaxcls.cli"] if code is None else ["-c", code]
    process = subprocess.Popen(
        [sys.executable, *program, "serve", str(model), "--port", "0", *map(str, options)],
        env={**os.environ, "XLA_FLAGS": "", "JAXCLS_HOME": str(home)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        lines = []
        while not (match := re.search(r"serving \S+: (\S+)", lines[-1] if lines else "")):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        yield Served(process, match[1])
    finally:
        process.kill()
        process.communicate()
