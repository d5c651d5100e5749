"""`python -m lensteer` is the command line."""

from lensteer.cli import main

main()
