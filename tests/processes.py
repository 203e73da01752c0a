"""Commands in processes of their own, forked from one that has imported everything, which takes seconds each time."""
import ctypes
import importlib
import multiprocessing
import os
import re
import resource
import sys
from pathlib import Path

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['wrn_timm.cli.finetune', 'wrn_timm.cli.train', 'wrn_timm.cli.detect', 'torch._dynamo',
                               'matplotlib.figure'])


class Command:
    """`wrn-timm NAME ARGUMENTS` in a process that has begun.

    Args:
        name: Of the command.
        *argv: Its arguments.
        errors: File for what it writes to standard error.
        memory: Bytes that the process may take more than it has when all is imported, on Linux.
    """

    def __init__(self, name, *argv, errors, memory=0):
        self._errors = Path(errors)
        self.process = SERVER.Process(target=_run, args=(name, [str(a) for a in argv], str(errors), memory))
        self.process.start()

    def has_not_ended(self):
        """For the condition of a loop that waits for what the command does."""
        assert self.process.is_alive(), self._errors.read_text()
        return True

    def end(self):
        """The exit status and what was written to standard error, once it has ended."""
        self.process.join()
        return self.process.exitcode, self._errors.read_text()


def _run(name, argv, errors, memory):
    with open(errors, 'w') as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, 'w', buffering=1, closefd=False)
    main = importlib.import_module(f'wrn_timm.cli.{name}').main
    if memory:
        import torch
        torch.set_num_threads(2)  # more have stacks that count
        torch.backends.mkldnn.enabled = False  # short of memory it crashes, or fails ever after
        ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back at once
        has = 1024 * int(re.search(r'VmData:\s*(\d+) kB', Path('/proc/self/status').read_text())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (has + memory,) * 2)
    sys.exit(main(argv))


def run(name, *argv, errors, **kwargs):
    """The exit status of a command and what it wrote to standard error."""
    return Command(name, *argv, errors=errors, **kwargs).end()
