"""KV caches of language models as short codes over learned dictionaries.

A key or a value is stored as the sum of a few atoms of small dictionaries that were learned once for the model, and
attention reads the codes as they are. This package has

* the codec, on numpy arrays: :class:`Dictionaries`, :class:`LayerCache`, and what these are made of;
* :mod:`lexico.transformers`: a cache for ``generate`` of transformers;
* :func:`learn`: dictionaries for a transformers model;
* :class:`Engine`: the engine of ``lexico serve``, tokens in and tokens out, and :mod:`lexico.dynamo`, a worker of NVIDIA Dynamo.

torch and transformers are imported by these alone, when they are used.

>>> import numpy as np
>>> import lexico
>>> rng = np.random.default_rng(0)
>>> codebooks = lexico.Codebooks(rng.standard_normal((64 + 3 * 256, 8)), first=64)
>>> vectors = rng.standard_normal((100, 8)).astype(np.float32)
>>> codes = codebooks.encode(vectors, sparsity=4)
>>> codes.nbytes  # a byte an atom, and one more
500
>>> codes.decode().shape
(100, 8)
"""

from ._lexico import (
    BusyError,
    Codebooks,
    Codes,
    Dictionaries,
    Dictionary,
    EndedError,
    Engine,
    HeadMaps,
    LayerCache,
    LexicoError,
    Text,
    __version__,
    head_maps,
    learn_codebooks,
    learn_dictionary,
    write_frontend_files,
)
from .learning import learn

__all__ = [
    "BusyError",
    "Codebooks",
    "Codes",
    "Dictionaries",
    "Dictionary",
    "EndedError",
    "Engine",
    "HeadMaps",
    "LayerCache",
    "LexicoError",
    "Text",
    "__version__",
    "head_maps",
    "learn",
    "learn_codebooks",
    "learn_dictionary",
    "write_frontend_files",
]
