"""Command-line options from the fields of dataclasses: types, defaults, and docstrings as help texts."""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser

from ..names import printable

__all__ = ['called', 'option', 'parse']

_Options = TypeVar('_Options')
_Settings = TypeVar('_Settings')


def option(default: Any = dataclasses.MISSING, metavar: str = '', **metadata: Any) -> Any:
    """Dataclass field of an option with a metavar and, as metadata, `positional` or argparse's `nargs`."""
    return dataclasses.field(default=default, metadata={'metavar': metavar, **metadata})


def called(command: str) -> str:
    """Name by which the user runs a command: its script in a checkout, or `wrn-timm COMMAND`."""
    return f'scripts/{command}.py' if Path(sys.argv[0]).name == f'{command}.py' else f'wrn-timm {command}'


def parse(
        argv: Sequence[str],
        about: tuple[str, str],
        options: type[_Options],
        settings: type[_Settings] | None = None,
        start: Callable[[_Options], _Settings] | None = None,
        purposes: Mapping[str, Sequence[str]] | None = None,
) -> tuple[_Options, _Settings | None]:
    """Parse a command line.

    Args:
        argv: Command-line arguments.
        about: Name of the command, and the text of --help before the options.
        options: Dataclass of the command's own options; fields without a default are required.
        settings: Dataclass of the training settings, whose fields are options too.
        start: Function that returns the default settings, given the options; None for `settings()`.
        purposes: Names of the options by purpose, in the order of --help; None for a single group.

    Returns:
        Both dataclasses; the second is None without `settings`.

    Raises:
        SystemExit: Code 2 for an invalid option, after a message; code 0 after --help.
        Any error of `start`.
    """
    own = _options(options)
    known = own | (_options(settings, to_be_given=False) if settings else {})
    parser = _Parser(about, known, purposes or {'Options': list(known)})
    given = parser.given(argv)
    try:
        chosen = options(**{k: v for k, v in given.items() if k in own})
    except ValueError as e:
        parser.error(str(e))
    if not settings:
        return chosen, None
    begun = start(chosen) if start else settings()
    try:
        return chosen, dataclasses.replace(begun, **{k: v for k, v in given.items() if k not in own})
    except ValueError as e:
        parser.error(str(e))


@dataclasses.dataclass(frozen=True)
class _Option:
    """An option: the name of its field, its type, help text and default (MISSING if none is shown)."""
    name: str
    hint: Any
    text: str
    default: Any
    required: bool
    metadata: Mapping[str, Any]


def _options(kind: type, to_be_given: bool = True) -> dict[str, _Option]:
    """Options by name, from the fields with a docstring; fields of the class come before fields of its bases.

    Args:
        kind: Dataclass.
        to_be_given: Whether fields without a default are required. Otherwise, if there are such fields, the values of
            all fields come from elsewhere (a recipe), and no defaults are shown.
    """
    hints, fields = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    elsewhere = not to_be_given and any(f.default is dataclasses.MISSING for f in fields.values())
    found: dict[str, _Option] = {}
    for base in filter(dataclasses.is_dataclass, kind.__mro__):
        for told in docstring_parser.parse_from_object(base).params:
            name, field = told.arg_name, fields[told.arg_name]
            default = dataclasses.MISSING if elsewhere else field.default
            found.setdefault(name, _Option(name, hints[name], ' '.join(told.description.split()), default,
                                           to_be_given and default is dataclasses.MISSING, field.metadata))
    return found


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors look like all errors of the commands, and name the nearest option."""

    def __init__(self, about: tuple[str, str], options: Mapping[str, _Option], purposes: Mapping[str, Sequence[str]]):
        name, text = about
        prog = called(name)
        if prog.endswith('.py'):
            text = text.replace(f'wrn-timm {name}', f'python {prog}')
        usage = ' '.join(['%(prog)s [OPTIONS]', *(
            f"{o.metadata['metavar']} ..." if o.required else f"[{o.metadata['metavar']} ...]"
            for o in options.values() if o.metadata.get('positional'))])
        super().__init__(prog=prog, usage=usage, description=text.strip(), add_help=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.options = options
        for purpose, names in purposes.items():
            group = self.add_argument_group(purpose)
            for each in names:
                _add(group.add_argument, options[each])
        self.add_argument('-h', '--help', action='help', help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {printable(message, lines=True)}\n{self.prog} --help shows the options\n')

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Values of the options that are given, without defaults."""
        # what follows -- is not for the parser of mixed arguments, which takes it for options
        found, unknown = self.parse_known_args(argv) if '--' in argv else self.parse_known_intermixed_args(argv)
        if unknown:
            name = next((word for word in unknown if word.startswith('-')), '').partition('=')[0]
            if not name:
                self.error(f'unexpected argument {unknown[0]}')
            nearest = difflib.get_close_matches(name, map(_flag, self.options), n=1)
            self.error(f'option {name} is unknown' + (f'; nearest: {nearest[0]}' if nearest else ''))
        try:
            return {k: _converted(self.options[k].hint, v) for k, v in vars(found).items()}
        except ValueError as e:
            self.error(str(e))


def _flag(name: str) -> str:
    return f'--{name.replace("_", "-")}'


def _add(add_argument: Callable[..., Any], option: _Option) -> None:
    """Add an option to a group of a parser; an option that is not given sets no value."""
    flag = _flag(option.name)
    shown = '(required)' if option.required else _shown(option.default)
    told = {'help': f'{option.text} {shown}'.strip().replace('%', '%%'), 'default': argparse.SUPPRESS}
    metavar = option.metadata.get('metavar') or flag.rpartition('-')[2].upper()
    if option.metadata.get('positional'):
        add_argument(option.name, nargs='+' if option.required else '*', metavar=metavar, **told)
    elif bool in (option.hint, *get_args(option.hint)):
        names = [flag, flag.replace('--', '--no-', 1)]
        told |= {'dest': option.name, 'action': _Switch}
        add_argument(*names[:1 if option.default is False else 2], **told)
        if option.default is False:  # turns off what a recipe or a resumed run turns on
            add_argument(names[1], **told | {'help': argparse.SUPPRESS})
    else:
        reading = _reading(option.hint) | {k: v for k, v in option.metadata.items() if k == 'nargs'}
        add_argument(flag, required=option.required, **told, **reading,
                     **({} if 'choices' in reading else {'metavar': metavar}))


class _Switch(argparse.Action):
    def __init__(self, **kwargs: Any):
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        setattr(namespace, self.dest, not option_string.startswith('--no-'))


def _shown(default: Any) -> str:
    if default is False or default in (dataclasses.MISSING, None, '', (), math.inf):
        return ''
    if default is True:
        return '(default: yes)'
    return f'(default: {" ".join(map(str, default)) if isinstance(default, tuple) else default})'


def _reading(hint: Any) -> dict[str, Any]:
    """Arguments of `add_argument` for values of a type."""
    parts = [part for part in get_args(hint) if part is not NoneType]
    if get_origin(hint) is Literal:
        return {'choices': parts}
    if get_origin(hint) is tuple:
        return {'nargs': '*', **(_reading(parts[0]) if get_origin(parts[0]) is not tuple else {'type': float})}
    if get_origin(hint) in (Union, UnionType):
        words = [word for part in parts for word in get_args(part)]
        if len(parts) == 1:
            return _reading(parts[0])
        kind = next(part for part in parts if not get_args(part))

        def read(text: str) -> Any:
            return text if text in words else kind(text)

        read.__name__ = f'{kind.__name__} or {" or ".join(words)}'  # for argparse's message
        return {'type': read}
    return {'type': hint}


def _converted(hint: Any, value: Any) -> Any:
    """Convert a value from argparse to its type; the items of nested tuples are given one after the other."""
    if not isinstance(value, list):
        return value
    kinds = get_args(get_args(hint)[0])
    if get_origin(get_args(hint)[0]) is not tuple:
        return tuple(value)
    if len(value) % len(kinds):
        raise ValueError(f'{" ".join(f"{v:g}" for v in value)}: give {len(kinds)} numbers at a time')
    return tuple(tuple(kind(v) for kind, v in zip(kinds, value[i:i + len(kinds)], strict=True))
                 for i in range(0, len(value), len(kinds)))
