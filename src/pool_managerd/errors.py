"""Errors by who must act: the author of the configuration, the node's operator, the engine, or the caller.

Every error carries a stable ``code`` (SPEC §11.2), the HTTP status it maps to, an optional ``hint`` that says
what to do, and whether trying again can help. Messages start with "cannot" unless a specification fixes the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class PoolError(Exception):
    """The root of everything this package raises on purpose.

    ``code`` says what is wrong for programs, ``status`` is the HTTP status that it has on the API, ``retriable`` whether
    trying again can help. The class alone has defaults for them. ``retry_after_ms`` is set only where waiting that long is
    known to help. ``details`` is extra data for machines; it must never hold a secret.
    """

    code: str = "INTERNAL"
    status: int = 500
    retriable: bool = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        hint: str | None = None,
        retriable: bool | None = None,
        retry_after_ms: int | None = None,
        pool_id: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.status = status or type(self).status
        self.hint = hint
        self.retriable = type(self).retriable if retriable is None else retriable
        self.retry_after_ms = retry_after_ms
        self.pool_id = pool_id
        self.details = details or {}


class SpecError(PoolError):
    """What was asked for is wrong: configuration, model reference, device mask, engine flags."""

    code = "INVALID_PARAMS"
    status = 400


class NodeError(PoolError):
    """This machine cannot do it now: no GPU, no memory, no disk, a locked state directory."""

    code = "NODE_UNAVAILABLE"
    status = 503
    retriable = True


class EngineError(PoolError):
    """The engine failed: it could not be run, exited, or never became healthy."""

    code = "PRELOAD_FAILED"
    status = 500


class RequestError(PoolError):
    """The caller's request cannot be served in the present state (unknown pool, draining, no slots …)."""

    code = "INVALID_PARAMS"
    status = 400


CODES: Mapping[str, str] = MappingProxyType({
    "ALREADY_READY": "A preload of a pool that is ready; `start` would have joined it.",
    "ALREADY_RUNNING": "Another daemon has this state or runtime directory; the message has its pid.",
    "APPLY_FAILED": "A configuration was applied, and some pools could not be what it says; the details have each pool's end.",
    "BAD_TOKEN": "The bearer token is wrong.",
    "BENCH_FAILED": "The engine did not answer a bench as it should; the message says how.",
    "BODY_TOO_LARGE": "The request's body is larger than is taken (gateway.max_body_bytes).",
    "BUDGET_SPENT": "The API key has used all tokens that it has for a day.",
    "CATALOG_TOO_NEW": "A later version has written into the cache of models; nothing of it is changed.",
    "CIRCUIT_OPEN": "The pool failed too often: until its breaker tries it again, or is reset, only a person starts it.",
    "CONCURRENCY_LIMIT": "The gateway has as many requests for the model as it may at once (pools[].requests.concurrency).",
    "CONFIGURATION_NOT_FOUND": "No configuration of the history has that number, or it was forgotten.",
    "CONFIG_ERROR": "The configuration cannot be honoured; the message names the place.",
    "CONFIG_UNWRITABLE": "The daemon may not write its own configuration file, so nothing was applied.",
    "DEVICE_NOT_FOUND": "No GPU or MIG instance has that name; the hint lists those that exist.",
    "DIGEST_MISMATCH": "A model file is not the one that its checksum names.",
    "DIGEST_MISSING": "`policy.strict_verification`: nobody has said what the model has to be, so it is not used.",
    "DIRECTORY_NOT_OURS": "A state or runtime directory could be changed by another user; the hint has the command.",
    "DRAIN_TIMEOUT": "Leases were not back in time, so a reload was given up; the engine serves on.",
    "ENGINE_GONE": "The engine ended, or cut its answer off, while the gateway passed it on.",
    "ENGINE_REFUSED": "The engine answered with an error when the client's stream had already begun.",
    "EXTERNAL_ENGINE": "Somebody else runs the pool's engine: nothing of this node is freed by its end.",
    "FETCH_FAILED": "A model could not be fetched for now; what came is kept, and the next try goes on behind it.",
    "GATE_FAILED": "A reloaded engine was ready and did not pass; the message says what it did not show.",
    "GPU_NOT_SHARED": "A pool is exclusive there, or asks to be where others are.",
    "GPU_REQUIRED": "Profiles home and cloud run engines on NVIDIA GPUs only, and there is none.",
    "GPU_UNAVAILABLE": "A GPU is quarantined, cordoned, gone or cannot be read; the hint says what to do.",
    "GPU_YIELDED": "The GPUs that the pool could use are left to others for now.",
    "HOST_REFUSED": "The request's Host is not the daemon's: perhaps a web page was made to send it.",
    "INSUFFICIENT_RAM": "The engine needs more RAM than is available.",
    "INSUFFICIENT_VRAM": "The engine needs more VRAM than may be reserved; the message says who holds the rest.",
    "INTERNAL": "A fault of pool-managerd itself.",
    "INVALID_PARAMS": "The request is wrong; the message names what.",
    "INVALID_POOL_ID": "The text cannot name a pool.",
    "ISOLATION_REQUIRED": "Profile cloud starts no engine that shares the daemon's user.",
    "KEY_NOT_FOUND": "The gateway has no API key of that name.",
    "LAUNCH_NOT_FOUND": "The log of that launch is not kept, or there was none.",
    "LEASE_NOT_FOUND": "That lease was never given, or is over.",
    "MISSING_TOKEN": "The request needs a bearer token.",
    "MODEL_IN_USE": "A pool needs that model, or it is pinned, so it stays in the cache; the message says which.",
    "MODEL_NOT_CACHED": "The cache of models has nothing for that reference.",
    "MODEL_NOT_FETCHED": "The model is not on this machine yet: a start of its pool, or `models pull`, fetches it.",
    "MODEL_NOT_FOUND": "No pool has that id, serves that name or has that alias; the hint lists those that exist.",
    "NODE_RESTARTED": "The daemon ended before the operation was finished.",
    "NODE_UNAVAILABLE": "The node cannot do it now: it is starting, shutting down, or short of something.",
    "NON_LOOPBACK_WITHOUT_TOKEN": "A daemon off loopback needs a token.",
    "NOT_OURS": "What was to be deleted is not in a cache of this daemon; the message says where it is.",
    "NOT_FOUND": "There is nothing at that path.",
    "NOT_TOGETHER": "A pool that is loaded and this one are kept apart by `together` in the configuration.",
    "NO_CONFIGURATION": "The daemon was started without a configuration file.",
    "MODEL_NOT_BUSY": "Nothing is under way with the model that could be broken off.",
    "NO_FREE_SLOTS": "Every slot of the pool is leased.",
    "OPERATION_CANCELLED": "Another request ended what was waited for.",
    "OPERATION_IN_PROGRESS": "Something else is under way that cannot be joined.",
    "OPERATION_NOT_FOUND": "No operation has that id, or it was forgotten.",
    "ORIGIN_REFUSED": "A web page of another origin sent the request.",
    "PLAN_CHANGED": "Something has changed since the plan was shown: look at it again.",
    "POLICY_DENIED": "`policy` does not allow it.",
    "POOL_DRAINING": "The pool takes no new leases and no start while it drains.",
    "POOL_HELD": "The pool is held: release it first.",
    "POOL_IN_USE": "A pool with requests in flight is neither evicted nor measured, and one that serves is not purged.",
    "POOL_NOT_CONFIGURED": "The pool has neither a configuration nor a submitted engine.",
    "POOL_NOT_FOUND": "No pool has that id.",
    "POOL_STOPPED": "A person stopped or drained the pool: demand does not start it, `start` does.",
    "POOL_UNAVAILABLE": "One of the pool's GPUs is quarantined.",
    "POOL_UNREADY": "The pool is not ready.",
    "PREFLIGHT_FAILED": "The machine lacks what every start needs; the hint has what to type.",
    "PRELOAD_FAILED": "The engine could not be run, ended, or never became healthy; the details have the end of its log.",
    "QUEUE_FULL": "As many requests as may wait for this pool, or on this node, do so already (queue.max_waiting).",
    "QUEUE_TIMEOUT": "There was no slot of the model within the time that the request waits.",
    "REQUEST_TIMEOUT": "The request's body did not come in time.",
    "SECRETS_NOT_KEPT": "A submitted engine's secrets went with the daemon before; submit it again.",
    "SLEEP_FAILED": "An engine did not fall asleep, or its sleep did not free the memory that a reload needs; it was woken.",
    "TICKET_NOT_FOUND": "No request of that ticket waits: it has its slot, was refused, or went away.",
    "STATE_TOO_NEW": "A newer version wrote the state; it is left untouched.",
    "STATE_UNWRITABLE": "The change could not be made durable, so it was not made.",
    "STOP_FAILED": "The engine's process survived SIGKILL.",
    "TOO_MANY_POOLS": "The node keeps no more pools, or no more submitted engines.",
    "TOO_MANY_REQUESTS": "Too many requests at once; try again.",
    "UNSUPPORTED_MEDIA_TYPE": "Bodies are JSON.",
    "VRAM_HELD": "The engine has ended, and its VRAM is not seen free; the message names the holder.",
})  # fmt: skip
"""Every ``code``, and what it means."""
