"""vLLM: one ``vllm serve`` of the command that is configured."""

from pool_managerd.engines.vllm.adapter import Vllm as ADAPTER

__all__ = ["ADAPTER"]
