"""Publish weights folders on the Hugging Face Hub.

    wrn-timm publish RUN --namespace NAME --dry-run        # a run of finetune, train or detect
    wrn-timm publish RUN/best --namespace NAME --private
    wrn-timm publish --all --namespace NAME                # in a checkout, every folder of weights/

Each folder is checked, uploaded, tagged and read back. The token is taken from `hf auth login` or $HF_TOKEN.
Files that are already on the Hub are not uploaded again.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..hub import preview, publish
from .common import Options, reports_errors, show_error
from .options import option, parse

WEIGHTS = Path(__file__).resolve().parents[2] / 'weights'


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishOptions(Options):
    folders: tuple[str, ...] = option((), 'FOLDER', positional=True)
    """Weights folders, or the run directories of finetune, train or detect that hold them."""
    namespace: str = option(metavar='NAME')
    """User or organisation on the Hub."""
    tag: str = ''
    """Last part of the repository's name; the default is the name of the data."""
    private: bool = False
    """Make the repositories private."""
    dry_run: bool = False
    """Only check, and show each file, its size and the card."""
    endpoint: str | None = option(None, 'URL')
    """URL of the Hub; the default is $HF_ENDPOINT or the Hugging Face Hub."""
    all: bool = False
    """Publish every folder of the checkout's weights/."""

    def __post_init__(self):
        super().__post_init__()
        if self.all == bool(self.folders):
            raise ValueError('give folders, or --all')
        if self.tag and len(self.folders) != 1:
            raise ValueError('--tag names one repository; give one folder')
        if self.all and not WEIGHTS.is_dir():
            raise ValueError('--all publishes the weights/ of a checkout, which this is not; give folders')


@reports_errors
def main(argv: Sequence[str]) -> int:
    options, _ = parse(argv, ('publish', __doc__), PublishOptions)
    failed = 0
    for folder in sorted(p for p in WEIGHTS.iterdir() if p.is_dir()) if options.all else options.folders:
        try:
            print(preview(folder, options.namespace, options.tag) if options.dry_run
                  else publish(folder, options.namespace, options.private, options.endpoint, options.tag))
        except Exception as e:  # the other folders are still published
            if options.traceback:
                raise
            show_error(e)
            failed += 1
    return 1 if failed else 0
