#!/usr/bin/env python3
"""How soon a long prompt that was seen before gets its first token after a restart, from the store.

    stored.py PROGRAM TEXT-FILE [--prompt 4000] [--tokens 32] [-- ARGUMENTS OF THE SERVER]

The first server reads the prompt anew and is stopped; the second begins from what is in the store.
"""
import argparse
import json
import pathlib
import tempfile
import time
import urllib.request

from server import Server, options_and_server

arguments = argparse.ArgumentParser()
arguments.add_argument("program")
arguments.add_argument("file")
arguments.add_argument("--prompt", type=int, default=4000)
arguments.add_argument("--tokens", type=int, default=32)
options, of_server = options_and_server(arguments)
text = open(options.file, encoding="utf-8").read()


def asked(server, prompt):
    """Seconds until the first token, and the text."""
    body = {"prompt": prompt, "max_tokens": options.tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(server.base + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    started, first, answer = time.time(), None, ""
    for line in urllib.request.urlopen(request, timeout=3600):
        if line.startswith(b"data: {"):
            first = first or time.time() - started
            answer += json.loads(line[6:])["choices"][0]["text"]
    return first, answer


store = tempfile.mkdtemp()
answers = []
for _ in range(2):
    server = Server(options.program, "--prefix-store", store, *of_server)
    prompt = server.tokens(text[: 8 * options.prompt])[: options.prompt]
    # The second server's figure is of a process that has answered already, as the first's.
    server.ask(prompt[-50:-20], 4)
    answers.append(asked(server, prompt))
    cached = server.figure("lexico_cached_prompt_tokens_total")
    server.stop()
(anew, said), (stored, again) = answers
megabytes = sum(file.stat().st_size for file in pathlib.Path(store).rglob("*") if file.is_file()) / 1e6
report = {"tokens": options.prompt, "first token, read anew": round(anew, 2), "from the store": round(stored, 2), "ratio": round(stored / anew, 3)}
report |= {"from the store, tokens": int(cached), "same text": said == again, "the store, MB": round(megabytes, 1)}
print(json.dumps(report, indent=1))
raise SystemExit(said != again)
