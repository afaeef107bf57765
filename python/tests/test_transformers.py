"""The cache for transformers: tiny drawn models of each family, the embedded model, and the Rust program beside it."""

import copy
import json
import subprocess

import numpy as np
import pytest
from conftest import TINY, drawn, rust_program
from conftest import identity as drawn_identity

import lexico

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from lexico._device import DeviceLayerCache  # noqa: E402
from lexico._models import identity  # noqa: E402
from lexico.transformers import LexicoCache, enable  # noqa: E402

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": lambda: transformers.LlamaConfig(**SHAPE),
    "Mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=None),
    "Mistral, windowed": lambda: transformers.MistralConfig(**SHAPE, sliding_window=24),
    "Qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "Qwen2, windowed in part": lambda: transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    "Qwen3": lambda: transformers.Qwen3Config(**SHAPE),
}
#: Everything dense: nothing but the order of sums differs from transformers' own cache.
DENSE = "lexico:window=4096,dense=f32"
#: Codes that are exact but for rounding, and hardly a window.
EXACT = "lexico:format=f32,sparsity=16,window=8,batch=4,dense=f32"
#: Ordinary codes.
CODED = "lexico:sparsity=6,window=8,batch=4"


#: What models call the cache: `past_key_values` before transformers 5.24.
ARGUMENT = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"


def given(cache):
    return {ARGUMENT: cache}


@pytest.fixture(params=FAMILIES)
def made(request):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[request.param]()).eval()
    # Drawn weights predict next to nothing: make tokens differ.
    model.lm_head.weight.data.mul_(20)
    return model, drawn(np.random.default_rng(0), identity(model))


def ids(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(1, 97, shape, generator=generator)


def padded(lengths):
    """A batch of sequences of these lengths, padded on the left, and its mask."""
    longest = max(lengths)
    tokens, mask = ids(len(lengths), longest), torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, longest - length :] = 1
    return tokens * mask, mask


def generate(model, tokens, cache, count=30, **options):
    return model.generate(
        tokens, **given(cache), max_new_tokens=count, do_sample=options.pop("do_sample", False), **options
    )


@pytest.mark.parametrize("options", [DENSE, EXACT])
@pytest.mark.parametrize(
    "kind", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.7}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_without_loss_texts_are_those_of_transformers_own_cache(made, options, kind):
    model, dictionaries = made
    for lengths in ([45], [45, 7, 30]):
        tokens, mask = padded(lengths)
        texts = []
        for cache in (transformers.DynamicCache(config=model.config), LexicoCache(model, dictionaries, options)):
            torch.manual_seed(3)
            texts.append(generate(model, tokens, cache, attention_mask=mask, **kind))
        assert (texts[0] == texts[1]).all()


def test_without_loss_logits_are_those_of_transformers_own_cache(made):
    model, dictionaries = made
    tokens = ids(2, 60)
    for options, bound in ((DENSE, 1e-3), (EXACT, 2e-2)):
        caches = transformers.DynamicCache(config=model.config), LexicoCache(model, dictionaries, options)
        with torch.no_grad():
            for start, end in ((0, 30), (30, 31), (31, 45), (45, 46), (46, 60)):
                both = [model(tokens[:, start:end], **given(cache)).logits for cache in caches]
                torch.testing.assert_close(both[0], both[1], atol=bound, rtol=0)
        assert caches[1].get_seq_length() == 60


def test_a_sequence_in_a_batch_is_what_it_is_alone(made):
    model, dictionaries = made
    lengths = [45, 7, 30]
    tokens, mask = padded(lengths)
    batch = LexicoCache(model, dictionaries, CODED)
    together = generate(model, tokens, batch, attention_mask=mask)
    assert batch.footprint()["codes"] > 0
    for row, length in enumerate(lengths):
        alone = LexicoCache(model, dictionaries, CODED)
        text = generate(model, tokens[row : row + 1, -length:], alone)
        assert (text[0] == together[row, -len(text[0]) :]).all()


def test_turns_go_on_and_saved_caches_do(made, tmp_path):
    model, dictionaries = made
    tokens, mask = padded([45, 7])
    cache = LexicoCache(model, dictionaries, CODED)
    text = generate(model, tokens, cache, attention_mask=mask)
    cache.save(tmp_path / "cache")
    loaded = LexicoCache.load(tmp_path / "cache", model, dictionaries)
    copied = copy.deepcopy(cache)
    more = torch.cat([text, ids(2, 9)], dim=1)
    mask = torch.cat([mask, torch.ones(2, more.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
    texts = [generate(model, more, own, attention_mask=mask) for own in (cache, loaded, copied)]
    assert (texts[0] == texts[1]).all() and (texts[0] == texts[2]).all()
    assert cache.get_seq_length() == loaded.get_seq_length() == texts[0].shape[1] - 1
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert (generate(model, tokens, cache, attention_mask=mask[:, :45]) == text).all()
    saved = (tmp_path / "cache").read_bytes()
    for damaged in (saved[: len(saved) // 2], saved[:-7] + b"damaged", b""):
        (tmp_path / "cache").write_bytes(damaged)
        with pytest.raises(lexico.LexicoError):
            LexicoCache.load(tmp_path / "cache", model, dictionaries)


def test_half_precision_works(made):
    model, dictionaries = made
    model = model.to(torch.bfloat16)
    cache = LexicoCache(model, dictionaries, CODED)
    text = generate(model, ids(1, 40), cache)
    assert text.shape == (1, 70)
    assert cache.nbytes > 0 and cache.fp16_nbytes > 0


def test_without_a_lexico_cache_a_model_is_as_with_sdpa(made):
    model, _ = made
    tokens, mask = padded([45, 7])
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        before = model(tokens, attention_mask=mask).logits
        enable(model)
        enable(model)
        assert (model(tokens, attention_mask=mask).logits == before).all()


def test_what_codes_do_not_know_is_refused(made):
    model, dictionaries = made
    tokens = ids(1, 30)
    cache = LexicoCache(model, dictionaries, CODED)
    # By transformers, and before 5.24 by the cache.
    with pytest.raises((ValueError, lexico.LexicoError)):
        generate(model, tokens, cache, prompt_lookup_num_tokens=3)
    cache = LexicoCache(model, dictionaries, CODED)
    with pytest.raises(lexico.LexicoError, match="taken back"):
        cache.crop(-1)
    with pytest.raises(lexico.LexicoError, match="no_grad"):
        model(tokens, **given(cache))
    with pytest.raises(lexico.LexicoError, match="make a new cache"), torch.no_grad():
        model(tokens, **given(cache))

    def refuses(word, call):
        fresh = LexicoCache(model, dictionaries, CODED)
        with pytest.raises(lexico.LexicoError, match=word), torch.no_grad():
            call(fresh)

    refuses("not supported", lambda cache: model(tokens, **given(cache), attention_mask=torch.zeros(1, 1, 30, 30)))
    odd = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    odd[..., 20, 5] = False
    refuses("other than of padding", lambda cache: model(tokens, **given(cache), attention_mask=odd))
    refuses("output_attentions", lambda cache: model(tokens, **given(cache), output_attentions=True))

    def other_batch(cache):
        model(tokens, **given(cache))
        model(ids(2, 1), **given(cache))

    refuses("2 sequences", other_batch)

    def other_attention(cache):
        model.set_attn_implementation("sdpa")
        model(tokens, **given(cache))
        model(tokens, **given(cache))

    refuses("has not read", other_attention)
    with pytest.raises(lexico.LexicoError, match="learned for"):
        LexicoCache(model, TINY / "dictionary.safetensors")
    with pytest.raises(OSError):
        LexicoCache(model)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=10))
    with pytest.raises(lexico.LexicoError, match="not supported"):
        LexicoCache(gpt2, dictionaries)


def test_damaged_and_empty_caches(made, tmp_path):
    model, dictionaries = made
    cache = LexicoCache(model, dictionaries, DENSE)
    cache.save(tmp_path / "empty")
    assert LexicoCache.load(tmp_path / "empty", model, dictionaries).get_seq_length() == 0
    with torch.no_grad():
        model(ids(1, 37), **given(cache))
    cache.save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    # The number of positions stands in no layer's own part.
    (tmp_path / "damaged").write_bytes(whole.replace(b'positions\\": 37', b'positions\\": 38'))
    assert (tmp_path / "damaged").read_bytes() != whole
    with pytest.raises(lexico.LexicoError, match="checksum"):
        LexicoCache.load(tmp_path / "damaged", model, dictionaries)


def test_a_step_that_broke_off_between_layers_is_noticed(made, monkeypatch):
    model, dictionaries = made
    cache = LexicoCache(model, dictionaries, DENSE)
    with torch.no_grad():
        model(ids(1, 20), **given(cache))
        last = model.get_decoder().layers[-1]
        with monkeypatch.context() as broken:
            broken.setattr(last, "forward", lambda *_args, **_kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                model(ids(1, 1), **given(cache))
        with pytest.raises(lexico.LexicoError, match="between two layers"):
            model(ids(1, 1), **given(cache))


def test_padding_after_an_answer_cannot_be_hidden_later(made):
    model, dictionaries = made
    if getattr(model.config, "sliding_window", None):
        return
    cache = LexicoCache(model, dictionaries, DENSE)
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[1, 15:20] = 0
    with torch.no_grad():
        model(ids(2, 20), **given(cache))
        with pytest.raises(lexico.LexicoError, match="cannot be taken back"):
            model(ids(2, 3), attention_mask=mask, **given(cache))


def test_padding_on_the_right_is_passed_over_between_turns(made):
    model, dictionaries = made
    tokens, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    cache = LexicoCache(model, dictionaries, DENSE)
    with torch.no_grad():
        if getattr(model.config, "sliding_window", None):
            with pytest.raises(lexico.LexicoError, match="padding_side"):
                model(tokens, attention_mask=mask, **given(cache))
            return
        both = []
        for own in (transformers.DynamicCache(config=model.config), cache):
            model(tokens, attention_mask=mask, **given(own))
            whole = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
            both.append(model(ids(2, 3), attention_mask=whole, **given(own)).logits)
    torch.testing.assert_close(both[0], both[1], atol=1e-3, rtol=0)
    assert [len(sequence) for sequence in cache.layers[0].sequences] == [23, 15]


@pytest.mark.parametrize("options", ["sparsity=5", "format=f32,sparsity=7", "format=f32,sparsity=9,tolerance=0.3"])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("maps", [True, False])
def test_the_form_for_devices_is_that_of_the_processor(options, window, maps):
    rng = np.random.default_rng(0)
    dictionaries = drawn(rng, drawn_identity(), maps=maps)
    # Batches of one leave the window at once, here and there.
    text = f"lexico:{options},window=16,batch=1,dense=f32"
    own = lexico.LayerCache(dictionaries, 0, text, sliding_window=window)
    other = DeviceLayerCache.of(own, dictionaries, 0, "cpu")
    for t in (70, 1, 1, 5, 1, 1, 150, 1):
        keys, values = (torch.from_numpy(x) for x in rng.standard_normal((2, 2, t, 16)).astype(np.float32))
        queries = torch.from_numpy(rng.standard_normal((6, t, 16)).astype(np.float32))
        expected = own.attend(queries.numpy(), keys.numpy(), values.numpy())
        torch.testing.assert_close(other.attend(queries, keys, values), torch.from_numpy(expected), atol=5e-3, rtol=0)
        own.append(keys.numpy(), values.numpy())
        other.append(keys, values)
        assert (len(own), own.coded) == (len(other), other.coded)
    assert copy.deepcopy(other).footprint() == other.footprint()
    assert other.footprint()["codes"] < 4 * own.footprint()["codes"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_texts_are_those_of_transformers_own_cache(made):
    model, dictionaries = made
    model = model.to("cuda")
    tokens, mask = (x.to("cuda") for x in padded([45, 7, 30]))
    texts = []
    for cache in (transformers.DynamicCache(config=model.config), LexicoCache(model, dictionaries, EXACT)):
        texts.append(generate(model, tokens, cache, attention_mask=mask))
    assert (texts[0] == texts[1]).all()


@pytest.fixture(scope="module")
def embedded():
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize("options", ["lexico:window=16", "lexico:sparsity=12,window=32", "lexico:format=i8,window=16"])
def test_texts_are_those_of_the_rust_program(embedded, options):
    model, tokenizer = embedded
    prompt = TINY / "prompt.txt"
    command = [rust_program(), "run", "--no-chat", "--json", "--cache", options, "-n", "100", "--file", str(prompt)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = json.loads(run.stdout)
    # The program begins a text with the begin-of-text token, and leaves out the file's last line end.
    tokens = tokenizer(tokenizer.bos_token + prompt.read_text().rstrip("\n"), return_tensors="pt").input_ids
    assert tokens.shape[1] == expected["prompt_tokens"]
    # The dictionaries in the model's folder are found.
    cache = LexicoCache(model, cache=options)
    text = generate(model, tokens, cache, count=100, tokenizer=tokenizer)[0, tokens.shape[1] :]
    assert tokenizer.decode(text, skip_special_tokens=True).strip() == expected["text"].strip()
    share = cache.nbytes / cache.fp16_nbytes
    assert share < 0.35
