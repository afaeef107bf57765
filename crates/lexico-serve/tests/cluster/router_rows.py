"""The rows of routers that speak HTTP: vllm-router, and Ray Serve."""

import json
import time

from processes import WORK, Process, figure, free_port, get, post, serve

BLOCK = 64


def vllm_router(vllm, lexico, policy, arguments, texts):
    """Prefixes that were placed by hand are found by the router."""
    servers = []
    for number in range(2):
        events = f"tcp://127.0.0.1:{free_port()}"
        flags = ["--ubatch-size", BLOCK, "--kv-events", events, "--alias", "served", *arguments]
        servers.append(serve(lexico, f"{policy}-{number}", *flags))
        servers[-1].events = events
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [vllm, "--host", "127.0.0.1", "--port", port, "--prometheus-port", free_port(), "--policy", policy]
    command += ["--worker-urls", *(server.base for server in servers)]
    if policy == "kv_aware":
        command += ["--kv-event-block-size", BLOCK, "--kv-event-model", "served"]
        for server in servers:
            command += ["--kv-event-source", f"{server.base}={server.events}"]
    router = Process(policy, command)
    router.until(lambda: get(base + "/health") or True, "vllm-router")
    time.sleep(2)

    def ask(base, text):
        body = {"model": "served", "prompt": text, "max_tokens": 2, "temperature": 0}
        usage = json.load(post(base + "/v1/completions", body))["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    found = 0
    if policy == "kv_aware":
        for number, text in enumerate(texts):
            ask(servers[number * 5 % 8 // 4].base, text)
        time.sleep(1)
        found = sum(ask(base, text + " And so") > 0 for text in texts)
        needed, wording = len(texts), f"{found} of {len(texts)} prefixes placed by hand were found"
    else:
        for _ in range(2):
            found = sum(ask(base, text + " And so") > 0 for text in texts)
        needed, wording = len(texts) - 1, f"{found} of {len(texts)} prefixes were found when they were asked for again"
    for process in (router, *servers):
        process.stop()
    return found >= needed, wording


def ray_serve(python, lexico, root, arguments):
    """Replicas come and go with the load, and a killed one loses no request."""
    out = WORK / "ray.json"
    process = Process(
        "ray",
        [python, root / "crates/lexico-serve/tests/cluster/ray_load.py", out],
        LEXICO=lexico,
        LEXICO_ARGUMENTS=" ".join(str(argument) for argument in arguments),
        PYTHONPATH=root / "python/examples",
        RAY_USAGE_STATS_ENABLED="0",
        # Of a busy machine: the usual times are 5 and 10 seconds.
        RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60",
        RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S="60",
        HOME=WORK,
    )
    process.until(lambda: out.is_file(), "Ray Serve")
    process.stop()
    seen = json.loads(out.read_text())
    passed = seen["replicas"] == [1, 3, 1] and seen["whole"] == seen["right"] == seen["asked"] and seen["healed"]
    return passed, (
        f"replicas {' → '.join(map(str, seen['replicas']))}; {seen['whole']} of {seen['asked']} answers whole, {seen['right']} right, one replica "
        f"killed with {seen['hit']:.0f} streams on it, replaced after {seen['seconds']:.0f} s"
    )
