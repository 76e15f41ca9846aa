"""
Names into addresses that may be dialled.

The cache is ours and bounded: it honours TTLs within bounds, remembers failures for a moment, and asks once however
many wait for a name.  Every answer is judged by the address guard; forbidden addresses are dropped, and a name none of
whose addresses is allowed is blocked.

Names are asked for as they are, without search domains and hosts file unless they are configured, so that what a name
means does not depend on the machine.  ``localhost`` is loopback by RFC 6761, without asking anybody.

A long-lived c-ares channel learns how long answers take, and after some thousand quick ones gives up on a slow name
after as little as 0.25 s, whatever ``timeout`` says (c-ares 1.32 and later; seen with 1.34.9).  So a time-out is asked
again, once, on a fresh channel, which then takes the old one's place.

A name whose servers do not answer is the name's fault; name servers of ours that answer nothing at all are not.  Where a
name got no answer, and nothing else did of late, the name servers are asked for the root, which every one of them knows.
While they are silent no name is waited for: once a second the root and one name that is wanted are asked for, and any
answer to either, be it a refusal, ends the silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import aiodns
import pycares

from hookd.core.addresses import TENANT_REASON, AddressRules, classify
from hookd.core.urls import is_localhost
from hookd.net.hosts import HostsFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TTL_LEAST_S, TTL_MOST_S = 5.0, 300.0
"""A TTL of 0 would be a query for each connection, one of a week a name that never moves."""

FAILURE_S = 5.0
CACHE_MOST = 10_000
ADDRESSES_MOST = 16
"""Of each family, taken of one answer: it may have four thousand, and each costs memory here and time at every connection."""

OTHER_FAMILY_S = 0.5
"""
For so long addresses of one family wait for those of the other (RFC 8305, 3, has 50 ms).

There are name servers that never answer when they are asked for AAAA: their names have addresses all the same.
"""

QUERY_TIMEOUT_S = 5.0
CHANNEL_LIFE_S = 300.0
"""Also bounds c-ares' own cache, which keeps answers for up to an hour and cannot be turned off from Python."""

LOOPBACK = ("127.0.0.1", "::1")

NO_SUCH_NAME = frozenset({pycares.errno.ARES_ENOTFOUND, pycares.errno.ARES_ENODATA})

SAID_BY_A_SERVER = frozenset(
    {
        pycares.errno.ARES_ENODATA,
        pycares.errno.ARES_EFORMERR,
        pycares.errno.ARES_ESERVFAIL,
        pycares.errno.ARES_ENOTFOUND,
        pycares.errno.ARES_ENOTIMP,
        pycares.errno.ARES_EREFUSED,
        pycares.errno.ARES_EBADRESP,
    }
)
"""After which it is known that one answers; all other errors may mean that nobody does."""

NO_DNS = "no DNS server answers"

LATELY_S = 5.0
"""An answer as recent as this shows that name servers answer."""

PROBE_S = 1.5
"""How long the root is waited for, and how long between two such questions."""

FAILURES = {
    pycares.errno.ARES_ENOTFOUND: "the name does not exist",
    pycares.errno.ARES_ENODATA: "the name has no address",
    pycares.errno.ARES_ESERVFAIL: "the name's servers failed",
    pycares.errno.ARES_EREFUSED: "the name's servers refused",
    pycares.errno.ARES_ETIMEOUT: "the name's servers did not answer",
    pycares.errno.ARES_ECONNREFUSED: NO_DNS,
}


@dataclass(frozen=True, slots=True)
class Resolution:
    """What became of a name: addresses, or a problem."""

    addresses: tuple[str, ...] = ()
    """Vetted, IPv4 and IPv6 as they came."""
    problem: str = ""
    """Fit for a tenant."""
    blocked: bool = False
    detail: str = ""
    """For the operator: which addresses were refused, and why."""
    ours: bool = False
    """No name server answers: nobody else is to blame."""


@dataclass(slots=True)
class _Answer:
    addresses: tuple[str, ...]
    problem: str
    until: float
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Said:
    """What was said of the addresses of one family."""

    addresses: tuple[str, ...] = ()
    ttl: int = 0
    code: int = 0
    """Of c-ares; 0: there was an answer."""


UNHEARD = Said(code=pycares.errno.ARES_ETIMEOUT)


class Resolver:
    """Resolves and vets; one for a process."""

    def __init__(
        self,
        rules: Callable[[], AddressRules],
        *,
        nameservers: Sequence[str] = (),
        hosts_file: str = "",
        search_domains: Sequence[str] = (),
        mono: Callable[[], float],
    ) -> None:
        self._rules = rules
        self._nameservers = list(nameservers)
        self._hosts = HostsFile(hosts_file)
        self._search = [domain.lower() for domain in search_domains]
        self._mono = mono
        self._cache: OrderedDict[str, _Answer] = OrderedDict()
        self._asking: dict[str, asyncio.Task[_Answer]] = {}
        self._channel: aiodns.DNSResolver | None = None
        self._channel_born = 0.0
        self._retired: list[aiodns.DNSResolver] = []
        self._under_way: Counter[aiodns.DNSResolver] = Counter()
        """Look-ups that a channel has not answered; only of those that have some."""
        self.lookups = 0
        self._heard_mono = float("-inf")
        """When a name server answered last."""
        self._silent = False
        self._listening: asyncio.Task[bool] | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._wanted = ""

    def __repr__(self) -> str:
        return f"<Resolver cached={len(self._cache)} asking={len(self._asking)}>"

    async def resolve(self, host: str) -> Resolution:
        """The addresses of a host that may be dialled; a name in the cache costs about 4 µs for each address."""
        answer = self._known(host)
        if answer is None:
            if self._silent:
                self._wanted = host
                return Resolution(problem=NO_DNS, ours=True)
            answer = await self._ask_once(host)
        if answer.problem:
            return Resolution(problem=answer.problem, ours=answer.ours)
        rules = self._rules()
        allowed = []
        refused = []
        for address in answer.addresses:
            verdict = classify(address, rules)
            if verdict.allowed:
                allowed.append(address)
            else:
                refused.append(f"{address}: {verdict.detail}")
        detail = "; ".join(refused)
        if allowed:
            return Resolution(tuple(allowed), detail=detail)
        return Resolution(problem=TENANT_REASON, blocked=True, detail=detail)

    async def silent(self) -> bool:
        """Whether no name server answers anything; takes ``PROBE_S`` at most to find out."""
        if self._silent or self._heard_mono > self._mono() - LATELY_S:
            return self._silent
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._root_is_known())
        if not await asyncio.shield(self._listening) and not self._silent:
            self._silent = True
            self._waiting = asyncio.create_task(self._wait_for_a_sign())
            for task in self._asking.values():
                if task is not asyncio.current_task():
                    task.cancel()  # it would wait on into the time when they answer again
        return self._silent

    async def close(self) -> None:
        """Ask nothing more."""
        tasks = [*self._asking.values(), *(t for t in (self._listening, self._waiting) if t is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._retire()
        self._under_way.clear()
        await self._close_retired()

    def _known(self, host: str) -> _Answer | None:
        try:
            return _Answer((str(ipaddress.ip_address(host)),), "", 0.0)
        except ValueError:
            pass
        if is_localhost(host):
            return _Answer(LOOPBACK, "", 0.0)
        if written := self._hosts.addresses(host):
            return _Answer(written, "", 0.0)
        answer = self._cache.get(host)
        if answer is None or answer.until <= self._mono():
            return None
        self._cache.move_to_end(host)
        return answer

    async def _ask_once(self, host: str) -> _Answer:
        task = self._asking.get(host)
        if task is None:
            task = asyncio.create_task(self._searched(host))
            self._asking[host] = task
            task.add_done_callback(lambda _: self._asking.pop(host, None))
        try:
            # one impatient attempt must not end the look-up for the others
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if not task.cancelled() or current is None or current.cancelling():
                raise
            # not whoever waits here, but the look-up was ended: by the silence, perhaps before its first step
            self._wanted = host
            return _Answer((), NO_DNS, 0.0, ours=True)

    async def _searched(self, host: str) -> _Answer:
        """A single label is looked for below each search domain first, as resolv.conf has it."""
        for name in [f"{host}.{domain}" for domain in self._search if "." not in host]:
            answer = self._known(name) or await self._asked(name)
            if answer.addresses or answer.ours:
                return answer
        return await self._asked(host)

    async def _asked(self, host: str) -> _Answer:
        self.lookups += 1
        found = await self._of_both_families(host)
        addresses = tuple(address for said in found for address in said.addresses[:ADDRESSES_MOST])
        now = self._mono()
        if addresses:
            # without its A records a name may not be reached at all from here: it is asked for again soon
            ttl = 0 if found[0].code == UNHEARD.code else min(said.ttl for said in found if said.addresses)
            answer = _Answer(addresses, "", now + min(TTL_MOST_S, max(TTL_LEAST_S, float(ttl))))
        else:
            # of two failures the one that is not "no such record" says more
            code = next((said.code for said in found if said.code not in NO_SUCH_NAME), found[0].code)
            answer = _Answer((), FAILURES.get(code, "the name could not be resolved"), now + FAILURE_S)
            if code not in SAID_BY_A_SERVER and await self.silent():
                return _Answer((), NO_DNS, 0.0, ours=True)
        self._cache[host] = answer
        while len(self._cache) > CACHE_MOST:
            self._cache.popitem(last=False)
        return answer

    async def _of_both_families(self, host: str) -> list[Said]:
        """What was said of A and of AAAA."""
        asked = [asyncio.create_task(self._query(host, kind)) for kind in ("A", "AAAA")]
        try:
            done, waiting = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            if waiting:
                known = any(task.result().addresses for task in done)
                await asyncio.wait(waiting, timeout=OTHER_FAMILY_S if known else None)
            return [task.result() if task.done() else UNHEARD for task in asked]
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _query(self, host: str, kind: str) -> Said:
        channel = self._current()
        said = await self._told_by(channel, host, kind)
        if said.code == pycares.errno.ARES_ETIMEOUT:
            if channel is self._channel:
                self._retire()
            said = await self._told_by(self._current(), host, kind)
        return said

    async def _told_by(self, channel: aiodns.DNSResolver, host: str, kind: str) -> Said:
        """Ask a channel that may be retired meanwhile: with the last of its look-ups it is closed."""
        self._under_way[channel] += 1
        try:
            return await self._told(channel, host, kind)
        finally:
            self._under_way[channel] -= 1
            if not self._under_way[channel]:
                del self._under_way[channel]
            if self._retired:
                await self._close_retired()

    async def _told(self, channel: aiodns.DNSResolver, host: str, kind: str) -> Said:
        try:
            said = await self._query_on(channel, host, kind)
        except UnicodeError:
            return Said(code=pycares.errno.ARES_EBADNAME)
        except aiodns.error.DNSError as error:
            said = Said(code=int(error.args[0]))
        if not said.code or said.code in SAID_BY_A_SERVER:
            self._heard_mono = self._mono()
        return said

    async def _root_is_known(self) -> bool:
        """Whether a name server answers when it is asked for the root's servers, whatever it answers."""
        channel = self._new_channel(PROBE_S, tries=1)
        try:
            await channel.query_dns(".", "NS")
        except aiodns.error.DNSError as error:
            return int(error.args[0]) in SAID_BY_A_SERVER
        finally:
            await channel.close()
        return True

    async def _answered(self, channel: aiodns.DNSResolver, host: str) -> bool:
        said = await self._told(channel, host, "A")
        return not said.code or said.code in SAID_BY_A_SERVER

    async def _wait_for_a_sign(self) -> None:
        while self._silent:
            begun = self._mono()
            host = self._wanted
            channel = self._new_channel(PROBE_S, tries=1)
            try:
                asked = [asyncio.create_task(self._root_is_known())]
                if host:
                    asked.append(asyncio.create_task(self._answered(channel, host)))
                known = await asyncio.gather(*asked)
            finally:
                await channel.close()
            if any(known):
                self._heard_mono = self._mono()
                self._silent = False
                self._retire()  # what it has learned is that nobody answers
                return
            await asyncio.sleep(max(0.0, begun + PROBE_S - self._mono()))

    @staticmethod
    async def _query_on(channel: aiodns.DNSResolver, host: str, kind: str) -> Said:
        # the trailing dot keeps search domains away
        result = await channel.query_dns(host + ".", kind)
        wanted = pycares.QUERY_TYPE_A if kind == "A" else pycares.QUERY_TYPE_AAAA
        addresses = [record.data.addr for record in result.answer if record.type == wanted]  # type: ignore[union-attr]
        # a name that is moved by its CNAME has a long-lived address behind it: the shortest of the way counts
        ttl = min((record.ttl for record in result.answer), default=0)
        return Said(tuple(addresses), ttl)

    def _current(self) -> aiodns.DNSResolver:
        now = self._mono()
        if self._channel is not None and now - self._channel_born > CHANNEL_LIFE_S:
            self._retire()
        if self._channel is None:
            self._channel = self._new_channel()
            self._channel_born = now
        return self._channel

    def _retire(self) -> None:
        """Ask it nothing more; what it was asked it may still answer."""
        if self._channel is not None:
            self._retired.append(self._channel)
            self._channel = None

    async def _close_retired(self) -> None:
        """Each has a thread and descriptors of its own; closing one would end what it is still asked for."""
        done = [channel for channel in self._retired if channel not in self._under_way]
        self._retired = [channel for channel in self._retired if channel in self._under_way]
        for channel in done:
            await channel.close()

    def _new_channel(self, timeout_s: float = QUERY_TIMEOUT_S, tries: int = 2) -> aiodns.DNSResolver:
        # "b": DNS only, without the hosts file
        return aiodns.DNSResolver(
            nameservers=self._nameservers or None, timeout=timeout_s, tries=tries, lookups="b"
        )


LOCAL_4 = re.compile(r"\|-- (\S+)\n\s+/32 host LOCAL")


def own_addresses() -> frozenset[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """
    The addresses of this machine's interfaces, as far as the system tells without privileges.

    Linux lists them below ``/proc/net``; elsewhere the addresses that routes would be taken from are found by connecting
    a datagram socket, which sends nothing.
    """
    found: set[ipaddress.IPv4Address | ipaddress.IPv6Address] = set()
    with contextlib.suppress(OSError, ValueError):
        table = Path("/proc/net/if_inet6").read_text(encoding="ascii")
        found.update(ipaddress.IPv6Address(int(line.split()[0], 16)) for line in table.splitlines())
    with contextlib.suppress(OSError, ValueError):
        table = Path("/proc/net/fib_trie").read_text(encoding="ascii")
        found.update(ipaddress.IPv4Address(address) for address in LOCAL_4.findall(table))
    for family, probe in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as prober:
            prober.connect((probe, 9))
            found.add(ipaddress.ip_address(prober.getsockname()[0].partition("%")[0]))
    return frozenset(found)
