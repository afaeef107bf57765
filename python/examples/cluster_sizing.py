"""Arithmetic on a cluster: memory, network, store and router, by bytes a token. Every assumption is a flag.

python python/examples/cluster_sizing.py                  the tables of docs/CLUSTER.md
python python/examples/cluster_sizing.py --workers 4000 --requests 1 --tokens 8000
"""

import argparse

#: Layers, KV heads, head dim.
MODELS = {
    "Llama-3.1-8B": (32, 8, 128),
    "Mistral-7B": (32, 8, 128),
    "Qwen2.5-7B": (28, 4, 128),
    "Qwen2.5-0.5B": (24, 2, 64),
    "SmolLM2-135M": (30, 3, 64),
}
SHARES = (0.08, 0.16, 0.25)

parser = argparse.ArgumentParser(
    description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument("--tokens", type=int, default=4000, help="tokens of a conversation")
parser.add_argument("--window", type=int, default=128, help="newest positions of each, which are held in FP16")
parser.add_argument("--new-tokens", type=int, default=500, help="tokens of a request that no prefix has")
parser.add_argument("--answer", type=int, default=200, help="tokens of an answer")
parser.add_argument("--block", type=int, default=256, help="tokens of a block (--ubatch-size)")
parser.add_argument("--workers", type=int, default=1000)
parser.add_argument("--requests", type=float, default=0.5, help="requests a second, of a worker")
parser.add_argument("--moved", type=float, default=0.05, help="share of requests whose worker does not hold the prefix")
parser.add_argument("--event-bytes", type=int, default=5, help="bytes of a token in an event")
parser.add_argument("--index-bytes", type=int, default=200, help="bytes of a block in a router's index")
parser.add_argument("--frontend", type=float, default=500, help="requests a second that a frontend takes")
given = parser.parse_args()


def table(head, rows):
    wide = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * width for width in wide], *rows]:
        print("| " + " | ".join(f"{cell!s:>{width}}" for cell, width in zip(row, wide, strict=True)) + " |")
    print()


def of_token(model, share=1.0):
    layers, heads, dim = MODELS[model]
    return 2 * layers * heads * dim * 2 * share


def of_conversation(model, share):
    """Bytes: codes, and the newest positions as they are."""
    window = min(given.window, given.tokens)
    return (given.tokens - window) * of_token(model, share) + window * of_token(model)


def seconds(time):
    return f"{time * 1e3:.0f} ms" if time < 1 else f"{time:.1f} s"


print(f"Conversations of {given.tokens} tokens in a GiB, the newest {given.window} in FP16\n")
table(
    ["model", "KB a token, FP16", "FP16", *(f"{share:.0%}" for share in SHARES)],
    [
        [
            model,
            f"{of_token(model) / 1e3:.1f}",
            *(f"{2**30 / of_conversation(model, share):.1f}" for share in (1.0, *SHARES)),
        ]
        for model in MODELS
    ],
)
print(f"A conversation of {given.tokens} tokens that moves: MB, and time at 1, 10 and 100 Gbit/s\n")
table(
    ["model", *(f"{share:.0%} {what}" for share in SHARES for what in ("MB", "1", "10", "100"))],
    [
        [
            model,
            *(
                cell
                for share in SHARES
                for size in [of_conversation(model, share)]
                for cell in [f"{size / 1e6:.1f}", *(seconds(size * 8 / (gbit * 1e9)) for gbit in (1, 10, 100))]
            ),
        ]
        for model in MODELS
    ],
)
rate = given.workers * given.requests
print(
    f"{given.workers} workers, {given.requests} requests a second each: {given.new_tokens} new tokens of {given.tokens}, "
    f"{given.answer} written, {given.moved:.0%} on a worker without the prefix\n"
)
table(
    ["model", "share", "store, writes GB/s", "store, reads GB/s", "a worker, Mbit/s", "a day of prefixes, TB"],
    [
        [
            model,
            f"{share:.0%}",
            f"{rate * size / 1e9:.2f}",
            f"{rate * given.moved * size / 1e9:.2f}",
            f"{given.requests * (1 + given.moved) * size * 8 / 1e6:.0f}",
            f"{rate * size * 86400 / 1e12:.0f}",
        ]
        for model in MODELS
        for share in SHARES
        for size in [of_conversation(model, share)]
    ],
)
blocks = rate * given.new_tokens / given.block
event = given.block * given.event_bytes + 300
held = given.workers * 100 * given.tokens / given.block
table(
    ["routing", ""],
    [
        ["requests a second", f"{rate:.0f}"],
        [f"frontends, at {given.frontend:.0f} requests a second each", f"{-(-rate // given.frontend):.0f}"],
        ["tokens a second that pass the frontends", f"{rate * (given.tokens + given.answer):.0f}"],
        ["blocks a second that are told of", f"{blocks:.0f}"],
        ["events to each router, MB/s", f"{blocks * event / 1e6:.2f}"],
        ["blocks in a router's index, 100 conversations a worker", f"{held:.0f}"],
        ["memory of the index, MB", f"{held * given.index_bytes / 1e6:.0f}"],
    ],
)
