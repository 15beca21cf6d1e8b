"""`python -m pardec`, the command line for environments without console scripts."""

from pardec.cli.program import main

main()
