"""`lexico serve` behind Ray Serve, one to three replicas. LEXICO_ARGUMENTS="--model FILE" serve run ray_serve:app"""

import json
import os
import shlex
import subprocess
import threading

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve
from ray.exceptions import RayActorError

SCALING = {"max_replicas": 3, "target_ongoing_requests": 2, "upscale_delay_s": 2, "downscale_delay_s": 10}


@serve.deployment(ray_actor_options={"num_cpus": 0.5}, autoscaling_config=SCALING)
class Lexico:
    def __init__(self):  # where the replica is killed the server ends too: Linux's setpriv sees to it
        command = ["setpriv", "--pdeathsig", "KILL", os.environ.get("LEXICO", "lexico"), "serve", "--port", "0"]
        command += ["--log-format", "json", *shlex.split(os.environ.get("LEXICO_ARGUMENTS", ""))]
        self.server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        address = next(line["address"] for line in map(json.loads, self.server.stderr) if "address" in line)
        next(line for line in self.server.stderr if '"ready"' in line)
        threading.Thread(target=self.server.stderr.read, daemon=True).start()
        kind = {"content-type": "application/json"}
        self.client = httpx.AsyncClient(base_url=f"http://{address}", timeout=None, headers=kind)

    def check_health(self):
        assert self.server.poll() is None, "the server has ended"

    async def answer(self, method, path, body):
        async with self.client.stream(method, path, content=body) as answer:
            yield answer.status_code, answer.headers.get("content-type")
            async for line in answer.aiter_lines():
                yield line + "\n"


@serve.deployment(max_ongoing_requests=1000)
@serve.ingress(api := FastAPI())
class Front:
    def __init__(self, lexico):
        self.lexico = lexico.options(stream=True)

    async def parts(self, *asked):
        sent = 0
        for last in (False, False, True):
            try:
                number = 0
                async for part in self.lexico.answer.remote(*asked):
                    number += 1
                    if number > sent:  # what was sent before a replica died is not sent again
                        sent = number
                        yield part
                return
            except RayActorError:
                if last:
                    raise

    @api.api_route("/{path:path}", methods=["GET", "POST"])
    async def pass_on(self, path: str, request: Request):
        if body := await request.body():  # with a seed a text is the same wherever it is written
            body = json.dumps({"seed": int.from_bytes(os.urandom(6), "big"), **json.loads(body)})
        parts = self.parts(request.method, f"/{path}", body)
        status, kind = await anext(parts)
        return StreamingResponse(parts, status, media_type=kind)


app = Front.bind(Lexico.bind())
