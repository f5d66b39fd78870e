"""One module for each word of the command line: `add_parser` says what it takes, `run(args)` does it."""

from orpo.commands import (
    chat,
    compare,
    config,
    data,
    demo,
    eval,
    export,
    generate,
    judge,
    probe,
    report,
    train,
)

COMMANDS = (demo, probe, train, eval, compare, generate, judge, chat, report, export, data, config)
