"""Writes a GGUF file of Llama 3.2 1B's shape with random weights, for speed alone: python llama_shape.py VOCABULARY.gguf OUT.gguf q4_k_m|q8_0

The vocabulary is the beginning of that of another file, which must have 128,256 byte-level tokens at least. Needs gguf and numpy.
"""
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

LAYERS, HIDDEN, FEED_FORWARD, KEYS, VOCABULARY = 16, 2048, 8192, 512, 128256
# Numbers in a block, its bytes, and the places of its scales.
BLOCKS = {Type.Q4_K: (256, 144, [0, 2]), Type.Q6_K: (256, 210, [208]), Type.Q8_0: (32, 34, [0])}

source, out, kind = sys.argv[1:]
few, many = {"q4_k_m": (Type.Q4_K, Type.Q6_K), "q8_0": (Type.Q8_0, Type.Q8_0)}[kind]
fields = gguf.GGUFReader(source).fields
tokens = fields["tokenizer.ggml.tokens"].contents()[:VOCABULARY]
known = set(tokens)
merges = [merge for merge in fields["tokenizer.ggml.merges"].contents() if merge.replace(" ", "", 1) in known]

writer = gguf.GGUFWriter(out, "llama")
writer.add_block_count(LAYERS)
writer.add_context_length(8192)
writer.add_embedding_length(HIDDEN)
writer.add_feed_forward_length(FEED_FORWARD)
writer.add_head_count(32)
writer.add_head_count_kv(8)
writer.add_rope_freq_base(500000.0)
writer.add_rope_dimension_count(64)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(VOCABULARY)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("llama-bpe")
writer.add_token_list(tokens)
writer.add_token_types([1] * VOCABULARY)
writer.add_token_merges(merges)
writer.add_bos_token_id(0)
writer.add_eos_token_id(1)
writer.add_add_bos_token(False)
draw = np.random.default_rng(1)


def matrix(name, rows, columns, kind):
    numbers, size, scales = BLOCKS[kind]
    blocks = draw.integers(0, 256, (rows * columns // numbers, size), dtype=np.uint8)
    for place in scales:
        scale = (draw.random(len(blocks)) * (4e-4 if kind == Type.Q8_0 else 2e-5)).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    writer.add_tensor(name, blocks.reshape(rows, columns // numbers * size), raw_dtype=kind)


def norm(name):
    writer.add_tensor(name, np.ones(HIDDEN, np.float32))


matrix("token_embd.weight", VOCABULARY, HIDDEN, many)
norm("output_norm.weight")
for layer in range(LAYERS):
    part = f"blk.{layer}."
    # As llama.cpp's Q4_K_M has it.
    more = layer < LAYERS // 8 or layer >= 7 * LAYERS // 8 or (layer - LAYERS // 8) % 3 == 2
    norm(part + "attn_norm.weight")
    norm(part + "ffn_norm.weight")
    matrix(part + "attn_q.weight", HIDDEN, HIDDEN, few)
    matrix(part + "attn_k.weight", KEYS, HIDDEN, few)
    matrix(part + "attn_v.weight", KEYS, HIDDEN, many if more else few)
    matrix(part + "attn_output.weight", HIDDEN, HIDDEN, few)
    matrix(part + "ffn_gate.weight", FEED_FORWARD, HIDDEN, few)
    matrix(part + "ffn_up.weight", FEED_FORWARD, HIDDEN, few)
    matrix(part + "ffn_down.weight", HIDDEN, FEED_FORWARD, many if more else few)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
