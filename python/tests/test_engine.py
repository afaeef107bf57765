"""The engine: the same texts as one after another, cancelling, refusing, ending, and the store that several share."""

import asyncio
import pathlib
import threading
import time

import pytest

import lexico

TINY = str(pathlib.Path(__file__).parents[2] / "models" / "tiny")
PROMPT = list(range(5, 105))


@pytest.fixture(scope="module")
def engine():
    engine = lexico.Engine(TINY, kv_memory=64 << 20, ubatch_size=16)
    yield engine
    assert engine.end()


def tokens(text):
    return [event["token"] for event in text if "token" in event]


def test_a_text_comes_token_by_token_and_ends_once(engine):
    events = list(engine.write(PROMPT, max_tokens=8, ignore_eos=True))
    assert events[0].keys() == {"cached_tokens"}
    assert [len(event) for event in events[1:-1]] == [2] * 8
    assert events[-1]["finish_reason"] == "length"
    again = list(engine.write(PROMPT, max_tokens=8, ignore_eos=True))
    assert again[0]["cached_tokens"] == 96
    assert again[1:] == events[1:]


def test_texts_together_are_those_alone(engine):
    prompts = [PROMPT[start : start + 40] for start in range(0, 50, 5)]
    alone = [tokens(engine.write(prompt, max_tokens=6, ignore_eos=True)) for prompt in prompts]
    together = [engine.write(prompt, max_tokens=6, ignore_eos=True) for prompt in prompts]
    assert [tokens(text) for text in together] == alone


def test_asyncio_waits_without_a_thread_a_text(engine):
    async def one(prompt):
        loop, happened, own = asyncio.get_running_loop(), asyncio.Event(), []
        text = engine.write(
            prompt, max_tokens=6, ignore_eos=True, notify=lambda: loop.call_soon_threadsafe(happened.set)
        )
        while not text.over:
            await happened.wait()
            happened.clear()
            own += [event["token"] for event in text.take() if "token" in event]
        return own, threading.active_count()

    async def all_of_them():
        return await asyncio.gather(*(one(PROMPT[: 20 + number]) for number in range(12)))

    before = threading.active_count()
    results = asyncio.run(all_of_them())
    assert all(len(own) == 6 for own, _ in results)
    # Threads of Rust that call show as dummies while they do, two at the most.
    assert max(count for _, count in results) <= before + 2


def test_log_probabilities_are_told_where_they_are_asked_for(engine):
    event = next(event for event in engine.write(PROMPT, max_tokens=1, logprobs=3) if "token" in event)
    likeliest, most = event["top_logprobs"][0]
    assert (likeliest, most) == (event["token"], event["logprob"])
    assert len(event["top_logprobs"]) == 3


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top-p|top_p"),
        ({"max_tokens": 10**9}, "context"),
        ({"logit_bias": [(10**6, 1.0)]}, "token 1000000"),
        ({"presence_penalty": float("nan")}, "penalty"),
    ],
)
def test_what_cannot_be_is_refused(engine, options, word):
    with pytest.raises(ValueError, match=word):
        list(engine.write(PROMPT, **options))


def test_prompts_that_cannot_be_are_refused(engine):
    for prompt, word in [([], "no tokens"), ([10**6], "token 1000000")]:
        with pytest.raises(ValueError, match=word):
            list(engine.write(prompt))


def test_a_text_that_is_cancelled_gives_its_memory_back(engine):
    before = engine.figures()["reserved"]
    text = engine.write([7, 8, 9], max_tokens=200, ignore_eos=True)
    next(text)
    assert engine.figures()["reserved"] > before
    text.cancel()
    while engine.figures()["reserved"] > before:
        time.sleep(0.01)


def test_figures_tell_of_memory_and_blocks(engine):
    assert engine.block_tokens == 16
    assert 0 < engine.block_bytes < engine.figures()["budget"] < 64 << 20
    assert "lexico_kv_budget_bytes" in engine.metrics()
    assert engine.kv_events is None
    assert engine.end_tokens


def test_settings_that_cannot_be_are_refused(tmp_path):
    for options, error in [
        ({"cache": "nothing"}, ValueError),
        ({"kv_memory": 0}, ValueError),
        ({"prefix_store": "ftp://there"}, ValueError),
        ({"kv_events": "nowhere"}, ValueError),
        ({"dictionary": tmp_path / "none.safetensors"}, OSError),
    ]:
        with pytest.raises(error):
            lexico.Engine(TINY, **options)
    with pytest.raises((OSError, lexico.LexicoError)):
        lexico.Engine(str(tmp_path / "nothing"))


def test_an_engine_that_has_ended_takes_no_texts():
    engine = lexico.Engine(TINY, kv_memory=64 << 20)
    text = engine.write([5, 6, 7], max_tokens=5, ignore_eos=True)
    # What was begun before is written.
    assert engine.end()
    assert len(tokens(text)) == 5
    with pytest.raises(lexico.EndedError):
        engine.write([5, 6, 7])
    assert engine.end()


def test_a_text_that_is_not_whole_in_time_is_over():
    engine = lexico.Engine(TINY, kv_memory=64 << 20)
    text = engine.write([5, 6, 7], max_tokens=4000, ignore_eos=True)
    assert not engine.end(timeout=0.05)
    assert 0 <= len(tokens(text)) < 4000


def test_what_one_has_read_another_goes_on_from_at_once(tmp_path):
    """Without waiting for its look at the folder, which comes every ten seconds."""
    store = tmp_path / "store"
    first, second, other = (
        lexico.Engine(TINY, kv_memory=64 << 20, ubatch_size=16, prefix_store=str(store), cache=cache)
        for cache in ("lexico", "lexico", "lexico:sparsity=5")
    )
    wanted = list(first.write(PROMPT, max_tokens=6, ignore_eos=True))
    while not list(store.glob("*.prefix")):
        time.sleep(0.01)
    moved = list(second.write(PROMPT, max_tokens=6, ignore_eos=True))
    assert moved[0]["cached_tokens"] == 96
    assert moved[1:] == wanted[1:]
    # Codes of other settings are never taken.
    assert next(other.write(PROMPT, max_tokens=6))["cached_tokens"] == 0
    assert "lexico_prefix_store_up 1" in second.metrics()
    for engine in (first, second, other):
        assert engine.end()
