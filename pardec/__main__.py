"""`python -m pardec`, the command line for environments without console scripts."""

from pardec.cli import main

main()
