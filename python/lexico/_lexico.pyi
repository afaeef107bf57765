"""The codec, on numpy arrays.

Arrays that are ``float32`` and C-contiguous are read where they lie; others, and whatever ``numpy.asarray`` takes, are
converted first. Shapes: ``m`` is the head dim, the length of a vector; ``n`` a number of vectors; ``N`` a number of
atoms; ``s`` the sparsity, the atoms of a code. Work on arrays lets other threads of Python go on.

Wrong arguments raise ``ValueError`` (``TypeError`` where they are no numbers, ``OverflowError`` for a negative count), files that
cannot be read or written ``OSError``, files and saved caches that are damaged or of other dictionaries :class:`LexicoError`.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Literal, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

__version__: str
EFFORTS: dict[str, tuple[int, int, dict[str, int]]]
"""Tokens, vectors, and arguments of :func:`learn_codebooks`, by effort."""

_Part = Literal["keys", "values"]
_Fit = Literal["unbiased", "least-squares"]
_Progress = Callable[[int, int], object]

class LexicoError(Exception):
    """A file, dictionaries or saved caches that cannot be used, and why."""

@final
class Dictionary:
    """``N`` atoms of unit length, for sparse codes: any ``s`` atoms, each with a coefficient.

    >>> import numpy as np, lexico
    >>> dictionary = lexico.Dictionary(np.eye(4))
    >>> codes = dictionary.encode([[3.0, 0.0, -4.0, 0.0]], sparsity=2, coefficients="f32")
    >>> codes.indices
    array([[2, 0]], dtype=uint16)
    >>> codes.decode()
    array([[ 3.,  0., -4.,  0.]], dtype=float32)
    """

    def __new__(cls, atoms: ArrayLike) -> Dictionary:
        """Takes atoms ``[N, m]``, rows of unit length, at most 65,536.

        Raises ``ValueError`` where a row is not of unit length or not finite.
        """

    @property
    def head_dim(self) -> int:
        """``m``."""

    @property
    def atoms(self) -> NDArray[np.float32]:
        """A copy of the atoms, ``[N, m]``."""

    def __len__(self) -> int:
        """``N``."""

    def encode(
        self,
        vectors: ArrayLike,
        sparsity: int,
        *,
        coefficients: Literal["i8", "f8", "f32"] = "i8",
        tolerance: float = 0.0,
        fit: _Fit = "unbiased",
    ) -> Codes:
        """Finds codes of ``vectors`` ``[n, m]`` by orthogonal matching pursuit.

        ``coefficients`` says how each is stored; ``tolerance``, a relative error from 0 to below 1, where a vector needs
        no more atoms. ``fit="unbiased"`` keeps the length that a query along a vector sees, ``"least-squares"`` is nearest
        to the vector. Raises ``ValueError`` for a sparsity above ``min(m, N)`` and for vectors that are not finite.
        """

@final
class Codebooks:
    """Codebooks of atoms of any length, for additive codes: the sum of one atom of each of the first ``s`` codebooks."""

    def __new__(cls, atoms: ArrayLike, first: int) -> Codebooks:
        """Takes atoms ``[N, m]``: a first codebook of ``first``, up to 2,048, then others of 256 each.

        Raises ``ValueError`` where they do not fill codebooks or one is not finite.
        """

    @property
    def head_dim(self) -> int:
        """``m``."""

    @property
    def first(self) -> int:
        """Atoms of the first codebook."""

    @property
    def atoms(self) -> NDArray[np.float32]:
        """A copy of the atoms, ``[N, m]``."""

    def __len__(self) -> int:
        """Number of codebooks, and so the largest sparsity."""

    def encode(self, vectors: ArrayLike, sparsity: int, *, beam: int = 8, fit: _Fit = "unbiased") -> Codes:
        """Finds codes of ``vectors`` ``[n, m]`` by beam search, which follows ``beam`` sums of each.

        Raises ``ValueError`` for a sparsity above the number of codebooks and for vectors that are not finite.
        """

@final
class Codes:
    """Codes of ``n`` vectors, as they are stored."""

    def __len__(self) -> int:
        """``n``."""

    @property
    def sparsity(self) -> int:
        """``s``."""

    @property
    def nbytes(self) -> int:
        """Bytes that the codes take."""

    @property
    def lengths(self) -> NDArray[np.uint16]:
        """Atoms of each vector, ``[n]``."""

    @property
    def indices(self) -> NDArray[np.uint16]:
        """Numbers of the atoms, ``[n, s]``, among those of all codebooks; 0 beyond a vector's length."""

    @property
    def coefficients(self) -> NDArray[np.float32]:
        """Coefficients before they are rounded to be stored, ``[n, s]``; of additive codes a vector's scale."""

    @property
    def relative_errors(self) -> NDArray[np.float32]:
        """``‖x − x̂‖ / ‖x‖`` of each vector by least squares, ``[n]``; 0 of a zero vector."""

    def decode(self) -> NDArray[np.float32]:
        """The vectors that the stored codes stand for, ``[n, m]``."""

@final
class HeadMaps:
    """The maps of a layer's KV heads, behind which additive codes are found: ``A(x − μ − Rₜb)``, ``x = A⁻¹y + μ + Rₜb``.

    ``b`` is the mean of keys before their rotary embedding ``Rₜ`` at position ``t``; values have none.
    """

    def __new__(
        cls,
        means: ArrayLike,
        matrices: ArrayLike,
        *,
        frequencies: ArrayLike | None = None,
        rotary_means: ArrayLike | None = None,
        basis: ArrayLike | None = None,
    ) -> HeadMaps:
        """Takes ``μ`` ``[heads, m]`` and ``A`` ``[heads, m, m]``; the angles a position, in radians, of the pairs of numbers
        that turn, ``[pairs]``, and ``b`` ``[heads, m]``; the orthonormal bases of heads that are coded ``h`` together,
        ``[heads / h, h·m, h·m]``.

        Raises ``ValueError`` where a matrix cannot be inverted, or a basis is not orthonormal.
        """

    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def means(self) -> NDArray[np.float32]:
        """``μ``, ``[heads, m]``."""

    @property
    def matrices(self) -> NDArray[np.float32]:
        """``A``, ``[heads, m, m]``."""

    @property
    def inverses(self) -> NDArray[np.float32]:
        """``A⁻¹``, ``[heads, m, m]``."""

    @property
    def frequencies(self) -> NDArray[np.float32] | None:
        """Angles a position, ``[pairs]``."""

    @property
    def rotary_means(self) -> NDArray[np.float32] | None:
        """``b``, ``[heads, m]``."""

    @property
    def basis(self) -> NDArray[np.float32] | None:
        """The bases of heads that are coded together, ``[groups, h·m, h·m]``."""

    @property
    def joint_heads(self) -> int:
        """``h``, heads that are coded together; 1 where each is coded alone."""

    def apply_all(self, positions: Sequence[int] | NDArray[np.integer[Any]], vectors: ArrayLike) -> NDArray[np.float32]:
        """Vectors ``[heads, n, m]`` of all heads at ``positions`` ``[n]`` as they are coded, of the same shape."""

    def invert_all(
        self, positions: Sequence[int] | NDArray[np.integer[Any]], vectors: ArrayLike
    ) -> NDArray[np.float32]:
        """Decoded vectors ``[heads, n, m]`` at ``positions`` ``[n]`` as the model made them, of the same shape."""

    def apply(
        self, head: int, positions: Sequence[int] | NDArray[np.integer[Any]], vectors: ArrayLike
    ) -> NDArray[np.float32]:
        """Vectors ``[n, m]`` of a head at ``positions`` ``[n]`` as they are coded, ``[n, m]``.

        Raises ``ValueError`` where heads are coded together.
        """

    def invert(
        self, head: int, positions: Sequence[int] | NDArray[np.integer[Any]], vectors: ArrayLike
    ) -> NDArray[np.float32]:
        """Decoded vectors ``[n, m]`` of a head at ``positions`` ``[n]`` as the model made them, ``[n, m]``.

        Raises ``ValueError`` where heads are coded together.
        """

@final
class Dictionaries:
    """The dictionaries, codebooks and maps of every layer of a model: what ``lexico train`` and :func:`lexico.learn` write."""

    def __new__(
        cls,
        model: dict[str, Any],
        training: dict[str, Any],
        layers: Sequence[dict[str, tuple[Any, Any]]],
    ) -> Dictionaries:
        """Takes the identity of the model (:attr:`model`), a record of how they were learned, and of each layer
        ``{"dictionaries": (keys, values), "codebooks": (keys, values), "maps": (keys, values)}``, of which some may be
        left out, the same in all layers.
        """

    @staticmethod
    def load(path: str | PathLike[str]) -> Dictionaries:
        """Reads a file and checks all of it."""

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a file that :meth:`load` and ``lexico run --dictionary`` read, atoms in half precision: whole, or not at all."""

    def __len__(self) -> int:
        """Layers."""

    @property
    def model(self) -> dict[str, Any]:
        """The model they are for: name, architecture, layers, kv_heads, head_dim, rotary."""

    @property
    def training(self) -> dict[str, Any]:
        """How they were learned."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def max_sparsity(self, *, additive: bool) -> int:
        """The largest sparsity of additive codes, or of sparse ones; 0 where there is nothing that they could be over."""

    def dictionary(self, layer: int, part: _Part) -> Dictionary | None:
        """The dictionary for sparse codes of a layer's keys or values."""

    def codebooks(self, layer: int, part: _Part) -> Codebooks | None:
        """The codebooks for additive codes."""

    def maps(self, layer: int, part: _Part) -> HeadMaps | None:
        """The maps behind which additive codes are found."""

    def check_fits(self, model: dict[str, Any]) -> None:
        """Checks that they serve a model of this identity, of which the name may differ.

        Raises :class:`LexicoError`, which says what differs.
        """

@final
class LayerCache:
    """Keys and values of one layer of one sequence: the past as codes, the first and the newest positions dense.

    A step attends with its own keys and values at full precision, then appends them:

    >>> import numpy as np, lexico
    >>> rng = np.random.default_rng(0)
    >>> codebooks = lexico.Codebooks(rng.standard_normal((64 + 7 * 256, 16)), first=64)
    >>> model = {"name": "none", "architecture": "none", "layers": 1, "kv_heads": 2, "head_dim": 16,
    ...          "rotary": {"kind": "default", "theta": 10000.0}}
    >>> training = {"sparsity": 2, "corpus": [], "tokens": 0, "relative_error": [], "tool": "none"}
    >>> layer = {"codebooks": (codebooks, codebooks)}
    >>> dictionaries = lexico.Dictionaries(model, training, [layer])
    >>> cache = lexico.LayerCache(dictionaries, 0, "lexico:sparsity=4,window=32")
    >>> keys, values = rng.standard_normal((2, 2, 500, 16)).astype(np.float32)
    >>> cache.append(keys, values)
    >>> queries = rng.standard_normal((6, 1, 16))  # three heads share a KV head
    >>> cache.attend(queries).shape
    (6, 1, 16)
    >>> len(cache), cache.coded
    (500, 464)
    """

    def __new__(
        cls,
        dictionaries: Dictionaries,
        layer: int,
        cache: str = "lexico",
        *,
        sliding_window: int | None = None,
        first_position: int = 0,
    ) -> LayerCache:
        """Makes an empty cache. ``cache`` has the options that ``--cache`` has: ``lexico:sparsity=12,window=128``.

        ``sliding_window`` are the positions that a query sees, its own among them. ``first_position`` is the number of the
        first position to come, which the rotary embedding of keys depends on. Raises ``ValueError`` for options that are
        not known or cannot be, ``IndexError`` where there is no such layer.
        """

    @staticmethod
    def for_layers(
        dictionaries: Dictionaries,
        cache: str = "lexico",
        *,
        sliding_windows: Sequence[int | None] | None = None,
        first_position: int = 0,
    ) -> list[LayerCache]:
        """Makes empty caches of all layers; ``sliding_windows`` has one of each."""

    def __len__(self) -> int:
        """Positions held."""

    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def sliding_window(self) -> int | None: ...
    @property
    def settings(self) -> dict[str, Any]:
        """Format, beam, tolerance, fit; atoms of each KV head's keys and values; sinks, window, batch, dense."""

    @property
    def coded(self) -> int:
        """Positions held as codes."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated, dictionaries aside."""

    def footprint(self) -> dict[str, int]:
        """Bytes allocated, by part: codes, sinks, window, leaving, bookkeeping."""

    def append(self, keys: ArrayLike, values: ArrayLike) -> None:
        """Takes new positions, ``[kv_heads, t, m]``, keys after their rotary embedding: one is a step of decoding, several
        are a prompt. Raises ``ValueError`` where a number is not finite; the cache is then as it was. Where numbers are so large
        that they cannot be coded it raises too, and the cache cannot be used any further.
        """

    def attend(
        self, queries: ArrayLike, keys: ArrayLike | None = None, values: ArrayLike | None = None
    ) -> NDArray[np.float32]:
        """Attention of ``queries`` over all positions held and, causally, over ``t`` new ones, which are not appended.

        ``queries`` are ``[heads, t, m]``, heads that share a KV head one after the other, or ``[kv_heads, G, t, m]``;
        ``keys`` and ``values`` ``[kv_heads, t, m]``. Without new positions ``t`` is 1. Scores are scaled by ``1/√m``. Returns
        an array of the queries' shape; zeros where there is nothing to attend to.
        """

    def drop(self, count: int) -> None:
        """Drops the ``count`` oldest positions. Raises ``ValueError`` where there are fewer."""

    def fork(self) -> LayerCache:
        """A copy that goes on by itself; both share the codes that are there."""

    def __deepcopy__(self, memo: object) -> LayerCache: ...
    def decode(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of all positions as attention takes them, ``[kv_heads, n, m]`` each."""

    def save(self) -> bytes:
        """All that it holds, compressed further, with a checksum."""

    def load(self, saved: bytes) -> None:
        """Makes this cache, of the same dictionaries and settings, the one that :meth:`save` was called of.

        Raises :class:`LexicoError` where it is damaged or of others; the cache is then as it was.
        """

def learn_codebooks(
    vectors: ArrayLike,
    held_out: ArrayLike | None = None,
    *,
    codebooks: int | None = None,
    first: int = 2048,
    sparsity: int | None = None,
    rounds: int = 8,
    vectors_per_round: int = 32768,
    beam: int = 4,
    seed: int = 0,
    progress: _Progress | None = None,
) -> tuple[Codebooks, float | None]:
    """Learns codebooks for ``vectors`` ``[n, m]``; returns them, in 8 bits, and the mean relative error of
    ``held_out`` ``[n', m]`` at ``sparsity``, ``None`` without any.

    By default there are ``m/2`` codebooks, judged at a sparsity of ``3m/16``. The same seed gives the same ones on any
    number of threads. ``progress(step, steps)`` is called throughout; what it raises, or Ctrl-C, ends the learning.
    """

def learn_dictionary(
    vectors: ArrayLike,
    held_out: ArrayLike | None = None,
    *,
    atoms: int = 4096,
    sparsity: int = 8,
    epochs: int = 24,
    batch: int = 512,
    learning_rate: float = 1e-2,
    patience: int = 3,
    seed: int = 0,
    progress: _Progress | None = None,
) -> tuple[Dictionary, float | None]:
    """Learns a dictionary for sparse codes of ``vectors`` ``[n, m]``, at least as many as ``atoms``; as
    :func:`learn_codebooks` otherwise. Learning ends after ``patience`` epochs in a row without a lower held-out error.
    """

def head_maps(
    vectors: ArrayLike,
    moments: NDArray[np.float64],
    *,
    frequencies: ArrayLike | None = None,
    positions: Sequence[int] | NDArray[np.integer[Any]] | None = None,
    joint_heads: int = 1,
) -> HeadMaps:
    """Makes the maps of a layer's keys, or values, out of vectors of each head, ``[heads, n, m]``, and of second moments
    ``[heads, m, m]`` of what they are multiplied with: queries, or the rows of the output projection.

    With ``frequencies`` ``[pairs]`` and ``positions`` ``[n]`` keys are coded without their means before the rotary embedding. With
    ``joint_heads`` so many heads are coded together, in the basis of their principal components.
    """

def write_blocks(path: str | PathLike[str], blocks: Sequence[tuple[str, bytes]], metadata: dict[str, str]) -> None:
    """Writes named bytes and texts as a safetensors file: whole, or not at all."""

def read_blocks(path: str | PathLike[str]) -> tuple[dict[str, bytes], dict[str, str]]:
    """Reads what :func:`write_blocks` wrote."""

class BusyError(LexicoError):
    """An engine whose memory or places are taken by other texts: ask again a little later."""

class EndedError(LexicoError):
    """An engine that has ended, or is about to."""

@final
class Engine:
    """A loaded model that writes texts, many at once: the engine of ``lexico serve`` without its HTTP, tokens in and tokens out.

    Scheduler, memory, prefixes, prefix store and figures are the server's, and so are the settings, which docs/SERVING.md
    explains.
    """

    def __new__(
        cls,
        model: str,
        *,
        dictionary: str | PathLike[str] | None = None,
        cache: str = "lexico",
        kv_memory: int = ...,
        quantize: str = "none",
        alias: str | None = None,
        parallel: int = 32,
        ctx_size: int = 0,
        n_predict: int = 2048,
        ubatch_size: int = 256,
        prefix_store: str | None = None,
        prefix_store_size: int = ...,
        kv_events: str | None = None,
        max_waiting: int = 1024,
        queue_timeout: float = 60.0,
        log_level: str | None = None,
    ) -> Engine:
        """Loads a folder in Hugging Face layout, a GGUF file, or a name on the hub, with the dictionaries that are named, else
        those beside the model. Sizes are in bytes. With ``log_level``, ``info`` say, a log is written to stderr.

        Raises ``ValueError`` for a setting that cannot be, ``OSError`` for files that cannot be read, and :class:`LexicoError`
        for those that cannot be used.
        """

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def context(self) -> int:
        """Tokens of a text at the most, its prompt included."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a block, by which routers count: those of a prompt that are read in one step."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, as a text of the whole context has them in the mean."""

    @property
    def begin_token(self) -> int | None:
        """The token that texts begin with, where the model has one: prompts are taken as they are."""

    @property
    def end_tokens(self) -> list[int]:
        """Tokens by which the model ends a text."""

    @property
    def kv_events(self) -> str | None:
        """Where events of kept prefixes are published, with the port where any free one was asked for."""

    def figures(self) -> dict[str, int]:
        """Memory and prefixes now: ``budget`` and ``reserved`` in bytes, ``prefix_queries``, ``prefix_hits``."""

    def metrics(self) -> str:
        """All figures in Prometheus' text format."""

    def write(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        logit_bias: Sequence[tuple[int, float]] = ...,
        stop: Sequence[str] = ...,
        stop_token_ids: Sequence[int] = ...,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        notify: Callable[[], object] | None = None,
    ) -> Text:
        """Begins a text that goes on from a prompt, at once.

        ``notify`` is called by another thread whenever there is something to :meth:`Text.take`. What cannot be asked for shows
        there too. Raises :class:`EndedError` after :meth:`end`.
        """

    def end(self, timeout: float = 30.0) -> bool:
        """Ends once the texts at hand are written, or after so many seconds; true where all were."""

@final
class Text:
    """A text that is being written. Where nothing holds it any more the engine forgets it.

    What happens is told by dicts: ``{"cached_tokens": …}`` once the prompt is read; ``{"token": …, "text": …}`` of each token,
    with ``logprob`` and ``top_logprobs`` where they were asked for; ``{"finish_reason": "stop" or "length", "text": …}`` at the
    end. Text is what became certain with a token. Instead of an end there may be ``ValueError``, for what cannot be asked for,
    :class:`BusyError`, :class:`EndedError` or :class:`LexicoError`.
    """

    def take(self) -> list[dict[str, Any]]:
        """What has happened since the last call; perhaps nothing."""

    @property
    def over(self) -> bool:
        """True where nothing is left to take and nothing comes any more."""

    def cancel(self) -> None:
        """Ends it without its end."""

    def __iter__(self) -> Text: ...
    def __next__(self) -> dict[str, Any]:
        """Waits for what happens next, while other threads go on."""

def write_frontend_files(gguf: str | PathLike[str], folder: str | PathLike[str]) -> None:
    """Writes ``config.json``, ``tokenizer.json`` and ``tokenizer_config.json``, by what a GGUF file says, to a folder.

    Raises ``OSError`` for files that cannot be read or written, and :class:`LexicoError` for what is not supported.
    """
