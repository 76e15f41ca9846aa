"""
Documentation for receivers, written from the configuration, the database and ``events.toml``.

Everything is Markdown first (``writing``, from the texts in ``text/`` and ``snippets/``); the site is that Markdown rendered
(``site``).  ``docs/receiving.md`` is written by it too.
"""
