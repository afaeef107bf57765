#!/usr/bin/env python3
"""How many texts a server holds at once within its memory, and what that does to the process's.

    held.py PROGRAM TEXT-FILE [--memory 256MiB] [--count 48] [--prompt 1500] [--end 2048] [-- ARGUMENTS OF THE SERVER]

Every text has a prompt of its own and goes on to `--end` tokens. A text is held from when it is admitted to its end; the figure is
the largest number of texts in the server at one time.
"""
import argparse
import json
import threading
import time

from server import Server, options_and_server

arguments = argparse.ArgumentParser()
arguments.add_argument("program")
arguments.add_argument("file")
arguments.add_argument("--memory", default="256MiB")
arguments.add_argument("--count", type=int, default=48)
arguments.add_argument("--prompt", type=int, default=1500)
arguments.add_argument("--end", type=int, default=2048)
options, of_server = options_and_server(arguments)
text = open(options.file, encoding="utf-8").read()

server = Server(options.program, "--kv-memory", options.memory, "--parallel", str(options.count), "--queue-timeout", "86400", *of_server)
tokens = server.tokens(text[: 8 * options.prompt * options.count])
prompts = [tokens[number * options.prompt :][: options.prompt] for number in range(options.count)]
# Long enough that some of it is coded: copies of the dictionaries in other formats are made when they are first needed. Too short for its
# prefix to be kept, which would count as held before.
server.ask(prompts[-1][:400], 4)
# Free memory goes back to the system once nothing has been asked for a while.
time.sleep(5)
before, faults = server.resident(), []


def ask(number):
    try:
        server.ask(prompts[number], options.end - options.prompt, timeout=86400)
    except OSError as error:
        faults.append(repr(error))


threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(options.count)]
for thread in threads:
    thread.start()
held, most, bytes_held, started = 0, before, 0, time.time()
while any(thread.is_alive() for thread in threads):
    time.sleep(1)
    reading, writing = (server.figure(f'lexico_sequences{{state="{state}"}}') for state in ("reading", "writing"))
    held, most = max(held, int(reading + writing)), max(most, server.resident())
    bytes_held = max(bytes_held, server.figure("lexico_kv_bytes"))
server.stop()
report = {"held at once": held, "of": options.count, "refused or failed": len(faults), "their caches, MiB": round(bytes_held / 2**20, 1)}
report |= {"resident before, MiB": round(before), "resident at the most, MiB": round(most), "growth, MiB": round(most - before), "seconds": round(time.time() - started)}
print(json.dumps(report, indent=1))
raise SystemExit(bool(faults))
