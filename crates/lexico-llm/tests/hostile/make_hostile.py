"""Writes files that lie, one lie each, and what the message about each must name (expected.json), for
tests/hostile.rs. Needs nothing but Python. Usage: python make_hostile.py
"""
import json
import pathlib
import struct

here = pathlib.Path(__file__).parent
expected = {}

# --- GGUF -------------------------------------------------------------------------------------------------------
U32, F32, BOOL, TEXT, ARRAY, U64 = 4, 6, 7, 8, 9, 10
MODEL = {
    "general.architecture": (TEXT, "llama"), "llama.context_length": (U32, 64), "llama.embedding_length": (U32, 8),
    "llama.block_count": (U32, 1), "llama.feed_forward_length": (U32, 8), "llama.attention.head_count": (U32, 2),
    "llama.attention.head_count_kv": (U32, 1), "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.freq_base": (F32, 10000.0), "tokenizer.ggml.model": (TEXT, "gpt2"), "tokenizer.ggml.pre": (TEXT, "gpt-2"),
    "tokenizer.ggml.tokens": (ARRAY, (TEXT, ["<s>", "</s>", "a", "b", "ab"])),
    "tokenizer.ggml.token_type": (ARRAY, (U32, [3, 3, 1, 1, 1])), "tokenizer.ggml.merges": (ARRAY, (TEXT, ["a b"])),
    "tokenizer.ggml.bos_token_id": (U32, 0), "tokenizer.ggml.eos_token_id": (U32, 1),
}
PARTS = {"attn_q": [8, 8], "attn_k": [4, 8], "attn_v": [4, 8], "attn_output": [8, 8], "ffn_gate": [8, 8], "ffn_up": [8, 8],
         "ffn_down": [8, 8], "attn_norm": [8], "ffn_norm": [8]}
TENSORS = {"token_embd.weight": ([5, 8], 0), "output_norm.weight": ([8], 0)} | {
    f"blk.0.{part}.weight": (shape, 0) for part, shape in PARTS.items()}


def text(s):
    s = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(s)) + s


def scalar(kind, value):
    if kind == TEXT:
        return text(value)
    return struct.pack("<" + {U32: "I", F32: "f", BOOL: "?", U64: "Q"}.get(kind, "I"), value)


def entry(key, kind, value):
    out = text(key) + struct.pack("<I", kind)
    if kind == ARRAY:
        of, items = value
        return out + struct.pack("<IQ", of, len(items)) + b"".join(scalar(of, item) for item in items)
    return out + (value if isinstance(value, bytes) else scalar(kind, value))


def gguf(metadata=MODEL, tensors=TENSORS, magic=b"GGUF", version=3, counts=(None, None), places={}, extra=b"", data=None):
    out = magic + struct.pack("<I", version)
    out += struct.pack("<QQ", len(tensors) if counts[0] is None else counts[0],
                       len(metadata) if counts[1] is None else counts[1])
    for key, (kind, value) in metadata.items():
        out += entry(key, kind, value)
    out += extra
    offset = 0
    for name, (shape, kind) in tensors.items():
        count = 1
        for size in shape:
            count *= size
        out += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n & (2**64 - 1)) for n in shape[::-1])
        out += struct.pack("<IQ", kind, places.get(name, offset))
        offset += (4 * count + 31) // 32 * 32 if count < 2**20 else 0
    out += b"\0" * (-len(out) % 32)
    return out + (struct.pack("<f", 0.1) * (offset // 4) if data is None else data)


def changed(**entries):
    """The model with entries changed (dots written as __), or taken out where the value is None."""
    new = dict(MODEL)
    for key, value in entries.items():
        key = key.replace("__", ".")
        if value is None:
            del new[key]
        else:
            new[key] = value
    return gguf(new)


def write(name, contents, names):
    (here / name).write_bytes(contents)
    expected[name] = names


sound = gguf()
write("sound.gguf", sound, "")
write("sound-name.gguf", changed(general__name=(TEXT, "a\x1b[2J\nb")), "")
write("empty.gguf", b"", "not a GGUF")
write("magic-alone.gguf", b"GGUF", "cut short")
write("magic.gguf", gguf(magic=b"GGML"), "not a GGUF")
write("version-1.gguf", gguf(version=1), "version 1")
write("version-99.gguf", gguf(version=99), "version 99")
write("big-endian.gguf", sound[:4] + sound[4:8][::-1] + sound[8:], "big-endian")
write("header-cut.gguf", sound[:300], "cut short")
write("data-cut.gguf", sound[:-100], "beyond the end")
write("tensor-count.gguf", gguf(counts=(2**60, None)), "cut short")
write("entry-count.gguf", gguf(counts=(None, 2**60)), "cut short")
write("entry-count-all.gguf", gguf(counts=(None, 2**64 - 1)), "cut short")
one = len(MODEL) + 1
write("key-length.gguf", gguf(counts=(None, one), extra=struct.pack("<Q", 2**62)), "cut short")
write("text-length.gguf", gguf(counts=(None, one), extra=text("x") + struct.pack("<IQ", TEXT, 2**63)), "cut short")
write("array-length.gguf", gguf(counts=(None, one), extra=text("x") + struct.pack("<IIQ", ARRAY, U32, 2**40)), "elements")
write("array-cut.gguf", gguf(counts=(None, one), extra=text("x") + struct.pack("<IIQ", ARRAY, U64, 2**20)), "cut short")
write("array-nested.gguf", gguf(counts=(None, one), extra=text("x") + struct.pack("<IIQIQ", ARRAY, ARRAY, 1, U32, 0)), "array")
write("value-type.gguf", gguf(counts=(None, one), extra=text("odd.key") + struct.pack("<II", 77, 0)), "odd.key")
write("key-twice.gguf", gguf(counts=(None, one), extra=entry("llama.block_count", U32, 2)), "llama.block_count")
write("dimensions-0.gguf", gguf(tensors=TENSORS | {"odd": ([], 0)}), "odd")
write("dimensions-9.gguf", gguf(tensors=TENSORS | {"odd": ([1] * 9, 0)}), "9 dimensions")
write("dimension-of-0.gguf", gguf(tensors=TENSORS | {"odd": ([8, 0], 0)}), "dimension of 0")
write("dimension-huge.gguf", gguf(tensors=TENSORS | {"odd": ([2**62], 0)}), "odd")
write("dimensions-overflow.gguf", gguf(tensors=TENSORS | {"odd": ([2**33, 2**33], 0)}), "odd")
write("number-type.gguf", gguf(tensors=TENSORS | {"token_embd.weight": ([5, 8], 19)}), "number type 19")
write("number-type-huge.gguf", gguf(tensors=TENSORS | {"token_embd.weight": ([5, 8], 2**32 - 1)}), "number type 4294967295")
write("blocks.gguf", gguf(tensors=TENSORS | {"token_embd.weight": ([5, 8], 8)}), "multiple of 32")
write("offset-outside.gguf", gguf(places={"output_norm.weight": 2**40}), "output_norm.weight")
write("offset-overflow.gguf", gguf(places={"output_norm.weight": 2**64 - 8}), "output_norm.weight")
write("tensor-missing.gguf", gguf(tensors={k: v for k, v in TENSORS.items() if "attn_k" not in k}), "blk.0.attn_k.weight")
write("tensor-shape.gguf", gguf(tensors=TENSORS | {"blk.0.attn_v.weight": ([8, 8], 0)}), "blk.0.attn_v.weight")
wide = {name: ([32 if n == 8 else n for n in shape], kind) for name, (shape, kind) in TENSORS.items()}
wide_model = MODEL | {"llama.embedding_length": (U32, 32), "llama.feed_forward_length": (U32, 32),
                      "llama.attention.head_count_kv": (U32, 2), "llama.attention.key_length": (U32, 16)}
wide |= {"blk.0.attn_k.weight": ([32, 32], 0), "blk.0.attn_v.weight": ([32, 32], 0)}
write("sound-wide.gguf", gguf(wide_model, wide), "")
write("norm-quantised.gguf", gguf(wide_model, wide | {"blk.0.attn_norm.weight": ([32], 8)}), "floating point")
write("embedding-flat.gguf", gguf(tensors=TENSORS | {"token_embd.weight": ([40], 0)}), "token_embd")
write("overlap.gguf", gguf(places={"output_norm.weight": 0}), "overlap")
write("tensor-unknown.gguf", gguf(tensors=TENSORS | {"blk.0.attn_output.bias": ([8], 0)}), "blk.0.attn_output.bias")
write("tensor-of-later-layer.gguf", gguf(tensors=TENSORS | {"blk.1.attn_norm.weight": ([8], 0)}), "blk.1.attn_norm.weight")
write("theta-text.gguf", changed(llama__rope__freq_base=(TEXT, "10000")), "llama.rope.freq_base")
write("scaling-number.gguf", changed(llama__rope__scaling__type=(U32, 1)), "llama.rope.scaling.type")
write("scaling-factor.gguf", changed(llama__rope__scaling__factor=(F32, 4.0)), "rope.scaling.factor")
write("scaling-linear.gguf", changed(llama__rope__scale_linear=(F32, 4.0)), "rope.scale_linear")
write("experts.gguf", changed(llama__expert_count=(U32, 8)), "expert_count")
write("not-causal.gguf", changed(llama__attention__causal=(BOOL, False)), "attention.causal")
write("kv-heads-list.gguf", changed(llama__attention__head_count_kv=(ARRAY, (U32, [1]))), "head_count_kv")
write("begin-outside.gguf", changed(tokenizer__ggml__bos_token_id=(U32, 99)), "bos_token_id")
write("begin-none.gguf", changed(tokenizer__ggml__bos_token_id=None, tokenizer__ggml__add_bos_token=(BOOL, True)), "begin")
write("token-long.gguf", changed(tokenizer__ggml__tokens=(ARRAY, (TEXT, ["<s>", "</s>", "a", "b", "a" * 5000]))), "5000 bytes")
write("window-qwen.gguf", gguf({k.replace("llama.", "qwen3."): v for k, v in MODEL.items()} | {
    "general.architecture": (TEXT, "qwen3"), "qwen3.attention.sliding_window": (U32, 8)}), "sliding_window")
write("template-name.gguf", changed(tokenizer__chat_template=(TEXT, "mistral-v3")), "mistral-v3")
write("alignment-0.gguf", changed(general__alignment=(U32, 0)), "general.alignment")
write("alignment-3.gguf", changed(general__alignment=(U32, 3)), "general.alignment")
write("architecture.gguf", changed(general__architecture=(TEXT, "mamba")), "mamba")
write("architecture-none.gguf", changed(general__architecture=None), "general.architecture")
write("architecture-number.gguf", changed(general__architecture=(U32, 1)), "general.architecture")
write("hidden-none.gguf", changed(llama__embedding_length=None), "llama.embedding_length")
write("heads-0.gguf", changed(llama__attention__head_count=(U32, 0)), "num_attention_heads")
write("heads-uneven.gguf", changed(llama__attention__head_count_kv=(U32, 3)), "3 KV heads")
write("layers-many.gguf", changed(llama__block_count=(U32, 2**32 - 1)), "num_hidden_layers")
write("layers-more.gguf", changed(llama__block_count=(U32, 2)), "blk.1")
write("epsilon-nan.gguf", changed(llama__attention__layer_norm_rms_epsilon=(F32, float("nan"))), "rms_norm_eps")
write("theta-negative.gguf", changed(llama__rope__freq_base=(F32, -1.0)), "rope_theta")
write("theta-infinite.gguf", changed(llama__rope__freq_base=(F32, float("inf"))), "rope_theta")
write("rotary.gguf", changed(llama__rope__scaling__type=(TEXT, "yarn")), "yarn")
write("head-dims.gguf", changed(llama__attention__key_length=(U32, 4), llama__attention__value_length=(U32, 8)), "value_length")
write("factors-few.gguf", gguf(tensors=TENSORS | {"rope_freqs.weight": ([1], 0)}), "rope_freqs.weight")
write("factors-type.gguf", gguf(tensors=TENSORS | {"rope_freqs.weight": ([2], 1)}), "rope_freqs.weight")
write("parts.gguf", changed(split__count=(U32, 2)), "one of 2 parts")
write("part-00001-of-00002.gguf", changed(split__count=(U32, 2)), "part-00002-of-00002.gguf")
write("twice-00001-of-00002.gguf", changed(split__count=(U32, 2), split__no=(U32, 0)), "another part")
write("twice-00002-of-00002.gguf", changed(split__count=(U32, 2), split__no=(U32, 1)), "another part")
write("order-00001-of-00002.gguf", changed(split__count=(U32, 2), split__no=(U32, 1)), "not part 1 of 2")
write("order-00002-of-00002.gguf", changed(split__count=(U32, 2), split__no=(U32, 0)), "not part 1 of 2")
write("vocabulary-none.gguf", changed(tokenizer__ggml__tokens=None), "tokenizer.ggml.tokens")
write("vocabulary-large.gguf", changed(tokenizer__ggml__tokens=(ARRAY, (TEXT, list("abcdefgh"))),
                                       tokenizer__ggml__token_type=(ARRAY, (U32, [1] * 8))), "vocabulary of 8")
write("vocabulary-twice.gguf", changed(tokenizer__ggml__tokens=(ARRAY, (TEXT, ["a", "b", "ab", "a", "c"]))), "both \"a\"")
write("vocabulary-kinds.gguf", changed(tokenizer__ggml__token_type=(ARRAY, (U32, [1]))), "kinds of 1")
write("tokenizer-none.gguf", changed(tokenizer__ggml__model=None), "tokenizer.ggml.model")
write("tokenizer.gguf", changed(tokenizer__ggml__model=(TEXT, "rwkv")), "rwkv")
write("split.gguf", changed(tokenizer__ggml__pre=(TEXT, "odd-bpe")), "odd-bpe")
write("split-none.gguf", changed(tokenizer__ggml__pre=None), "tokenizer.ggml.pre")
write("merges-none.gguf", changed(tokenizer__ggml__merges=None), "tokenizer.ggml.merges")
write("merges-alone.gguf", changed(tokenizer__ggml__merges=(ARRAY, (TEXT, ["ab"]))), "merge 0, \"ab\"")
write("scores-none.gguf", changed(tokenizer__ggml__model=(TEXT, "llama")), "tokenizer.ggml.scores")
write("scores-few.gguf", changed(tokenizer__ggml__model=(TEXT, "llama"), tokenizer__ggml__scores=(ARRAY, (F32, [0.0]))), "scores of 1")
write("template.gguf", changed(tokenizer__chat_template=(TEXT, "{% for m in %}")), "chat template")

# --- Safetensors ------------------------------------------------------------------------------------------------
def safetensors(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


write("empty.safetensors", b"", "shorter than 8")
write("length.safetensors", safetensors({}, length=2**63), "claims a header")
write("length-short.safetensors", safetensors({}, length=100), "claims a header")
write("no-json.safetensors", safetensors(b"nonsense"), "header")
write("list.safetensors", safetensors(b"[]"), "header")
write("deep.safetensors", safetensors(b"[" * 100_000), "header")
write("offset-outside.safetensors", safetensors({"x": tensor("F32", [4], 0, 16)}, b"\0" * 8), "promises")
write("offset-backwards.safetensors", safetensors({"x": tensor("F32", [4], 16, 0)}, b"\0" * 16), "header")
write("offset-overflow.safetensors", safetensors({"x": tensor("F32", [4], 2**64 - 16, 2**64 - 1)}, b""), "header")
write("shape-overflow.safetensors", safetensors({"x": tensor("F32", [2**62, 2**62], 0, 16)}, b"\0" * 16), "header")
write("hole.safetensors", safetensors({"x": tensor("F32", [1], 4, 8)}, b"\0" * 8), "header")
write("overlap.safetensors", safetensors({"x": tensor("F32", [1], 0, 4), "y": tensor("F32", [1], 0, 4)}, b"\0" * 4), "header")
write("dtype.safetensors", safetensors({"x": tensor("F12", [1], 0, 4)}, b"\0" * 4), "header")
write("format.safetensors", safetensors({"__metadata__": {"format": "pt"}, "x": tensor("F32", [1], 0, 4)}, b"\0" * 4), "format")
write("zip.safetensors", b"PK\x03\x04" + b"\0" * 60, "zip")

# --- Dictionaries -----------------------------------------------------------------------------------------------
IDENTITY = {"name": "x", "architecture": "LlamaForCausalLM", "layers": 1, "kv_heads": 1, "head_dim": 2,
            "rotary": {"kind": "default", "theta": 10000.0}}
TRAINING = {"sparsity": 2, "corpus": [], "tokens": 0, "relative_error": [], "tool": "x"}
ATOMS = [1.0, 0.0, 0.0, 1.0, 0.6, 0.8]


def dictionary(keys=ATOMS, shape=(3, 2), dtype="F32", identity=IDENTITY, training=TRAINING, values=True, **metadata):
    meta = {"format": "lexico-dictionary/1", "model": json.dumps(identity), "training": json.dumps(training)} | metadata
    data = struct.pack(f"<{len(keys)}f", *keys)
    header = {"__metadata__": meta, "layers.0.keys": tensor(dtype, list(shape), 0, len(data))}
    if values:
        header["layers.0.values"] = tensor("F32", [3, 2], len(data), len(data) + 24)
        data += struct.pack("<6f", *ATOMS)
    return safetensors(header, data)


write("dictionary-sound.safetensors", dictionary(), "")
write("dictionary-nan.safetensors", dictionary([1.0, 0.0, float("nan"), 1.0, 0.6, 0.8]), "atom 1")
write("dictionary-infinite.safetensors", dictionary([1.0, 0.0, 0.0, float("inf"), 0.6, 0.8]), "atom 1")
write("dictionary-zero.safetensors", dictionary([1.0, 0.0, 0.0, 1.0, 0.0, 0.0]), "atom 2")
write("dictionary-long-atom.safetensors", dictionary([1.0, 0.0, 0.0, 7.0, 0.6, 0.8]), "atom 1")
write("dictionary-flat.safetensors", dictionary(shape=(6,)), "dimensions")
write("dictionary-wide.safetensors", dictionary([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], shape=(2, 3)), "head dim")
write("dictionary-integers.safetensors", dictionary(dtype="I32"), "I32")
write("dictionary-no-values.safetensors", dictionary(values=False), "tensors")
write("dictionary-format.safetensors", dictionary(format="lexico-dictionary/9"), "lexico-dictionary/9")
write("dictionary-layers.safetensors", dictionary(identity=IDENTITY | {"layers": 2**62}), "layers")
write("dictionary-layers-0.safetensors", dictionary(identity=IDENTITY | {"layers": 0}), "layers")
write("dictionary-head-dim.safetensors", dictionary(identity=IDENTITY | {"head_dim": 4}), "head dim")
write("dictionary-model.safetensors", dictionary(model="nonsense"), "model")
write("dictionary-training.safetensors", dictionary(training={"sparsity": -1}), "training")
write("dictionary-deep.safetensors",
      safetensors({"__metadata__": {"format": "lexico-dictionary/1", "model": "[" * 50_000, "training": ""}}), "model")

# --- Configs, indexes, templates --------------------------------------------------------------------------------
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 5, "max_position_embeddings": 64,
          "rms_norm_eps": 1e-5}


def config(name, names, **entries):
    write(f"config-{name}.json", json.dumps(CONFIG | entries).encode(), names)


config("sound", "")
config("heads-0", "num_attention_heads", num_attention_heads=0)
config("heads-uneven", "3 KV heads", num_key_value_heads=3)
config("heads-negative", "-1", num_attention_heads=-1)
config("hidden-0", "hidden_size", hidden_size=0)
config("hidden-huge", "hidden_size", hidden_size=2**63)
config("layers-huge", "num_hidden_layers", num_hidden_layers=2**40)
config("head-dim-odd", "head_dim", head_dim=7)
config("vocabulary-0", "vocab_size", vocab_size=0)
config("epsilon-0", "rms_norm_eps", rms_norm_eps=0)
config("epsilon-text", "config", rms_norm_eps="NaN")
config("theta-0", "rope_theta", rope_theta=0)
config("rotary", "longrope", rope_scaling={"type": "longrope"})
config("rotary-parameters", "yarn", rope_parameters={"rope_type": "yarn"})
config("rotary-partial", "low_freq_factor", rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4})
config("window-0", "sliding_window", architectures=["MistralForCausalLM"], sliding_window=0)
config("architecture", "Mamba", architectures=["MambaForCausalLM"])
config("architectures-none", "not supported", architectures=[])
write("config-nan.json", json.dumps(CONFIG | {"rms_norm_eps": float("nan")}).encode(), "config")
write("config-deep.json", b"[" * 100_000, "config")
write("config-bytes.json", b"\xff\xfe\x00", "UTF-8")
write("index-outside.json", json.dumps({"weight_map": {"x": "../../passwd"}}).encode(), "passwd")
write("index-absolute.json", json.dumps({"weight_map": {"x": "/etc/passwd"}}).encode(), "passwd")
write("index-missing.json", json.dumps({"weight_map": {"x": "gone.safetensors"}}).encode(), "gone.safetensors")
write("index-empty.json", json.dumps({"weight_map": {}}).encode(), "model.embed_tokens.weight")
write("index-list.json", b"[]", "index")
write("template-open.jinja", b"{% for m in messages %}", "chat template")
write("template-unknown.jinja", b"{{ messages | oddfilter }}", "oddfilter")
write("template-endless.jinja", b"{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}", "chat template")
write("template-recursive.jinja", b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template")
write("template-wide.jinja", b"{{ 'x' * 99999999999 }}", "chat template")
write("template-refuses.jinja", b"{{ raise_exception('not like this') }}", "not like this")
write("template-no-text.jinja", b"{{ messages[99].content.split(1, 2, 3) }}", "chat template")

(here / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
