"""One module for each word of the command line: `add_parser` says what it takes, `run(args)` does it."""

from orpo.commands import chat, config, eval, report, train

COMMANDS = (train, eval, chat, report, config)
