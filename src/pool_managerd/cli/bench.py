"""``bench``: measure a pool on purpose, and draw what was found."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import NO, CommandFailed
from pool_managerd.cli.options import ConfigFile, Output, PoolId, Url, daemon
from pool_managerd.cli.output import Format, Json, printable, show
from pool_managerd.cli.progress import wait_for
from pool_managerd.core.bench import MAX_PROMPT_TOKENS, MAX_RUNS, MAX_TOKENS, PROMPT_TOKENS, RUNS, TOKENS

Tokens = Annotated[
    int | None,
    typer.Option(min=2, max=MAX_TOKENS, help=f"To make for each request; {TOKENS}, or what fits.", show_default=False),
]
PromptTokens = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_PROMPT_TOKENS, help=f"In each prompt, about; {PROMPT_TOKENS}, or what fits.", show_default=False),
]
Runs = Annotated[int, typer.Option(min=1, max=MAX_RUNS, help="So often alone, and so often on all slots at once.")]
_WIDTH = 80
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bench(
    pool_id: PoolId, tokens: Tokens = None, prompt_tokens: PromptTokens = None, runs: Runs = RUNS, url: Url = None,
    config: ConfigFile = None, output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Measure a ready pool on purpose.

    One request alone, then all slots at once. All slots are leased meanwhile; a pool with requests in flight is not measured.
    What was found is the pool's baseline from then on, in status, snapshots and metrics, unless an earlier bench had longer
    requests. Ctrl-C breaks it off.
    """
    node = daemon(url, config)
    body = {key: value for key, value in (("tokens", tokens), ("prompt_tokens", prompt_tokens)) if value is not None}
    operation: Json = {}
    try:
        with _interrupts_wait():
            operation = node.request("POST", "pools", pool_id, "bench", body={**body, "runs": runs})
        operation = _ended(node, operation)
    except KeyboardInterrupt:
        if operation:
            with suppress(CommandFailed):  # it was over already
                node.request("DELETE", "pools", pool_id, "bench")
        raise CommandFailed(f"the bench of {pool_id} was broken off", 130) from None
    if operation.get("status") == "failed":
        failure = operation.get("error") or {}
        raise CommandFailed(str(failure.get("message")), NO, hint=failure.get("hint"), code=failure.get("code"))
    show(operation["outcome"], output, _drawn)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """A Ctrl-C is heard behind this: when it is known what there is to break off."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _drawn(found: Json) -> None:
    sys.stdout.write(printable("\n".join(chart(found))) + "\n")


def _ended(node: Daemon, operation: Json) -> Json:
    last = operation

    def pending() -> list[str]:
        nonlocal last
        last = node.get("operations", operation["operation_id"])
        progress = last.get("progress") or {}
        return [str(progress.get("human") or operation["pool_id"])] if last.get("status") == "running" else []

    wait_for(pending)
    return last


def chart(found: Json) -> list[str]:
    """What was measured, in lines of 80 columns at most."""
    loads = [("alone", found["alone"])]
    if found.get("full"):
        loads.append((f"{found['full']['requests']} at once", found["full"]))
    engine = f"{found.get('engine')} {found.get('engine_version') or ''}".strip()
    model = str(found.get("model_id") or "").rpartition("/")[2].removeprefix("file:")
    lines = [
        f"pool {found['pool_id']}: {model}"[:_WIDTH], f"on {engine}, slots: {found['slots']}"[:_WIDTH],
        str(found["measured_with"])[:_WIDTH], "", " " * 22 + "".join(f"{name:>14}" for name, _ in loads),
    ]  # fmt: skip
    for label, key, unit in _ROWS:
        cells = [load.get(key) for _, load in loads]
        if any(cell is not None for cell in cells):
            lines.append(f"{label:<22}" + "".join(f"{_cell(cell, unit):>14}" for cell in cells))
    most = max(load["tokens_per_s_total"] for _, load in loads) or 1.0
    lines += ["", "tokens/s in total, prompts included"]
    for name, load in loads:
        value = load["tokens_per_s_total"]
        lines.append(f"{name:>12} {_bar(value / most, _WIDTH - 24)} {value:.1f}")
    if longer := found.get("longer_bench"):
        lines += ["", "not the pool's baseline: that stays what a longer bench has measured"[:_WIDTH], f"({longer})"[:_WIDTH]]
    return lines


_ROWS = (
    ("first token, p50", "first_token_ms_p50", " ms"), ("between tokens, p50", "between_tokens_ms_p50", " ms"),
    ("between tokens, p99", "between_tokens_ms_p99", " ms"), ("tokens/s of each", "tokens_per_s", ""),
    ("prompt tokens/s", "prompt_tokens_per_s", ""),
)  # fmt: skip


def _cell(value: Any, unit: str) -> str:
    return "-" if value is None else f"{value:.1f}{unit}"


def _bar(share: float, room: int) -> str:
    eighths = max(1, round(share * room * 8))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
