"""``python -m hookd``."""

from hookd.commands import main

main()
