#!/usr/bin/env python3
"""Lexico's cache in transformers on a real model: beside the Rust program, in bytes, and in time.

    real_models.py same FOLDER DICTIONARY TEXT --program PROGRAM [--prompt 800] [--tokens 100]
    real_models.py bytes FOLDER DICTIONARY TEXT [--positions 4000]
    real_models.py speed FOLDER DICTIONARY TEXT [--prompt 2000] [--tokens 200] [--times 3]
    real_models.py chunks FOLDER DICTIONARY TEXT [--positions 4000]     # what LMCache stores of it

FOLDER is a model as the Hugging Face hub has it, DICTIONARY a file of `lexico train`, TEXT any text. All is computed in f32 on the
processor.
"""

import argparse
import ctypes
import gc
import json
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import lexico
from lexico.transformers import LexicoCache

CACHE = "lexico:sparsity=12,window=128"
# To compare numbers, all that is dense in f32. All of a short text lies in the window of the second: nothing is coded.
FULL, WINDOW, CODED = "full:dense=f32", "lexico:window=8192,dense=f32", CACHE + ",dense=f32"


def tell(report):
    print(json.dumps(report, indent=1))


def greedy(model, cache, prompt, tokens, forced=None):
    """The tokens that a model writes, or is made to write, and the logarithms of all probabilities at each."""
    written: list[int] = []
    rows = []
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for step in range(tokens):
            scores = model(ids, cache=cache).logits[0, -1].log_softmax(-1)
            rows.append(scores)
            written.append(int(scores.argmax()) if forced is None else forced[step])
            ids = torch.tensor([[written[-1]]])
    return written, rows


def ask(options, cache, prompt):
    """The program's server's greedy answer, with the logarithms of probabilities."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A prompt that is read at once attends to itself as it is, as it does in transformers.
    arguments = ["--ubatch-size", "8192", "--port", str(port), "--log-level", "warn", "--cache", cache]
    if cache != FULL:
        arguments += ["--dictionary", options.dictionary]
    server = subprocess.Popen([options.program, "serve", "--model", options.folder, *arguments])
    base = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(base + "/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        if server.poll() is not None:
            raise SystemExit(f"{options.program} serve ended with {server.returncode} before it answered")
        body = {"prompt": prompt, "max_tokens": options.tokens, "temperature": 0, "ignore_eos": True, "logprobs": 5}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(base + "/v1/completions", json.dumps(body).encode(), headers)
        return json.load(urllib.request.urlopen(request, timeout=3600))["choices"][0]
    finally:
        server.terminate()
        server.wait()


def apart(written, rows, chosen, tops):
    """The largest distances of logarithms of probabilities: of the tokens written, and of the five likeliest, in order."""
    of_five = [
        abs(a - b)
        for row, top in zip(rows, tops, strict=True)
        for a, b in zip(sorted(row.topk(5).values.tolist()), sorted(top)[-5:], strict=True)
    ]
    of_chosen = [abs(float(row[token]) - other) for row, token, other in zip(rows, written, chosen, strict=True)]
    return {"token written, at the most apart": max(of_chosen), "five likeliest": max(of_five)}


def same(model, tokenizer, dictionaries, text, options):
    """Greedy text and the logarithms of probabilities, against those of the program's server; and how far they move where every weight
    does by rounding."""
    prompt = text[: options.prompt]
    makers = {
        FULL: lambda: DynamicCache(config=model.config),
        WINDOW: lambda: LexicoCache(model, dictionaries, WINDOW),
        CODED: lambda: LexicoCache(model, dictionaries, CODED),
    }
    ours = {name: greedy(model, make(), prompt, options.tokens) for name, make in makers.items()}
    report: dict[str, dict[str, object]] = {}
    for name, (written, rows) in ours.items():
        answer = ask(options, name, prompt)
        logs = answer["logprobs"]
        alike = tokenizer.decode(written) == answer["text"]
        report[name] = {"tokens": len(logs["tokens"]), "same text": alike}
        if alike and len(logs["tokens"]) == len(written):
            report[name] |= apart(written, rows, logs["token_logprobs"], [top.values() for top in logs["top_logprobs"]])
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(1 + (torch.rand_like(weights) - 0.5) * 2e-7)
    for name, (written, rows) in ours.items():
        _, moved = greedy(model, makers[name](), prompt, options.tokens, written)
        chosen = [float(row[token]) for row, token in zip(moved, written, strict=True)]
        report[name]["moved by a rounding of the weights"] = apart(
            written, rows, chosen, [row.topk(5).values.tolist() for row in moved]
        )
    tell(report)


def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def give_back():
    """What is free goes back to the system, the C library's share too, so that no memory is counted that nothing holds."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def bytes_held(model, _tokenizer, dictionaries, text, options):
    """What the process gives back when a filled cache goes, against what the cache counts."""
    with torch.no_grad():
        cache = LexicoCache(model, dictionaries, CACHE)
        for first in range(0, options.positions, 250):
            model.model(torch.tensor([text[first : first + 250]]), cache=cache)
    counted, of_fp16 = cache.nbytes, cache.nbytes / cache.fp16_nbytes
    give_back()
    filled = resident()
    del cache
    give_back()
    held = filled - resident()
    tell({"counted": counted, "held": held, "held over counted": held / counted, "of FP16": of_fp16})


def chunks(model, _tokenizer, _dictionaries, text, options):
    """What LMCache's serde makes of the model's own chunks of 256 tokens: bytes over bf16's, and the error of what comes back."""
    from lmcache.v1.distributed.api import ObjectKey

    from lexico.lmcache import _Chunks

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for first in range(0, options.positions, 250):
            model.model(torch.tensor([text[first : first + 250]]), cache=cache)
    # [2, layers, heads, tokens, m] as LMCache has it: [2, layers, tokens, heads·m]
    vectors = torch.stack([torch.cat([getattr(layer, part) for layer in cache.layers]) for part in ("keys", "values")])
    whole = vectors.transpose(2, 3).flatten(3).to(torch.bfloat16)
    serde, size, took, errors = _Chunks(options.dictionary), 0, [], []
    for first in range(0, whole.shape[2] - 255, 256):
        chunk = whole[:, :, first : first + 256].float().numpy()
        key = ObjectKey(first.to_bytes(8, "big"), "model", 0, 0, "")
        size += serde.size(chunk.shape)
        started = time.perf_counter()
        data = serde.encode(chunk, key)
        took.append(time.perf_counter() - started)
        back = serde.decode(data, key, chunk.shape)
        errors.append(((back - chunk) ** 2).sum((1, 2, 3)) / (chunk**2).sum((1, 2, 3)))
    count = len(took)
    keys, values = sum(errors) / count
    of_bf16 = size / (count * 256 * whole[:, :, 0].numel() * 2)
    report = {
        "chunks": count,
        "bytes a chunk": size // count,
        "of bf16": of_bf16,
        "seconds to code a chunk": statistics.median(took),
    }
    tell(report | {"relative squared error of keys": float(keys), "of values": float(values)})


def speed(model, _tokenizer, dictionaries, text, options):
    """Tokens a second after a prompt, in turn with transformers' own cache."""
    makers = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "lexico": lambda: LexicoCache(model, dictionaries, CACHE),
    }
    rates: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(options.times):
        for name, make in makers.items():
            cache = make()
            with torch.no_grad():
                token = model(torch.tensor([text[: options.prompt]]), cache=cache).logits[:, -1:].argmax(-1)
                started = time.perf_counter()
                for _ in range(options.tokens):
                    token = model(token, cache=cache).logits[:, -1:].argmax(-1)
            rates[name].append(options.tokens / (time.perf_counter() - started))
    ratios = [a / b for a, b in zip(rates["lexico"], rates["dynamic"], strict=True)]
    median = statistics.median(ratios)
    tell({"threads": torch.get_num_threads(), "tokens a second": rates, "ratios": ratios, "median ratio": median})


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"same": same, "bytes": bytes_held, "speed": speed, "chunks": chunks}
    arguments.add_argument("command", choices=commands)
    arguments.add_argument("folder")
    arguments.add_argument("dictionary")
    arguments.add_argument("text")
    arguments.add_argument("--program", default="lexico")
    arguments.add_argument("--prompt", type=int)
    arguments.add_argument("--positions", type=int, default=4000)
    arguments.add_argument("--tokens", type=int)
    arguments.add_argument("--times", type=int, default=3)
    options = arguments.parse_args()
    options.prompt = options.prompt or {"same": 800}.get(options.command, 2000)
    options.tokens = options.tokens or {"same": 100}.get(options.command, 200)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    needed = options.positions if options.command in ("bytes", "chunks") else options.prompt
    text = tokenizer(Path(options.text).read_text()[: 16 * needed]).input_ids
    if len(text) < needed:
        arguments.error(f"{options.text} gives {len(text)} tokens; {needed} are needed")
    commands[options.command](model, tokenizer, lexico.Dictionaries.load(options.dictionary), text, options)


if __name__ == "__main__":
    main()
