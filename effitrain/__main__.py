"""``python -m effitrain``."""

from effitrain.cli.main import main

main()
