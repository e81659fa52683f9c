"""Commands from functions: jsonargparse makes options of their parameters and of the settings, with types and help.

Parameters before `*` are arguments on the command line, the others options. What the docstring says of them is their help.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from docstring_parser import parse as parse_docstring
from jsonargparse import ActionConfigFile, ArgumentParser

from .config import Config
from .settings import explain, find_config, nearest, settings_of

__all__ = ["Command", "Given", "Group", "parse", "run_command"]


@dataclass(frozen=True)
class Given:
    """The settings that a command was given.

    Attributes:
        values: nested dictionaries of those in the file of --config and on the command line, no defaults.
        typed: names of those on the command line.
    """

    values: dict[str, Any]
    typed: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """What runs, and which settings it takes.

    Attributes:
        run: the function, which returns the exit status; with settings its first parameter takes what is `Given`.
        settings: beginnings of the names of settings that act; empty for a command without any.
    """

    run: Callable[..., int]
    settings: tuple[str, ...] = ()


Group = Mapping[str, Command]

_OPTION = re.compile(r"^--(\w[\w-]*)")  # up to the first point or equals sign: --num-train is --num_train


def parse(
    commands: Mapping[str, Command | Group], arguments: Sequence[str], *, description: str, default: str
) -> tuple[dict[str, Any], list[str]]:
    """The options that a line gives, no defaults, by command; and the line with the command that it means.

    Raises:
        ArgumentError: the line is not right.
    """
    arguments = list(arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = [default, *arguments]
    arguments = [_OPTION.sub(lambda option: "--" + option.group(1).replace("-", "_"), item) for item in arguments]
    for place, item in enumerate(arguments):  # a file comes first, so that what is typed wins, wherever it stands
        if item.startswith("--config"):
            taken = 1 if "=" in item else 2
            arguments[1:] = arguments[place : place + taken] + arguments[1:place] + arguments[place + taken :]
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=description)
    _add_commands(parser, commands)
    printed = any(item.startswith("--print_config") for item in arguments)  # with what is not given
    return parser.parse_args(arguments, defaults=printed).as_dict(), arguments


def run_command(
    commands: Mapping[str, Command | Group], arguments: Sequence[str], *, description: str, default: str
) -> int:
    """Run one of the commands; `default` is the one of a line that names none.

    Returns:
        Its exit status; 1 for an error that the user can mend and 2 for a line that is none, each printed in a few words
        without a traceback; 130 after Ctrl-C.
    """
    try:
        try:
            options, arguments = parse(commands, arguments, description=description, default=default)
        except ArgumentError as error:
            print(f"error: {_usage_error(str(error), commands, arguments)}", file=sys.stderr)
            return 2
        name = options["command"]
        chosen, values = commands[name], options.get(name) or {}
        if not isinstance(chosen, Command):
            name, chosen, values = (
                f"{name} {values['command']}",
                chosen[values["command"]],
                values.get(values["command"]) or {},
            )
        return _call(name, chosen, values, arguments)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return 130


def _call(name: str, command: Command, values: dict[str, Any], arguments: Sequence[str]) -> int:
    values.pop("config", None)
    if not command.settings:
        return command.run(**values)
    typed = tuple(found.group(1) for found in map(re.compile(r"--([\w.]+)").match, arguments) if found)
    typed = tuple(setting for setting in typed if setting in settings_of())
    idle = [setting for setting in typed if not setting.startswith(command.settings)]
    if idle:
        raise ValueError(f"{name} makes no use of {', '.join(idle)}; leave {'it' if len(idle) == 1 else 'them'} out")
    sections = {setting.partition(".")[0] for setting in settings_of()}
    settings = {key: values.pop(key) for key in list(values) if key in sections}
    return command.run(Given(settings, typed), **values)


class _Config(ActionConfigFile):
    """A YAML file, or the name of one that is shipped."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            path = find_config(values)
        except ValueError as error:
            raise ArgumentError(None, str(error)) from None
        super().__call__(parser, cfg, str(path), option_string)


def _add_commands(parser: ArgumentParser, commands: Mapping[str, Command | Group]) -> None:
    added = parser.add_subcommands(required=True, dest="command", title="commands")
    for name, command in commands.items():
        summary = _summary(command)
        inner = ArgumentParser(
            exit_on_error=False, allow_abbrev=False, description=summary, usage=_usage(name, command)
        )
        added.add_subcommand(name, inner, help=summary)
        if isinstance(command, Command):
            _add_options(inner, command)
        else:
            _add_commands(inner, command)


def _add_options(parser: ArgumentParser, command: Command) -> None:
    parameters = list(inspect.signature(command.run).parameters.values())
    if command.settings:
        parser.add_argument("--config", action=_Config, help="a YAML file, or the name of one that is shipped")
        parser.add_class_arguments(Config)
        parameters = parameters[1:]
    hints = typing.get_type_hints(command.run)
    documented = parse_docstring(inspect.getdoc(command.run) or "").params
    words = {item.arg_name: " ".join((item.description or "").split()) for item in documented}
    for parameter in parameters:
        kind, keywords = hints[parameter.name], dict[str, Any](help=words[parameter.name])
        listed = next((one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is list), None)
        if listed:
            keywords |= {
                "type": typing.get_args(listed)[0],
                "nargs": "*" if parameter.default is not parameter.empty else "+",
            }
        else:
            keywords |= {"type": kind}
        if parameter.default is not parameter.empty:
            keywords["default"] = parameter.default
        if kind is bool:
            keywords |= {"nargs": "?", "const": True}
        option = parameter.kind is parameter.KEYWORD_ONLY
        if option and parameter.default is parameter.empty:
            keywords["required"] = True
        parser.add_argument(f"--{parameter.name}" if option else parameter.name, **keywords)


def _summary(command: Command | Group) -> str:
    """The first paragraph of a command's docstring; of a group, its commands."""
    if not isinstance(command, Command):
        return ", ".join(command)
    return (inspect.getdoc(command.run) or "").partition("\n\n")[0].replace("\n", " ")


def _usage(name: str, command: Command | Group) -> str | None:
    """The line of usage of a command with settings, of which there are too many to list them; None for the usual one."""
    if not isinstance(command, Command) or not command.settings:
        return None
    parameters = list(inspect.signature(command.run).parameters.values())[1:]
    own = [
        f"[--{item.name} ...]" if item.kind is item.KEYWORD_ONLY else f"{item.name.upper()} ..." for item in parameters
    ]
    return " ".join(["%(prog)s", "[--config NAME]", "[--SECTION.SETTING VALUE ...]", *own])


def _usage_error(message: str, commands: Mapping[str, Command | Group], arguments: Sequence[str]) -> str:
    patterns = (r"unrecognized arguments: (?:--)?([^\s=]+)", r"does not accept option '([^']+)'")
    unknown = next(filter(None, (re.search(pattern, message) for pattern in patterns)), None)
    if unknown is None:
        return explain(message)
    command, name = commands.get(arguments[0]), unknown.group(1)
    own = list(inspect.signature(command.run).parameters) if isinstance(command, Command) else []
    known = [*own, *settings_of()] if isinstance(command, Command) and command.settings else own
    return f"unknown setting {name}{nearest(name, known)}; see {arguments[0]} --help"
