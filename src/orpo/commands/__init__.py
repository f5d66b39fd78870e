"""One module for each word of the command line: `add_parser` says what it takes, `run(args)` does it."""

from orpo.commands import (
    chat,
    config,
    data,
    demo,
    eval,
    export,
    generate,
    judge,
    launch,
    plan,
    recipes,
    report,
    suites,
    train,
)

COMMANDS = (
    demo, recipes, plan, train, launch, eval, suites, generate, judge, chat, report, export, data, config,
)  # fmt: skip
