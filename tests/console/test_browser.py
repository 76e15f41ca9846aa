"""The console in a real Chromium: every page, its actions, keys, live tail, and what it must not do."""

from __future__ import annotations

import asyncio
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.console.conftest import HOSTILE, TOKEN, Stage, World
from tests.producing import fetch, send, wait_for_row

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

pytestmark = [
    pytest.mark.parametrize("server_dsn", ["embedded"], indirect=True, scope="session"),
    pytest.mark.xdist_group("browser"),
    # greenlet's threads, which playwright brings along
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WAIT_MS = 15_000

PAGES = (
    "/", "/endpoints", "/endpoints/add", "/endpoints/{good}", "/endpoints/{bad}", "/endpoints/{good}/edit", "/events",
    "/events?type=nothing.*", "/events/{failed}", "/events/{failed}/{number}", "/events/{delivered}/{delivered_number}", "/deliveries",
    "/deliveries?state=exhausted&tenant=acme", "/deliveries?state=nonsense", "/dead-letters", "/live", "/audit",
    "/resend?state=exhausted&tenant=acme", "/nothing",
)  # fmt: skip


CONTRASTS = (
    "/", "/endpoints/add", "/endpoints/{bad}", "/events", "/events/{failed}/{number}", "/deliveries?state=nonsense", "/audit",
    "/resend?state=exhausted&tenant=acme",
)  # fmt: skip
"""Looked at in dark, too: every colour is on one of them."""


class Looker:
    """A tab, and everything that went wrong in it."""

    def __init__(self, browser: Any, world: World, **context: Any) -> None:
        self._browser = browser
        self._context = context
        self.world = world
        self.wrong: list[str] = []

    async def __aenter__(self) -> Any:
        self.context = await self._browser.new_context(**self._context)
        self.context.set_default_timeout(WAIT_MS)
        self.page = await self.context.new_page()
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("request", self._asked)
        await self.page.add_init_script(
            "document.addEventListener('securitypolicyviolation', e => console.error('violation ' + e.violatedDirective + ' ' + e.blockedURI))"
        )
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        await self.context.close()
        if kind is None:
            assert self.wrong == []

    def _said(self, message: Any) -> None:
        # a status that a page is meant to have is no error of the page
        if (
            message.type in ("error", "warning")
            and "Failed to load resource: the server responded" not in message.text
        ):
            self.wrong.append(f"{message.type}: {message.text}")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.world.url, "data:")):
            self.wrong.append(f"asked {request.url}")

    async def go(self, path: str) -> Any:
        return await self.page.goto(self.world.url + path, wait_until="load")


@pytest.fixture
def look(browser: Any, world: World, stage: Stage) -> Callable[..., None]:
    """Run a test's coroutine with a tab of its own."""

    def run(work: Callable[[Any, Any], Awaitable[None]], **context: Any) -> None:
        async def go() -> None:
            async with Looker(browser, world, **context) as looker:
                await work(looker, looker.page)

        stage(go())

    return run


async def _paths(world: World, pages: tuple[str, ...] = PAGES) -> list[str]:
    known = {
        "good": world.good, "bad": world.bad, "delivered": world.delivered, "failed": world.failed,
        "number": await world.number(world.failed), "delivered_number": await world.number(world.delivered),
    }  # fmt: skip
    return [path.format(**known) for path in pages]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_can_be_read_by_everybody(look: Callable[..., None], world: World, scheme: str) -> None:
    from axe_playwright_python.async_playwright import Axe

    axe = Axe()
    options = {
        "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
        "resultTypes": ["violations"],
    }

    async def work(looker: Any, page: Any) -> None:
        await world.counted()
        for path in await _paths(world, CONTRASTS if scheme == "dark" else PAGES):
            await looker.go(path)
            await page.evaluate(
                "for (const d of document.querySelectorAll('details:not(figure *)')) d.open = true"
            )
            found = (await axe.run(page, options=options)).response["violations"]
            told = [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in found]
            assert told == [], path

    look(work, color_scheme=scheme, reduced_motion="reduce")


@pytest.mark.parametrize("javascript", [True, False])
def test_no_page_is_wider_than_a_narrow_screen(
    look: Callable[..., None], world: World, javascript: bool
) -> None:
    async def work(looker: Any, page: Any) -> None:
        for path in await _paths(world):
            answer = await looker.go(path)
            assert answer.status < 500, path
            assert await page.locator("h1").count() == 1, path
            if javascript:
                wide = await page.evaluate(
                    "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                )
                assert wide <= 0, path

    look(work, viewport={"width": 360, "height": 700}, java_script_enabled=javascript)


def test_what_others_wrote_is_text(look: Callable[..., None], world: World) -> None:
    async def work(looker: Any, page: Any) -> None:
        number = await world.number(world.failed)
        await looker.go(f"/events/{world.failed}/{number}")
        assert "order.paid to http" in await page.locator("h1").inner_text()
        answer = page.get_by_label(re.compile("Body of the answer"))
        assert await answer.inner_text() == HOSTILE
        assert HOSTILE in await page.get_by_label(re.compile("Headers of the answer")).inner_text()
        assert HOSTILE in await page.locator("#payload").inner_text()
        assert "given up: answered 500" in await page.locator(".verdict").first.inner_text()
        for phase in ("DNS", "connect", "first byte", "whole"):
            assert await page.locator(".phases dt", has_text=phase).count() == 1
        await page.locator("summary", has_text="Request").click()
        request = await page.get_by_label(re.compile("Request of attempt")).inner_text()
        assert f"webhook-id: {world.failed}" in request
        assert "webhook-signature: v1," in request
        await looker.go(f"/endpoints/{world.bad}")
        assert await page.locator("dd", has_text=HOSTILE).count() == 1
        assert await page.title() != "owned"

    look(work)


def test_search_finds_by_id_field_and_payload(look: Callable[..., None], world: World) -> None:
    async def work(looker: Any, page: Any) -> None:
        async def search(text: str) -> None:
            await page.locator(".find input").fill(text)
            await page.locator(".find input").press("Enter")
            await page.wait_for_load_state("load")

        await looker.go("/")
        number = await world.number(world.failed)
        for text, path in (
            (world.failed, f"/events/{world.failed}"),
            (str(number), f"/events/{world.failed}/{number}"),
            (str(world.good), f"/endpoints/{world.good}"),
        ):
            await search(text)
            await page.wait_for_url(world.url + path)
        await search("state:exhausted tenant:acme")
        await page.wait_for_url("**/deliveries?*")
        assert "state=exhausted" in page.url
        assert await page.locator("main tbody tr").count() >= 1
        assert (
            await page.locator("main tbody .pill").all_inner_texts()
            == ["exhausted"] * await page.locator("main tbody tr").count()
        )
        await search("data.name:Jo")
        assert await page.locator("main tbody tr").count() >= 1
        await search("data.name:Nobody")
        assert "Nothing matches" in await page.locator("main").inner_text()
        await looker.go("/deliveries")
        await page.get_by_label("State", exact=True).select_option("delivered")
        await page.get_by_label("Payload path").fill("$.id ? (@ == 12345678901234567890)")
        await page.get_by_role("button", name="Search").click()
        await page.wait_for_url("**state=delivered**")
        assert await page.locator("main tbody tr").count() >= 1
        await page.locator("main tbody tr").first.click(position={"x": 5, "y": 5})
        await page.wait_for_url("**/events/**")
        await search("00000000-0000-7000-8000-000000000000")
        assert "Nothing found" in await page.locator("h1").inner_text()

    look(work)


def test_keys(look: Callable[..., None], world: World) -> None:
    async def work(looker: Any, page: Any) -> None:
        await looker.go("/")
        await page.keyboard.press("/")
        assert await page.evaluate("document.activeElement.name") == "q"
        await page.keyboard.type("gd")
        await page.keyboard.press("Escape")
        assert page.url == world.url + "/"
        await page.keyboard.press("?")
        assert await page.locator("#keys").is_visible()
        await page.keyboard.press("Escape")
        assert not await page.locator("#keys").is_visible()
        await page.keyboard.press("g")
        await page.keyboard.press("d")
        await page.wait_for_url("**/deliveries")
        await page.keyboard.press("j")
        await page.keyboard.press("j")
        await page.keyboard.press("k")
        assert await page.locator("tr.at").count() == 1
        where = await page.locator("tr.at").get_attribute("data-href")
        await page.keyboard.press("Enter")
        await page.wait_for_url(f"**{where}")
        # without a mouse everything can be reached, and seen to be
        await looker.go("/endpoints")
        seen = set()
        for _ in range(40):
            await page.keyboard.press("Tab")
            seen.add(await page.evaluate("document.activeElement.name || document.activeElement.innerText"))
            assert await page.evaluate(
                "document.activeElement === document.body || document.activeElement.matches(':focus-visible')"
            )
        assert {"Overview", "Add an endpoint", "Search", "q", "url", "state"} <= seen

    look(work)


def test_the_theme_is_kept(look: Callable[..., None]) -> None:
    async def work(looker: Any, page: Any) -> None:
        ground = "getComputedStyle(document.body).backgroundColor"
        await looker.go("/")
        light = await page.evaluate(ground)
        await page.locator("#theme").click()
        dark = await page.evaluate(ground)
        assert dark != light
        await looker.go("/events")
        assert await page.evaluate(ground) == dark
        assert await page.locator("#theme").inner_text() == "Theme: dark"

    look(work, color_scheme="light")


def test_the_overview_renews_itself(look: Callable[..., None], world: World) -> None:
    async def work(looker: Any, page: Any) -> None:
        await world.counted()
        await looker.go("/")
        assert await page.locator("figure.chart").count() == 4
        assert await page.locator("figure.chart path.area").count() >= 2
        assert "answered 500" in await page.locator("main").inner_text()
        await page.evaluate("document.querySelector('#renewed').dataset.old = 'yes'")
        await page.locator("#renewed:not([data-old])").wait_for()
        assert await page.locator("#renew-state").inner_text() == "Live"
        attempts = page.locator("figure.chart").first
        await attempts.locator(".hit").last.hover()
        assert "delivered" in await attempts.locator("output").inner_text()

    look(work)


def test_the_live_tail_shows_what_happens(look: Callable[..., None], world: World) -> None:
    async def work(looker: Any, page: Any) -> None:
        await looker.go("/live?tenant=acme")
        await page.locator("#stream-state", has_text="Live").wait_for()
        event = await send(world.dsn, "user.updated", '{"n": 1}', tenant="acme")
        row = page.locator(f'tr[data-href^="/events/{event}"]')
        await row.wait_for()
        assert "delivered" in await row.inner_text()
        assert await row.count() == 1
        assert await page.locator("main tbody tr").first.get_attribute(
            "data-href"
        ) == await row.get_attribute("data-href")
        await page.locator("#stream-button").click()
        paused = await send(world.dsn, "user.updated", '{"n": 2}', tenant="acme")
        await wait_for_row(world.dsn, "select 1 from hookd.attempt where event_id = $1", paused)
        assert await page.locator(f'tr[data-href^="/events/{paused}"]').count() == 0
        await page.locator("#stream-button").click()
        await page.locator(f'tr[data-href^="/events/{paused}"]').wait_for()

    look(work)


@pytest.mark.parametrize("javascript", [True, False])
def test_pause_and_resume(look: Callable[..., None], world: World, javascript: bool) -> None:
    async def work(looker: Any, page: Any) -> None:
        await looker.go(f"/endpoints/{world.good}")
        await page.locator("summary", has_text="Pause").click()
        await page.get_by_label("Reason").fill("maintenance <b>")
        await page.get_by_role("button", name="Pause").click()
        await page.locator(".say", has_text="Paused").wait_for()
        assert "maintenance <b>" in await page.locator("main").inner_text()
        event = await send(world.dsn, "user.created", tenant="acme")
        await looker.go(f"/events/{event}")
        assert await page.locator("main tbody .pill").inner_text() == "pending"
        await page.locator("main tbody a").first.click()
        await page.locator(".head .sub", has_text="its endpoint is paused").wait_for()
        await looker.go(f"/endpoints/{world.good}")
        await page.locator("summary", has_text="Resume").click()
        await page.get_by_role("button", name="Resume").click()
        await page.locator(".say", has_text="receives again").wait_for()
        await wait_for_row(
            world.dsn, "select 1 from hookd.attempt where event_id = $1 and verdict = 'delivered'", event
        )
        assert "endpoint.pause" in await page.locator("main").inner_text()

    look(work, java_script_enabled=javascript)


def test_resend_one(look: Callable[..., None], world: World) -> None:
    async def work(looker: Any, page: Any) -> None:
        event = await send(world.dsn, "user.resent", tenant="acme")
        await wait_for_row(world.dsn, "select 1 from hookd.attempt where event_id = $1", event)
        before = await world.number(event)
        await looker.go(f"/events/{event}/{before}")
        await page.keyboard.press("r")
        await page.locator(".say", has_text="Queued again").wait_for()
        await wait_for_row(
            world.dsn, "select 1 from hookd.attempt where event_id = $1 and delivery_id > $2", event, before
        )
        assert [c.event_id for c in world.receiver.calls].count(event) == 2
        await looker.go(f"/events/{event}/{before}")
        assert "delivered" in await page.locator(".head").inner_text(), "what happened before is still there"
        await page.locator("a", has_text="resent later").click()
        await page.locator(".tag", has_text="resend").first.wait_for()
        trail = await fetch(world.dsn, "select via, action from hookd.audit where event_id = $1", event)
        assert [tuple(r) for r in trail] == [("console", "delivery.resend")]

    look(work)


def test_resend_all_that_match_counts_first(look: Callable[..., None], world: World) -> None:
    async def work(looker: Any, page: Any) -> None:
        for _ in range(3):
            event = await send(world.dsn, "order.bulk", tenant="acme")
            await wait_for_row(world.dsn, "select 1 from hookd.attempt where event_id = $1", event)
        await looker.go("/deliveries?state=exhausted&type=order.bulk")
        await page.get_by_role("link", name="Resend all that match").click()
        assert "3 deliveries" in await page.locator("main").inner_text()
        pending = await fetch(world.dsn, "select count(*) as n from hookd.delivery where replay")
        assert pending[0]["n"] == 0, "nothing is queued before it is confirmed"
        await page.get_by_role("button", name="Resend 3 deliveries").click()
        await page.locator(".say", has_text="3 queued").wait_for()
        await wait_for_row(
            world.dsn,
            "select 1 from hookd.attempt a join hookd.event v on v.id = a.event_id where a.replay and v.type = 'order.bulk' having count(*) = 3",
        )
        others = await fetch(
            world.dsn, "select 1 from hookd.attempt a where a.replay and a.event_id = $1", world.failed
        )
        assert others == [], "what the page did not show was not sent again"

    look(work)


def test_an_endpoint_from_its_form_to_its_removal(look: Callable[..., None], world: World) -> None:
    async def work(looker: Any, page: Any) -> None:
        url = world.receiver.url + "/second"
        await looker.go("/endpoints")
        await page.get_by_role("link", name="Add an endpoint").click()
        await page.get_by_label("URL").fill("http://169.254.169.254/latest")
        await page.get_by_label("Event types").fill("thing.*")
        await page.get_by_role("button", name="Add").click()
        assert "refused" in await page.locator(".say.bad").inner_text()
        assert await page.get_by_label("Event types").input_value() == "thing.*", "what was typed stays"
        await page.get_by_label("URL").fill(url)
        await page.get_by_label("Headers").fill("X-Env: prod")
        await page.get_by_role("button", name="Add").click()
        secret = await page.locator("#secret").inner_text()
        assert secret.startswith("whsec_")
        await page.get_by_role("link", name="Go on").click()
        assert secret not in await page.content()
        where = page.url

        await page.get_by_role("button", name="Send a test").click()
        assert "accepted" in await page.locator(".head").inner_text()
        request = await page.get_by_label("Request").inner_text()
        assert "***" in request
        assert "prod" not in request
        assert world.receiver.calls[-1].headers["x-env"] == "prod"

        await page.goto(where)
        await page.locator("summary", has_text="More").click()
        await page.get_by_role("button", name="Rotate").click()
        rotated = await page.locator("#secret").inner_text()
        assert rotated.startswith("whsec_")
        assert rotated != secret
        await page.goto(where)
        assert "2 secrets" in await page.locator("main").inner_text()

        await page.get_by_role("link", name="Edit").click()
        await page.get_by_label("Requests a second").fill("5")
        await page.get_by_label("Description").fill("second")
        await page.get_by_role("button", name="Save").click()
        await page.locator(".say", has_text="Saved").wait_for()
        assert "5/s" in await page.locator("main").inner_text()
        assert "x-env" in (await page.locator("main").inner_text()).lower(), (
            "headers stay where the field is empty"
        )

        await page.locator("summary", has_text="More").click()
        await page.get_by_role("button", name="Verify").click()
        assert "Not verified" in await page.locator("h1").inner_text()

        await page.goto(where)
        await page.locator("summary", has_text="More").click()
        await page.get_by_label("I want that").check()
        await page.get_by_role("button", name="Remove").click()
        await page.locator(".say", has_text="Removed").wait_for()
        await looker.go("/audit")
        said = await page.locator("main").inner_text()
        for action in ("add", "update", "rotate", "test", "remove"):
            assert f"endpoint.{action}" in said
        assert secret not in said

    look(work)


@pytest.fixture
def gate(browser: Any, guarded: World, stage: Stage) -> Iterator[Callable[..., None]]:
    def run(work: Callable[[Any, Any], Awaitable[None]], **context: Any) -> None:
        async def go() -> None:
            async with Looker(browser, guarded, **context) as looker:
                await work(looker, looker.page)

        stage(go())

    yield run


def test_with_a_token_the_console_asks_once(gate: Callable[..., None], guarded: World) -> None:
    async def work(looker: Any, page: Any) -> None:
        await looker.go("/deliveries?state=exhausted")
        assert await page.title() == "Log in · hookd"
        await page.get_by_label("Token").fill("wrong")
        await page.get_by_role("button", name="Log in").click()
        assert "not the token" in await page.locator(".say.bad").inner_text()
        await page.get_by_label("Token").fill(TOKEN)
        await page.get_by_role("button", name="Log in").click()
        await page.wait_for_url("**/deliveries?state=exhausted")
        (cookie,) = await looker.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["expires"]) == (True, "Strict", -1)
        assert TOKEN not in cookie["value"]
        assert await page.evaluate("document.cookie") == ""
        await looker.go("/live")
        await page.locator("#stream-state", has_text="Live").wait_for()
        assert (await page.request.get(guarded.url + "/api/v1/endpoints")).status == 200
        copy = await looker._browser.new_context()
        await copy.add_cookies([cookie])
        other = await copy.new_page()
        await other.goto(guarded.url + "/")
        assert "Overview" in await other.title()
        await page.get_by_role("button", name="Log out").click()
        await page.wait_for_url("**/login")
        for tab in (page, other):
            await tab.goto(guarded.url + "/")
            assert await tab.title() == "Log in · hookd", "a copy of the cookie is worth nothing either"
        await copy.close()

    gate(work)


def test_a_drain_ends_the_live_tail(gate: Callable[..., None], guarded: World) -> None:
    async def work(looker: Any, page: Any) -> None:
        await looker.go("/live")
        await page.get_by_label("Token").fill(TOKEN)
        await page.get_by_role("button", name="Log in").click()
        await page.locator("#stream-state", has_text="Live").wait_for()
        guarded.daemon.signal(signal.SIGTERM)
        await page.locator("#stream-state", has_text="stops").wait_for()
        assert await asyncio.to_thread(guarded.daemon.process.wait, 30) == 0
        looker.wrong.clear()  # it tries again, and nobody is there

    gate(work)
