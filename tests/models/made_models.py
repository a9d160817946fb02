"""GGUF models of several families with random weights, small enough to write and to load within a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDTH, VOCABULARY, CONTEXT = 256, 512, 32_768


class Maker:
    """Writes one model: numbers by key, tensors by name."""

    def __init__(self, path: Path, architecture: str, layers: int, context: int = CONTEXT) -> None:
        import gguf

        self.path = path
        self.writer: Any = gguf.GGUFWriter(str(path), architecture)
        self._prefix = architecture
        tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
        tokens += [f"w{number}".encode() for number in range(VOCABULARY - len(tokens))]
        self.writer.add_file_type(0)
        self.writer.add_tokenizer_model("llama")
        self.writer.add_token_list(tokens)
        self.writer.add_token_scores([0.0] * VOCABULARY)
        self.writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (VOCABULARY - 259)])
        self.writer.add_layer_norm_rms_eps(1e-5)
        self.numbers(context_length=context, embedding_length=WIDTH, block_count=layers, vocab_size=VOCABULARY)

    def numbers(self, **values: int) -> None:
        """``attention__head_count=4`` is the key ``<architecture>.attention.head_count``."""
        for key, value in values.items():
            self.writer.add_uint32(f"{self._prefix}.{key.replace('__', '.')}", value)

    def tensor(self, name: str, *shape: int) -> None:
        import numpy as np

        random = np.random.default_rng(len(name))
        self.writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * 0.02).astype(np.float32))

    def ones(self, name: str, width: int = WIDTH) -> None:
        import numpy as np

        self.writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    def bare(self, name: str, *shape: int) -> None:
        """A tensor of this very name."""
        import numpy as np

        self.writer.add_tensor(name, np.ones(shape, np.float32))

    def biased(self, name: str, *shape: int) -> None:
        self.tensor(name, *shape)
        self.bare(f"{name}.bias", shape[0])

    def normal(self, name: str) -> None:
        """A layer norm with its bias."""
        self.ones(name)
        self.bare(f"{name}.bias", WIDTH)

    def attention(self, at: str, queries: int, keys: int) -> None:
        self.tensor(f"{at}attn_q", queries, WIDTH)
        self.tensor(f"{at}attn_k", keys, WIDTH)
        self.tensor(f"{at}attn_v", keys, WIDTH)
        self.tensor(f"{at}attn_output", WIDTH, queries)

    def feed_forward(self, layer: int, width: int) -> None:
        self.tensor(f"blk.{layer}.ffn_gate", width, WIDTH)
        self.tensor(f"blk.{layer}.ffn_up", width, WIDTH)
        self.tensor(f"blk.{layer}.ffn_down", WIDTH, width)

    def done(self) -> Path:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path


def write_gemma3(path: Path, layers: int = 12) -> Path:
    """Five layers in six look back 512 tokens; the output matrix is the token embedding."""
    maker = Maker(path, "gemma3", layers)
    maker.numbers(attention__head_count=4, attention__head_count_kv=2, attention__key_length=64, attention__value_length=64)
    maker.numbers(attention__sliding_window=512, feed_forward_length=512)
    maker.tensor("token_embd", VOCABULARY, WIDTH)
    maker.ones("output_norm")
    for layer in range(layers):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            maker.ones(f"blk.{layer}.{name}")
        for name in ("attn_q_norm", "attn_k_norm"):
            maker.ones(f"blk.{layer}.{name}", 64)
        maker.tensor(f"blk.{layer}.attn_q", 256, WIDTH)
        maker.tensor(f"blk.{layer}.attn_k", 128, WIDTH)
        maker.tensor(f"blk.{layer}.attn_v", 128, WIDTH)
        maker.tensor(f"blk.{layer}.attn_output", WIDTH, 256)
        maker.feed_forward(layer, 512)
    return maker.done()


def write_deepseek2(path: Path, layers: int = 4) -> Path:
    """Attention whose cache is compressed to 128 numbers and 64 rotated ones per token."""
    heads, latent, query, plain, rope, value = 4, 128, 64, 32, 64, 32
    maker = Maker(path, "deepseek2", layers)
    maker.numbers(attention__head_count=heads, attention__head_count_kv=1, attention__key_length=latent + rope)
    maker.numbers(attention__value_length=latent, attention__key_length_mla=plain + rope, attention__value_length_mla=value)
    maker.numbers(attention__kv_lora_rank=latent, attention__q_lora_rank=query, rope__dimension_count=rope)
    maker.numbers(feed_forward_length=512, leading_dense_block_count=layers, expert_feed_forward_length=64, expert_count=4)
    maker.numbers(expert_used_count=2, expert_shared_count=1)
    maker.writer.add_expert_weights_scale(1.0)
    maker.tensor("token_embd", VOCABULARY, WIDTH)
    maker.tensor("output", VOCABULARY, WIDTH)
    maker.ones("output_norm")
    for layer in range(layers):
        at = f"blk.{layer}."
        maker.ones(f"{at}attn_norm")
        maker.ones(f"{at}ffn_norm")
        maker.ones(f"{at}attn_q_a_norm", query)
        maker.ones(f"{at}attn_kv_a_norm", latent)
        maker.tensor(f"{at}attn_q_a", query, WIDTH)
        maker.tensor(f"{at}attn_q_b", heads * (plain + rope), query)
        maker.tensor(f"{at}attn_kv_a_mqa", latent + rope, WIDTH)
        maker.tensor(f"{at}attn_k_b", heads, latent, plain)
        maker.tensor(f"{at}attn_v_b", heads, value, latent)
        maker.tensor(f"{at}attn_output", WIDTH, heads * value)
        maker.feed_forward(layer, 512)
    return maker.done()


def write_bert(path: Path, layers: int = 4, *, pooling: int = 2) -> Path:
    """An encoder, as bge and its kind: it embeds (``pooling`` 2) or scores (4), and keeps no cache."""
    maker = Maker(path, "bert", layers, context=512)
    maker.numbers(attention__head_count=4, feed_forward_length=512, pooling_type=pooling)
    maker.writer.add_bool("bert.attention.causal", False)
    maker.writer.add_layer_norm_eps(1e-5)
    maker.writer.add_token_type_count(2)
    maker.writer.add_bos_token_id(1)
    maker.writer.add_sep_token_id(2)
    maker.tensor("token_embd", VOCABULARY, WIDTH)
    maker.tensor("position_embd", 512, WIDTH)
    maker.tensor("token_types", 2, WIDTH)
    maker.normal("token_embd_norm")
    for layer in range(layers):
        at = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            maker.biased(f"{at}{name}", WIDTH, WIDTH)
        maker.biased(f"{at}ffn_up", 512, WIDTH)
        maker.biased(f"{at}ffn_down", WIDTH, 512)
        maker.normal(f"{at}attn_output_norm")
        maker.normal(f"{at}layer_output_norm")
    if pooling == 4:
        maker.biased("cls", WIDTH, WIDTH)
        maker.biased("cls.output", 1, WIDTH)
    return maker.done()


def write_gemma_embedding(path: Path, layers: int = 6) -> Path:
    """A decoder's shape that is used as an encoder: no cache either."""
    maker = Maker(path, "gemma-embedding", layers)
    maker.numbers(attention__head_count=4, attention__head_count_kv=2, attention__key_length=64, attention__value_length=64)
    maker.numbers(attention__sliding_window=512, feed_forward_length=512, pooling_type=1)
    maker.writer.add_bool("gemma-embedding.attention.causal", False)
    maker.tensor("token_embd", VOCABULARY, WIDTH)
    maker.ones("output_norm")
    for layer in range(layers):
        at = f"blk.{layer}."
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            maker.ones(f"{at}{name}")
        for name in ("attn_q_norm", "attn_k_norm"):
            maker.ones(f"{at}{name}", 64)
        maker.attention(at, 256, 128)
        maker.feed_forward(layer, 512)
    return maker.done()


def write_llama4(path: Path, layers: int = 8) -> Path:
    """Three layers in four attend within chunks of 8192 tokens; experts in every second layer."""
    maker = Maker(path, "llama4", layers)
    maker.numbers(attention__head_count=4, attention__head_count_kv=2, attention__key_length=64, attention__value_length=64)
    maker.numbers(feed_forward_length=512, expert_feed_forward_length=128, expert_count=4, expert_used_count=1)
    maker.numbers(interleave_moe_layer_step=2, rope__dimension_count=64)
    maker.tensor("token_embd", VOCABULARY, WIDTH)
    maker.tensor("output", VOCABULARY, WIDTH)
    maker.ones("output_norm")
    for layer in range(layers):
        at = f"blk.{layer}."
        maker.ones(f"{at}attn_norm")
        maker.ones(f"{at}ffn_norm")
        maker.attention(at, 256, 128)
        if layer % 2 == 0:
            maker.feed_forward(layer, 512)
            continue
        maker.tensor(f"{at}ffn_gate_inp", 4, WIDTH)
        maker.tensor(f"{at}ffn_gate_exps", 4, 128, WIDTH)
        maker.tensor(f"{at}ffn_up_exps", 4, 128, WIDTH)
        maker.tensor(f"{at}ffn_down_exps", 4, WIDTH, 128)
        for name in ("gate", "up"):
            maker.tensor(f"{at}ffn_{name}_shexp", 128, WIDTH)
        maker.tensor(f"{at}ffn_down_shexp", WIDTH, 128)
    return maker.done()


def write_nemotron_h(path: Path) -> Path:
    """Layers of three kinds: a state, attention, or neither."""
    kinds = "MFMFMAMF"
    inner, state, groups, heads, kernel = 512, 64, 2, 8, 4
    maker = Maker(path, "nemotron_h", len(kinds))
    maker.writer.add_head_count_kv([2 if kind == "A" else 0 for kind in kinds])
    maker.writer.add_feed_forward_length([512 if kind == "F" else 0 for kind in kinds])
    maker.numbers(attention__head_count=4, attention__key_length=64, attention__value_length=64)
    maker.numbers(ssm__inner_size=inner, ssm__state_size=state, ssm__group_count=groups, ssm__time_step_rank=heads)
    maker.numbers(ssm__conv_kernel=kernel)
    maker.tensor("token_embd", VOCABULARY, WIDTH)
    maker.tensor("output", VOCABULARY, WIDTH)
    maker.ones("output_norm")
    for layer, kind in enumerate(kinds):
        at = f"blk.{layer}."
        maker.ones(f"{at}attn_norm")
        if kind == "A":
            maker.attention(at, 256, 128)
        elif kind == "F":
            maker.tensor(f"{at}ffn_up", 512, WIDTH)
            maker.tensor(f"{at}ffn_down", WIDTH, 512)
        else:
            mixed = inner + 2 * groups * state
            maker.tensor(f"{at}ssm_in", inner + mixed + heads, WIDTH)
            maker.biased(f"{at}ssm_conv1d", mixed, kernel)
            maker.bare(f"{at}ssm_dt.bias", heads)
            maker.bare(f"{at}ssm_a", heads, 1)
            maker.bare(f"{at}ssm_d", heads, 1)
            maker.bare(f"{at}ssm_norm.weight", groups, inner // groups)
            maker.tensor(f"{at}ssm_out", WIDTH, inner)
    return maker.done()
