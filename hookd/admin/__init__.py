"""The HTTP side of the daemon: API, metrics and probes."""
