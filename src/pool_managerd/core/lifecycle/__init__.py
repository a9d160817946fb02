"""The lifecycle of one engine: ``step(instance, event, now, policy) -> (instance, effects)``. Sans-IO (DESIGN §3)."""

from pool_managerd.core.lifecycle.instance import After, Instance, Phase, Policy
from pool_managerd.core.lifecycle.table import TABLE, next_alarm, step
from pool_managerd.core.lifecycle.view import View, validate, view

__all__ = ["TABLE", "After", "Instance", "Phase", "Policy", "View", "next_alarm", "step", "validate", "view"]
