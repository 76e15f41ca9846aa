"""``hookd listen``: a receiver for development."""

from __future__ import annotations

import asyncio
import datetime
import json
import random
import signal
import sys
import time
from typing import TYPE_CHECKING

import click

from hookd.commands.drawing import Line, coloured, painted
from hookd.commands.session import Failed, given_secret, options
from hookd.config import duration

if TYPE_CHECKING:
    from hookd.commands import Invocation
    from hookd.net.receiver import Received, Receiver

BODY_SHOWN = 4000
BRIEF_BODY_SHOWN = 300


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=9000, show_default=True, help="0 takes any.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--secret", "secrets", multiple=True, envvar="HOOKD_SECRET", metavar="S", help="Check signatures with it (@FILE, whpk_…, or whsec_…, which process lists show); may be repeated; else $HOOKD_SECRET.")  # fmt: skip
@click.option("--forward-to", default="", metavar="URL", help="Hand requests on, and its answer back.")
@click.option(
    "--fail", type=click.FloatRange(0, 1), default=0.0, metavar="RATE", help="Answer this share with 500."
)
@click.option("--delay", default="0s", metavar="D", help="Answer after so long: 250ms, 2s.")
@click.option("--status", "statuses", default="200", show_default=True, metavar="N[,N…]", help="Answer with it; of several each once, then always with the last.")  # fmt: skip
@click.option("--brief", is_flag=True, help="Two lines for each request, without its headers.")
@options
@click.pass_obj
def listen(
    invocation: Invocation, port: int, host: str, secrets: tuple[str, ...], forward_to: str, fail: float,
    delay: str, statuses: str, *, brief: bool,
) -> None:  # fmt: skip
    """
    A receiver for development: print and verify what arrives, answer as told, and hand it on.

    On a terminal type what to answer the next requests with: 503 and Enter, or 503 503 200; `always 503` stays.  It answers
    the challenges of `hookd endpoint verify`, unless it hands requests on.

    \b
    hookd listen --port 9000 --secret whsec_…
    hookd endpoint add http://127.0.0.1:9000/
    """  # noqa: D301 - click's mark for lines that stay
    from hookd.core.signing import parse_checking  # noqa: PLC0415 - not for --help
    from hookd.net.receiver import Manners, Receiver  # noqa: PLC0415

    try:
        delay_s = duration(delay)
        secrets = tuple(given_secret(secret) or "" for secret in secrets)
        for secret in secrets:
            parse_checking(secret)
    except ValueError as error:
        raise Failed(str(error), 2) from None
    answers = _statuses(statuses)
    manners = Manners(answers[-1], fail, delay_s, forward_to=forward_to)
    dice = random.Random()  # noqa: S311 - decides which request fails
    printer = _json_line if invocation.json else _Printer(brief=brief)

    async def serve() -> None:
        receiver = Receiver(manners, secrets, printer, wall=time.time, draw=dice.random)
        receiver.next_statuses.extend(answers[:-1])
        try:
            listening = await receiver.start(port, host)
        except OSError as error:
            raise Failed(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
        click.echo(f"listening on http://{host}:{listening}/  (Ctrl-C stops)", err=True)
        if not secrets:
            click.echo("signatures are not checked: give --secret", err=True)
        loop = asyncio.get_running_loop()
        if sys.stdin.isatty() and not invocation.json:
            click.echo("type 503 and Enter to answer the next request with it", err=True)
            loop.add_reader(sys.stdin.fileno(), _typed, receiver)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        await receiver.stop()

    asyncio.run(serve())


def _statuses(text: str) -> list[int]:
    """Statuses as they were typed, with commas or blanks between them."""
    found = []
    for part in text.replace(",", " ").split():
        if not part.isascii() or not part.isdigit() or not 200 <= int(part) <= 599:
            raise Failed(f"{part!r} is no status to answer with; write 200 to 599, for example 503", 2)
        found.append(int(part))
    if not found:
        raise Failed("say a status to answer with, for example 503", 2)
    return found


def _typed(receiver: Receiver) -> None:
    """A line from the keyboard: what to answer with."""
    line = sys.stdin.readline()
    if not line:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        return
    word, _, rest = line.strip().partition(" ")
    try:
        wanted = _statuses(rest if word == "always" else line) if word else []
    except Failed as problem:
        click.echo(f"{problem}; several: 503 503 200; from now on: always 503", err=True)
        return
    if word:
        receiver.next_statuses.clear()
    if word == "always":
        receiver.always(wanted[-1])
    else:
        receiver.next_statuses.extend(wanted)
    click.echo(f"next: {receiver.to_come}", err=True)


FOLLOWS = {
    410: "the endpoint is switched off",
    429: "it comes again, and fewer at once",
    502: "it comes again, and fewer at once",
    503: "it comes again, and fewer at once",
    504: "it comes again, and fewer at once",
}
"""What hookd does after an answer."""


def _follows(status: int) -> str:
    if 200 <= status < 300:
        return "delivered"
    if 300 <= status < 400:
        return "a failure, unless delivery.redirects follows it"
    return FOLLOWS.get(status, "it comes again later")


class _Printer:
    """Prints requests for people; what came from outside does not play with the terminal."""

    def __init__(self, *, brief: bool) -> None:
        self._brief = brief
        self._colour = coloured()

    def __call__(self, received: Received) -> None:
        headers = {name.lower(): value for name, value in received.headers.items()}
        signed, mark = {
            None: ("not checked", "warn"),
            True: ("signature ok", "good"),
            False: ("BAD SIGNATURE", "bad"),
        }[received.signed]
        at = f"{datetime.datetime.now():%H:%M:%S}"  # noqa: DTZ005 - for whoever sits here
        attempt = headers.get("hookd-attempt", "-")
        onward = f"  -> {received.forwarded_to}" if received.forwarded_to else ""
        if self._brief:
            identity = headers.get("webhook-id", "-")
            self._say(
                f"{at}  {received.status}  {received.path}  {identity}  attempt {attempt}  {signed}{onward}"
            )
            self._say(f"  {_cut(received.body, BRIEF_BODY_SHOWN)}")
            return
        self._say(f"{at}  {received.method} {received.path}  attempt {attempt}", "head")
        for name, value in received.headers.items():
            self._say(f"  {name}: {value}", "dim")
        self._say("")
        self._say(f"  {_cut(received.body, BODY_SHOWN)}")
        self._say("")
        self._say(f"  {signed}{f': {received.problem}' if received.problem else ''}", mark)
        self._say(f"  answered {received.status}: {_follows(received.status)}{onward}")
        self._say("")

    def _say(self, text: str, mark: str = "") -> None:
        click.echo(painted(Line(text, mark), None, colour=self._colour), color=self._colour)


def _cut(body: bytes, most: int) -> str:
    text = body[:most].decode("utf-8", "replace")
    return text + (f"… {len(body):,} bytes in all" if len(body) > most else "")


def _json_line(received: Received) -> None:
    click.echo(
        json.dumps({
            "path": received.path, "status": received.status, "signed": received.signed,
            "problem": received.problem or None, "headers": received.headers,
            "body": received.body.decode("utf-8", "replace"),
        })
    )  # fmt: skip
