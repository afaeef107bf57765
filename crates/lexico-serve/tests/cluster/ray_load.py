"""Load for python/examples/ray_serve.py: rises, falls, and a replica is killed; writes what was seen to a file.

    ray_load.py FILE
"""

import asyncio
import json
import os
import pathlib
import signal
import sys
import time

import httpx
import ray
import ray_serve
from processes import figure, free_port
from ray import serve

NAME = "lexico"
PROMPTS = [f"{number} children have {number + 3} coins each, and" for number in range(2, 8)]


def servers():
    """Of each `lexico serve`: the process of its replica, and the port that it listens on."""
    inodes = {}
    for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            inodes[f"socket:[{fields[9]}]"] = int(fields[1].split(":")[1], 16)
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if command[0].decode() != os.environ["LEXICO"] or command[1] != b"serve":
                continue
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            ports = [inodes[os.readlink(fd)] for fd in (folder / "fd").iterdir() if os.readlink(fd) in inodes]
            yield parent, ports[0]
        except (OSError, IndexError):
            continue


def running():
    states = serve.status().applications[NAME].deployments["Lexico"].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


async def ask(client, base, prompt, tokens):
    """A streamed text; None where it is not whole."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    text, whole = "", False
    async with client.stream("POST", base + "/v1/completions", json=body, timeout=600) as answer:
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                whole = True
            elif line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return None
                text += chunk["choices"][0]["text"]
    return text if whole else None


async def until(wanted, seconds):
    """Waits for a number of replicas; the number that there was."""
    deadline = time.monotonic() + seconds
    while running() != wanted and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    return running()


async def load(base):
    seen = {"replicas": [running()], "asked": 0, "whole": 0, "right": 0}
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100)) as client:
        wanted = [await ask(client, base, prompt, 100) for prompt in PROMPTS]

        def count(answers):
            for number, answer in answers:
                seen["asked"] += 1
                seen["whole"] += answer is not None
                seen["right"] += answer == wanted[number]

        over = False

        async def client_of(number):
            while not over:
                count([(number, await ask(client, base, PROMPTS[number], 100))])

        clients = [asyncio.create_task(client_of(number)) for number in range(len(PROMPTS))]
        seen["replicas"].append(await until(3, 180))
        # In the middle of streams.
        await asyncio.sleep(1)
        victim, seen["hit"] = 0, 0
        while not seen["hit"]:
            for pid, port in servers():
                streams = figure(f"http://127.0.0.1:{port}/metrics", "vllm:num_requests_running")
                if streams > seen["hit"]:
                    victim, seen["hit"] = pid, streams
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        while not (healed := len({pid for pid, _ in servers()} - {victim}) == 3) and time.monotonic() < killed + 120:
            await asyncio.sleep(0.5)
        seen["healed"], seen["seconds"] = healed, time.monotonic() - killed
        over = True
        await asyncio.gather(*clients)
        seen["replicas"].append(await until(1, 240))
    return seen


def main():
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(ray_serve.app, name=NAME)
        seen = asyncio.run(load(f"http://127.0.0.1:{port}"))
        out = pathlib.Path(sys.argv[1])
        out.with_suffix(".new").write_text(json.dumps(seen))
        out.with_suffix(".new").rename(out)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
