"""What receivers are told: that it is true, harmless and complete."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import jsonschema_rs
import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from standardwebhooks import Webhook, WebhookVerificationError

from hookd.commands.docs import shape
from hookd.config import Config, ConfigInvalid, DeliveryConfig, RetryConfig
from hookd.core.signing import parse_secret, sign, verify
from hookd.guide import openapi
from hookd.guide.__main__ import receiving
from hookd.guide.catalogue import Catalogue, Described, EventText, Head, parse_catalogue
from hookd.guide.sample import EXAMPLE_SECRET, SENT_AT, example_id, sample
from hookd.guide.site import site
from hookd.guide.writing import escape, one_file, prose, slug, text_of, write
from tests.cli import Cli
from tests.conftest import run_sql, with_database
from tests.daemon_process import DaemonProcess
from tests.producing import add_endpoint_with_id, send
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("one_server")

ROOT = Path(__file__).parents[2]

EXAMPLE = parse_catalogue(text_of("text/events.toml"))

HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "[x](javascript:alert(1))", "![x](https://evil.example/p.png)",
    "`` ` ``` `", "a | b", "</code></pre><script>", "# heading", "<!-- --><b>", "&lt;b&gt; &amp;", "{{example_secret}}", "- item",
    "> quote", "\\", "<https://evil.example/>", "---", "1. one", "*a* _b_ ~~c~~", "a\nb\n\n## c",
)  # fmt: skip


# The snippets, against a request that a daemon sent.


@dataclass
class Captured:
    secret: str
    head: bytes
    headers: dict[str, str]
    body: bytes


@pytest.fixture(scope="module")
def captured(server_dsn: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Captured]:
    """A request as it arrived."""
    name = f"guide_{uuid4().hex[:8]}"
    run_sql(server_dsn, f"create database {name} template {template}")
    dsn = with_database(server_dsn, name)
    daemon = DaemonProcess(tmp_path_factory.mktemp("daemon"), {"HOOKD_DATABASE__DSN": dsn})

    async def go() -> Captured:
        async with Receiver() as receiver:
            secret, _ = await add_endpoint_with_id(dsn, receiver.url)
            await send(dsn, "order.paid", '{"order":  17, "größe": "ä\\u00e4"}')
            await receiver.wait_for_calls(1)
            call = receiver.calls[0]
            return Captured(secret, call.raw_head, call.headers, call.body)

    try:
        daemon.wait_ready()
        yield asyncio.run(go())
    finally:
        daemon.kill()
        run_sql(server_dsn, f"drop database {name} with (force)")


def checked(language: str, secret: str, headers: dict[str, str], body: bytes, folder: Path) -> bool:
    """What the published code says of a request."""
    code = text_of(f"snippets/verify.{'sh' if language == 'shell' else language}")
    (folder / "body").write_bytes(body)
    if language == "python":
        place: dict[str, Any] = {}
        exec(code, place)
        return bool(place["verify"](secret, headers, body))
    if language == "javascript":
        (folder / "check.mjs").write_text(
            code
            + f"""
import {{ readFileSync }} from "node:fs"
console.log(verify({json.dumps(secret)}, {json.dumps(headers)}, readFileSync("body")))
"""
        )
        command = ["node", "check.mjs"]
    else:
        (folder / "verify.sh").write_text(code)
        given = [headers[f"webhook-{name}"] for name in ("id", "timestamp", "signature")]
        command = ["sh", "verify.sh", secret, *given]
    done = subprocess.run(command, cwd=folder, input=body, capture_output=True, check=False, timeout=60)
    said = done.stdout.decode().strip()
    assert said in ("true", "false", "right", "wrong") or said.startswith("right, but"), done.stderr
    return said in ("true", "right")


@pytest.mark.parametrize("language", ["python", "javascript", "shell"])
def test_the_published_code_checks_a_real_request(captured: Captured, language: str, tmp_path: Path) -> None:
    needs = {"javascript": "node", "shell": "openssl"}.get(language)
    if needs and shutil.which(needs) is None:
        pytest.skip(f"{needs} is not on PATH")
    other = "whsec_" + "a" * 44
    assert checked(language, captured.secret, captured.headers, captured.body, tmp_path)
    assert not checked(language, captured.secret, captured.headers, captured.body + b"\n", tmp_path)
    assert not checked(language, other, captured.headers, captured.body, tmp_path)
    # while a secret rotates there are two
    two = captured.headers | {"webhook-signature": "v1,AAAA " + captured.headers["webhook-signature"]}
    assert checked(language, captured.secret, two, captured.body, tmp_path)
    old = int(time.time()) - 1000
    signature = sign([parse_secret(captured.secret)], captured.headers["webhook-id"], old, captured.body)
    late = captured.headers | {"webhook-timestamp": str(old), "webhook-signature": signature}
    assert not checked(language, captured.secret, late, captured.body, tmp_path)


def test_the_library_checks_a_real_request(captured: Captured) -> None:
    code = text_of("snippets/library.python").replace("whsec_…", captured.secret)

    class Request:
        headers = captured.headers
        body = captured.body

    place: dict[str, Any] = {"request": Request}
    exec(code, place)
    assert place["event"]["data"]["order"] == 17
    Request.body = captured.body + b" "
    with pytest.raises(WebhookVerificationError):
        exec(code, place)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library of npm in it."""
    if os.environ.get("HOOKD_TEST_VERIFIERS") != "1":
        pytest.skip("HOOKD_TEST_VERIFIERS=1 installs it")
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("node and npm are not on PATH")
    folder = tmp_path_factory.mktemp("npm")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(ROOT / "tests" / "verifiers" / name, folder)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries", "0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        pytest.skip(f"npm cannot install it: {done.stderr[-200:]}")
    return folder


def test_the_javascript_library_checks_a_real_request(captured: Captured, modules: Path) -> None:
    code = text_of("snippets/library.javascript").replace("whsec_…", captured.secret)
    for body, said in ((captured.body, "17\n"), (captured.body + b" ", "")):
        given = f"const headers = {json.dumps(captured.headers)}, body = {json.dumps(body.decode())}\n"
        (modules / "check.mjs").write_text(given + code + "\nconsole.log(event.data.order)")
        done = subprocess.run(
            ["node", "check.mjs"], cwd=modules, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.stdout == said, done.stderr


def test_examples_look_like_what_is_sent(captured: Captured) -> None:
    """The same headers in the same order, and a body of the same form."""
    shown = sample("order.paid", '{"order":  17, "größe": "ä\\u00e4"}', Config())

    def names(head: str) -> list[str]:
        return [line.partition(":")[0] for line in head.splitlines()[1:] if line]

    assert names(shown.head) == names(captured.head.decode())
    assert shown.head.splitlines()[0] == "POST /hooks HTTP/1.1"
    assert re.sub(rb'"timestamp":"[^"]+"', b"", shown.body) == re.sub(
        rb'"timestamp":"[^"]+"', b"", captured.body
    )


def test_examples_are_signed_and_reproducible() -> None:
    one, again = (sample("order.paid", '{"a": 1}', Config()) for _ in range(2))
    assert one == again
    headers = dict(line.split(": ", 1) for line in one.head.splitlines()[1:])
    assert verify(EXAMPLE_SECRET, headers, one.body, SENT_AT).valid
    assert not verify(EXAMPLE_SECRET, headers, one.body + b" ", SENT_AT).valid
    assert example_id("a").version == 7
    assert example_id("a") != example_id("b")
    # and every example of the site is
    for page in write(Config(), EXAMPLE):
        for block in re.findall(r"```http\n(.*?)\n```", page.markdown, re.DOTALL):
            head, _, body = block.partition("\n\n")
            headers = dict(line.split(": ", 1) for line in head.splitlines()[1:])
            assert verify(EXAMPLE_SECRET, headers, body.encode(), SENT_AT).valid
            assert int(headers["content-length"]) == len(body.encode())


def test_the_command_that_sends_an_example_sends_it(tmp_path: Path) -> None:
    payload = '{"it\'s": "a \'quote\' and a $HOME and `x`"}'
    catalogue = Catalogue(events={"a": Described("a", example=payload)})
    page = next(p for p in write(Config(), catalogue) if p.name == "events/a")
    command = re.findall(r"```sh\n(.*?)\n```", page.markdown, re.DOTALL)[0]
    # an interpreter that says what it was given stands in for curl
    (tmp_path / "curl").write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    (tmp_path / "curl").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", command],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split(b"\0")[-2] == sample("a", payload, Config()).body


# The text.


def test_docs_receiving_is_written_by_it() -> None:
    written = (ROOT / "docs" / "receiving.md").read_text(encoding="utf-8")
    assert written == receiving(), "run: python -m hookd.guide > docs/receiving.md"


def test_it_says_what_is_configured() -> None:
    config = Config(
        delivery=DeliveryConfig(
            timeout=7.0, connect_timeout=0.5, redirects="any", max_response=2048, format="raw"
        ),
        retry=RetryConfig(schedule=[1.0, 60.0], jitter=0.0, disable_after=7200.0),
    )
    text = one_file(write(config, Catalogue()), "x")
    for said in ("has 7 s", "connection 500 ms", "followed where it is 307 or 308", "2 KiB", "again up to 2 times, for 1 min 1 s",
                 "| 3 | 1 min later | 1 min 1 s |", "fail for 2 h is switched off", "the payload alone"):  # fmt: skip
        assert said in text, said
    assert "Thin events" not in text
    none = one_file(write(Config(retry=RetryConfig(schedule=[])), Catalogue()), "x")
    assert "no retry" in none


@pytest.mark.parametrize("form", ["standard", "raw", "cloudevents", "thin"])
def test_openapi_is_valid(form: Any) -> None:
    config = Config(delivery=DeliveryConfig(format=form, thin_url="https://api.example.com/{event_id}"))
    catalogue = msgspec.structs.replace(
        EXAMPLE,
        events=EXAMPLE.events
        | {
            text: Described(text, EventText(summary=text, description=text), json.dumps(text))
            for text in ("odd/type", "{x}", '"><script>')
        }
        | {
            "with.refs": Described(
                "with.refs", EventText(), '{"a": 1}',
                {"$schema": "https://json-schema.org/draft/2020-12/schema", "properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}},
            )
        },
    )  # fmt: skip
    document = json.loads(json.dumps(openapi.document(config, catalogue)))
    OpenAPIV31SpecValidator(document).validate()
    assert set(document["webhooks"]) == set(catalogue.events)
    for path in document["webhooks"].values():
        (content,) = path["post"]["requestBody"]["content"].values()
        jsonschema_rs.validator_for(content["schema"]).validate(content["example"])
    broken = document | {"webhooks": {"x": {"post": {"responses": "none"}}}}
    assert list(OpenAPIV31SpecValidator(broken).iter_errors())


class Page(HTMLParser):
    """What a browser would see."""

    VOID = frozenset({"meta", "link", "input", "br", "hr", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get(name)) is not None]


def hostile_catalogue() -> Catalogue:
    events = {}
    for n, text in enumerate(HOSTILE):
        type_ = re.sub(r"\s", "", text)
        schema = {
            "properties": {text: {"type": text, "description": text, "enum": [text], "format": text}},
            "required": [text],
        }
        events[type_] = Described(
            type_, EventText(summary=text, description=f"{text}\n\n{text} `{text}`", deprecated=text if n % 2 else ""), json.dumps({text: text}), schema
        )  # fmt: skip
    everything = " ".join(HOSTILE)
    head = Head(title=everything, introduction="\n\n".join(HOSTILE), contact=everything)
    changes = parse_catalogue('[[changes]]\ndate = 2026-01-01\ntext = "x"').changes
    return Catalogue(
        head, events, [msgspec.structs.replace(changes[0], text=text, types=list(events)) for text in HOSTILE]
    )


def test_what_comes_from_elsewhere_is_only_text() -> None:
    catalogue = hostile_catalogue()
    files = site(write(Config(), catalogue), catalogue.head.title, prose(catalogue.head.introduction))
    allowed = {"html", "head", "meta", "title", "link", "body", "a", "header", "div", "nav", "ul", "ol", "li", "code", "s", "main",
               "h1", "h2", "h3", "p", "pre", "b", "i", "strong", "em", "table", "thead", "tbody", "tr", "th", "td", "input", "label"}  # fmt: skip
    harmless = {"lang", "charset", "name", "content", "http-equiv", "rel", "href", "class", "id", "aria-label", "aria-current",
                "tabindex", "type", "checked", "for", "start"}  # fmt: skip
    seen = ""
    for path, text in files.items():
        assert ".." not in path
        if not path.endswith(".html"):
            continue
        page = Page(text)
        seen += page.text
        assert {tag for tag, _ in page.elements} <= allowed, path
        assert {name for _, attributes in page.elements for name in attributes} <= harmless, path
        for href in page.all("href"):
            assert re.match(r"https://|(\.\./)?[\w.-]+(/[\w.-]+)?\.(html|css|json)|#", href), href
        # what is loaded, and not only linked to, is ours
        assert [a["href"] for tag, a in page.elements if tag == "link"] in (["style.css"], ["../style.css"])
    for text in (
        "<script>alert(1)</script>",
        "![x](https://evil.example/p.png)",
        "&lt;b&gt; &amp;",
        "{{example_secret}}",
    ):
        assert text in seen


def test_markdown_of_anything_is_only_text() -> None:
    from markdown_it import MarkdownIt

    for text in HOSTILE:
        for written in (escape(text), f"a {escape(text)} b", prose(text)):
            tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(written)
            kinds = {t.type for t in tokens} | {c.type for t in tokens for c in t.children or ()}
            plain = {
                "paragraph_open",
                "paragraph_close",
                "inline",
                "text",
                "softbreak",
                "code_inline",
                "text_special",
            }
            # kept on purpose, in prose only
            kept = {
                "bullet_list_open",
                "bullet_list_close",
                "list_item_open",
                "list_item_close",
                "link_open",
                "link_close",
            }
            assert kinds <= plain | (kept if written == prose(text) else set()), (text, written, kinds)


def test_every_link_leads_somewhere() -> None:
    files = site(write(Config(), EXAMPLE), "T", "")
    pages = {path: Page(text) for path, text in files.items() if path.endswith(".html")}
    followed = 0
    for path, page in pages.items():
        assert len(set(page.all("id"))) == len(page.all("id")), path
        for href in page.all("href"):
            if href.startswith("https://") or href.endswith(("style.css", "openapi.json")):
                continue
            target, _, anchor = href.partition("#")
            parts = [*Path(path).parent.parts, *target.split("/")]
            while ".." in parts:
                at = parts.index("..")
                del parts[at - 1 : at + 1]
            found = "/".join(parts) if target else path
            assert found in pages, (path, href)
            assert not anchor or anchor in pages[found].all("id"), (path, href)
            followed += 1
    assert followed > 50
    text = one_file(write(Config(), EXAMPLE), "T")
    anchors = {slug(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links
    assert links <= anchors
    assert ".md)" not in text


def test_types_have_files_of_their_own() -> None:
    events = {t: Described(t) for t in ("a/b", "a-b", "A-B", "../../etc/passwd", "..", "ü", "é", "x" * 255)}
    files = site(write(Config(), Catalogue(events=events)), "T")
    pages = [path for path in files if path.startswith("events/")]
    assert len({path.lower() for path in pages}) == len(events)
    assert all(re.fullmatch(r"events/[\w.-]{1,110}\.html", path) and "/." not in path for path in pages)


# events.toml.


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    text = '''titel = "x"
addresses = ["192.0.2.1", "nowhere"]
contact = 7

[events."order.paid"]
sumary = "x"
example = "{,}"
description = """
sumary = "not a key"
"""

[events.order.refunded]
summary = "quotes are missing"

[events."a b"]

[events."user.created"]
schema = { type = "objet" }

[events."user.deleted"]
example = '{"id": "x", "extra": 1}'
schema = { type = "object", properties = { id = { type = "integer" } } }

[events."user.moved"]
schema_file = "nothing.json"
example_file = "bad.json"

[events."user.far"]
schema = { "$ref" = "http://evil.example/schema.json" }

[[changes]]
date = 2026-01-01
text = "x"
types = ["order.payed"]

[[changes]]
text = "undated whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
'''
    with pytest.raises(ConfigInvalid) as raised:
        parse_catalogue(text, "e.toml", tmp_path)
    said = sorted(map(str, raised.value.mistakes))
    expected = [
        "e.toml:1: titel: there is no such key; did you mean title?",
        "e.toml:2: addresses: 'nowhere' is no IP address or network",
        "e.toml:3: contact: expected text, got a whole number",
        'e.toml:6: events."order.paid".sumary: there is no such key; did you mean summary?',
        'e.toml:7: events."order.paid".example: is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)',
        'e.toml: events."order": a type with a dot is written in quotes: [events."order.refunded"]',
        'e.toml:15: events."a b": a type has 1 to 255 characters, none of them a blank or *',
        'e.toml:18: events."user.created".schema: is no JSON Schema: "objet" is not valid under any of the schemas listed in the \'anyOf\' keyword',
        'e.toml:21: events."user.deleted".example: does not fit its schema: id: "x" is not of type "integer"',
        'e.toml:25: events."user.moved".schema_file: nothing.json cannot be read: No such file or directory',
        'e.toml:24: events."user.moved".example: is no JSON',
        'e.toml:29: events."user.far".schema: is no JSON Schema: Resource \'http://evil.example/schema.json\' is not present',
        "e.toml:34: changes[0].types: there is no event 'order.payed'; did you mean order.paid?",
        "e.toml:36: changes[1]: lacks date",
        "e.toml:37: holds a signing secret; it must not be published",
    ]  # fmt: skip
    for line in expected:
        assert any(one.startswith(line) for one in said), (line, said)
    assert len(said) == len(expected), said
    assert "MfKQ" not in str(said)


def test_a_table_as_an_example_and_dates() -> None:
    text = '[events.a.example]\nn = 1\ns = "ü"\n[events.a.example.inner]\nb = true'
    assert parse_catalogue(text).events["a"].example == '{"n": 1, "s": "ü", "inner": {"b": true}}'
    exact = parse_catalogue("[events.a]\nexample = '{\"n\":  1.00}'")
    assert exact.events["a"].example == '{"n":  1.00}'
    with pytest.raises(ConfigInvalid, match="which JSON has not"):
        parse_catalogue("[events.a]\nexample = { at = 2026-01-01 }")
    assert EXAMPLE.changes[0].date == datetime.date(2026, 11, 1)


def test_tenants_are_told_their_own() -> None:
    text = """
[events.shared]
[events.secret-project]
tenants = ["acme"]
[[changes]]
date = 2026-01-01
text = "everybody"
[[changes]]
date = 2026-01-02
text = "only acme"
types = ["secret-project"]
"""
    catalogue = parse_catalogue(text)
    told = {
        tenant: one_file(write(Config(), catalogue.for_tenant(tenant)), "x")
        for tenant in (None, "acme", "globex")
    }
    assert "secret-project" in told["acme"]
    assert "only acme" in told["acme"]
    assert "secret-project" not in told["globex"]
    assert "only acme" not in told["globex"]
    assert "everybody" in told["globex"]
    assert "secret-project" in told[None]


def test_the_shape_of_a_payload_has_no_values() -> None:
    given = {
        "id": 17,
        "name": "Ada",
        "ok": False,
        "none": None,
        "tags": ["a", "b"],
        "by mail": {"ada@example.com": 1, "n": {"x": 1.5}},
        "a@b": 1,
    }
    assert shape(given) == {"id": 0, "name": "…", "ok": True, "none": None, "tags": ["…"]}
    assert shape({"to": {"ada@example.com": 1, "n": {"x": 1.5}}}) == {"to": {"n": {"x": 0}}}


# The command.


def test_docs_from_the_database(dsn: str, tmp_path: Path) -> None:
    cli = Cli(dsn, tmp_path)
    (tmp_path / "events.toml").write_text('title = "Acme"\n[events."order.paid"]\nsummary = "Paid"\n')

    async def go() -> str:
        secret, _ = await add_endpoint_with_id(
            dsn, "http://127.0.0.1:9009/private-url", tenant="acme", types=["typed.by-them"]
        )
        await send(dsn, "order.paid", '{"order": 17, "who": "Ada Lovelace"}', tenant="acme")
        await send(dsn, "user.created", json.dumps({"secret": secret, "name": "Grace"}), tenant="globex")
        return secret

    secret = asyncio.run(go())
    (done,) = cli.json("docs", "--output", "out")
    assert done["events"] == 2
    site_text = "".join(p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file())
    for hidden in (secret, "Ada", "Grace", "private-url", "typed.by-them", "globex"):
        assert hidden not in site_text, hidden
    assert "&quot;who&quot;: &quot;…&quot;" in site_text
    assert (tmp_path / "out" / "events" / "user.created.html").is_file()
    # its own tenant's only; the page of the other goes
    assert cli.json("docs", "--output", "out", "--tenant", "acme")[0]["events"] == 1
    assert not (tmp_path / "out" / "events" / "user.created.html").exists()
    real = cli.ok("docs", "--format", "markdown", "--payloads", "real", "--output", "-")
    assert "Grace" in real
    assert secret not in real
    assert "user.created" not in cli.ok("docs", "--format", "markdown", "--tenant", "acme", "--output", "-")
    document = json.loads(cli.ok("docs", "--format", "openapi", "--output", "-"))
    assert set(document["webhooks"]) == {"order.paid", "user.created"}


def test_docs_without_a_database(tmp_path: Path) -> None:
    cli = Cli("postgresql://nobody@127.0.0.1:1/none", tmp_path)
    (tmp_path / "c.toml").write_text(cli.ok("docs", "--example"))
    assert "3 events" in cli.ok("docs", "--offline", "--catalogue", "c.toml")
    assert (tmp_path / "webhook-docs" / "index.html").read_text().startswith("<!doctype html>")
    assert "give --output DIR" in cli.fails(2, "docs", "--offline", "--output", "-")
    assert "cannot be read: No such file" in cli.fails(2, "docs", "--offline", "--catalogue", "none.toml")
    (tmp_path / "taken").write_text("a file")
    assert "cannot be written" in cli.fails(1, "docs", "--offline", "--output", "taken")
    (tmp_path / "bad.toml").write_text("titel = 1\n[events.a]\nsumary = 1\n")
    assert len(cli.fails(2, "docs", "--offline", "--catalogue", "bad.toml").splitlines()) == 2


def test_the_library_of_the_guide_is_the_one_tested() -> None:
    shown = sample("a", "{}", Config())
    headers = dict(line.split(": ", 1) for line in shown.head.splitlines()[1:])
    with pytest.raises(WebhookVerificationError, match="too old"):
        Webhook(EXAMPLE_SECRET).verify(shown.body, headers)
