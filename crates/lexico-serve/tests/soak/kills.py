#!/usr/bin/env python3
"""A server that is killed under load, again and again: every later start serves, and the store never gives a wrong prefix.

    kills.py PROGRAM TEXT-FILE [--kills 20] [--prompts 12] [--characters 2400] [--seconds 20] [--store PLACE] [-- ARGUMENTS OF THE SERVER]

Each is killed within `--seconds`. The texts of a server without a store are what every answer is compared with.
"""
import argparse
import json
import random
import tempfile
import threading
import time

from server import Server, options_and_server

arguments = argparse.ArgumentParser()
arguments.add_argument("program")
arguments.add_argument("file")
arguments.add_argument("--kills", type=int, default=20)
arguments.add_argument("--prompts", type=int, default=12)
arguments.add_argument("--characters", type=int, default=2400)
arguments.add_argument("--seconds", type=float, default=20)
arguments.add_argument("--store")
options, of_server = options_and_server(arguments)
text = open(options.file, encoding="utf-8").read()
prompts = [text[number * options.characters :][: options.characters] for number in range(options.prompts)]
drawn = random.Random(1)

server = Server(options.program, *of_server)
wanted = [server.ask(prompt, 16)[0] for prompt in prompts]
server.stop()
store = options.store or tempfile.mkdtemp()
counts = {"kills": 0, "answers": 0, "wrong": 0, "answers with a prefix": 0}
lock = threading.Lock()


def ask(server, number):
    try:
        answer, cached, _ = server.ask(prompts[number], 16)
    except (OSError, ValueError):
        return
    with lock:
        counts["answers"] += 1
        counts["wrong"] += answer != wanted[number]
        counts["answers with a prefix"] += cached > 0


for _ in range(options.kills):
    server = Server(options.program, "--prefix-store", store, *of_server)
    threads = [threading.Thread(target=ask, args=(server, drawn.randrange(options.prompts))) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(drawn.uniform(0.2, options.seconds))
    server.kill()
    counts["kills"] += 1
    for thread in threads:
        thread.join()
# The last start answers all.
server = Server(options.program, "--prefix-store", store, *of_server)
before = counts["answers with a prefix"]
for number in range(options.prompts):
    ask(server, number)
counts["of the last start's answers, with a prefix"] = f"{counts['answers with a prefix'] - before} of {options.prompts}"
server.stop()
print(json.dumps(counts, indent=1))
raise SystemExit(counts["wrong"] > 0 or counts["answers"] < options.prompts)
