"""The worker of Dynamo, driven as Dynamo drives it, but for its network."""

import asyncio
import pathlib

import pytest

pytest.importorskip("dynamo.common.backend", reason="ai-dynamo is not installed")

from dynamo.llm.exceptions import EngineShutdown, InvalidArgument  # noqa: E402

from lexico.dynamo import LexicoEngine  # noqa: E402

TINY = str(pathlib.Path(__file__).parents[2] / "models" / "tiny")
PROMPT = list(range(5, 105))


class Context:
    """A request's, which stops when it is told to."""

    def __init__(self, name="one"):
        self.name, self.stopped = name, False

    def id(self):
        return self.name

    def is_stopped(self):
        return self.stopped


def run(work, *arguments):
    async def whole():
        engine, config = await LexicoEngine.from_args(
            ["--model", TINY, "--kv-memory", "64MiB", "--ubatch-size", "16", *arguments]
        )
        started = await engine.start(1)
        try:
            return await work(engine, config, started)
        finally:
            await engine.cleanup()
            await engine.cleanup()

    return asyncio.run(whole())


async def chunks(engine, context=None, prompt=PROMPT, sampling=None, output=None, **stops):
    request = {
        "token_ids": prompt,
        "sampling_options": {"temperature": 0.0} | (sampling or {}),
        "stop_conditions": stops,
        "output_options": output or {},
    }
    return [chunk async for chunk in engine.generate(request, context or Context())]


def tokens(given):
    return [token for chunk in given for token in chunk["token_ids"]]


def test_a_text_has_one_end_and_its_usage():
    async def work(engine, config, started):
        assert config.endpoint_types == "completions"
        assert started.llm.kv_cache_block_size == 16
        assert started.llm.total_kv_blocks > 0
        assert started.llm.context_length == 4096
        [source] = await engine.kv_event_sources()
        assert source.endpoint.startswith("tcp://127.0.0.1:")
        for cached in (0, 96):
            given = await chunks(engine, max_tokens=8, ignore_eos=True)
            assert [chunk for chunk in given if "finish_reason" in chunk] == given[-1:]
            assert given[-1]["finish_reason"] == "length"
            assert len(tokens(given)) == 8
            assert given[-1]["completion_usage"] == {
                "prompt_tokens": 100,
                "completion_tokens": 8,
                "total_tokens": 108,
                "prompt_tokens_details": {"cached_tokens": cached},
            }

    run(work)


def test_options_are_kept_to():
    async def work(engine, config, started):
        free = tokens(await chunks(engine, max_tokens=40, ignore_eos=True))
        third = free[2]
        # A token that ends the text is its last, and is not taken before there are as many as asked for.
        stopped = await chunks(engine, max_tokens=40, ignore_eos=True, stop_token_ids=[third])
        assert tokens(stopped) == free[: free.index(third) + 1]
        assert stopped[-1]["finish_reason"] == "stop"
        late = tokens(await chunks(engine, max_tokens=40, ignore_eos=True, stop_token_ids=[third], min_tokens=10))
        assert third not in late[:10]
        hidden = tokens(await chunks(engine, max_tokens=40, stop_token_ids_hidden=[third]))
        assert hidden == free[: free.index(third) + 1]
        # The same seed draws the same, another does not.
        drawn = [
            tokens(await chunks(engine, sampling={"temperature": 2.0, "seed": seed}, max_tokens=20, ignore_eos=True))
            for seed in (1, 1, 2)
        ]
        assert drawn[0] == drawn[1] != drawn[2]
        one = tokens(await chunks(engine, sampling={"temperature": 2.0, "top_k": 1}, max_tokens=20, ignore_eos=True))
        assert one == free[:20]
        penalised = {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 5.0}
        other = tokens(await chunks(engine, sampling=penalised, max_tokens=40, ignore_eos=True))
        assert len(set(other)) > len(set(free))

    run(work)


def test_log_probabilities_stand_beside_their_tokens():
    async def work(engine, config, started):
        given = await chunks(engine, output={"logprobs": 2}, max_tokens=5, ignore_eos=True)
        for chunk in given[:-1]:
            assert len(chunk["log_probs"]) == len(chunk["top_logprobs"]) == len(chunk["token_ids"])
            for token, logprob, top in zip(chunk["token_ids"], chunk["log_probs"], chunk["top_logprobs"], strict=True):
                assert [entry["rank"] for entry in top] == [1, 2]
                assert (top[0]["token_id"], top[0]["logprob"]) == (token, logprob)

    run(work)


def test_what_it_cannot_do_is_refused():
    async def work(engine, config, started):
        for options in (
            {"sampling": {"n": 2}},
            {"sampling": {"guided_decoding": {"json": {}}}},
            {"sampling": {"use_beam_search": True}},
            {"sampling": {"temperature": -1.0}},
            {"sampling": {"something_new": 3}},
            {"max_thinking_tokens": 5},
            {"output": {"prompt_logprobs": 1}},
            {"output": {"logprobs": 1000}},
            {"max_tokens": 10**7},
            {"prompt": []},
            {"prompt": [10**8]},
        ):
            with pytest.raises(InvalidArgument):
                await chunks(engine, **options)
        # What some clients always send.
        assert await chunks(engine, sampling={"n": 1, "best_of": 1, "use_beam_search": False}, max_tokens=1)

    run(work)


def test_a_text_that_is_not_wanted_any_more_ends():
    async def work(engine, config, started):
        context, given = Context(), []
        request = {
            "token_ids": PROMPT,
            "sampling_options": {"temperature": 0.0},
            "stop_conditions": {"max_tokens": 3000, "ignore_eos": True},
        }
        async for chunk in engine.generate(request, context):
            given.append(chunk)
            context.stopped = True
            await engine.abort(context)
        assert given[-1]["finish_reason"] == "cancelled"
        assert len(tokens(given)) < 3000
        # One that was stopped before it began.
        given = await chunks(engine, context)
        assert [chunk["finish_reason"] for chunk in given] == ["cancelled"]

    run(work)


def test_many_texts_together_are_those_alone():
    async def work(engine, config, started):
        prompts = [PROMPT[number : number + 30] for number in range(20)]
        options = {"max_tokens": 6, "ignore_eos": True}
        together = await asyncio.gather(
            *(chunks(engine, Context(str(number)), prompt, **options) for number, prompt in enumerate(prompts))
        )
        for prompt, given in zip(prompts, together, strict=True):
            assert tokens(await chunks(engine, prompt=prompt, **options)) == tokens(given)

    run(work)


def test_after_its_end_it_says_that_it_has_ended():
    async def work(engine, config, started):
        assert "lexico_kv_budget_bytes" in engine._figures()
        assert "vllm:" not in engine._figures()
        await engine.cleanup()
        with pytest.raises(EngineShutdown):
            await chunks(engine, max_tokens=1)

    run(work)


def test_folders_that_the_frontend_cannot_read_are_refused(tmp_path):
    for model in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(SystemExit, match="--model"):
            asyncio.run(LexicoEngine.from_args(["--model", str(model)]))
