"""The rows of NVIDIA Dynamo: its frontend, workers of Lexico, and a store of S3's kind, all on loopback."""

import contextlib
import json
import os
import subprocess
import threading
import time

from processes import WORK, Process, figure, free_port, get, post

STORE = "s3://prefixes/of/the/cluster"


class Store(Process):
    """moto's server, with a bucket."""

    def __init__(self, python):
        port = free_port()
        self.base = f"http://127.0.0.1:{port}"
        super().__init__("store", [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", port])
        self.until(lambda: get(self.base + "/moto-api/"), "the store")
        bucket = self.base + "/prefixes"
        subprocess.run(["curl", "--silent", "--fail", "--request", "PUT", "--output", "/dev/null", bucket], check=True)
        os.environ.update(
            AWS_ENDPOINT=self.base, AWS_ALLOW_HTTP="true", AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_REGION="us-east-1"
        )

    def objects(self):
        """The number of prefixes in it."""
        return get(self.base + "/prefixes?list-type=2").count("<Key>")


PLANES = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]


class Cluster:
    """A frontend and its workers."""

    def __init__(self, python, model, arguments):
        self.python, self.model, self.arguments = python, model, arguments
        os.environ.update(
            DYN_FILE_KV=str(WORK / "discovery"),
            DYN_TCP_RPC_HOST="127.0.0.1",
            DYN_EVENT_PLANE_HOST="127.0.0.1",
            HF_HUB_OFFLINE="1",
            DO_NOT_TRACK="1",
            XDG_CACHE_HOME=str(WORK / "cache"),
            HOME=str(WORK),
        )
        (WORK / "discovery").mkdir()
        port = free_port()
        self.base = f"http://127.0.0.1:{port}"
        command = [python, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", port]
        self.frontend = Process("frontend", [*command, "--router-mode", "kv", "--migration-limit", "3", *PLANES])
        self.frontend.until(lambda: get(self.base + "/health"), "Dynamo's frontend")
        self.workers, self.started = {}, 0

    def instances(self):
        """The numbers of the workers that the frontend knows."""
        listed = json.loads(get(self.base + "/health")).get("instances") or []
        return {one["instance_id"] for one in listed if one.get("endpoint") == "generate"}

    def add(self):
        """Starts a worker, and returns its number once the frontend knows it."""
        self.started += 1
        # Dynamo keeps this port in sixteen bits with a sign.
        port, before = free_port(20000, 32000), self.instances()
        command = [self.python, "-m", "lexico.dynamo", "--model", self.model, *PLANES, *self.arguments]
        worker = Process(f"worker-{self.started}", command, DYN_SYSTEM_PORT=port)
        worker.metrics = f"http://127.0.0.1:{port}/metrics"
        number = worker.until(lambda: next(iter(self.instances() - before), None), "a worker")
        self.workers[number] = worker
        # The list is empty for a moment when a worker is taken in.
        listed = lambda: json.loads(get(self.base + "/v1/models"))["data"]  # noqa: E731
        self.name = worker.until(lambda: next((one["id"] for one in listed()), None), "the model")
        return number

    def kill(self, number):
        self.workers.pop(number).kill()

    def body(self, prompt, tokens, **more):
        common = {"model": self.name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return common | {"nvext": {"extra_fields": ["worker_id"]}} | more

    def ask(self, prompt, tokens, **more):
        """Text, usage and worker."""
        answer = json.load(post(self.base + "/v1/completions", self.body(prompt, tokens, **more)))
        return answer["choices"][0]["text"], answer["usage"], answer["nvext"]["worker_id"]["decode_worker_id"]

    def written(self, prompt, tokens, **more):
        """The tokens of a text, and the log-probabilities of the likeliest at each."""
        answer = json.load(post(self.base + "/v1/completions", self.body(prompt, tokens, logprobs=3, **more)))
        told = answer["choices"][0]["logprobs"]
        return list(zip(told["tokens"], told["top_logprobs"], strict=True))

    def stream(self, prompt, tokens, told=lambda worker: None, **more):
        """Text, usage, seconds to the first token, and whether it ended as streams do."""
        asked, first, text, usage, whole = time.monotonic(), None, "", None, False
        more = {"stream": True, "stream_options": {"include_usage": True}} | more
        for line in post(self.base + "/v1/completions", self.body(prompt, tokens, **more)):
            if line.startswith(b"data: [DONE]"):
                whole = True
            elif line.startswith(b"data: "):
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                worker = ((chunk.get("nvext") or {}).get("worker_id") or {}).get("decode_worker_id")
                if worker is not None:
                    told(worker)
                for choice in chunk.get("choices", []):
                    if choice.get("text"):
                        first = first or time.monotonic() - asked
                        text += choice["text"]
        return text, usage, first, whole


def same_text(cluster, lexico, run_arguments, prompts, tokens=32):
    """Whole and streamed texts beside those of `lexico run`."""
    right = 0
    for number, prompt in enumerate(prompts):
        file = WORK / f"prompt-{number}.txt"
        file.write_text(prompt)
        command = [lexico, "run", *run_arguments, "--no-chat", "--file", file, "-n", tokens]
        said = subprocess.run([str(part) for part in command], capture_output=True, check=True, text=True).stdout
        whole, usage, _ = cluster.ask(prompt, tokens)
        streamed, usage_of_stream, _, ended = cluster.stream(prompt, tokens)
        same = whole.strip() == streamed.strip() == said.removeprefix(prompt).strip() and usage == usage_of_stream and ended
        right += same
        if not same:
            print(f"-- run:\n{said!r}\n-- whole:\n{whole!r} {usage}\n-- streamed:\n{streamed!r} {usage_of_stream} {ended}")
    return right == len(prompts), f"{right} of {len(prompts)} prompts, {tokens} tokens each, whole and streamed"


def stay_with_their_prefix(cluster, texts, times=5):
    """Requests whose prefixes lie on a worker go there."""
    home, on_holder, cached, asked = {}, 0, 0, 0
    for turn in range(times):
        for number, text in enumerate(texts):
            _, usage, worker = cluster.ask(f"{text}\nQuestion {turn}:", 4)
            on_holder += worker == home.setdefault(number, worker)
            found = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            # The first reads it; each later one goes on from all whole blocks that they share.
            cached += found > 0 if turn else found == 0
            asked += 1
            # What the router is told takes a moment.
            time.sleep(0.2)
    workers = len(set(home.values()))
    return (
        on_holder >= 0.95 * asked and cached >= 0.95 * asked and workers > 1,
        f"{on_holder} of {asked} on the holder, cached_tokens says so of {cached}; the prefixes lay on {workers} workers",
    )


# Nats by which a token may be less likely than the likeliest and still take its place: what quantised weights are multiplied with is rounded to
# 8 bits, and otherwise where a text is read than where it is written (on SmolLM2 in Q4_1 a token's log-probability differed by up to 0.46).
TIE = 0.5


def parts_by(written, text):
    """By how much the first token that differs was less likely than the one wanted; 0 where none does, None where it was none of the likeliest."""
    at = 0
    for token, likeliest in written:
        if not text[at:].startswith(token):
            best = max(likeliest.values())
            others = [best - logprob for other, logprob in likeliest.items() if other and text[at:].startswith(other)]
            return min(others, default=None)
        at += len(token)
    return 0


def told(parted):
    gaps = [f"{by:.2f}" if by is not None else "none of the likeliest" for by in parted if by != 0]
    return f", the others parted by {', '.join(gaps)} nats" if gaps else ""


def killed_in_streams(cluster, prompts, tokens):
    """A worker is killed in the middle of streams."""
    options = {"ignore_eos": True}
    wanted = [cluster.written(prompt, tokens, **options) for prompt in prompts]
    first, answers, at_work = threading.Barrier(len(prompts) + 1), {}, {}

    def one(number):
        def told(worker):
            if number not in at_work:
                at_work[number] = worker
                with contextlib.suppress(threading.BrokenBarrierError):
                    first.wait(300)

        answers[number] = cluster.stream(prompts[number], tokens, told, **options)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        first.wait(300)
    time.sleep(0.05)
    victim = max(set(at_work.values()), key=list(at_work.values()).count)
    hit = list(at_work.values()).count(victim)
    cluster.kill(victim)
    killed = time.monotonic()
    while victim in cluster.instances() and time.monotonic() - killed < 60:
        time.sleep(0.1)
    gone = time.monotonic() - killed
    for thread in threads:
        thread.join(600)
    whole = sum(answer[3] and answer[1]["completion_tokens"] == tokens for answer in answers.values())
    parted = [parts_by(wanted[number], answers[number][0]) for number in answers]
    right = sum(by is not None and by <= TIE for by in parted)
    same = sum(by == 0 for by in parted)
    number = cluster.add()
    taken = False
    for turn in range(40):
        taken = taken or cluster.ask(f"{turn} is a number. Another is", 2)[2] == number
    moved = figure(cluster.base + "/metrics", "dynamo_frontend_model_migration_total") or 0
    return (
        whole == right == len(prompts) and moved > 0 and gone <= 15 and taken,
        f"{whole} of {len(prompts)} whole, {right} right, {same} of them the same text{told(parted)} ({hit} were on the dead worker, {moved:.0f} moved); gone from the frontend "
        f"after {gone:.1f} s; a new one {'answers' if taken else 'gets nothing'}",
    )


def moved_conversation(cluster, store, text):
    """A conversation whose worker dies goes on elsewhere, from the store."""
    before = store.objects()
    holder = []
    said, usage, anew, _ = cluster.stream(text, 16, holder.append)
    while store.objects() == before:
        time.sleep(0.05)
    cluster.kill(holder[0])
    while holder[0] in cluster.instances():
        time.sleep(0.1)
    _, again, moved, _ = cluster.stream(f"{text}{said} And then", 16)
    cached = again["prompt_tokens_details"]["cached_tokens"]
    cluster.add()
    return (
        moved <= 0.25 * anew and cached > 0.8 * usage["prompt_tokens"],
        f"{usage['prompt_tokens']} tokens: first token after {moved:.2f} s where reading took {anew:.2f} s ({moved / anew:.3f} of it), "
        f"{cached} tokens from the store",
    )


def store_gone(cluster, store, texts):
    """The store dies between requests."""
    wanted = [cluster.ask(text + " Then", 8)[0] for text in texts]
    up = [figure(worker.metrics, "lexico_prefix_store_up") for worker in cluster.workers.values()]
    store.kill()
    slowest, answers = 0.0, []
    for text in texts:
        # Another beginning, so that it is read anew.
        asked = time.monotonic()
        cluster.ask("Now: " + text, 8)
        slowest = max(slowest, time.monotonic() - asked)
        answers.append(cluster.ask(text + " Then", 8)[0])
    deadline = time.monotonic() + 45
    state = lambda name: [figure(worker.metrics, name) for worker in cluster.workers.values()]  # noqa: E731
    while any(state("lexico_prefix_store_up")) and time.monotonic() < deadline:
        time.sleep(0.5)
    lines = [len(worker.lines("the prefix store does not do")) for worker in cluster.workers.values()]
    down, errors = state("lexico_prefix_store_up"), state("lexico_prefix_store_errors_total")
    return (
        answers == wanted and set(up) == {1.0} and set(down) == {0.0} and set(lines) == {1},
        f"{len(answers)} of {len(texts)} answered as before, the slowest new one after {slowest:.1f} s; lexico_prefix_store_up {up} before, "
        f"{down} after, errors {errors}, lines in the logs {lines}",
    )
