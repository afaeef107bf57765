"""A worker of NVIDIA Dynamo: ``python -m lexico.dynamo --model FOLDER``.

Dynamo's frontend tokenises texts and chooses a worker by the prefixes that each holds; a worker writes the tokens. The engine
inside is that of ``lexico serve``: the same scheduler, memory, prefixes and prefix store, by flags of the same names.

dynamo is imported by this module alone (``ai-dynamo==1.6.1``; docs/CLUSTER.md tells how it is installed).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

from dynamo._core import Context
from dynamo.common.backend.engine import EngineConfig, GenerateChunk, GenerateRequest, LLMEngine, LlmRegistration
from dynamo.common.backend.health_check import build_health_check_payload
from dynamo.common.backend.publisher import ComponentSnapshot, KvEventSource, ZmqSource
from dynamo.common.backend.run import run
from dynamo.common.backend.worker import WorkerConfig
from dynamo.common.utils.token_ids import token_ids_to_list
from dynamo.llm.exceptions import EngineShutdown, InvalidArgument, Unknown

from . import BusyError, EndedError, Engine, LexicoError, Text, write_frontend_files

logger = logging.getLogger(__name__)

#: Seconds between two reports of the memory to the router.
REPORT = 0.5
#: The largest number of log-probabilities beside a token's own.
MAX_LOGPROBS = 20
#: Files that the frontend reads of a model.
FRONTEND_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
#: Options that a request may have and that the engine has another word for, or the frontend does.
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
#: Options of no effect at these values, which some clients always send.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (0, 1),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True, False),
    "detokenize": (True, False),
}


class LexicoEngine(LLMEngine):  # type: ignore[misc]
    """The engine, as Dynamo's worker drives it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._engine: Engine | None = None
        self._texts: dict[str, asyncio.Event] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._snapshots: Any = None
        self._reports: asyncio.Task[None] | None = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[LexicoEngine, WorkerConfig]:
        """Reads the command line."""
        arguments = parser().parse_args(argv)
        folder = await asyncio.to_thread(frontend_folder, arguments)
        kinds = endpoint_types(arguments, folder)
        name = arguments.alias or folder.name
        config = WorkerConfig(
            namespace=arguments.namespace,
            component=arguments.component,
            endpoint=arguments.endpoint,
            model_name=str(folder),
            served_model_name=name,
            endpoint_types=kinds,
            custom_jinja_template=arguments.chat_template,
            discovery_backend=arguments.discovery_backend,
            request_plane=arguments.request_plane,
            event_plane=arguments.event_plane,
            tool_call_parser=arguments.tool_call_parser,
            reasoning_parser=arguments.reasoning_parser,
        )
        return cls(arguments, folder), config

    async def start(self, worker_id: int) -> EngineConfig:
        """Loads the model."""
        given = self._arguments
        self._engine = engine = await asyncio.to_thread(
            Engine,
            given.model,
            dictionary=given.dictionary,
            cache=given.cache,
            kv_memory=given.kv_memory,
            quantize=given.quantize,
            parallel=given.parallel,
            ctx_size=given.ctx_size,
            n_predict=given.n_predict,
            ubatch_size=given.ubatch_size,
            prefix_store=given.prefix_store,
            prefix_store_size=given.prefix_store_size,
            kv_events=given.kv_events,
            max_waiting=given.max_waiting,
            queue_timeout=given.queue_timeout,
            log_level=given.log_level,
        )
        self._loop = asyncio.get_running_loop()
        if engine.begin_token is not None:
            logger.warning(
                "texts of this model begin with token %d, which Dynamo's frontend does not put before those of /v1/completions: "
                "send it in the prompt; chats have it where the template writes it",
                engine.begin_token,
            )
        return EngineConfig(
            model=str(self._folder),
            served_model_name=given.alias or self._folder.name,
            llm=LlmRegistration(
                context_length=engine.context,
                kv_cache_block_size=engine.block_tokens,
                total_kv_blocks=self._blocks(engine.figures()["budget"]),
                max_num_seqs=given.parallel,
                max_num_batched_tokens=engine.block_tokens,
            ),
        )

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateChunk, None]:
        """Writes a text."""
        engine = self._running()
        prompt = token_ids_to_list(request["token_ids"])
        try:
            options = options_of(request)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error
        loop, happened = asyncio.get_running_loop(), asyncio.Event()
        self._texts[context.id()] = happened
        text: Text | None = None
        cached = written = 0
        try:
            # Texts that are not wanted any more are not begun.
            if not context.is_stopped():
                text = engine.write(prompt, notify=lambda: loop.call_soon_threadsafe(happened.set), **options)
            reason = None if text else "cancelled"
            while text is not None and reason is None:
                await happened.wait()
                happened.clear()
                if context.is_stopped():
                    reason = "cancelled"
                    break
                chunk: GenerateChunk = {"token_ids": [], "index": 0}
                for event in text.take():
                    cached = event.get("cached_tokens", cached)
                    reason = event.get("finish_reason")
                    if "token" in event:
                        add(chunk, event)
                written += len(chunk["token_ids"])
                if chunk["token_ids"]:
                    yield chunk
                if reason is None and text.over:
                    raise EngineShutdown("the engine has stopped")
            yield {
                "token_ids": [],
                "index": 0,
                "finish_reason": str(reason),
                "completion_usage": {
                    "prompt_tokens": len(prompt),
                    "completion_tokens": written,
                    "total_tokens": len(prompt) + written,
                    "prompt_tokens_details": {"cached_tokens": cached},
                },
            }
        except EndedError as error:
            raise EngineShutdown(str(error)) from error
        except (ValueError, OverflowError, TypeError) as error:
            raise InvalidArgument(str(error)) from error
        except BusyError as error:
            raise Unknown(f"busy: {error}") from error
        except LexicoError as error:
            raise Unknown(str(error)) from error
        finally:
            self._texts.pop(context.id(), None)
            if text is not None:
                text.cancel()

    async def abort(self, context: Context) -> None:
        """Forgets a text that nobody wants any more."""
        if happened := self._texts.get(context.id()):
            happened.set()

    async def cleanup(self) -> None:
        """Ends, once the texts at hand are written or ``--drain-timeout`` is over."""
        if self._reports is not None:
            self._reports.cancel()
            self._reports = None
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.end, self._arguments.drain_timeout)

    async def kv_event_sources(self) -> list[KvEventSource]:
        """The events of kept prefixes."""
        endpoint = self._running().kv_events
        return [ZmqSource(endpoint=endpoint)] if endpoint else []

    def component_metrics_dp_ranks(self) -> list[int]:
        """One rank, of which memory is reported."""
        return [0]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        """Takes what reports of memory go to."""
        self._snapshots = publisher
        # It is called by a thread of Dynamo's, after the start.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_reports)

    async def register_prometheus(self, metrics: Any) -> None:
        """Adds the figures of ``lexico serve`` to those of Dynamo."""
        metrics.register_prometheus_expfmt_callback(self._figures)

    async def health_check_payload(self) -> dict[str, Any] | None:
        """A text of one token, by which Dynamo sees whether the worker lives."""
        ends = self._running().end_tokens
        return dict(build_health_check_payload(ends[0] if ends else 0))

    def _running(self) -> Engine:
        if self._engine is None:
            raise EngineShutdown("the engine has ended")
        return self._engine

    def _blocks(self, size: int) -> int:
        return size // self._running().block_bytes

    def _figures(self) -> str:
        if self._engine is None:
            return ""
        kept, wanted = [], False
        for line in self._engine.metrics().splitlines():
            # Those that vLLM has too are for programs that know no other names; Dynamo has its own.
            name = line.split(" ")[2] if line.startswith("#") else line
            wanted = name.startswith("lexico_")
            if wanted:
                kept.append(line)
        return "\n".join(kept) + "\n"

    def _begin_reports(self) -> None:
        if self._reports is None:
            self._reports = asyncio.create_task(self._report())

    async def _report(self) -> None:
        while self._engine is not None:
            figures = self._engine.figures()
            asked = figures["prefix_queries"]
            self._snapshots.publish(
                0,
                ComponentSnapshot(
                    kv_used_blocks=self._blocks(figures["reserved"]),
                    kv_total_blocks=self._blocks(figures["budget"]),
                    gpu_cache_usage=figures["reserved"] / figures["budget"],
                    kv_cache_hit_rate=figures["prefix_hits"] / asked if asked else None,
                    dp_rank=0,
                ),
            )
            await asyncio.sleep(REPORT)


def add(chunk: GenerateChunk, event: Mapping[str, Any]) -> None:
    """Adds a token to a chunk, with its log-probabilities where they were asked for."""
    chunk["token_ids"].append(event["token"])
    if "logprob" in event:
        chunk.setdefault("log_probs", []).append(event["logprob"])
        top = [
            {"rank": rank, "token_id": token, "token": None, "logprob": logprob}
            for rank, (token, logprob) in enumerate(event["top_logprobs"], 1)
        ]
        chunk.setdefault("top_logprobs", []).append(top)


def options_of(request: GenerateRequest) -> dict[str, Any]:
    """The options of :meth:`Engine.write` by a request.

    Raises ``ValueError`` for what the engine cannot do.
    """
    for name in ("multi_modal_data", "mm_routing_info", "prefill_result", "encoder_result"):
        if request.get(name):
            raise ValueError(f"{name}: workers of Lexico take tokens alone")
    extra = request.get("extra_args") or {}
    sampling = {**(request.get("sampling_options") or {}), **(extra.get("sampling_options") or {})}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    options: dict[str, Any] = {"temperature": 1.0}
    options |= {name: sampling.pop(name) for name in SAMPLING if name in sampling}
    if options.get("top_k") == -1:
        options["top_k"] = 0
    seed = sampling.pop("seed", None)
    options["seed"] = random.getrandbits(64) if seed is None else seed & (2**64 - 1)
    bias = sampling.pop("logit_bias", None) or {}
    options["logit_bias"] = [(int(token), float(value)) for token, value in bias.items()]
    refuse("sampling option", sampling)

    stops = {name: value for name, value in (request.get("stop_conditions") or {}).items() if value is not None}
    ignore = options["ignore_eos"] = bool(stops.pop("ignore_eos", False))
    ends = set(stops.pop("stop_token_ids", [])) | set(stops.pop("stop_token_ids_hidden", []) if not ignore else [])
    stops.pop("stop_token_ids_hidden", None)
    options["stop_token_ids"] = sorted(ends)
    options["stop"] = stops.pop("stop", [])
    options["max_tokens"] = stops.pop("max_tokens", None)
    options["min_tokens"] = stops.pop("min_tokens", 0)
    refuse("stop condition", stops)

    output = request.get("output_options") or {}
    if output.get("prompt_logprobs") is not None:
        raise ValueError("prompt_logprobs: workers of Lexico tell log-probabilities of what they write alone")
    logprobs = output.get("logprobs")
    if logprobs is not None and not 0 <= int(logprobs) <= MAX_LOGPROBS:
        raise ValueError(f"logprobs is {logprobs}, and it must be from 0 to {MAX_LOGPROBS}")
    options["logprobs"] = None if logprobs is None else int(logprobs)
    return options


def refuse(kind: str, options: Mapping[str, Any]) -> None:
    """Refuses what is left of a request's options, but for those that change nothing."""
    for name, value in options.items():
        if value not in WITHOUT_EFFECT.get(name, ()) and value not in ({}, []):
            raise ValueError(f"{kind} {name}={str(value)[:100]}: workers of Lexico cannot do that")


def frontend_folder(arguments: argparse.Namespace) -> Path:
    """The folder that the frontend reads the tokenizer and the chat template from.

    It is the model's own; for a GGUF file its files are written, to ``--model-folder`` or to the user's cache.
    """
    model = Path(arguments.model)
    if model.is_dir():
        folder = model
    elif model.is_file():
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(arguments.model_folder or cache / "lexico" / "frontend" / model.stem)
        write_frontend_files(model, folder)
    else:
        raise SystemExit(f"--model {arguments.model}: there is no such folder or GGUF file")
    missing = [name for name in FRONTEND_FILES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"--model {folder}: Dynamo's frontend needs {', '.join(missing)} there")
    return folder.resolve()


def endpoint_types(arguments: argparse.Namespace, folder: Path) -> str:
    """What the frontend offers: chats where there is a template for them."""
    if arguments.endpoint_types:
        return str(arguments.endpoint_types)
    has_template = (folder / "chat_template.jinja").is_file() or "chat_template" in (
        folder / "tokenizer_config.json"
    ).read_text(encoding="utf-8")
    if has_template or arguments.chat_template:
        return "chat,completions"
    logger.warning("%s has no chat template: texts alone are offered, no chats (--chat-template FILE)", folder)
    return "completions"


def size(text: str) -> int:
    """Bytes, as 512MiB or 2GiB."""
    for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), 1):
        if text.endswith(unit):
            return int(float(text[: -len(unit)]) * 1024**power)
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line: flags of ``lexico serve``, then Dynamo's own."""
    parser = argparse.ArgumentParser(
        prog="python -m lexico.dynamo",
        description="A worker of NVIDIA Dynamo whose KV caches are held as codes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    own = parser.add_argument_group("as of lexico serve")
    own.add_argument("-m", "--model", required=True, help="a folder in Hugging Face layout, or a GGUF file")
    own.add_argument("-d", "--dictionary", help="the model's dictionaries; those beside the model by default")
    own.add_argument("--cache", default="lexico", help="the cache method and its options, as lexico:sparsity=12")
    own.add_argument("--kv-memory", type=size, default=2 << 30, metavar="SIZE", help="memory of all caches")
    own.add_argument("--quantize", default="none", help="none, q8_0, q6_k or q4_k")
    own.add_argument("-a", "--alias", "--served-model-name", help="name that clients call the model by")
    own.add_argument("--parallel", "--max-num-seqs", type=int, default=32, help="texts that are written at once")
    own.add_argument("-c", "--ctx-size", "--max-model-len", type=int, default=0, help="0: the model's context")
    own.add_argument("-n", "--n-predict", type=int, default=2048, help="tokens where a request names no number")
    own.add_argument("--ubatch-size", type=int, default=256, help="tokens of a block, by which the router counts")
    own.add_argument("--prefix-store", metavar="FOLDER|s3://BUCKET", help="where prefixes are kept and shared")
    own.add_argument("--prefix-store-size", type=size, default=16 << 30, metavar="SIZE", help="its size at the most")
    own.add_argument("--max-waiting", type=int, default=1024, help="texts that wait; more are refused")
    own.add_argument("--queue-timeout", type=float, default=60, help="seconds that a text waits at the most")
    own.add_argument("--drain-timeout", type=float, default=30, help="seconds that texts have to end after SIGTERM")
    own.add_argument("--chat-template", metavar="FILE", help="Jinja template of chats in place of the model's own")
    own.add_argument("--log-level", default="info", help="error, warn, info or debug")
    own.add_argument("--kv-events", default="tcp://127.0.0.1:0", help="where events of prefixes pass to the worker")
    of_dynamo = parser.add_argument_group("of Dynamo")
    environment = os.environ.get
    of_dynamo.add_argument("--namespace", default=environment("DYN_NAMESPACE", "dynamo"))
    of_dynamo.add_argument("--component", default="lexico")
    of_dynamo.add_argument("--endpoint", default="generate")
    of_dynamo.add_argument("--endpoint-types", help="chat,completions, or one of them; by the chat template if absent")
    of_dynamo.add_argument("--model-folder", help="where files for the frontend are written for a GGUF model")
    of_dynamo.add_argument("--discovery-backend", default=environment("DYN_DISCOVERY_BACKEND", "etcd"))
    of_dynamo.add_argument("--request-plane", default=environment("DYN_REQUEST_PLANE", "tcp"))
    of_dynamo.add_argument("--event-plane", default=environment("DYN_EVENT_PLANE"))
    of_dynamo.add_argument("--tool-call-parser")
    of_dynamo.add_argument("--reasoning-parser")
    return parser


def main() -> None:
    """Runs a worker until SIGTERM or Ctrl-C."""
    run(LexicoEngine)


if __name__ == "__main__":
    main()
