"""A cache of codes for transformers: ``model.generate(..., cache=LexicoCache(model, "dictionary.safetensors"))``.

Prompts attend exactly; what leaves the recent window is then kept as codes, and attention reads these directly. Models of
the classes ``LlamaForCausalLM``, ``MistralForCausalLM``, ``Qwen2ForCausalLM`` and ``Qwen3ForCausalLM``.

On the processor attention is Lexico's own. On other devices it is made of torch's operations: codes lie in the device's memory in about
twice the bytes, and a step takes a few operations for every atom of every head, which is slow (:mod:`lexico._device`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ._device import DeviceLayerCache
from ._lexico import Dictionaries, LayerCache, LexicoError, read_blocks, write_blocks
from ._models import identity, sliding_windows

__all__ = ["LexicoCache", "enable"]

#: Name of the attention function, and of the masks that belong to it.
NAME = "lexico"
#: Format of a saved cache.
FORMAT = "lexico-transformers/2"
#: Arguments of attention functions that change what attention is, which codes do not know.
_FOREIGN = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cu_seq_lens_k", "output_attentions")


def enable(model: PreTrainedModel) -> None:
    """Lets a model's attention read the codes of a :class:`LexicoCache`, which its constructor does too.

    With any other cache, and with none, the model then attends as with ``attn_implementation="sdpa"``. Raises
    :class:`~lexico.LexicoError` for a model whose attention cannot be replaced.
    """
    AttentionInterface.register(NAME, _attention)
    # Without masks of its own a model passes over padding, and does not say so.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise LexicoError(
            f"{type(model).__name__} does not let its attention be replaced, so that it cannot read codes"
        )


class LexicoCache(Cache):  # type: ignore[misc]
    """Keys and values of a batch of sequences as codes over the model's dictionaries.

    ``dictionaries`` are a file or :class:`~lexico.Dictionaries`; by default ``dictionary.safetensors`` in the model's folder.
    ``cache`` has the options of ``lexico run --cache``, as ``lexico:sparsity=12,window=128``. One cache serves one
    conversation, or one batch, from call to call.

    Raises :class:`~lexico.LexicoError` where the dictionaries are of another model, ``ValueError`` for options that
    cannot be, ``OSError`` where there is no such file.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dictionaries: str | PathLike[str] | Dictionaries | None = None,
        cache: str = "lexico",
    ) -> None:
        if dictionaries is None:
            dictionaries = Path(model.config._name_or_path) / "dictionary.safetensors"
        if not isinstance(dictionaries, Dictionaries):
            dictionaries = Dictionaries.load(dictionaries)
        dictionaries.check_fits(identity(model))
        enable(model)
        self.options = cache
        self.dictionaries = dictionaries
        self._padding = _Padding()
        layers = LayerCache.for_layers(dictionaries, cache, sliding_windows=sliding_windows(model))
        super().__init__(
            layers=[_Layer(layer, number, dictionaries, self._padding) for number, layer in enumerate(layers)]
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all layers and sequences, dictionaries aside."""
        return sum(sequence.nbytes for layer in self.layers for sequence in layer.sequences)

    @property
    def fp16_nbytes(self) -> int:
        """Bytes of the same keys and values in 16-bit floats."""
        sequences = (sequence for layer in self.layers for sequence in layer.sequences)
        return sum(4 * sequence.kv_heads * sequence.head_dim * len(sequence) for sequence in sequences)

    def footprint(self) -> dict[str, int]:
        """Bytes allocated, by part: codes, sinks, window, leaving, bookkeeping."""
        parts: dict[str, int] = {}
        for layer in self.layers:
            for sequence in layer.sequences:
                for name, count in sequence.footprint().items():
                    parts[name] = parts.get(name, 0) + count
        return parts

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the cache, compressed further: whole, or not at all."""
        self._check_whole()
        blocks = [
            (f"sequences.{number}.layers.{index}", sequence.save())
            for index, layer in enumerate(self.layers)
            for number, sequence in enumerate(layer.sequences)
        ]
        real = self._padding.real
        if real is not None:
            blocks.append(("real", real.to(torch.uint8).numpy().tobytes()))
        facts = json.dumps(
            {"cache": self.options, "sequences": max(self.batch_size, 0), "positions": self.get_seq_length()}
        )
        # Layers have checksums of their own.
        write_blocks(path, blocks, {"format": FORMAT, "facts": facts, "crc32": _checksum(facts, blocks)})

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: PreTrainedModel,
        dictionaries: str | PathLike[str] | Dictionaries | None = None,
    ) -> LexicoCache:
        """Reads a cache that :meth:`save` wrote, for the same model and dictionaries.

        Raises :class:`~lexico.LexicoError` where it is damaged or of others.
        """
        blocks, metadata = read_blocks(path)
        if metadata.get("format") != FORMAT:
            raise LexicoError(f"{path}: it is no cache that LexicoCache.save wrote, or one of another version")
        try:
            if metadata["crc32"] != _checksum(metadata["facts"], blocks.items()):
                raise LexicoError("it is damaged: its checksum differs")
            facts = json.loads(metadata["facts"])
            options, count, positions = str(facts["cache"]), int(facts["sequences"]), int(facts["positions"])
            real = blocks.pop("real", None)
            if real is not None:
                array = np.frombuffer(real, np.uint8).reshape(count, positions)
                real = torch.from_numpy(array.astype(bool))
            cache = cls(model, dictionaries, options)
            if len(blocks) != count * len(cache.layers):
                raise LexicoError("it does not hold every layer of every sequence")
            for index, layer in enumerate(cache.layers if count else []):
                layer.start(count, model.device)
                for number, sequence in enumerate(layer.sequences):
                    sequence.load(blocks[f"sequences.{number}.layers.{index}"])
                layer.seen = positions
        except (KeyError, TypeError, ValueError, LexicoError) as error:
            raise LexicoError(f"{path}: {error}") from error
        cache._padding.real = real
        return cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands a layer's new keys and values on to attention."""
        if layer_idx == 0:
            self._check_whole()
        handed: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return handed

    def _check_whole(self) -> None:
        """Refuses a cache whose layers hold different positions."""
        if any(layer.seen != self.layers[0].seen for layer in self.layers):
            raise LexicoError(
                "a step before broke off between two layers, so that they hold different positions; make a new cache"
            )

    @property
    def batch_size(self) -> int:
        """Sequences; −1 before the first step."""
        return len(self.layers[0].sequences) or -1

    @property
    def is_croppable(self) -> bool:
        """Codes cannot be taken back, so that ``generate`` refuses assisted decoding."""
        return False

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raises :class:`~lexico.LexicoError`."""
        raise LexicoError(
            "positions that were coded cannot be taken back, as assisted decoding asks for; generate without an assistant, "
            "or copy the cache before, with copy.deepcopy"
        )

    def reset(self) -> None:
        """Empties the cache."""
        self._padding.clear()
        super().reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Takes the sequences of these numbers, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence."""
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Takes the sequences of these numbers, or those for which a mask is true."""
        if self.batch_size < 0:
            return
        chosen = torch.arange(self.batch_size)[indices.cpu()]
        self._padding.select(chosen)
        for layer in self.layers:
            layer.select(chosen.tolist())


class _Padding:
    """Which positions of a batch are no padding; all layers share it, as they do a step's mask."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        #: ``[batch, seen]``; ``None`` where all positions are real.
        self.real: torch.Tensor | None = None
        #: The last mask, as long as it is there, where it began and how many positions were new.
        self._step: tuple[ref[torch.Tensor] | None, int, int] | None = None
        self._new: torch.Tensor | None = None

    def __deepcopy__(self, memo: object) -> _Padding:
        copied = _Padding()
        copied.real = self.real
        return copied

    def select(self, chosen: torch.Tensor) -> None:
        self._step = None
        if self.real is not None:
            self.real = self.real[chosen]

    def new(self, mask: torch.Tensor | None, batch: int, seen: int, t: int, window: int | None) -> torch.Tensor | None:
        """Which of the ``t`` new positions are real, ``[batch, t]``; ``None`` where all are.

        Refuses a mask that asks for anything but causal attention, behind the model's window, to what is no padding.
        """
        if mask is None and self.real is None:
            return None
        if self._step is not None and self._step[1:] == (seen, t):
            held = self._step[0]
            if (mask is None and held is None) or (held is not None and mask is not None and held() is mask):
                return self._new
        # Layers of two kinds, of which some have a window, have masks of two kinds.
        before = torch.ones(batch, seen, dtype=torch.bool) if self.real is None else self.real[:, :seen]
        if mask is None:
            new = torch.ones(batch, t, dtype=torch.bool)
        else:
            if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[-1] != seen + t:
                raise LexicoError(
                    f"an attention mask of {mask.dtype} {tuple(mask.shape)} is not supported; give the tokenizer's "
                    "attention_mask [batch, positions]"
                )
            given = mask[:, 0].cpu().expand(batch, t, seen + t)
            # Every position sees itself, unless it is padding.
            new = given[:, torch.arange(t), seen + torch.arange(t)]
        real = torch.cat([before, new], dim=1)
        if mask is not None:
            own, other = seen + torch.arange(t)[:, None], torch.arange(seen + t)[None, :]
            sees = other <= own
            if window is not None:
                sees &= other > own - window
            expected = sees & real[:, None, :]
            if not (given == expected)[new].all():
                if not given[:, -1, :seen][before].all():
                    raise LexicoError(
                        "the mask hides positions that were not hidden when they were read, as the padding that generate writes "
                        "after an answer that ends early; codes cannot be taken back: go on with a cache for each answer"
                    )
                raise LexicoError("attention masks other than of padding, in causal attention, are not supported")
        if window is not None and (real[:, :-1] & ~real[:, 1:]).any():
            raise LexicoError(
                "behind a sliding window padding must come first: set the tokenizer's padding_side to 'left'"
            )
        self.real = None if real.all() else real
        # Masks are large.
        self._step = None if mask is None else ref(mask), seen, t
        self._new = None if new.all() else new
        return self._new


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """A layer of a batch: a cache of codes for each sequence."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, empty: LayerCache, number: int, dictionaries: Dictionaries, padding: _Padding) -> None:
        super().__init__()
        self.sequences: list[LayerCache | DeviceLayerCache] = []
        #: Positions so far, padding among them.
        self.seen = 0
        self._empty = empty
        self._number = number
        self._dictionaries = dictionaries
        self._padding = padding
        self._device = torch.device("cpu")
        #: The empty cache in a device's memory, with the dictionaries.
        self._on_device: tuple[torch.device, DeviceLayerCache] | None = None
        #: Keys that were handed out to be attended with.
        self._waiting = False

    def start(self, batch: int, device: torch.device | None = None) -> None:
        """Makes empty caches for so many sequences."""
        empty: LayerCache | DeviceLayerCache = self._empty
        self._device = torch.device("cpu") if device is None else device
        if self._device.type != "cpu":
            if self._on_device is None or self._on_device[0] != self._device:
                made = DeviceLayerCache.of(self._empty, self._dictionaries, self._number, self._device)
                self._on_device = self._device, made
            empty = self._on_device[1]
        self.sequences = [empty.fork() for _ in range(batch)]
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.start(key_states.shape[0], key_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands the new keys and values on to :func:`_attention`, which finds the layer by the keys and appends them."""
        if self._waiting:
            raise LexicoError(
                "the model's attention has not read the codes of the step before: something replaced its implementation after "
                "lexico.transformers.enable(model), or broke off; make a new cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, own = key_states.shape[0], len(self.sequences)
        if batch != own:
            raise LexicoError(f"a batch of {batch} sequences for a cache of {own}; make a new cache, or call reset()")
        if key_states.device != self._device:
            raise LexicoError(
                f"the model is on {key_states.device}, and the codes are on {self._device}; make a new cache"
            )
        self._waiting = True
        key_states._lexico_layer = self
        return key_states, value_states

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
    ) -> torch.Tensor:
        """Attention ``[batch, t, heads, m]`` of ``query`` ``[batch, heads, t, m]`` over all positions so far and the new ones,
        which are then appended."""
        batch, _, t, m = query.shape
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            raise LexicoError("codes have no gradients: call the model under torch.no_grad()")
        new = self._padding.new(mask, batch, self.seen, t, self._empty.sliding_window)
        # A prompt attends as it would without codes.
        exact = None
        if self.seen == 0:
            exact, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
        if exact is None and scaling is not None:
            # The codec's own scale is 1/√m.
            factor = scaling * m**0.5
            query = query if abs(factor - 1) < 1e-6 else query * factor
        outs: list[torch.Tensor] = []
        for number, sequence in enumerate(self.sequences):
            queries, keys, values = query[number], key[number], value[number]
            rows = None
            if new is not None:
                rows = new[number].nonzero()[:, 0].to(key.device)
                if rows.numel() == 0:
                    # Outputs of padding are zeros.
                    outs.append(query.new_zeros(t, query.shape[1], m))
                    continue
                queries, keys, values = queries[:, rows], keys[:, rows], values[:, rows]
            attended = None
            if isinstance(sequence, DeviceLayerCache):
                if exact is None:
                    attended = sequence.attend(queries, keys, values)
                sequence.append(keys, values)
            else:
                own_keys, own_values = _array(keys), _array(values)
                if exact is None:
                    attended = torch.from_numpy(sequence.attend(_array(queries), own_keys, own_values))
                sequence.append(own_keys, own_values)
            if attended is not None:
                attended = attended.transpose(0, 1).to(query)
                if rows is not None:
                    attended = query.new_zeros(t, query.shape[1], m).index_copy_(0, rows, attended)
                outs.append(attended)
        out = torch.stack(outs) if exact is None else exact
        self.seen += t
        self._waiting = False
        return out

    def select(self, chosen: list[int]) -> None:
        """Takes the sequences of these numbers; one that is taken again shares its codes."""
        taken: set[int] = set()
        sequences = []
        for number in chosen:
            own = self.sequences[number]
            sequences.append(own.fork() if number in taken else own)
            taken.add(number)
        self.sequences = sequences

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    #: Its name in earlier versions.
    get_max_cache_shape = get_max_length

    def offload(self) -> None:
        """Does nothing: codes are small, and stay where they are."""

    def prefetch(self) -> None:
        """Does nothing, as :meth:`offload`."""

    def reset(self) -> None:
        self.sequences = []
        self.is_initialized = False
        self.seen = 0
        self._waiting = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select(beam_idx.tolist())

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise LexicoError("positions that were coded cannot be taken back")


def _checksum(facts: str, blocks: Iterable[tuple[str, bytes]]) -> str:
    """The checksum of what no layer's own is of."""
    real = dict(blocks).get("real", b"")
    return f"{zlib.crc32(facts.encode() + real):08x}"


def _array(x: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A tensor's numbers; no copy where they are f32 already."""
    return np.asarray(x.detach().float().numpy())


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that models call: over the codes of the layer that handed the keys out, else SDPA."""
    layer = getattr(key, "_lexico_layer", None)
    if layer is None:
        # Where a model knows no argument of that name it passes it on, and makes a cache of its own.
        if isinstance(kwargs.get("cache"), LexicoCache):
            raise LexicoError(
                "this version of transformers calls the argument past_key_values: model(…, past_key_values=cache)"
            )
        if kwargs.get("s_aux") is not None:
            raise LexicoError("attention with learned sinks (s_aux) is not supported")
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return out, None
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None and kwargs[name] is not False]
    if is_causal is False:
        foreign.append("is_causal=False")
    if dropout:
        foreign.append("dropout")
    if foreign:
        raise LexicoError(f"attention over codes does not know {', '.join(foreign)}; use another cache")
    if sliding_window is not None and sliding_window != layer._empty.sliding_window:
        raise LexicoError(
            f"a layer with a sliding window of {sliding_window}, in a cache made for {layer._empty.sliding_window}"
        )
    return layer.attend(module, query, key, value, attention_mask, scaling), None
