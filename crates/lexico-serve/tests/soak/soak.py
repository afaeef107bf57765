#!/usr/bin/env python3
"""Clients of mixed lengths, some of which hang up, for a while; then what the server's memory and answers were like.

    soak.py BASE [--minutes 60] [--clients 32] [--pid PID] [--key KEY] [--patience 600]

A client waits for `--patience` seconds, as long as openai-python does: the longest prompts wait for 31 others to be read.

Every answer names its question's number in the prompt's seed, so that a stream that got another's text shows: the same question
must be answered by the same text, whenever it is asked.
"""
import argparse
import json
import random
import socket
import threading
import time
import urllib.parse
import urllib.request

arguments = argparse.ArgumentParser()
arguments.add_argument("base")
arguments.add_argument("--minutes", type=float, default=60)
arguments.add_argument("--clients", type=int, default=32)
arguments.add_argument("--pid", type=int)
arguments.add_argument("--key", default="")
arguments.add_argument("--patience", type=float, default=600)
options = arguments.parse_args()
place = urllib.parse.urlparse(options.base)
end = time.time() + 60 * options.minutes
lock = threading.Lock()
texts, gaps, counts, faults = {}, [], {"whole": 0, "hung up": 0, "busy": 0}, []


def question(number):
    drawn = random.Random(number)
    prose = " ".join(drawn.choice(["Ana", "Ben", "coins", "gives", "has", "more", "than", "seven", "the"]) for _ in range(drawn.choice([10, 60, 300, 900])))
    return {"prompt": f"Question {number}: {prose}", "max_tokens": drawn.choice([8, 32, 96]), "temperature": 0, "stream": True}


def ask(number, hang_up):
    body = json.dumps(question(number)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {options.key}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection((place.hostname, place.port), timeout=options.patience) as connection:
        connection.sendall(head.encode() + body)
        lines, text, before = connection.makefile("rb"), "", None
        status = int(lines.readline().split()[1])
        if status == 429:
            counts["busy"] += 1
            return time.sleep(1)
        assert status == 200, status
        done = False
        for line in lines:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                done = True
                break
            now = time.time()
            if before:
                gaps.append(now - before)
            before = now
            text += json.loads(line[6:])["choices"][0]["text"]
            if hang_up and len(text) > 20:
                counts["hung up"] += 1
                return None
    assert done, "a stream was cut"
    with lock:
        counts["whole"] += 1
        if texts.setdefault(number, text) != text:
            faults.append(f"question {number} was answered differently")


def client(number):
    drawn = random.Random(number)
    while time.time() < end:
        try:
            ask(drawn.randrange(200), drawn.random() < 0.1)
        except Exception as error:  # noqa: BLE001 whatever it is, it is told
            faults.append(repr(error))


def resident():
    status = open(f"/proc/{options.pid}/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


threads = [threading.Thread(target=client, args=(number,)) for number in range(options.clients)]
for thread in threads:
    thread.start()
memory, every = [], min(5, 6 * options.minutes)
while any(thread.is_alive() for thread in threads):
    time.sleep(every)
    # Clients that have nothing left to ask are no load.
    if options.pid and time.time() < end:
        memory.append(resident())
gaps.sort()
report = {"counts": counts, "faults": len(faults), "examples": faults[:5], "p50 between chunks": gaps[len(gaps) // 2], "p99 between chunks": gaps[len(gaps) * 99 // 100]}
if memory:
    half, minute = memory[len(memory) // 2 :], max(1, round(60 / every))
    first, last = (sum(part) / len(part) for part in (half[:minute], half[-minute:]))
    report |= {"last half's memory, MiB": {"its first minute": first, "its last": last, "least": min(half), "most": max(half)}}
    report |= {"last half's growth": last / first - 1}
print(json.dumps(report, indent=1))
raise SystemExit(bool(faults))
