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
    launch,
    plan,
    probe,
    recipes,
    report,
    suites,
    train,
)

COMMANDS = (
    demo, recipes, plan, probe, train, launch, eval, suites, compare, generate, judge, chat, report, export,
    data, config,
)  # fmt: skip
