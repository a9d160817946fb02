"""What each pool is to run, and by which rules: as it is configured, or as a request has submitted it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import AnyEngine
from pool_managerd.errors import PoolError
from pool_managerd.supervision import policy
from pool_managerd.supervision.intents import SubmissionCodec
from pool_managerd.supervision.pool import Definition
from pool_managerd.supervision.services import Services


class Definitions:
    """Makes them from the configuration that is in force."""

    def __init__(self, config: Config, services: Services, codec: SubmissionCodec) -> None:
        self._config, self._s, self._codec = config, services, codec

    def use_config(self, config: Config) -> None:
        """What the next ones are made from."""
        self._config = config

    def of(self, pool_id: str, config: PoolConfig | None, submitted: Mapping[str, Any] | None = None) -> Definition:
        """Of a configured pool, or of one whose engine was ``submitted`` to an earlier daemon."""
        definition = Definition(policy.policy_for(self._config, pool_id, config, self._s.node_id), config)
        if config is None and submitted is not None:
            return self._recalled(pool_id, definition, submitted)
        return definition

    def with_engine(self, pool_id: str, definition: Definition, engine: AnyEngine | None) -> Definition:
        """``definition`` with this engine in the place of a submitted one."""
        rules = policy.policy_for(self._config, pool_id, definition.config, self._s.node_id, engine)
        return Definition(rules, definition.config, engine)

    def _recalled(self, pool_id: str, definition: Definition, submitted: Mapping[str, Any]) -> Definition:
        """Barred, and said so, when it cannot be used any more."""
        try:
            if withheld := submitted.get("withheld"):
                raise policy.not_kept(pool_id, withheld)
            engine = self._codec.parse_prepared(submitted, pool_id)
            policy.check_submission(self._config, pool_id, engine)
        except PoolError as problem:
            human = f"The stored engine of pool '{pool_id}' cannot be used any more: {problem.message}"
            self._s.events.emit("notice", human, level="error", pool_id=pool_id, hint=problem.hint)
            return replace(definition, barred=problem)
        return self.with_engine(pool_id, definition, engine)
