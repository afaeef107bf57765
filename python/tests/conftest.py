"""What tests share: the embedded model's folder and dictionaries, drawn dictionaries, and what is not there to test with."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import lexico

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "models" / "tiny"


@pytest.fixture(scope="session")
def tiny() -> lexico.Dictionaries:
    return lexico.Dictionaries.load(TINY / "dictionary.safetensors")


def identity(layers: int = 1, kv_heads: int = 2, head_dim: int = 16) -> dict:
    return {
        "name": "drawn",
        "architecture": "LlamaForCausalLM",
        "layers": layers,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rotary": {"kind": "default", "theta": 10000.0, "parameters": {}},
    }


TRAINING = {"sparsity": 2, "corpus": ["drawn"], "tokens": 0, "relative_error": [], "tool": "tests"}


def drawn(rng: np.random.Generator, model: dict, *, maps: bool = True, sparse: bool = True) -> lexico.Dictionaries:
    """Dictionaries of drawn atoms for a model, with maps and means before the rotary embedding where asked for."""
    heads, m = model["kv_heads"], model["head_dim"]

    def both(make):
        return make(rotary=True), make(rotary=False)

    def codebooks(rotary: bool) -> lexico.Codebooks:
        scales = np.repeat(0.8 ** np.arange(m // 2), [64] + [256] * (m // 2 - 1))
        atoms = rng.standard_normal((len(scales), m)) * scales[:, None]
        return lexico.Codebooks(atoms.astype(np.float16), first=64)

    def dictionary(rotary: bool) -> lexico.Dictionary:
        atoms = rng.standard_normal((8 * m, m))
        return lexico.Dictionary(atoms / np.linalg.norm(atoms, axis=1, keepdims=True))

    def head_maps(rotary: bool) -> lexico.HeadMaps:
        matrices = np.eye(m) + 0.1 * rng.standard_normal((heads, m, m))
        turned = {}
        if rotary:
            frequencies = model["rotary"]["theta"] ** (-np.arange(m // 2) / (m // 2))
            turned = {"frequencies": frequencies, "rotary_means": rng.standard_normal((heads, m))}
        return lexico.HeadMaps(rng.standard_normal((heads, m)), matrices, **turned)

    def layer() -> dict:
        parts = {"codebooks": both(codebooks)}
        if sparse:
            parts["dictionaries"] = both(dictionary)
        if maps:
            parts["maps"] = both(head_maps)
        return parts

    return lexico.Dictionaries(model, TRAINING, [layer() for _ in range(model["layers"])])


def rust_program() -> str:
    """The program `lexico`, which LEXICO_PROGRAM names, or which lies on the path."""
    program = os.environ.get("LEXICO_PROGRAM") or shutil.which("lexico")
    if not program:
        pytest.skip("there is no program lexico: LEXICO_PROGRAM names one that was built")
    return program
