"""Dictionaries for a transformers model, learned from its keys and values."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ._lexico import EFFORTS, Dictionaries, HeadMaps, __version__, head_maps, learn_codebooks
from ._models import identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The attention function that keeps what it is given.
NAME = "lexico-learning"
#: Of so many windows one is held out.
HELD_OUT = 20
#: Vectors that a dictionary is judged on, at the most.
HELD_OUT_VECTORS = 4096
#: Position beyond which no window begins.
LAST_POSITION = 1 << 15
#: Of so many queries that follow each other one is looked at: neighbours are alike.
STRIDE = 4

Array = NDArray[np.float32]


def learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    out: str | PathLike[str] | None = None,
    *,
    effort: str = "normal",
    tokens: int | None = None,
    context: int = 1024,
    vectors: int | None = None,
    seed: int = 0,
    joint_heads: int = 1,
    corpus: str = "texts",
    progress: Callable[[str, int, int], object] | None = None,
) -> Dictionaries:
    """Learns codebooks and maps for a transformers model from ``texts``, and writes them to ``out``, a file as ``lexico train``
    writes.

    The model reads up to ``tokens`` tokens in windows of ``context``; up to ``vectors`` keys and as many values of each
    layer are learned from, the same texts and ``seed`` giving the same dictionaries. ``effort`` is ``"quick"``, ``"normal"`` or
    ``"thorough"``, as for ``lexico train``, and sets what is left out. Of ``joint_heads`` KV heads keys, and values, are coded
    together: better codes of the same length, and so many times the look-ups in attention. ``corpus`` names the texts in the file.
    ``progress(stage, done, of)`` is called throughout, ``stage`` being ``"reading"`` or, say, ``"layer 3 keys"``; what it raises,
    or Ctrl-C, ends the learning.

    Which heads need more atoms is not measured: ``lexico measure`` adds it to the file.

    Raises ``ValueError`` for too little text and impossible settings, :class:`~lexico.LexicoError` for a model that is not
    supported.
    """
    import torch

    own_identity = identity(model)
    layers, heads, m = own_identity["layers"], own_identity["kv_heads"], own_identity["head_dim"]
    if effort not in EFFORTS:
        raise ValueError(f"effort={effort!r}: it must be one of {', '.join(EFFORTS)}")
    usual_tokens, usual_vectors, options = EFFORTS[effort]
    tokens = usual_tokens if tokens is None else tokens
    vectors = usual_vectors if vectors is None else vectors
    longest = int(model.config.max_position_embeddings)
    if not 2 <= context <= longest:
        raise ValueError(f"context={context}: it must be from 2 to {longest}, the model's context")
    if joint_heads < 1 or heads % joint_heads:
        raise ValueError(f"joint_heads={joint_heads}: the model has {heads} KV heads, which must be a multiple of it")
    if vectors < heads:
        raise ValueError(f"vectors={vectors}: at least one of each of {heads} KV heads is needed")
    windows = _windows(tokenizer, texts, context, tokens)
    reader = _Reader(layers, heads, m, len(windows), context, vectors, seed)
    model_training = model.training
    model.eval()
    try:
        with torch.no_grad(), reader.listening(model):
            for number, window in enumerate(windows):
                reader.begin(number, len(window), longest)
                ids = torch.tensor([window], device=model.device)
                positions = reader.first + torch.arange(len(window), device=model.device)[None]
                model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)
                if progress is not None:
                    progress("reading", number + 1, len(windows))
    finally:
        model.train(model_training)
    frequencies = _frequencies(model)
    all_layers, errors = [], []
    for layer in range(layers):
        own: dict[str, Any] = {}
        error = {}
        for part in ("keys", "values"):
            moments = reader.queries[layer] if part == "keys" else _output_moments(model, layer, heads, m)
            sampled, positions_of = reader.sample(layer, part, held_out=False)
            rotary: dict[str, Any] = {"frequencies": frequencies, "positions": positions_of} if part == "keys" else {}
            maps = head_maps(sampled, moments, joint_heads=joint_heads, **rotary)
            held_out, held_out_positions = reader.sample(layer, part, held_out=True)
            stage = f"layer {layer} {part}"
            codebooks, found = learn_codebooks(
                _mapped(maps, sampled, positions_of),
                _mapped(maps, held_out, held_out_positions),
                # Half as many atoms again as sparse codes' usual eighth of the head dim.
                sparsity=min(max(max(m // 8, 1) * 3 // 2, 1), max(m // 2, 1)),
                seed=seed + 2 * layer + (part == "values"),
                progress=None if progress is None else _stage(progress, stage),
                **options,
            )
            own.setdefault("codebooks", []).append(codebooks)
            own.setdefault("maps", []).append(maps)
            error[part] = found
        all_layers.append({name: tuple(both) for name, both in own.items()})
        errors.append(error)
    training = {
        "sparsity": max(m // 8, 1),
        "corpus": [corpus],
        "tokens": sum(map(len, windows)),
        "relative_error": [],
        "tool": f"lexico {__version__}, Python",
        "effort": effort,
        "vectors": reader.kept * heads,
        "seed": seed,
        "tokens_crc32": f"{_checksum(windows):08x}",
        "grouped_relative_error": errors,
    }
    dictionaries = Dictionaries(own_identity, training, all_layers)
    if out is not None:
        dictionaries.save(out)
    return dictionaries


def _stage(progress: Callable[[str, int, int], object], stage: str) -> Callable[[int, int], object]:
    return lambda done, of: progress(stage, done, of)


def _windows(tokenizer: Any, texts: Iterable[str], context: int, tokens: int) -> list[list[int]]:
    """Windows of ``context`` tokens out of all texts, as many as ``tokens`` allows, evenly drawn."""
    ids: list[int] = []
    if isinstance(texts, str):
        raise ValueError("texts: a list of texts is needed, and it is one text")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts: a text is needed, and it is a {type(text).__name__}")
        ids += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
    # A window is read as a text that begins there.
    begin = [tokenizer.bos_token_id] if _begins(tokenizer) else []
    own = context - len(begin)
    count = min(len(ids) // own, tokens // context)
    if count < 2:
        raise ValueError(
            f"texts: {len(ids)} tokens, of which at most {tokens} are to be read in windows of {context}, are not two windows, "
            "one to learn from and one to judge by; give more text or a smaller context"
        )
    starts = [number * (len(ids) - own) // (count - 1) for number in range(count)]
    return [begin + ids[start : start + own] for start in starts]


def _begins(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its begin-of-text token before a text."""
    begin = tokenizer.bos_token_id
    return begin is not None and tokenizer("a")["input_ids"][:1] == [begin]


def _checksum(windows: list[list[int]]) -> int:
    checksum = 0
    for window in windows:
        checksum = zlib.crc32(np.asarray(window, "<u4").tobytes(), checksum)
    return checksum


def _mapped(maps: HeadMaps, vectors: Array, positions: NDArray[np.uint32]) -> Array:
    """Vectors ``[heads, n, m]`` as they are coded, ``[heads·n, m]``."""
    return maps.apply_all(positions, vectors).reshape(-1, vectors.shape[-1])


def _frequencies(model: Any) -> Array:
    """The angles a position of the rotary embedding, in radians."""
    rotary = model.get_decoder().rotary_emb
    return np.asarray(rotary.inv_freq.detach().float().cpu().numpy())


def _output_moments(model: Any, layer: int, heads: int, m: int) -> NDArray[np.float64]:
    """``Wᵀ·W`` of the output projection's columns of each KV head's query group, ``[heads, m, m]``: what an error of a value
    does to the layer's output."""
    weight = model.get_decoder().layers[layer].self_attn.o_proj.weight
    columns = weight.detach().double().cpu().reshape(weight.shape[0], heads, -1, m)
    moments = np.einsum("ohgi,ohgj->hij", *[columns.numpy()] * 2, optimize=True)
    return np.ascontiguousarray(moments)


class _Reader:
    """Samples of keys and values of every layer, and sums of the queries' second moments, while a model reads windows."""

    def __init__(self, layers: int, heads: int, m: int, windows: int, context: int, vectors: int, seed: int) -> None:
        self.period = min(HELD_OUT, windows)
        held_out = windows // self.period
        self.quota = {
            False: min(max(vectors // heads // (windows - held_out), 1), context),
            True: min(max(HELD_OUT_VECTORS // heads // held_out, 1), context),
        }
        self.queries = np.zeros((layers, heads, m, m))
        self.seed = seed
        self.heads = heads
        #: Vectors of each head by layer, part and whether they are held out; positions by the last alone.
        self._vectors: dict[tuple[int, str, bool], list[Array]] = {}
        self._positions: dict[bool, list[NDArray[np.uint32]]] = {False: [], True: []}
        self.first = 0

    @property
    def kept(self) -> int:
        """Positions that are learned from."""
        return sum(map(len, self._positions[False]))

    def begin(self, number: int, length: int, longest: int) -> None:
        """Draws the positions of the next window that are kept, and where it begins: half of them at 0, the others at some
        position of each order of magnitude alike, so that keys are seen as they are turned in long texts."""
        rng = np.random.default_rng([self.seed, number])
        self.held_out = number % self.period == self.period - 1
        most = min(longest - length, LAST_POSITION)
        self.first = 0
        if rng.random() < 0.5 and most > length:
            self.first = int(np.exp(rng.uniform(np.log(length), np.log(most))))
        count = min(self.quota[self.held_out], length)
        self.rows = np.sort(rng.choice(length, count, replace=False))
        self._positions[self.held_out].append((self.first + self.rows).astype(np.uint32))

    def listening(self, model: Any) -> Any:
        """Lets the model's attention be seen, until the context ends."""
        return _listening(model, self)

    def see(self, layer: int, query: Any, key: Any, value: Any) -> None:
        """Keeps what it wants of a layer's queries, keys and values, ``[1, heads, t, m]``."""
        for part, vectors in (("keys", key), ("values", value)):
            own = vectors[0].float().cpu().numpy()[:, self.rows]
            if not np.isfinite(own).all():
                raise ValueError(f"the model gives {part} in layer {layer} that are a NaN or an infinity")
            self._vectors.setdefault((layer, part, self.held_out), []).append(own)
        if not self.held_out:
            queries = query[0, :, ::STRIDE].float()
            queries = queries.reshape(self.heads, -1, queries.shape[-1])
            self.queries[layer] += (queries.transpose(1, 2) @ queries).double().cpu().numpy()

    def sample(self, layer: int, part: str, *, held_out: bool) -> tuple[Array, NDArray[np.uint32]]:
        """Vectors ``[heads, n, m]`` and their positions ``[n]``; the reader gives them up."""
        vectors = np.concatenate(self._vectors.pop((layer, part, held_out)), axis=1)
        return vectors, np.concatenate(self._positions[held_out])


#: Who reads along, by a model's attention modules: models are learned from side by side.
_READERS: WeakKeyDictionary[Any, _Reader] = WeakKeyDictionary()


def _attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _READERS[module].see(module.layer_idx, query, key, value)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


class _listening:  # noqa: N801
    """A context in which a model's attention shows a reader what it is given."""

    def __init__(self, model: Any, reader: _Reader) -> None:
        self.model, self.reader = model, reader
        self.modules = [layer.self_attn for layer in model.get_decoder().layers]

    def __enter__(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        self.before = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        _READERS.update((module, self.reader) for module in self.modules)

    def __exit__(self, *error: object) -> None:
        self.model.set_attn_implementation(self.before)
        for module in self.modules:
            _READERS.pop(module, None)
