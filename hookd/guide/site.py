"""
The site: the pages as HTML files that need no server, no script and nothing from elsewhere.

The Markdown is rendered with HTML switched off, so text stays text; what is written as HTML here is escaped here.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt
from markdown_it.token import Token

from hookd.guide.writing import slug, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hookd.guide.writing import Page

GENERATOR = '<meta name="generator" content="hookd docs">'
"""By which pages of an earlier run are known."""

POLICY = "default-src 'none'; style-src 'self'; img-src data:; form-action 'none'; base-uri 'none'"


def site(pages: Sequence[Page], title: str, introduction: str = "") -> dict[str, str]:
    """Files by their paths; ``introduction`` is Markdown and stands on the first page."""
    files = {"style.css": text_of("style.css")}
    for n, page in enumerate(pages):
        files[_file(page)] = _page(pages, n, title, introduction if n == 0 else "")
    return files


def _file(page: Page) -> str:
    return "index.html" if page.name == "overview" else f"{page.name}.html"


def _page(pages: Sequence[Page], n: int, title: str, introduction: str) -> str:
    page = pages[n]
    root = "../" * page.name.count("/")
    heading = f"<h1>{html.escape(title)}</h1>\n{_rendered(introduction, root)}" if n == 0 else ""
    body = heading + _rendered(page.markdown, root, shift=0 if n == 0 else 1)
    named = title if n == 0 else f"{page.title} · {title}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
{GENERATOR}
<title>{html.escape(named)}</title>
<link rel="stylesheet" href="{root}style.css">
</head>
<body>
<a class="skip" href="#main">Skip to the text</a>
<header><a href="{root}index.html">{html.escape(title)}</a></header>
<div class="columns">
<nav aria-label="Pages">{_menu(pages, page, root)}</nav>
<main id="main">
{body}{_onward(pages, n, root)}</main>
</div>
</body>
</html>
"""


def _menu(pages: Sequence[Page], here: Page, root: str) -> str:
    def entry(page: Page) -> str:
        current = ' aria-current="page"' if page is here else ""
        text = html.escape(page.title)
        if "/" in page.name:
            text = f"<code>{'<s>' if page.deprecated else ''}{text}{'</s>' if page.deprecated else ''}</code>"
        return f'<li><a href="{root}{html.escape(_file(page))}"{current}>{text}</a></li>'

    lines = ["<ul>"]
    for page in pages:
        if "/" in page.name:
            continue
        inner = "".join(entry(p) for p in pages if p.name.startswith(f"{page.name}/"))
        lines.append(entry(page).replace("</li>", f"<ul>{inner}</ul></li>") if inner else entry(page))
    return "\n".join([*lines, f'<li class="file"><a href="{root}openapi.json">OpenAPI</a></li>', "</ul>"])


def _onward(pages: Sequence[Page], n: int, root: str) -> str:
    links = []
    for step, rel, arrow in ((-1, "prev", "← {}"), (1, "next", "{} →")):
        if 0 <= n + step < len(pages):
            page = pages[n + step]
            links.append(
                f'<a rel="{rel}" href="{root}{html.escape(_file(page))}">{arrow.format(html.escape(page.title))}</a>'
            )
    return f'<p class="onward">{"".join(links)}</p>\n' if links else ""


# From Markdown.


def _rendered(markdown: str, root: str, shift: int = 0) -> str:
    """HTML of a page; ``shift`` is by how much its headings are higher than written."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for n, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", slug(_text(tokens[n + 1])))
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{max(1, int(token.tag[1]) - shift)}"
        for child in token.children or ():
            if child.type == "link_open":
                child.attrSet("href", _target(str(child.attrGet("href")), root))
    rendered: str = parser.renderer.render(list(_blocks(tokens)), parser.options, {})
    return rendered


def _text(inline: Token) -> str:
    return "".join(child.content for child in inline.children or ())


def _target(href: str, root: str) -> str:
    """A link to a page as it is called here."""
    path, mark, anchor = href.partition("#")
    if "://" in href or not path.endswith(".md"):
        return href
    name = path.removesuffix(".md")
    return f"{root}{'index' if name == 'overview' else name}.html{mark}{anchor}"


def _blocks(tokens: Sequence[Token]) -> Iterator[Token]:
    """The tokens, with code and tables as they are wanted: neighbouring pieces of code with titles are tabs."""
    group: list[Token] = []
    number = 0
    for token in tokens:
        if token.type == "fence" and "|" in token.info:
            group.append(token)
            continue
        if group:
            number += 1
            yield _literal(_tabs(group, number))
            group = []
        if token.type == "fence":
            yield _literal(_code(token))
        elif token.type == "table_open":
            yield _literal('<div class="wide" tabindex="0">')
            yield token
        elif token.type == "table_close":
            yield token
            yield _literal("</div>\n")
        else:
            yield token
    if group:
        yield _literal(_tabs(group, number + 1))


def _literal(text: str) -> Token:
    return Token("html_block", "", 0, content=text, block=True)


def _tabs(group: Sequence[Token], number: int) -> str:
    """Radio buttons: they need no script, and arrow keys move between them."""
    parts = ['<div class="tabs">\n']
    for n, token in enumerate(group):
        title = token.info.partition("|")[2].strip()
        checked = " checked" if n == 0 else ""
        key = f"tab-{number}-{n}"
        parts.append(
            f'<input type="radio" name="tabs-{number}" id="{key}"{checked}><label for="{key}">{html.escape(title)}</label>\n'
        )
        parts.append(_code(token))
    return "".join([*parts, "</div>\n"])


def _code(token: Token) -> str:
    language = token.info.partition("|")[0].strip()
    text = token.content.rstrip("\n")
    if language in ("http", "json"):
        shown = _http(text) if language == "http" else html.escape(text)
        return f'<pre class="wrapped"><code>{shown}</code></pre>\n'
    # a region that scrolls is reached by the keyboard
    return f'<pre tabindex="0"><code>{html.escape(text)}</code></pre>\n'


def _http(text: str) -> str:
    """A request with the names of its headers marked."""
    head, _, body = text.partition("\n\n")
    first, *lines = head.split("\n")
    said = [f"<b>{html.escape(first)}</b>"]
    for line in lines:
        name, colon, value = line.partition(":")
        said.append(f"<i>{html.escape(name)}</i>{colon}{html.escape(value)}")
    return "\n".join([*said, "", html.escape(body)])
