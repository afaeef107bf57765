"""What of a transformers model the codec asks about."""

from __future__ import annotations

from typing import Any

from ._lexico import LexicoError

#: Classes whose attention is that of the Llama family, with the architecture that dictionaries name: GGUF files call both llama.
ARCHITECTURES = {
    "LlamaForCausalLM": "LlamaForCausalLM",
    "MistralForCausalLM": "LlamaForCausalLM",
    "Qwen2ForCausalLM": "Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "Qwen3ForCausalLM",
}
#: Numbers that a rotary embedding's scaling depends on, by its kind.
ROTARY = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def identity(model: Any) -> dict[str, Any]:
    """The identity of a model, which its dictionaries must agree with.

    Raises :class:`~lexico.LexicoError` for a model that is not supported.
    """
    name, config = type(model).__name__, model.config
    if name not in ARCHITECTURES:
        raise LexicoError(f"models of class {name} are not supported; these are: {', '.join(ARCHITECTURES)}")
    rotary = dict(config.rope_parameters)
    kind = rotary.get("rope_type") or "default"
    if kind not in ROTARY:
        raise LexicoError(f"a rotary embedding of kind {kind!r} is not supported; these are: {', '.join(ROTARY)}")
    if (rotary.get("partial_rotary_factor") or 1.0) != 1.0:
        raise LexicoError("a rotary embedding of a part of each head is not supported")
    path = str(getattr(config, "_name_or_path", "")) or name
    return {
        "name": path.rstrip("/").rsplit("/", 1)[-1],
        "architecture": ARCHITECTURES[name],
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rotary": {
            "kind": kind,
            "theta": float(rotary["rope_theta"]),
            "parameters": {name: float(rotary[name]) for name in ROTARY[kind]},
        },
    }


def sliding_windows(model: Any) -> list[int | None]:
    """The positions that a query sees in each layer, its own among them; ``None`` where it sees all."""
    config = model.config
    layers = config.num_hidden_layers
    if type(model).__name__ == "LlamaForCausalLM":
        return [None] * layers
    window = config.sliding_window
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise LexicoError(f"layers of type {', '.join(sorted(unknown))} are not supported")
    return [window if kind == "sliding_attention" else None for kind in kinds]
