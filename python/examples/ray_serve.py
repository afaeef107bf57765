"""`lexico serve` behind Ray Serve, one to three replicas. LEXICO_ARGUMENTS="--model FILE" serve run ray_serve:app"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve
from ray.exceptions import RayActorError

SCALING = {"max_replicas": 3, "target_ongoing_requests": 2, "upscale_delay_s": 2, "downscale_delay_s": 10}
# Where a replica is killed its server ends too: Linux's setpriv sees to it.
SERVER = "setpriv --pdeathsig KILL {LEXICO} serve --port 0 --log-format json {LEXICO_ARGUMENTS}"


@serve.deployment(ray_actor_options={"num_cpus": 0.5}, autoscaling_config=SCALING)
class Lexico:
    def __init__(self):
        command = shlex.split(SERVER.format_map({"LEXICO": "lexico", "LEXICO_ARGUMENTS": "", **os.environ}))
        self.server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        ready = json.loads(next(line for line in self.server.stderr if '"ready"' in line))
        threading.Thread(target=shutil.copyfileobj, args=(self.server.stderr, sys.stderr), daemon=True).start()
        self.client = httpx.AsyncClient(base_url=f"http://{ready['address']}", timeout=None)

    def check_health(self):
        assert self.server.poll() is None, "the server has ended"

    async def answer(self, method, path, body):
        asked = self.client.stream(method, path, content=body, headers={"content-type": "application/json"})
        async with asked as answer:
            yield answer.status_code, {"content-type": answer.headers.get("content-type", "")}
            async for line in answer.aiter_lines():
                yield line + "\n"


@serve.deployment(max_ongoing_requests=1000)
@serve.ingress(api := FastAPI())
class Front:
    def __init__(self, lexico):
        self.lexico = lexico.options(stream=True)

    async def parts(self, *asked, sent=0, tries=3):
        known = sent  # what was sent before a replica died is not sent again
        try:
            async for part in self.lexico.answer.remote(*asked):
                if known == 0:
                    sent += 1
                    yield part
                known = max(known - 1, 0)
        except RayActorError:
            if tries == 1:
                raise
            async for part in self.parts(*asked, sent=sent, tries=tries - 1):
                yield part

    @api.api_route("/{path:path}", methods=["GET", "POST"])
    async def pass_on(self, path: str, request: Request):
        if body := await request.body():  # with a seed a text is the same wherever it is written
            body = json.dumps({"seed": int.from_bytes(os.urandom(6), "big"), **json.loads(body)})
        parts = self.parts(request.method, f"/{path}", body)
        return StreamingResponse(parts, *await anext(parts))


app = Front.bind(Lexico.bind())
