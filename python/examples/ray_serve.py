"""`lexico serve` behind Ray Serve: replicas come and go with the load, and a request whose replica dies goes on at another.

    pip install "ray[serve]" httpx
    LEXICO_ARGUMENTS="--model model.gguf --prefix-store s3://BUCKET/FOLDER" serve run ray_serve:app
"""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import threading

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve
from ray.exceptions import RayActorError

SCALING = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 2, "upscale_delay_s": 2, "downscale_delay_s": 10}


@serve.deployment(ray_actor_options={"num_cpus": 0.5}, health_check_period_s=2, autoscaling_config=SCALING)
class Lexico:
    def __init__(self):
        command = [os.environ.get("LEXICO", "lexico"), "serve", "--port", "0", "--log-format", "json"]
        command += shlex.split(os.environ.get("LEXICO_ARGUMENTS", ""))
        die_with_me = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # noqa: E731 (Linux)
        self.server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_me)
        log = map(json.loads, self.server.stderr)
        address = next(line["address"] for line in log if "address" in line)
        next(line for line in log if line["message"] == "ready")
        threading.Thread(target=self.server.stderr.read, daemon=True).start()
        self.client = httpx.AsyncClient(base_url=f"http://{address}", timeout=None)

    def check_health(self):
        assert self.server.poll() is None, "the server has ended"

    async def answer(self, method, path, body):
        async with self.client.stream(method, path, content=body, headers={"content-type": "application/json"}) as answer:
            yield answer.status_code, answer.headers.get("content-type")
            async for line in answer.aiter_lines():
                yield line + "\n"


@serve.deployment(max_ongoing_requests=1000)
@serve.ingress(api := FastAPI())
class Front:
    def __init__(self, lexico):
        self.lexico = lexico.options(stream=True)

    @api.api_route("/{path:path}", methods=["GET", "POST"])
    async def pass_on(self, path: str, request: Request):
        body = await request.body()
        if body:  # with a seed a text is the same wherever it is written
            body = json.dumps({"seed": int.from_bytes(os.urandom(6)), **json.loads(body)}).encode()
        parts = self.parts(request.method, f"/{path}", body)
        status, kind = await anext(parts)
        return StreamingResponse(parts, status, media_type=kind)

    async def parts(self, *asked, sent=0):
        for attempt in range(3):
            try:
                number = 0
                async for part in self.lexico.answer.remote(*asked):
                    number += 1
                    if number > sent:
                        yield part
                        sent = number
                return
            except RayActorError:
                if attempt == 2:
                    raise


app = Front.bind(Lexico.bind())
