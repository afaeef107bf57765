#!/usr/bin/env python3
"""Whether texts that are written together are each what they are alone.

    same.py PROGRAM TEXT-FILE [--count 50] [--tokens 24] [-- ARGUMENTS OF THE SERVER]

Prompts are parts of the file of 40 to 1,200 characters. The first server is asked one after the other, the second, which knows
no prefix, all at once. On a slow machine it needs `--queue-timeout 3600`.
"""
import argparse
import json
from concurrent.futures import ThreadPoolExecutor

from server import Server, options_and_server

arguments = argparse.ArgumentParser()
arguments.add_argument("program")
arguments.add_argument("file")
arguments.add_argument("--count", type=int, default=50)
arguments.add_argument("--tokens", type=int, default=24)
options, of_server = options_and_server(arguments)
text = open(options.file, encoding="utf-8").read()
prompts = [text[2000 * number :][: 40 + number * 977 % 1160] for number in range(options.count)]

server = Server(options.program, *of_server)
alone = [server.ask(prompt, options.tokens)[0] for prompt in prompts]
server.stop()
server = Server(options.program, *of_server)
with ThreadPoolExecutor(options.count) as threads:
    together = list(threads.map(lambda prompt: server.ask(prompt, options.tokens)[0], prompts))
server.stop()
equal = sum(a == b for a, b in zip(alone, together))
print(json.dumps({"texts": options.count, "tokens": options.tokens, "equal": equal}))
raise SystemExit(equal != options.count)
