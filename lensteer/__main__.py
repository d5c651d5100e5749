"""`python -m lensteer` runs the command line."""

from lensteer.cli import main

main()
