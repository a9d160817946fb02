"""What the flags of a command that is moved over mean to our engines, and which of them a pool may not have."""

from __future__ import annotations

from functools import cache

from pool_managerd.engines.flags import OptionTable, attempt, hyphenated
from pool_managerd.engines.llamacpp import command as llamacpp
from pool_managerd.engines.llamacpp import rules
from pool_managerd.engines.llamacpp.options import flag_of_variable
from pool_managerd.engines.llamacpp.options import recorded_options as llamacpp_options
from pool_managerd.engines.vllm.flags import REFUSED, SET_BY_DAEMON
from pool_managerd.engines.vllm.flags import recorded_options as vllm_options
from pool_managerd.errors import PoolError
from pool_managerd.moving.command_line import Keyed, Written


def read_flags(engine: str, words: tuple[str, ...], one_gpu: bool) -> tuple[Written, ...]:
    """The flags in ``words`` as the recorded version of the engine has them, in order (``moving.command_line.ReadFlags``)."""
    table = _table(engine)
    found: list[Written] = []
    for use, items in table.walk(words, suggest=False):
        if isinstance(use, PoolError):
            found.append(Written("", items[1:], items, known=False))
            continue
        if engine == "vllm":
            wrong = attempt(lambda use=use: table.refuse(use, SET_BY_DAEMON, REFUSED))  # type: ignore[misc]
        else:
            wrong = llamacpp.refusals(use, table, sees_one=one_gpu, gpu_only=True)
        beside = engine == "llamacpp" and any(table.names(use, name) for name in rules.FILES)
        found.append(Written(use.name, use.values, items, _reason(wrong), True, beside))
    return tuple(found)


def flag_of_key(key: str) -> Keyed | None:
    """The flag that a key of llama.cpp's presets names: its long name, a short one, or its variable of the environment
    (``moving.command_line.FlagOfKey``).
    """
    table = _table("llamacpp")
    variable = flag_of_variable(key)
    name = next((name for name in (variable, hyphenated(f"--{key}"), f"-{key}") if name in table), None)
    if name is None:
        return None
    use = table.use(name)
    negated = use.option.negated
    negation = use.option.spelling(negated[0]) if negated else ""
    negates = use.name in negated
    return Keyed(use.option.canonical, negation, use.option.values, negates, mistaken=negates and name == variable)


@cache
def _table(engine: str) -> OptionTable:
    return vllm_options() if engine == "vllm" else llamacpp_options()


def _reason(wrong: tuple[PoolError, ...]) -> str:
    if not wrong:
        return ""
    first = wrong[0]
    reason = first.message.partition(": ")[2] or first.message
    if first.code == "GPU_REQUIRED":
        return f"{reason}; with `profile: dev` it may stand in provisioning.flags"
    return f"{reason}; {first.hint}" if first.hint and not first.hint.startswith("remove it") else reason
