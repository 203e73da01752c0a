"""The commands `wrn-timm COMMAND ...` (or `python -m wrn_timm.cli COMMAND ...`), one module each."""
from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence

__all__ = ['COMMANDS', 'command', 'main', 'what_to_install']

COMMANDS = {  # the first lines of the modules' docstrings, copied to avoid importing them
    'finetune': 'Fine-tune pretrained weights on photographs.',
    'predict': 'Predict the classes of photographs.',
    'validate': 'Evaluate pretrained weights on a test set.',
    'train': 'Train a network from scratch with a recipe.',
    'detect': 'Train a detector on photographs with boxes, evaluate it, and find objects with it.',
    'export': 'Export a pretrained network to a file that other programs can run.',
    'publish': 'Publish weights folders on the Hugging Face Hub.',
}
_EXTRAS = {'detect': 'detect', 'export': 'train,export'}  # the others need [train]


def what_to_install(error: ModuleNotFoundError, name: str) -> str:
    """Say how to install a missing package that the command `name` needs."""
    package, extra = error.name.partition('.')[0], _EXTRAS.get(name, 'train')
    return f'{name} needs {package}, which is not installed; in a clone of wrn_timm: pip install -e ".[{extra}]"'


def command(name: str) -> Callable[[Sequence[str] | None], int]:
    """The `main(argv)` of a command, which imports its module when it is called."""
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            module = importlib.import_module(f'.{name}', __name__)
        except ModuleNotFoundError as e:
            if e.name is None or e.name.partition('.')[0] == 'wrn_timm':
                raise
            print(f'error: {what_to_install(e, name)}', file=sys.stderr)
            return 1
        except KeyboardInterrupt:  # loading torch takes seconds
            return 130
        return module.main(argv)

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names.

    Returns:
        Exit code: 0 on success, 1 after an error, 2 for an invalid command or option, 130 if stopped early.
    """
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ''][:-1] or ['--help']
    if name in COMMANDS:
        return command(name)(rest)
    if name in ('-h', '--help'):
        lines = [f'  {name:10}{line}' for name, line in COMMANDS.items()]
        print('\n'.join(['usage: wrn-timm COMMAND ...', '', *lines, '', 'wrn-timm COMMAND --help shows the options '
                         'of a command, wrn-timm --version shows the version.']))
        return 0
    if name == '--version':
        from .. import __version__
        print(f'wrn-timm {__version__}')
        return 0
    nearest, = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)
    print(f'error: command {name!r} is unknown; nearest: {nearest}; known: {", ".join(COMMANDS)}', file=sys.stderr)
    return 2
