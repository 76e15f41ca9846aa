"""hookd: a webhook dispatcher for applications that already have PostgreSQL."""

__version__ = "0.1.0"
