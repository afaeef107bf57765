"""A small cluster on loopback, and what it must do: a table of what was seen; fails where a row does.

    check.py --lexico PROGRAM [--dynamo PYTHON --store PYTHON] [--vllm-router PROGRAM] [--ray PYTHON]
             [--model tiny|FOLDER|FILE.gguf] [--dictionary FILE] [--text FILE] [--tokens 3000] [--json]

`run`, beside it, makes the environments. Rows whose packages are not named are not there.
"""

import argparse
import json
import pathlib
import shutil
import sys
import time

import dynamo_rows as dynamo
import router_rows as routers
from processes import WORK, end_all

ROOT = pathlib.Path(__file__).resolve().parents[4]

arguments = argparse.ArgumentParser()
arguments.add_argument("--lexico", required=True)
arguments.add_argument("--dynamo", help="a Python that has lexico, ai-dynamo and ai-dynamo-runtime")
arguments.add_argument("--store", help="a Python that has moto[server]")
arguments.add_argument("--vllm-router")
arguments.add_argument("--ray", help="a Python that has ray[serve] and httpx")
arguments.add_argument("--model", default="tiny")
arguments.add_argument("--dictionary")
arguments.add_argument("--text", type=pathlib.Path, default=ROOT / "README.md", help="prompts are parts of it")
arguments.add_argument("--tokens", type=int, default=3000, help="of the conversation that moves")
arguments.add_argument("--kv-memory", default="256MiB")
arguments.add_argument("--json", action="store_true")
options = arguments.parse_args()

text = " ".join(options.text.read_text(encoding="utf-8").split())
rows = []


def tiny_folder():
    """The embedded model as Dynamo's frontend takes it: no token before texts, which the frontend would leave out, and a template."""
    folder = WORK / "tiny"
    shutil.copytree(ROOT / "models" / "tiny", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["add_bos_token"] = False
    config["chat_template"] = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)



model = tiny_folder() if options.model == "tiny" else options.model
of_model = ["--model", model, *(["--dictionary", options.dictionary] if options.dictionary else [])]


def part(number, characters):
    """A part of the text that no other number has."""
    start = number * characters
    return text[start % (len(text) - characters) :][:characters]


def row(name, check, *given):
    started = time.monotonic()
    passed, seen = check(*given)
    rows.append({"what": name, "passed": bool(passed), "seen": seen, "seconds": round(time.monotonic() - started)})
    print(f"{'passed' if passed else 'FAILED'}  {name}: {seen}", file=sys.stderr, flush=True)


def of_dynamo():
    store = dynamo.Store(options.store)
    cluster = dynamo.Cluster(
        options.dynamo,
        model,
        [*of_model[2:], "--kv-memory", options.kv_memory, "--ubatch-size", "64", "--prefix-store", dynamo.STORE],
    )
    for _ in range(2):
        cluster.add()
    short = [f"Number {number}. {part(number, 90)}" for number in range(10)]
    row("text through Dynamo's frontend is that of lexico run", dynamo.same_text, cluster, options.lexico, of_model, short[:4])
    longer = [f"Part {number}: {part(number, 900)}" for number in range(8)]
    row("8 prefixes × 5 requests stay with their prefix", dynamo.stay_with_their_prefix, cluster, longer)
    row("a worker is killed in the middle of 10 streams", dynamo.killed_in_streams, cluster, short, 64)
    conversation = tokens_of(options.tokens)
    row("a conversation moves to another worker", dynamo.moved_conversation, cluster, store, conversation)
    row("the store goes in the middle", dynamo.store_gone, cluster, store, [f"Before {t}" for t in longer[:4]])
    end_all()


def tokens_of(count):
    """Text of about so many tokens, by the model's own tokenizer."""
    server = routers.serve(options.lexico, "tokenizer", *of_model)
    given = routers.post(server.base + "/tokenize", {"prompt": text[: 8 * count]})
    tokens = json.load(given)["tokens"][:count]
    said = json.load(routers.post(server.base + "/detokenize", {"tokens": tokens}))["prompt"]
    server.stop()
    return said


try:
    if options.dynamo:
        of_dynamo()
    if options.vllm_router:
        texts = [f"Text {number}. {part(number, 900)}" for number in range(8)]
        for policy, name in [("kv_aware", "vllm-router, kv_aware"), ("cache_aware", "vllm-router, cache_aware")]:
            row(name, routers.vllm_router, options.vllm_router, options.lexico, policy, of_model, texts)
    if options.ray:
        row("Ray Serve: 1 → 3 → 1 replicas, one killed", routers.ray_serve, options.ray, options.lexico, ROOT, of_model)
finally:
    end_all()
    if rows and all(one["passed"] for one in rows):
        shutil.rmtree(WORK, ignore_errors=True)
    else:
        print(f"the logs are in {WORK}", file=sys.stderr)

if options.json:
    print(json.dumps(rows, indent=1))
else:
    wide = max(len(one["what"]) for one in rows)
    for one in rows:
        print(f"{'passed' if one['passed'] else 'FAILED'}  {one['what']:{wide}}  {one['seconds']:4} s  {one['seen']}")
sys.exit(not all(one["passed"] for one in rows))
