"""Dictionaries for a transformers model."""

import json
import subprocess

import numpy as np
import pytest
from conftest import TINY, rust_program

import lexico

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from lexico.transformers import LexicoCache  # noqa: E402

OPTIONS = {"tokens": 6144, "context": 256, "vectors": 8192, "effort": "quick"}


@pytest.fixture(scope="module")
def embedded():
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def texts():
    lines = (TINY / "problems_train.jsonl").read_text().splitlines()
    return [json.loads(line)["question"] for line in lines[:600]]


@pytest.fixture(scope="module")
def learned(embedded, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("learned") / "dictionary.safetensors"
    stages = []
    model, tokenizer = embedded
    dictionaries = lexico.learn(
        model, tokenizer, texts, path, **OPTIONS, progress=lambda stage, done, of: stages.append((stage, done, of))
    )
    return path, dictionaries, stages


def test_what_is_learned_codes_the_model(embedded, learned, tiny):
    path, dictionaries, stages = learned
    assert stages[0][0] == "reading" and stages[-1][0] == "layer 3 values"
    assert dictionaries.model["kv_heads"] == 2 and dictionaries.model["rotary"] == tiny.model["rotary"]
    errors = dictionaries.training["grouped_relative_error"]
    assert len(errors) == 4 and all(0 < error["keys"] < 0.6 for error in errors)
    assert dictionaries.maps(0, "keys").rotary_means is not None
    assert dictionaries.maps(0, "values").rotary_means is None
    model, tokenizer = embedded
    assert model.config._attn_implementation != "lexico-learning"
    prompt = tokenizer((TINY / "prompt.txt").read_text(), return_tensors="pt").input_ids
    texts = []
    for cache in (transformers.DynamicCache(config=model.config), LexicoCache(model, path, "lexico:window=16")):
        text = model.generate(prompt, cache=cache, tokenizer=tokenizer, max_new_tokens=53, do_sample=False)
        texts.append(text[0, prompt.shape[1] :])
    length = min(map(len, texts))
    same = (texts[0][:length] == texts[1][:length]).float().mean()
    assert same > 0.8, same


def test_the_rust_program_reads_it(learned):
    path, _, _ = learned
    command = [rust_program(), "run", "--no-chat", "--json", "--cache", "lexico:window=16", "-n", "20"]
    command += ["--dictionary", str(path), "--file", str(TINY / "prompt.txt")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["generated_tokens"] == 20


def test_the_same_texts_give_the_same(embedded, texts, learned):
    small = {**OPTIONS, "tokens": 1024, "vectors": 1024}
    both = [lexico.learn(*embedded, texts, **small, seed=3) for _ in range(2)]
    for part in ("keys", "values"):
        assert (both[0].codebooks(1, part).atoms == both[1].codebooks(1, part).atoms).all()
    other = lexico.learn(*embedded, texts, **small, seed=4)
    assert np.abs(other.codebooks(1, "keys").atoms - both[0].codebooks(1, "keys").atoms).max() > 0


def test_learning_breaks_off_and_says_what_is_wrong(embedded, texts):
    model, tokenizer = embedded

    def stop(stage, done, of):
        if stage != "reading":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lexico.learn(model, tokenizer, texts, **OPTIONS, progress=stop)
    for word, call in [
        ("not two windows", lambda: lexico.learn(model, tokenizer, ["short"])),
        ("a list", lambda: lexico.learn(model, tokenizer, "one text")),
        ("a text is needed", lambda: lexico.learn(model, tokenizer, [b"bytes"])),
        ("context", lambda: lexico.learn(model, tokenizer, texts, context=5000)),
        ("effort", lambda: lexico.learn(model, tokenizer, texts, effort="fast")),
        ("vectors", lambda: lexico.learn(model, tokenizer, texts, vectors=1)),
    ]:
        with pytest.raises(ValueError, match=word):
            call()
    assert model.config._attn_implementation != "lexico-learning"
    # Nothing holds what was sampled.
    assert not lexico.learning._READERS
