"""
What guard, resolver and signing cost a delivery: with them, and with nothing in their place, in turns in one run.

    python bench/guard.py [--rounds 9] [--deliveries 10000] [--concurrency 200] [--hosts 20] [--payload 1024] [--json]

One process composes requests and makes exchanges as the daemon does, with no queue, no lanes and no database, against
``receiver.py`` on another core; its CPU a delivery is counted.  On a warm connection, which is how nearly all deliveries
go, and with a new connection for each, which is where the guard works: two looks at the name's addresses, one at the
address that is dialled, one at the peer.  Names are resolved by aiodns from a name server of this script, once, and are in
the resolver's cache from then on.

- *no guard*: ``classify`` allows everything, and the resolver is a dictionary.
- *no signing*: ``sign`` returns a constant.

A round is one turn of each; what is printed beside a variant is the median over the rounds of its difference to the whole,
and the standard error of that.  What a URL's grammar costs is apart: an endpoint's URL is judged when its head is prepared,
not for each delivery.

Goal: on a warm connection the guard costs nothing that can be measured: the difference is below 1 % or two standard errors.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import ipaddress
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock
from uuid import UUID

import uvloop

import hookd.core.composer
import hookd.net.connections
import hookd.net.resolver
from hookd.core.addresses import ALLOWED, AddressRules, classify
from hookd.core.composer import Composer, Wire
from hookd.core.model import BodyFormat, Delivery, DeliveryId, Endpoint, EndpointKey, Event, Outcome
from hookd.core.signing import new_secret, parse_secret, sign
from hookd.core.urls import parse_url
from hookd.daemon import GC_THRESHOLDS
from hookd.net.exchange import ExchangeOptions, HttpExchange
from hookd.net.resolver import Resolution, Resolver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent

RULES = AddressRules(allow=(ipaddress.ip_network("127.0.0.0/8"),), deny=(ipaddress.ip_network("10.0.0.0/8"),))

WHOLE, NO_GUARD, NO_SIGNING, NEITHER = "as it is", "no guard", "no signing", "neither"

SHARE = 0.01


class Names(asyncio.DatagramProtocol):
    """A name server to which every name is loopback, for five minutes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)  # uvloop's is none by its type

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        end = data.index(b"\0", 12) + 5
        (kind,) = struct.unpack(">H", data[end - 4 : end - 2])
        answer = (
            b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 300, 4) + bytes([127, 0, 0, 1]) if kind == 1 else b""
        )
        head = data[:2] + struct.pack(">HHHHH", 0x8180, 1, 1 if answer else 0, 0, 0)
        self.transport.sendto(head + data[12:end] + answer, addr)


class Table:
    """Instead of the resolver."""

    def __init__(self) -> None:
        self.known = Resolution(addresses=("127.0.0.1",))

    async def resolve(self, _host: str) -> Resolution:
        return self.known

    async def close(self) -> None:
        pass


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """hookd, or a part of it; functions, because a mock that counts its calls costs more than what it replaces."""
    with contextlib.ExitStack() as stack:
        if name in (NO_GUARD, NEITHER):
            for module in (hookd.net.connections, hookd.net.resolver):
                stack.enter_context(mock.patch.object(module, "classify", lambda *_: ALLOWED))  # noqa: PT008
        if name in (NO_SIGNING, NEITHER):
            constant = "v1,K5oZfzN95Z9UVu1EsfQmfVNQhnkZ2pj9o9NDN/H/pI4="
            stack.enter_context(mock.patch.object(hookd.core.composer, "sign", lambda *_: constant))  # noqa: PT008
        yield


class Load:
    """Composes and sends, so many at once."""

    def __init__(self, exchange: HttpExchange, hosts: list[str], payload: int) -> None:
        self.exchange = exchange
        wire = Wire("hookd/bench", BodyFormat.STANDARD, 20.0, 5.0)
        self.composers = []
        for number, host in enumerate(hosts):
            endpoint = Endpoint(
                EndpointKey(number), UUID(int=number), "t", f"http://{host}/aside", host, 0,
                secrets=(new_secret(os.urandom(32)),),
            )  # fmt: skip
            self.composers.append(Composer(endpoint, wire))
        self.payload = b'{"n": 1, "fill": "%s"}' % (b"x" * max(0, payload - 20))

    async def run(self, count: int, concurrency: int, *, fresh: bool) -> float:
        """CPU of each of so many deliveries, in µs; ``fresh``: each on a connection of its own."""
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        begun = ended = 0

        def start() -> None:
            nonlocal begun
            number, begun = begun, begun + 1
            event = Event(UUID(int=number), "bench.made", "t", self.payload, 1732392900.0)
            delivery = Delivery(DeliveryId(number), EndpointKey(0), event, 0, 0)
            request = self.composers[number % len(self.composers)].compose(delivery, 1732392900)
            self.exchange.begin(request, None, done)
            self.exchange.depart()

        def done(outcome: Outcome) -> None:
            nonlocal ended
            ended += 1
            if outcome.status != 200:
                if not over.done():
                    over.set_exception(SystemExit(f"the receiver answered {outcome}"))
                return
            if fresh:
                self.exchange.connections.drop_idle()
            if begun < count:
                start()
            elif ended == count and not over.done():
                over.set_result(None)

        cpu = time.process_time()
        for _ in range(min(concurrency, count)):
            start()
        await over
        return (time.process_time() - cpu) / count * 1e6


async def measured(given: argparse.Namespace, port: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Names, local_addr=("127.0.0.1", 0))
    at = transport.get_extra_info("sockname")[1]
    resolver = Resolver(lambda: RULES, nameservers=[f"127.0.0.1:{at}"], mono=time.monotonic)
    hosts = [f"h{n}.bench.example:{port}" for n in range(given.hosts)]
    loads = {}
    for name in (WHOLE, NO_GUARD, NO_SIGNING, NEITHER):
        names: Any = Table() if name in (NO_GUARD, NEITHER) else resolver
        exchange = HttpExchange(names, lambda: RULES, ExchangeOptions(), wall=time.time, mono=time.monotonic)
        loads[name] = Load(exchange, hosts, given.payload)
    kinds = {
        "warm": (given.deliveries, given.concurrency, False, (WHOLE, NO_GUARD, NO_SIGNING, NEITHER)),
        # few at once: with all in one turn of the loop the connections would share their costs
        "new": (max(50, given.deliveries // 10), 10, True, (WHOLE, NO_GUARD)),
    }
    found: dict[str, dict[str, list[float]]] = {k: {v: [] for v in kinds[k][3]} for k in kinds}
    for turn in range(given.rounds + 1):
        for kind, (count, concurrency, fresh, variants) in kinds.items():
            shift = turn % len(variants)
            for name in variants[shift:] + variants[:shift]:
                with variant(name):
                    await loads[name].run(2 * concurrency, concurrency, fresh=fresh)
                    if turn == 0:
                        gc.collect()
                        gc.freeze()
                        gc.set_threshold(*GC_THRESHOLDS)
                    us = await loads[name].run(count, concurrency, fresh=fresh)
                if turn:  # the first is for warming up
                    found[kind][name].append(us)
    alone = await apart(given, resolver, loads[WHOLE])
    for load in loads.values():
        await load.exchange.close()
    transport.close()
    return {"kinds": {k: compared(rounds) for k, rounds in found.items()}, "alone": alone}


def compared(rounds: dict[str, list[float]]) -> dict[str, Any]:
    whole = rounds[WHOLE]
    figures: dict[str, Any] = {WHOLE: {"us": statistics.median(whole), "rounds": whole}}
    for name, others in rounds.items():
        if name == WHOLE:
            continue
        differences = [a - b for a, b in zip(whole, others, strict=True)]
        # of a median of about normal values
        error = (
            1.2533 * statistics.stdev(differences) / math.sqrt(len(differences))
            if len(differences) > 1
            else 0.0
        )
        figures[name] = {
            "us": statistics.median(others), "rounds": others,
            "costs_us": statistics.median(differences), "error_us": error,
        }  # fmt: skip
    return figures


async def apart(given: argparse.Namespace, resolver: Resolver, load: Load) -> dict[str, float]:
    """What each costs when it is called again and again, in µs: the best of five."""
    body = load.payload + b" " * 90
    shared = [parse_secret(new_secret(os.urandom(32)).reveal())]
    pair = [parse_secret(new_secret(os.urandom(32), "ed25519").reveal())]
    mapped = ipaddress.ip_address("127.0.0.1")

    def timed(call: Callable[[], object], count: int) -> float:
        best = math.inf
        for _ in range(5):
            cpu = time.process_time()
            for _ in range(count):
                call()
            best = min(best, (time.process_time() - cpu) / count * 1e6)
        return best

    best = math.inf
    for _ in range(5):
        cpu = time.process_time()
        for _ in range(5000):
            await resolver.resolve("h0.bench.example")
        best = min(best, (time.process_time() - cpu) / 5000 * 1e6)
    return {
        "signing, v1": timed(lambda: sign(shared, "01a2105a-0364-7552-ad71-d3340d5f17d5", 1732392900, body), 20_000),
        "signing, v1a": timed(lambda: sign(pair, "01a2105a-0364-7552-ad71-d3340d5f17d5", 1732392900, body), 2000),
        "guard, an address as text": timed(lambda: classify("93.184.216.34", RULES), 20_000),
        "guard, an address": timed(lambda: classify(mapped, RULES), 20_000),
        "guard, a URL (once for each endpoint)": timed(lambda: parse_url(f"http://h0.bench.example:{given.hosts}/hook"), 5000),
        "resolver, a name in the cache": best,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--deliveries", type=int, default=10_000, help="of a turn; a tenth on new connections"
    )
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--payload", type=int, default=1024, help="bytes")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(cores) > 1:
        os.sched_setaffinity(0, set(cores[1:]))
    receiver = subprocess.Popen(
        [sys.executable, str(HERE / "receiver.py"), "1"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert receiver.stdout is not None
        (port,) = json.loads(receiver.stdout.readline())
        if len(cores) > 1:
            os.sched_setaffinity(0, {cores[0]})
        figures = uvloop.run(measured(given, port))
    finally:
        receiver.terminate()
        receiver.wait()
    guard = figures["kinds"]["warm"][NO_GUARD]
    whole = figures["kinds"]["warm"][WHOLE]["us"]
    figures["goal"] = {"us": max(SHARE * whole, 2 * guard["error_us"]), "met": False}
    figures["goal"]["met"] = guard["costs_us"] <= figures["goal"]["us"]
    if given.json:
        print(json.dumps(figures))
    else:
        _print(figures, given)
    sys.exit(0 if figures["goal"]["met"] else 1)


def _print(figures: dict[str, Any], given: argparse.Namespace) -> None:
    print(f"{given.concurrency} in flight, {given.hosts} hosts, {given.payload} B; composing and exchange only; µs of CPU a delivery, medians of {given.rounds} rounds")  # fmt: skip
    for kind, title in (("warm", "on a warm connection"), ("new", "each on a new connection, 10 in flight")):
        print(f"  {title}")
        for name, f in figures["kinds"][kind].items():
            costs = f"   so it costs {f['costs_us']:5.2f} ± {f['error_us']:.2f}" if "costs_us" in f else ""
            print(f"    {name:12}{f['us']:8.1f}{costs}   ({min(f['rounds']):.1f} to {max(f['rounds']):.1f})")
    print("  each alone, called again and again")
    for name, us in figures["alone"].items():
        print(f"    {name:40}{us:8.2f}")
    goal = figures["goal"]
    print(
        f"  the guard on a warm connection: at most {goal['us']:.2f} wanted, {'met' if goal['met'] else 'missed'}"
    )


if __name__ == "__main__":
    main()
