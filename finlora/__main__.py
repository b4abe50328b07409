"""`python -m finlora`, the same as the command `finlora`."""

from finlora.cli import main

main()
