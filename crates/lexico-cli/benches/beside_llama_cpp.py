"""Speed of `lexico run` beside llama.cpp on the same GGUF files, in turn, on the same machine: medians and their ratio.

  python -m pip install llama-cpp-python==0.3.36 numpy
  cargo build --release
  python crates/lexico-cli/benches/beside_llama_cpp.py [--repetitions 5] [--threads 1,2] [--busy] MODEL.gguf…

Prefill is of a prompt of 512 words, decode of 32 tokens, both in tokens a second; `first` is the time in seconds until
the first token of a short prompt, from the start of the process for lexico and from the call that opens the model for
llama.cpp (Python's own start is not counted). --busy adds how much of its decode speed at two threads each keeps while
another program keeps one core busy. A build of llama.cpp for AMX instructions that the machine does not let it use ends
with "Illegal instruction": build it with CFLAGS and CXXFLAGS="-mno-amx-int8 -mno-amx-tile -mno-amx-bf16".
"""
import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

LEXICO = Path(__file__).resolve().parents[3] / "target/release/lexico"
WORDS = "the quick brown fox jumps over a lazy dog while seven wise owls count stars and rivers in a quiet valley".split()
DECODED = 32


def prompt():
    draw = random.Random(1)
    return " ".join(draw.choice(WORDS) for _ in range(512))


def llama_cpp(model, threads, text, decoded):
    """In a process of its own: prefill, decode and the time to the first token."""
    import llama_cpp

    started = time.perf_counter()
    llama = llama_cpp.Llama(model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=512, n_ubatch=512, verbose=False)
    tokens = llama.tokenize(text.encode(), add_bos=False)
    opened = time.perf_counter()
    llama.eval(tokens)
    token = llama.sample(temp=0.0)
    first = time.perf_counter()
    for _ in range(decoded):
        llama.eval([token])
        token = llama.sample(temp=0.0)
    ended = time.perf_counter()
    print(json.dumps({"prefill": len(tokens) / (first - opened), "decode": decoded / (ended - first) if decoded else 0.0, "first": first - started}))


def theirs(model, threads, text, decoded):
    command = [sys.executable, __file__, "--own", json.dumps([model, threads, text, decoded])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llama.cpp ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def ours(model, threads, text, decoded):
    command = [str(LEXICO), "run", "--threads", str(threads), "--model", model, "--cache", "full", "--no-chat", "--ignore-eos", "-n", str(decoded + 1), "--json", text]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"lexico ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    found = json.loads(done.stdout)
    return {"prefill": found["prompt_tokens"] / found["prefill_seconds"], "decode": found["decode_tokens_per_second"]}


def our_first(model, threads):
    """Until the first token's text comes out of the program."""
    command = [str(LEXICO), "run", "--threads", str(threads), "--model", model, "--cache", "full", "--no-chat", "--ignore-eos", "-n", "1", "Hello"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        running.stdout.read(1)
        return time.perf_counter() - started


def row(name, figure, own, other, digits=1):
    print(f"{name:44} {figure:12} {own:10.{digits}f} {other:10.{digits}f} {own / other:7.2f}", flush=True)


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--repetitions", type=int, default=5)
    options.add_argument("--threads", default="1,2")
    options.add_argument("--busy", action="store_true")
    options.add_argument("models", nargs="+")
    options = options.parse_args()
    print(f"{'model':44} {'':12} {'lexico':>10} {'llama.cpp':>10} {'ratio':>7}")
    for model in options.models:
        name = Path(model).stem
        for threads in map(int, options.threads.split(",")):
            runs = {ours: [], theirs: []}
            for _ in range(options.repetitions):
                for engine, found in runs.items():
                    found.append(engine(model, threads, prompt(), DECODED))
            median = lambda engine, figure: statistics.median(run[figure] for run in runs[engine])
            for figure in ["prefill", "decode"]:
                row(name, f"{figure}, {threads} thr.", median(ours, figure), median(theirs, figure))
        first = {"ours": [], "theirs": []}
        for _ in range(options.repetitions):
            first["ours"].append(our_first(model, 2))
            first["theirs"].append(theirs(model, 2, "Hello", 0)["first"])
        row(name, "first, s", statistics.median(first["ours"]), statistics.median(first["theirs"]), 2)
        if options.busy:
            kept = {}
            for engine in [ours, theirs]:
                alone = statistics.median(engine(model, 2, "Hello", 3 * DECODED)["decode"] for _ in range(options.repetitions))
                busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                try:
                    beside = statistics.median(engine(model, 2, "Hello", 3 * DECODED)["decode"] for _ in range(options.repetitions))
                finally:
                    busy.kill()
                    busy.wait()
                kept[engine] = beside / alone
            row(name, "kept, busy", kept[ours], kept[theirs], 2)


if sys.argv[1:2] == ["--own"]:
    llama_cpp(*json.loads(sys.argv[2]))
else:
    main()
