"""Codes as the stored form of LMCache's chunks: the serde ``lexico`` of ``lmcache server``.

An entry of LMCache's list of storages names it::

    {"type": "fs", "base_path": "/cache", "serde": {"type": "lexico", "dictionary": "dictionary.safetensors"}}

and ``python -m lexico.lmcache server …`` starts LMCache with it: LMCache has no way to name a module that it should import.
What the server gives back are the vectors that codes stand for, in 10 to 17 per cent of their bytes in between. A chunk that
is damaged, or of another model, dictionary, rotary embedding or rank, is a miss, and so are those that were asked for with it.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from typing import Any

import numpy as np
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde import (
    AsyncSerdeProcessor,
    Deserializer,
    SerdeProcessor,
    Serializer,
    get_registered_serde_types,
    register_serde_factory,
)
from lmcache.v1.memory_management import MemoryObj
from numpy.typing import NDArray

from ._lexico import Dictionaries, LayerCache, LexicoError

__all__ = ["LexicoDeserializer", "LexicoSerializer", "main"]

#: First bytes of a chunk: the format, and the version that is written and read.
FORMAT = b"lexico-lmcache/1"
#: Beginning of a chunk: the format, the bytes that follow, their checksum, those of the header.
START = struct.Struct("<16sQII")
#: What a chunk's header, and a layer's, take at the most beside the codes.
HEADER, LAYER_HEADER = 4096, 1024
#: Bytes of a coefficient of sparse codes.
COEFFICIENTS = {"i8": 1, "f8": 1, "f32": 4}
#: Chunks are looked for at multiples of so many positions, and before this one.
STEP, LAST_POSITION = 16, 1 << 17

#: Numbers that a chunk may be of: those of FP8 caches are no vectors before they are scaled.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

Array = NDArray[np.float32]


class _Chunks:
    """Chunks ``[2, layers, tokens, kv_heads·m]``, keys after rotary embedding first, and their codes."""

    def __init__(self, dictionary: str, sparsity: float | None = None) -> None:
        self.dictionaries = Dictionaries.load(dictionary)
        # All of a chunk is coded at once, but for the tokens that may be the first of a text, which stay dense.
        self.options = "lexico:window=0,batch=1,dense=f16" + ("" if sparsity is None else f",sparsity={sparsity}")
        caches = LayerCache.for_layers(self.dictionaries, self.options)
        self.settings = [cache.settings for cache in caches]
        model = self.dictionaries.model
        self.layers, self.heads, self.head_dim = model["layers"], model["kv_heads"], model["head_dim"]
        self.identity = {name: model[name] for name in ("architecture", "layers", "kv_heads", "head_dim", "rotary")}

    def check(self, shape: tuple[int, ...]) -> int:
        """Refuses chunks of another shape than the model's; returns their tokens."""
        width = self.heads * self.head_dim
        if len(shape) != 4 or shape[:2] != (2, self.layers) or shape[3] != width:
            raise LexicoError(
                f"a chunk of shape {tuple(shape)}, but the dictionaries are for [2, {self.layers}, tokens, {width}]; parts of a model's "
                "heads, as with tensor parallelism, are not supported"
            )
        return int(shape[2])

    def header(self, key: ObjectKey, tokens: int) -> dict[str, Any]:
        """What a chunk must agree with to be read."""
        return {
            "model": self.identity,
            "name": key.model_name,
            "rank": key.kv_rank,
            "group": key.object_group_id,
            "tokens": tokens,
            "cache": self.options,
        }

    def encode(self, chunk: Array, key: ObjectKey) -> bytes:
        tokens = self.check(chunk.shape)
        vectors = chunk.reshape(2, self.layers, tokens, self.heads, self.head_dim).swapaxes(2, 3)
        first = self.first_position(vectors[0])
        caches = LayerCache.for_layers(self.dictionaries, self.options, first_position=first)
        saved = []
        for layer, cache in enumerate(caches):
            cache.append(vectors[0, layer], vectors[1, layer])
            saved.append(cache.save())
        header = self.header(key, tokens) | {"layers": [len(own) for own in saved]}
        text = json.dumps(header).encode()
        rest = text + b"".join(saved)
        return START.pack(FORMAT, len(rest), zlib.crc32(rest), len(text)) + rest

    def decode(self, data: bytes, key: ObjectKey, shape: tuple[int, ...]) -> Array:
        tokens = self.check(shape)
        if len(data) < START.size:
            raise LexicoError("the chunk is cut short")
        form, length, checksum, header_length = START.unpack_from(data)
        rest = data[START.size : START.size + length]
        if form != FORMAT:
            raise LexicoError("it is no chunk that lexico wrote, or one of another version")
        if len(rest) != length or zlib.crc32(rest) != checksum or header_length > length:
            raise LexicoError("the chunk is damaged or cut short")
        header = json.loads(rest[:header_length])
        lengths = header.pop("layers")
        wanted = self.header(key, tokens)
        if header != wanted:
            names = [name for name in wanted if header.get(name) != wanted[name]]
            raise LexicoError(f"the chunk is of another {', '.join(names)}")
        out = np.empty((2, self.layers, self.heads, tokens, self.head_dim), np.float32)
        at = header_length
        for layer, cache in enumerate(LayerCache.for_layers(self.dictionaries, self.options)):
            # This refuses codes over other dictionaries.
            cache.load(rest[at : at + lengths[layer]])
            at += lengths[layer]
            if len(cache) != tokens:
                raise LexicoError(f"the chunk has {len(cache)} tokens, not {tokens}")
            out[0, layer], out[1, layer] = cache.decode()
        return out.swapaxes(2, 3).reshape(shape)

    def first_position(self, keys: Array) -> int:
        """The position at which keys ``[layers, heads, tokens, m]`` begin, which LMCache does not tell: that at which their means
        before the rotary embedding fit best. Codes are right for any, and nearest for the right one."""
        candidates = np.arange(0, LAST_POSITION, STEP)
        fits = np.zeros(len(candidates))
        for layer in range(min(self.layers, 4)):
            maps = self.dictionaries.maps(layer, "keys")
            if maps is None or maps.frequencies is None or maps.rotary_means is None:
                return 0
            angles, means = maps.frequencies.astype(np.float64), maps.rotary_means
            pairs = len(angles)
            turned = np.exp(-1j * np.arange(keys.shape[2])[:, None] * angles)
            complex_keys = keys[layer, ..., :pairs] + 1j * keys[layer, ..., pairs : 2 * pairs]
            complex_means = means[:, :pairs] + 1j * means[:, pairs : 2 * pairs]
            sums = np.einsum("htp,tp,hp->p", complex_keys, turned, complex_means.conj())
            fits += (np.exp(-1j * candidates[:, None] * angles) @ sums).real
        return int(candidates[fits.argmax()])

    def size(self, shape: tuple[int, ...]) -> int:
        """The bytes of every chunk of this shape: as many as its codes take at the most. LMCache's adapters read a file back only
        where it is as long as the room that they make for it."""
        tokens, size = self.check(shape), START.size + HEADER
        for layer in self.settings:
            each = COEFFICIENTS.get(layer["format"])
            for sparsity in (*layer["keys"], *layer["values"]):
                # The columns of codes are kept as they are, or in fewer bytes: atoms and a scale, or indices, coefficients and lengths.
                code = sparsity + 2 if each is None else sparsity * (2 + each) + 4
                size += tokens * code + layer["sinks"] * self.head_dim * 2 + 8 * (sparsity + 8)
            size += LAYER_HEADER
        return int(size)


class LexicoSerializer(Serializer):  # type: ignore[misc]
    """Turns a chunk into codes, all layers of it."""

    def __init__(self, chunks: _Chunks) -> None:
        self._chunks = chunks

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Writes the codes of ``src`` ``[2, layers, tokens, kv_heads·m]`` to the bytes of ``dst``, and zeros after them; returns how
        many bytes these are."""
        source = _vectors(src)
        data = self._chunks.encode(source.detach().to("cpu", torch.float32).numpy(), key)
        room, size = _tensor(dst).flatten(), self._chunks.size(tuple(source.shape))
        if not len(data) <= size <= room.numel():
            raise LexicoError(f"codes of {len(data)} bytes for {size}, in a room of {room.numel()}")
        room[:size] = 0
        room[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return size

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """The bytes of a chunk."""
        for number in layout_desc.dtypes:
            _check_number(number)
        return sum(self._chunks.size(tuple(shape)) for shape in layout_desc.shapes)


class LexicoDeserializer(Deserializer):  # type: ignore[misc]
    """Turns codes back into a chunk."""

    def __init__(self, chunks: _Chunks) -> None:
        self._chunks = chunks

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Writes the vectors that the codes in ``src`` stand for to ``dst``. Raises :class:`~lexico.LexicoError`, which is a miss,
        where they are damaged or foreign; ``dst`` is then as it was."""
        data = _tensor(src).flatten().cpu().numpy().tobytes()
        room = _vectors(dst)
        try:
            vectors = self._chunks.decode(data, key, tuple(room.shape))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise LexicoError(f"the chunk contradicts itself: {error}") from error
        room.copy_(torch.from_numpy(vectors))


def _check_number(number: torch.dtype) -> None:
    if number not in FLOATS:
        raise LexicoError(f"a cache of {number}; bfloat16, float16 and float32 are supported")


def _vectors(memory: MemoryObj) -> torch.Tensor:
    tensor = _tensor(memory)
    _check_number(tensor.dtype)
    return tensor


def _tensor(memory: MemoryObj) -> torch.Tensor:
    tensor = memory.tensor
    if tensor is None:
        raise LexicoError("a memory object without a tensor; chunks of several groups are not supported")
    return tensor


def _create(options: dict[str, object]) -> SerdeProcessor:
    """The serde that a configuration asks for."""
    unknown = sorted(set(options) - {"dictionary", "sparsity", "max_workers"})
    if unknown:
        raise ValueError(
            f'serde lexico: no option {unknown[0][:100]!r}; there are "dictionary", "sparsity" and "max_workers"'
        )
    if not isinstance(options.get("dictionary"), str):
        raise ValueError('serde lexico: "dictionary" must name a file of dictionaries')
    sparsity, workers = options.get("sparsity"), options.get("max_workers", 1)
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float | None):
        raise ValueError('serde lexico: "sparsity" must be a number')
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError('serde lexico: "max_workers" must be a whole number, 1 or more')
    chunks = _Chunks(str(options["dictionary"]), sparsity)
    return AsyncSerdeProcessor(LexicoSerializer(chunks), LexicoDeserializer(chunks), max_workers=workers)


if "lexico" not in get_registered_serde_types():
    register_serde_factory("lexico", _create)


def main() -> None:
    """Runs LMCache's own command line, with the serde ``lexico``."""
    from lmcache.cli.main import main as lmcache

    sys.exit(lmcache())


if __name__ == "__main__":
    main()
