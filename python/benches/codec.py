#!/usr/bin/env python3
"""The codec from numpy beside the Rust benches, on one thread, in turn: coding vectors by beam search, and attention on codes.

    codec.py [--times 5]

Run it from the repository's root. Ratios are of Python's time over Rust's, on the same amount of work of the same shape.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time

os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402

import lexico  # noqa: E402

HEAD_DIM, ATOMS, VECTORS = 64, 12, 4096
KV_HEADS, GROUP, CONTEXT = 3, 3, 8192


def rust(bench, *arguments):
    command = [
        "cargo",
        "bench",
        "-q",
        "--workspace",
        "--bench",
        bench,
        "--",
        "--head-dim",
        str(HEAD_DIM),
        "-t",
        "1",
        "--json",
    ]
    return json.loads(subprocess.run([*command, *arguments], check=True, capture_output=True, text=True).stdout)


def rust_encode():
    arguments = ["--additive", "-s", str(ATOMS), "--vectors", str(VECTORS), "-r", "3"]
    return rust("pursuit", *arguments)["microseconds_per_vector"]


def rust_attend():
    shape = ["--kv-heads", str(KV_HEADS), "--group", str(GROUP), "--context", str(CONTEXT)]
    row = rust("attention", *shape, "--format", f"additive:{ATOMS}", "-r", "31")["rows"][0]
    return row["formats"][0]["microseconds"]


def median(work, times):
    # The Rust benches have worked for a while before they measure: a processor that was idle is slow at first.
    warm = time.perf_counter() + 0.5
    while time.perf_counter() < warm:
        work()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    drawn = np.random.default_rng(1)
    atoms = drawn.standard_normal((2048 + 256 * (ATOMS - 1), HEAD_DIM)) / ATOMS**0.5
    # Atoms in 8 bits, as learned ones are, and as the benches have them: multiples of a power of two, 127 at the most.
    unit = 2.0 ** np.ceil(np.log2(np.abs(atoms).max(1, keepdims=True) / 127))
    atoms = np.round(atoms / unit) * unit
    codebooks = lexico.Codebooks(atoms, first=2048)
    vectors = drawn.standard_normal((VECTORS, HEAD_DIM)).astype(np.float32)

    model = {"name": "none", "architecture": "none", "layers": 1, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    model["rotary"] = {"kind": "default", "theta": 10000.0}
    training = {"sparsity": ATOMS, "corpus": [], "tokens": 0, "relative_error": [], "tool": "none"}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/dictionary.safetensors"
        lexico.Dictionaries(model, training, [{"codebooks": (codebooks, codebooks)}]).save(path)
        dictionaries = lexico.Dictionaries.load(path)
    codebooks = dictionaries.codebooks(0, "keys")
    # The smallest window: nearly all positions are codes, as all are in the bench.
    cache = lexico.LayerCache(dictionaries, 0, f"lexico:sparsity={ATOMS},window=1,batch=1,sinks=0")
    keys, values = drawn.standard_normal((2, KV_HEADS, CONTEXT, HEAD_DIM)).astype(np.float32)
    cache.append(keys, values)
    assert cache.coded >= CONTEXT - 1, cache.coded
    queries = drawn.standard_normal((KV_HEADS * GROUP, 1, HEAD_DIM)).astype(np.float32)
    own = drawn.standard_normal((2, KV_HEADS, 1, HEAD_DIM)).astype(np.float32)

    works = {
        "encode, microseconds a vector": (
            rust_encode,
            lambda: median(lambda: codebooks.encode(vectors, ATOMS, fit="least-squares"), 3) / VECTORS,
        ),
        "attend, microseconds": (rust_attend, lambda: median(lambda: cache.attend(queries, own[0], own[1]), 31)),
    }
    report = {}
    for name, (there, here) in works.items():
        pairs = [(there(), here()) for _ in range(times)]
        ratios = [b / a for a, b in pairs]
        report[name] = {
            "rust": [a for a, _ in pairs],
            "numpy": [b for _, b in pairs],
            "median ratio": statistics.median(ratios),
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
