"""Writes a random two-layer llama as GGUF: a byte-level vocabulary, 64 wide, half a megabyte.

It speaks nonsense, but only in printable ASCII, and never ends by itself: llama-server refuses random bytes as no
text at all. Dimension 0 of the stream is the same for every token and no layer changes it, so the output row of a
token can be raised or sunk by its first weight.
"""

from __future__ import annotations

from pathlib import Path

WIDTH, LAYERS, HEADS, FEED_FORWARD = 64, 2, 4, 128


def write_tiny_model(path: Path) -> Path:
    """The same bytes every time; returns ``path``."""
    import gguf
    import numpy as np

    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    def tensor(name: str, *shape: int, steady: bool = False) -> None:
        values = (random.standard_normal(shape) * 0.05).astype(np.float32)
        if steady:
            values[0] = 0
        writer.add_tensor(name, values)

    embedding = (random.standard_normal((len(tokens), WIDTH)) * 0.05).astype(np.float32)
    embedding[:, 0] = 1
    writer.add_tensor("token_embd.weight", embedding)
    output = (random.standard_normal((len(tokens), WIDTH)) * 0.5).astype(np.float32)
    output[:, 0] = -4
    output[3 + 32 : 3 + 127, 0] = 4
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{layer}.{name}.weight", WIDTH, WIDTH, steady=name == "attn_output")
        tensor(f"blk.{layer}.ffn_gate.weight", FEED_FORWARD, WIDTH)
        tensor(f"blk.{layer}.ffn_up.weight", FEED_FORWARD, WIDTH)
        tensor(f"blk.{layer}.ffn_down.weight", WIDTH, FEED_FORWARD, steady=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
