"""The `acd-logits` command: one module per command, and what they share."""

from .command import CommandError, CommandParser, run_command, run_script
from .main import main

__all__ = ["CommandError", "CommandParser", "main", "run_command", "run_script"]
