"""May it run here at all?"""

from __future__ import annotations

from pool_managerd.errors import NodeError


def assert_gpu_only(cuda_available: bool) -> None:
    """Raises NodeError GPU_REQUIRED at once when no CUDA is found: there is no CPU attempt (ORCH-1102, B-PREFLIGHT-010..013)."""
    if not cuda_available:
        raise NodeError(
            "GPU-only enforcement: nvcc/nvidia-smi not found, so no engine is started on this machine",
            code="GPU_REQUIRED", status=503, retriable=False,
            hint="install the NVIDIA driver, or use 'profile: dev' to try engines on the CPU",
        )  # fmt: skip
