"""Chunks of LMCache as codes."""

import numpy as np
import pytest
from conftest import drawn, identity

import lexico

torch = pytest.importorskip("torch", reason="torch is not installed")
try:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor

    import lexico.lmcache
except ImportError as error:
    pytest.skip(f"LMCache is not installed, or lacks something: {error}", allow_module_level=True)

MODEL = identity(layers=3, kv_heads=2, head_dim=16)
SHAPE = (2, 3, 256, 32)


class Memory:
    """A memory object of LMCache, as far as serdes know it."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.fixture
def made(tmp_path):
    path = tmp_path / "dictionary.safetensors"
    drawn(np.random.default_rng(0), MODEL).save(path)
    return str(path), lexico.lmcache._Chunks(str(path), 6)


def key(**others):
    return ObjectKey(**({"chunk_hash": b"chunk", "model_name": "model", "kv_rank": 0} | others))


def chunk():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def stored(chunks, source):
    serializer = lexico.lmcache.LexicoSerializer(chunks)
    room = serializer.estimate_serialized_size(MemoryLayoutDesc([torch.Size(SHAPE)], [torch.bfloat16]))
    # What lies in the room before is none of a chunk's business.
    out = torch.full((room + 100,), 7, dtype=torch.uint8)
    length = serializer.serialize(Memory(source), Memory(out), key())
    # Adapters read back what is as long as the room that they make for it.
    assert length == room
    return out[:room], length


def test_what_comes_back_is_what_the_codec_decodes(made):
    path, chunks = made
    source = chunk()
    data, length = stored(chunks, source)
    # Of a model so small that headers are a fifth of it.
    assert length < 0.4 * 2 * source.numel()
    out = torch.zeros(SHAPE, dtype=torch.bfloat16)
    lexico.lmcache.LexicoDeserializer(chunks).deserialize(Memory(data), Memory(out), key())
    vectors = source.float().numpy().reshape(2, 3, 256, 2, 16).swapaxes(2, 3)
    first = chunks.first_position(vectors[0])
    caches = lexico.LayerCache.for_layers(lexico.Dictionaries.load(path), chunks.options, first_position=first)
    for layer, cache in enumerate(caches):
        cache.append(vectors[0, layer], vectors[1, layer])
        for part, decoded in enumerate(cache.decode()):
            expected = torch.from_numpy(decoded.swapaxes(0, 1).reshape(256, 32)).to(torch.bfloat16)
            assert (out[part, layer] == expected).all()


def test_positions_are_found_by_the_means(made):
    _, chunks = made
    rng = np.random.default_rng(1)
    keys = 0.5 * rng.standard_normal((3, 2, 256, 16)).astype(np.float32)
    maps = [chunks.dictionaries.maps(layer, "keys") for layer in range(3)]
    for first in (0, 5120):
        moved = keys.copy()
        for layer, own in enumerate(maps):
            angles = np.arange(first, first + 256)[:, None] * own.frequencies
            cosines, sines = np.cos(angles), np.sin(angles)
            for head, mean in enumerate(own.rotary_means):
                moved[layer, head, :, :8] += mean[:8] * cosines - mean[8:] * sines
                moved[layer, head, :, 8:] += mean[8:] * cosines + mean[:8] * sines
        assert chunks.first_position(moved) == first


def test_foreign_and_damaged_chunks_are_misses(made, tmp_path):
    path, chunks = made
    data, length = stored(chunks, chunk())
    deserializer = lexico.lmcache.LexicoDeserializer(chunks)

    own = key()

    def refused(word=None, data=data, key=own, shape=SHAPE, deserializer=deserializer):
        out = torch.zeros(shape, dtype=torch.bfloat16)
        with pytest.raises(lexico.LexicoError, match=word):
            deserializer.deserialize(Memory(data), Memory(out), key)
        assert not out.any()

    # After the codes there are zeros, which say nothing.
    codes = int(data.nonzero().max()) + 1
    assert codes < length
    for place in range(0, codes, 4999):
        damaged = data.clone()
        damaged[place] ^= 1
        refused(data=damaged)
        refused(data=data[:place])
    refused("name", key=key(model_name="other"))
    refused("rank", key=key(kv_rank=1))
    refused("tokens", shape=(2, 3, 128, 32))
    refused("tensor parallelism", shape=(2, 3, 256, 16))
    other = tmp_path / "other.safetensors"
    drawn(np.random.default_rng(1), MODEL).save(other)
    refused("dictionary", deserializer=lexico.lmcache.LexicoDeserializer(lexico.lmcache._Chunks(str(other), 6)))
    refused("cache", deserializer=lexico.lmcache.LexicoDeserializer(lexico.lmcache._Chunks(path, 5)))


def test_the_serde_is_registered_under_its_name(made):
    path, _ = made
    serde = create_serde_processor(SerdeConfig("lexico", {"dictionary": path, "sparsity": 6}))
    assert serde.estimate_serialized_size(MemoryLayoutDesc([torch.Size(SHAPE)], [torch.bfloat16])) > 0
    serde.close()
    for options, word in (
        ({}, "dictionary"),
        ({"dictionary": path, "sparsty": 3}, "sparsty"),
        ({"dictionary": path, "sparsity": "many"}, "sparsity"),
        ({"dictionary": path, "sparsity": True}, "sparsity"),
        ({"dictionary": path, "max_workers": 0}, "max_workers"),
    ):
        with pytest.raises(ValueError, match=word):
            create_serde_processor(SerdeConfig("lexico", options))


def test_caches_of_other_numbers_are_refused(made):
    """FP8 caches come as bytes of the same shape, which would be coded as numbers from 0 to 255."""
    _, chunks = made
    serializer, deserializer = lexico.lmcache.LexicoSerializer(chunks), lexico.lmcache.LexicoDeserializer(chunks)
    data, _ = stored(chunks, chunk())
    for number in (torch.uint8, torch.float8_e4m3fn, torch.int8):
        other = torch.zeros(SHAPE, dtype=number)
        with pytest.raises(lexico.LexicoError, match="float16"):
            serializer.estimate_serialized_size(MemoryLayoutDesc([torch.Size(SHAPE)], [number]))
        with pytest.raises(lexico.LexicoError, match="float16"):
            serializer.serialize(Memory(other), Memory(data), key())
        with pytest.raises(lexico.LexicoError, match="float16"):
            deserializer.deserialize(Memory(data), Memory(other), key())
