#!/usr/bin/env python3
"""How much sixteen texts together gain over one after another: seconds, and with --pid the processor's seconds, of each token.

    together.py BASE TEXT-FILE [--characters 800] [--tokens 32] [--count 16] [--pid PID] [--key KEY]

Prompts are parts of the file, none twice, so that no prefix helps. Processor seconds count on a machine that others use too.
"""
import argparse
import json
import threading
import time
import urllib.request

arguments = argparse.ArgumentParser()
arguments.add_argument("base")
arguments.add_argument("file")
arguments.add_argument("--characters", type=int, default=800)
arguments.add_argument("--tokens", type=int, default=32)
arguments.add_argument("--count", type=int, default=16)
arguments.add_argument("--pid", type=int)
arguments.add_argument("--key", default="")
options = arguments.parse_args()
text = open(options.file, encoding="utf-8").read()


def ask(number):
    prompt = text[number * options.characters :][: options.characters]
    body = {"prompt": prompt, "max_tokens": options.tokens, "temperature": 0, "ignore_eos": True}
    headers = {"content-type": "application/json", "authorization": f"Bearer {options.key}"}
    request = urllib.request.Request(options.base + "/v1/completions", json.dumps(body).encode(), headers)
    json.load(urllib.request.urlopen(request, timeout=3600))


def processor():
    if not options.pid:
        return 0
    fields = open(f"/proc/{options.pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def measured(work):
    before, started = processor(), time.time()
    work()
    tokens = options.count * options.tokens
    return {"seconds a token": (time.time() - started) / tokens, "processor seconds a token": (processor() - before) / tokens}


def together():
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(options.count, 2 * options.count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


alone = measured(lambda: [ask(number) for number in range(options.count)])
all_at_once = measured(together)
gain = {name: alone[name] / all_at_once[name] for name in alone if all_at_once[name]}
print(json.dumps({"alone": alone, "together": all_at_once, "gain": gain}, indent=1))
