"""The cache of models of a node that has none: two models, and what is left of a download."""

from __future__ import annotations

from typing import Any

from pool_managerd.errors import RequestError

NEEDED, UNNEEDED = "hf:org/repo/model-with-a-rather-long-name-Q8_0.gguf", "hf:org/old:Q4_K_M"


class FakeCache:
    """``asked`` is what came: the method, and what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, Any]] = []
        self.pinned: set[str] = set()

    async def models(self, *, everywhere: bool = False) -> list[dict[str, Any]]:
        return [self._row(NEEDED, ["demo"]), self._row(UNNEEDED, [])]

    async def pin_model(self, ref: str, *, pinned: bool = True) -> dict[str, Any]:
        self.asked.append(("pin", (ref, pinned)))
        if ref not in (NEEDED, UNNEEDED):
            raise RequestError(f"the model {ref} is not in the cache", code="MODEL_NOT_CACHED", status=404)
        (self.pinned.add if pinned else self.pinned.discard)(ref)
        return self._row(ref, [])

    async def plan_model_gc(self, older_than_s: float | None = None) -> dict[str, Any]:
        self.asked.append(("plan", older_than_s))
        return _gc()

    async def collect_models(self, older_than_s: float | None = None) -> dict[str, Any]:
        self.asked.append(("gc", older_than_s))
        return _gc()

    def _row(self, ref: str, pools: list[str]) -> dict[str, Any]:
        return {
            "ref": ref, "path": "/cache/m.gguf", "size_bytes": 5 << 30, "files": 1, "digest": "sha256:0", "verified": True,
            "source": "c0", "fetched_at_ms": 1, "untouched": True, "pools": pools, "lifecycle": "active",
            "pinned": ref in self.pinned, "last_used_ms": 1_795_000_000_000 if pools else None, "last_verified_ms": 1,
        }  # fmt: skip


def _gc() -> dict[str, Any]:
    rows = [
        ("partial/0123456789abcdef0123456789abcdef.part", "download", 1 << 30, "delete", "nobody goes on with this download"),
        (UNNEEDED, "model", 5 << 30, "delete", "nobody has needed it for 12 days"),
        (NEEDED, "model", 5 << 30, "keep", "pool demo is configured with it; pool other goes back to it where its reload fails"),
    ]
    return {
        "rows": [
            {"name": name, "kind": kind, "size_bytes": count, "action": action, "why": why, "frees_bytes": count}
            for name, kind, count, action, why in rows
        ],
        "freed_bytes": 6 << 30, "used_bytes": 11 << 30, "max_bytes": 10 << 30, "free_bytes": 1 << 40, "keep_free_bytes": 4 << 30,
    }  # fmt: skip
