"""What is to be found about ports: those that something has, those that several pools want, and the daemon's own."""

from __future__ import annotations

from collections.abc import Iterator

from pool_managerd.core.preflight.facts import HostFacts, Wants
from pool_managerd.core.preflight.findings import FAIL, WARN, Finding


def port_findings(facts: HostFacts, wants: Wants) -> Iterator[Finding]:
    for pool in wants.local_pools:
        taken = [port for port in pool.ports if port in facts.ports_taken]
        for port in taken:
            message = f"cannot give port {port} to pool {pool.pool_id}: something listens there"
            level = FAIL if len(taken) == len(pool.ports) else WARN  # it takes another one of its own
            yield Finding("port_taken", level, f"port {port}", message, (f"ss -ltnp 'sport = :{port}'",))
    yield from shared_ports(wants, facts.ports_taken)
    yield from daemon_port(wants)
    if wants.control_port and wants.control_port in facts.ports_taken:
        message = f"something listens on the control API's port {wants.control_port} already, perhaps a running daemon"
        yield Finding("control_port", WARN, f"port {wants.control_port}", message, (f"ss -ltnp 'sport = :{wants.control_port}'",))
    if wants.engine_ports is not None:
        low, high = wants.engine_ports
        free = high - low + 1 - len([port for port in facts.ports_taken if low <= port <= high])
        needed = len([pool for pool in wants.local_pools if not pool.ports])
        if free < needed:
            message = f"cannot find ports for {needed} pools: {free} of {low}-{high} are free"
            remedy = ('daemon: {engine_ports: "20000-29999"}', "ss -ltn")
            yield Finding("engine_ports", FAIL, f"ports {low}-{high}", message, remedy)


def shared_ports(wants: Wants, taken: frozenset[int] = frozenset()) -> Iterator[Finding]:
    """Ports that several pools have as their own: no start fails for it, but which pool gets one depends on who came first."""
    own: dict[str, set[int]] = {}
    for pool in wants.local_pools:
        own.setdefault(pool.pool_id, set()).update(pool.ports)
    groups: dict[tuple[str, ...], list[int]] = {}
    for port in sorted(set().union(*own.values())):
        names = tuple(sorted(name for name, ports in own.items() if port in ports))
        if len(names) > 1:
            groups.setdefault(names, []).append(port)
    used = {*taken, *(port for ports in own.values() for port in ports), wants.control_port}
    for names, ports in groups.items():
        spare = all(own[name] - set(ports) for name in names)
        free = (port for port in range(ports[-1] + 1, 65536) if port not in used)
        remedy = [f"provisioning: {{ports: [{port}]}}  # pool {name}" for name, port in zip(names[1:], free, strict=False)]
        yield _shared(names, ports, spare, remedy or [f"provisioning: {{ports: []}}  # pool {names[-1]}"])


def daemon_port(wants: Wants) -> Iterator[Finding]:
    """The control API's own port as a pool's: no start fails for it, but the pool never gets it."""
    port = wants.control_port
    for pool in wants.local_pools:
        if port is not None and port in pool.ports:
            instead = "one of daemon.engine_ports" if set(pool.ports) == {port} else "another of its own"
            message = f"pool {pool.pool_id} has port {port}, which is the control API's (daemon.bind): it runs on {instead}"
            remedy = f"provisioning: {{ports: [{port + 1 if port < 65535 else port - 1}]}}  # pool {pool.pool_id}"
            yield Finding("port_of_daemon", WARN, f"port {port}", message, (remedy,))


def _shared(names: tuple[str, ...], ports: list[int], spare: bool, remedy: list[str]) -> Finding:
    which = f"port{'s' if len(ports) > 1 else ''} {', '.join(map(str, ports))}"
    instead = "another of its own" if spare else "one of daemon.engine_ports"
    both = "both" if len(names) == 2 else "all"
    message = f"pools {', '.join(names[:-1])} and {names[-1]} {both} have {which}: whichever starts later runs on {instead}"
    return Finding("port_shared", WARN, which, message, tuple(remedy))
