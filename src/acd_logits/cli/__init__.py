"""The command line: `acd-logits`, with a module for each of its commands.

The commands share these:

    command.py      a parser, a run that ends in an exit code, errors of one line
    options.py      arguments that commands share
    loading.py      the model and the pair that the arguments name
    prompts.py      the prompts of generate and explain
    assistant.py    a loaded model that answers, for generate, chat and explain
    columns.py      two answers side by side, for generate
"""

from .command import CommandError, CommandParser, run_command, run_script
from .main import main

__all__ = ["CommandError", "CommandParser", "main", "run_command", "run_script"]
