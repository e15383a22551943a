"""``python -m nybble``."""

from nybble.cli.app import main

main()
