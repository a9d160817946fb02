"""Facts of model families that a GGUF header does not tell: what the engine does with architectures of these names."""

from __future__ import annotations

from types import MappingProxyType

# One layer in so many attends to everything; the headers of these families give only the window's size.
WINDOW_PERIODS = MappingProxyType({
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "olmo2": 4, "exaone4": 4, "exaone-moe": 4, "afmoe": 4,
    "llama4": 4, "smallthinker": 4,
})  # fmt: skip
FIXED_WINDOWS = MappingProxyType({"llama4": 8_192, "smallthinker": 4_096})
"""Windows that the engine uses whatever the header says, unless it says 0."""

DENSE_FIRST = frozenset({"smallthinker"})
WINDOWLESS = frozenset({"phi3"})
"""Families whose window the engine does not use."""

ENCODERS = frozenset({
    "bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert", "modern-bert",
    "gemma-embedding", "wavtokenizer-dec",
})  # fmt: skip
CACHELESS = frozenset({"dream", "llada", "llada-moe", "rnd1"})
"""They write a whole text at once, step by step, and keep nothing."""

PLAIN = frozenset({
    "afmoe", "apertus", "arcee", "arctic", "baichuan", "bailingmoe", "bailingmoe2", "bitnet", "bloom", "chameleon", "chatglm",
    "codeshell", "cogvlm", "cohere2", "command-r", "dbrx", "deci", "deepseek", "deepseek2", "deepseek2-ocr", "dots1",
    "ernie4_5", "ernie4_5-moe", "exaone", "exaone-moe", "exaone4", "falcon", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4",
    "glm4", "glm4moe", "gpt-oss", "gpt2", "gptj", "gptneox", "granite", "granitemoe", "grok", "grovemoe", "hunyuan-dense",
    "hunyuan-moe", "hunyuan_vl", "internlm2", "jais", "jais2", "llama", "llama-embed", "llama4", "maincoder", "mimo2",
    "minicpm", "minicpm3", "minimax-m2", "mistral3", "mistral4", "mpt", "nemotron", "olmo", "olmo2", "olmoe", "openelm",
    "orion", "paddleocr", "pangu-embedded", "phi2", "phi3", "phimoe", "plamo", "plamo3", "plm", "qwen", "qwen2", "qwen2moe",
    "qwen2vl", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "refact", "seed_oss", "smallthinker", "smollm3", "stablelm",
    "starcoder", "starcoder2", "step35", "t5", "t5encoder", "xverse",
})  # fmt: skip
HYBRID = frozenset({
    "jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "kimi-linear", "glm-dsa",
    "deepseek32",
})  # fmt: skip
"""Families whose memory is that of attention, layer by layer, and those that keep states as well, as their headers tell."""
ALL_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
EVERY_FOURTH_ATTENDS = frozenset({"qwen3next", "qwen35", "qwen35moe"})
BOTH_IN_EACH_LAYER = frozenset({"falcon-h1"})
THREE_KINDS_OF_LAYER = frozenset({"nemotron_h", "nemotron_h_moe"})
KNOWN = frozenset({
    *ENCODERS, *CACHELESS, *PLAIN, *HYBRID, *ALL_RECURRENT, *EVERY_FOURTH_ATTENDS, *BOTH_IN_EACH_LAYER,
})  # fmt: skip
