"""Starting servers of the program, and asking them."""
import atexit
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request


def options_and_server(arguments):
    """The options of a script, and what follows `--`: arguments of the server."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    return arguments.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]


class Server:
    """`PROGRAM serve --port … ARGUMENTS`, once it answers."""

    def __init__(self, program, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        command = [program, "serve", "--port", str(self.port), "--log-level", "warn", *arguments]
        self.process = subprocess.Popen(command)
        # A script that fails leaves none behind.
        atexit.register(self.process.kill)
        while self.process.poll() is None:
            try:
                urllib.request.urlopen(self.base + "/health", timeout=5)
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.05)
        raise SystemExit("the server did not start")

    def ask(self, prompt, tokens, timeout=3600):
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.base + "/v1/completions", json.dumps(body).encode(), headers)
        answer = json.load(urllib.request.urlopen(request, timeout=timeout))
        cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return answer["choices"][0]["text"], cached, answer["usage"]["prompt_tokens"]

    def tokens(self, text):
        """The numbers of a text's tokens."""
        request = urllib.request.Request(self.base + "/tokenize", json.dumps({"prompt": text}).encode(), {"content-type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=600))["tokens"]

    def figure(self, name):
        """The sum of a figure of /metrics, as `lexico_kv_bytes` or `lexico_sequences{state="read"}`."""
        lines = urllib.request.urlopen(self.base + "/metrics", timeout=60).read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def resident(self):
        """MiB that the process holds."""
        status = open(f"/proc/{self.process.pid}/status").read()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        self.process.wait()
