"""The cache of a layer in a device's memory, in torch's own operations.

It holds and attends to the same codes as :class:`~lexico.LayerCache`, and costs more: an index takes two bytes, as a
coefficient does, so that codes are about twice as large; a step goes through every head's codes atom by atom, with temporary
numbers for every position; what leaves the recent window goes to the processor to be coded, and comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._lexico import Codebooks, Dictionaries, Dictionary, HeadMaps, LayerCache, LexicoError

#: Positions of a block, and the angle in radians that slow pairs turn by within it at the most.
_BLOCK, _SLOW = 64, 0.1


class _Part:
    """What a layer's keys, or its values, are coded with, on a device."""

    def __init__(
        self, dictionaries: Dictionaries, layer: int, part: str, settings: dict[str, Any], device: Any
    ) -> None:
        name: Any = part
        self.settings = settings
        self.sparsities: list[int] = settings[part]
        coder = dictionaries.codebooks if settings["format"] == "additive" else dictionaries.dictionary
        own: Codebooks | Dictionary | None = coder(layer, name)
        if own is None:
            raise LexicoError(f"layer {layer} has nothing to code {part} with")
        self.coder = own
        atoms = own.atoms
        if isinstance(own, Codebooks):
            # Codes of s atoms are over the first s codebooks.
            atoms = atoms[: own.first + 256 * (max(self.sparsities) - 1)]
        self.atoms = torch.from_numpy(atoms).to(device)
        maps: HeadMaps | None = dictionaries.maps(layer, name) if isinstance(own, Codebooks) else None
        self.mapped = maps is not None
        if maps is None:
            return
        if maps.joint_heads > 1:
            raise LexicoError(
                f"layer {layer}: {maps.joint_heads} heads are coded together, which works on the processor alone; move the model there"
            )
        self.means = torch.from_numpy(maps.means).to(device)[:, None]
        self.matrices = torch.from_numpy(maps.matrices).to(device)
        self.inverses = torch.from_numpy(maps.inverses).to(device)
        self.angles = self.rotary_means = None
        if maps.frequencies is not None and maps.rotary_means is not None:
            # Apple's GPUs have no numbers of 64 bits.
            exact = torch.device("cpu") if torch.device(device).type == "mps" else device
            self.angles = torch.from_numpy(maps.frequencies.astype(np.float64)).to(exact)
            self.rotary_means = torch.from_numpy(maps.rotary_means).to(device)

    def apply(self, vectors: Tensor) -> Tensor:
        """``A(x − μ)`` of vectors ``[heads, n, m]``."""
        return (vectors - self.means) @ self.matrices.transpose(1, 2) if self.mapped else vectors

    def invert(self, vectors: Tensor) -> Tensor:
        """``A⁻¹y + μ`` of vectors ``[heads, n, m]``."""
        return vectors @ self.inverses.transpose(1, 2) + self.means if self.mapped else vectors

    def queries(self, queries: Tensor) -> Tensor:
        """``A⁻ᵀq`` of queries ``[heads, n, m]``."""
        return queries @ self.inverses if self.mapped else queries

    def turned(self, first: int, count: int) -> Tensor | None:
        """The means before the rotary embedding as they are at positions, ``[heads, count, m]``; ``None`` without any."""
        if not self.mapped or self.angles is None or self.rotary_means is None:
            return None
        positions = torch.arange(first, first + count, device=self.angles.device, dtype=torch.float64)
        # As the codec has it: slow pairs turn by the angle of the middle of their block, all of it alike.
        middles = positions // _BLOCK * _BLOCK + (_BLOCK - 1) / 2
        slow = self.angles.abs() * _BLOCK <= _SLOW
        angles = torch.where(slow, middles[:, None], positions[:, None]) * self.angles
        cosines, sines = (own.float().to(self.rotary_means.device) for own in (angles.cos(), angles.sin()))
        pairs = angles.shape[1]
        out = self.rotary_means[:, None].repeat(1, count, 1)
        x, y = self.rotary_means[:, None, :pairs], self.rotary_means[:, None, pairs : 2 * pairs]
        out[..., :pairs] = x * cosines - y * sines
        out[..., pairs : 2 * pairs] = y * cosines + x * sines
        return out

    def encode(self, vectors: Tensor, first: int) -> list[tuple[Tensor, Tensor]]:
        """The codes of mapped vectors ``[heads, n, m]`` from a position on: of each head indices ``[n, s]`` and coefficients
        ``[n, s]``, or ``[n, 1]``."""
        turned = self.turned(first, vectors.shape[1])
        if turned is not None:
            vectors = vectors - turned @ self.matrices.transpose(1, 2)
        codes = []
        for own, sparsity in zip(vectors.cpu().numpy(), self.sparsities, strict=True):
            fit = self.settings["fit"]
            if isinstance(self.coder, Codebooks):
                found = self.coder.encode(own, sparsity, beam=self.settings["beam"], fit=fit)
                # One of the 32 scales that stored codes have.
                numbers = np.exp2(np.round(np.log2(found.coefficients[:, :1]) * 32).clip(0, 31) / 32)
            else:
                tolerance = self.settings["tolerance"]
                found = self.coder.encode(own, sparsity, coefficients="f32", tolerance=tolerance, fit=fit)
                numbers = found.coefficients
            indices = torch.from_numpy(found.indices.astype(np.int16)).to(vectors.device)
            codes.append((indices, torch.from_numpy(numbers).to(vectors.device, torch.float16)))
        return codes


def _dense(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as they are kept: what is larger than a 16-bit float can be is the largest, as in the codec."""
    most = torch.finfo(dtype).max
    return rows.clamp(-most, most).to(dtype)


def _indices(codes: Tensor, atom: int) -> Tensor:
    """Numbers of the atoms at a place of codes, ``[n]``, out of 16 bits without a sign."""
    return codes[:, atom].long() & 0xFFFF


@dataclass
class DeviceLayerCache:
    """A :class:`~lexico.LayerCache` in a device's memory; rows are mapped where there are maps."""

    keys: _Part
    values: _Part
    kv_heads: int
    head_dim: int
    sliding_window: int | None
    dropped: int = 0
    #: First positions and recent window, of keys and of values, ``[heads, n, m]``.
    sinks: list[Tensor] = field(default_factory=list)
    recent: list[Tensor] = field(default_factory=list)
    #: Of keys and values, of each head: indices and coefficients.
    codes: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)

    @classmethod
    def of(cls, empty: LayerCache, dictionaries: Dictionaries, layer: int, device: Any) -> DeviceLayerCache:
        """An empty one with the settings of another."""
        settings = empty.settings
        if settings["memory"] is not None:
            raise LexicoError("cache: memory=… is for the processor; on a GPU give window=…")
        keys, values = (_Part(dictionaries, layer, part, settings, device) for part in ("keys", "values"))
        dtype = torch.float16 if settings["dense"] == "f16" else torch.float32
        none = torch.zeros(empty.kv_heads, 0, empty.head_dim, dtype=dtype, device=device)
        codes = [part.encode(none.float(), 0) for part in (keys, values)]
        shape = (empty.kv_heads, empty.head_dim, empty.sliding_window)
        return cls(keys, values, *shape, 0, [none, none], [none, none], codes)

    def __len__(self) -> int:
        return int(self.sinks[0].shape[1] + self.coded + self.recent[0].shape[1])

    @property
    def coded(self) -> int:
        """Positions held as codes."""
        return int(self.codes[0][0][0].shape[0])

    def footprint(self) -> dict[str, int]:
        """Bytes, by part."""
        codes = [tensor for part in self.codes for head in part for tensor in head]
        return {
            "codes": sum(tensor.nbytes for tensor in codes),
            "sinks": sum(tensor.nbytes for tensor in self.sinks),
            "window": sum(tensor.nbytes for tensor in self.recent),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.footprint().values())

    def fork(self) -> DeviceLayerCache:
        """A copy that goes on by itself; tensors are shared, since none is changed."""
        codes = [list(part) for part in self.codes]
        shape = (self.kv_heads, self.head_dim, self.sliding_window, self.dropped)
        return DeviceLayerCache(self.keys, self.values, *shape, list(self.sinks), list(self.recent), codes)

    def __deepcopy__(self, memo: object) -> DeviceLayerCache:
        return self.fork()

    def save(self) -> bytes:
        raise LexicoError("caches in a device's memory are not saved; move the model to the processor")

    def load(self, saved: bytes) -> None:
        raise LexicoError("caches in a device's memory are not loaded; move the model to the processor")

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Takes new positions, ``[kv_heads, t, m]``, and codes what the recent window cannot hold."""
        settings = self.keys.settings
        new = [self.keys.apply(keys.float()), self.values.apply(values.float())]
        if not all(bool(own.isfinite().all()) for own in new):
            raise LexicoError("keys or values are a NaN or an infinity, and cannot be coded")
        count = 0
        if self.coded + self.recent[0].shape[1] == 0:
            count = min(settings["sinks"] - self.sinks[0].shape[1], keys.shape[1])
        dtype = self.recent[0].dtype
        first = self.dropped + self.sinks[0].shape[1] + count + self.coded
        surplus = self.recent[0].shape[1] + keys.shape[1] - count - settings["window"]
        surplus = surplus if surplus >= settings["batch"] else 0
        for number, (part, own) in enumerate(zip((self.keys, self.values), new, strict=True)):
            self.sinks[number] = torch.cat([self.sinks[number], _dense(own[:, :count], dtype)], 1)
            rows = torch.cat([self.recent[number].float(), own[:, count:]], 1)
            if surplus:
                both = zip(self.codes[number], part.encode(rows[:, :surplus], first), strict=True)
                self.codes[number] = [
                    (torch.cat([before[0], more[0]]), torch.cat([before[1], more[1]])) for before, more in both
                ]
            self.recent[number] = _dense(rows[:, surplus:], dtype)
        if self.sliding_window is not None:
            outside = len(self) - (self.sliding_window - 1)
            if outside >= 64:
                self._drop(min(outside, self.sinks[0].shape[1] + self.coded))

    def _drop(self, count: int) -> None:
        sinks = min(count, self.sinks[0].shape[1])
        coded = count - sinks
        self.dropped += count
        self.sinks = [rows[:, sinks:] for rows in self.sinks]
        self.codes = [
            [(codes[coded:].clone(), numbers[coded:].clone()) for codes, numbers in part] for part in self.codes
        ]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of ``queries`` ``[heads, t, m]`` over all positions held and, causally, over ``t`` new ones."""
        heads, t, m = queries.shape
        group = heads // self.kv_heads
        plain = queries.float().reshape(self.kv_heads, group * t, m) / m**0.5
        asked = self.keys.queries(plain)
        held, sinks = len(self), self.sinks[0].shape[1]
        new = [self.keys.apply(keys.float()), self.values.apply(values.float())]
        dense = [[own[number].float() for own in (self.sinks, self.recent)] + [new[number]] for number in (0, 1)]
        coded = torch.zeros(self.kv_heads, group * t, self.coded, device=queries.device)
        products = asked @ self.keys.atoms.T
        for head, (indices, numbers) in enumerate(self.codes[0]):
            for atom in range(indices.shape[1]):
                scale = numbers[:, min(atom, numbers.shape[1] - 1)].float()
                coded[head] += products[head][:, _indices(indices, atom)] * scale
        turned = self.keys.turned(self.dropped + sinks, self.coded)
        if turned is not None:
            coded += plain @ turned.transpose(1, 2)
        parts = [asked @ rows.transpose(1, 2) for rows in dense[0]]
        scores = torch.cat([parts[0], coded, *parts[1:]], 2)
        # Query i of the new ones is at position held + i.
        own = held + torch.arange(t, device=queries.device).repeat(group)[:, None]
        other = torch.arange(held + t, device=queries.device)[None]
        hidden = other > own
        if self.sliding_window is not None:
            hidden |= other <= own - self.sliding_window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        first, of_codes, recent, last = weights.split([sinks, self.coded, self.recent[0].shape[1], t], 2)
        out = first @ dense[1][0] + recent @ dense[1][1] + last @ dense[1][2]
        summed = torch.zeros(self.kv_heads, group * t, self.values.atoms.shape[0], device=queries.device)
        for head, (indices, numbers) in enumerate(self.codes[1]):
            for atom in range(indices.shape[1]):
                scale = numbers[:, min(atom, numbers.shape[1] - 1)].float()
                summed[head].index_add_(1, _indices(indices, atom), of_codes[head] * scale)
        out = self.values.invert(out + summed @ self.values.atoms)
        return out.reshape(heads, t, m)
