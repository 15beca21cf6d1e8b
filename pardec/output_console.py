"""The console that commands print tables and colours on."""

import sys

from rich.console import Console


class OutputConsole(Console):
    """Rich's, but that how a program ends whose output nobody reads any more is left to `exit_on_unusable_input`."""

    def on_broken_pipe(self) -> None:
        """Called while a BrokenPipeError is handled, which goes on; rich would end the program with exit code 1."""
        error = sys.exc_info()[1]
        assert error is not None
        raise error
