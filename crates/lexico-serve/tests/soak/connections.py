#!/usr/bin/env python3
"""Ten thousand connections that say nothing, and clients that send their heads letter by letter: others are served meanwhile.

    connections.py PROGRAM [--idle 10000] [--slow 500] [-- ARGUMENTS OF THE SERVER]
"""
import argparse
import json
import resource
import select
import socket
import time

from server import Server, options_and_server

arguments = argparse.ArgumentParser()
arguments.add_argument("program")
arguments.add_argument("--idle", type=int, default=10000)
arguments.add_argument("--slow", type=int, default=500)
options, of_server = options_and_server(arguments)
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

server = Server(options.program, *of_server)


def answered():
    started = time.time()
    server.ask("Once", 8, timeout=60)
    return round(time.time() - started, 3)


alone, before = answered(), server.resident()
idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(options.idle)]
with_idle, most = answered(), server.resident()
slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(options.slow)]
head, times = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-slow: " + b"a" * 200, []
for letter in head[:60]:
    for connection in slow:
        try:
            connection.send(bytes([letter]))
        except OSError:
            pass
    times.append(answered())
    time.sleep(max(0, 1 - times[-1]))


def closed(connections):
    """How many the server has closed."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN | select.POLLRDHUP)
    return len(poll.poll(0))


report = {"seconds of an answer alone": alone, f"with {options.idle} idle connections": with_idle, "with slow ones, at the most": max(times)}
report |= {"slow ones closed after a minute": closed(slow), "idle ones closed": closed(idle), "growth, MiB": round(most - before, 1)}
for connection in idle + slow:
    connection.close()
report["afterwards"] = answered()
server.stop()
print(json.dumps(report, indent=1))
raise SystemExit(max(times) > 60)
