"""Run timm's own tests/test_models.py on our models.

    python tests/timm_suite.py wrn16_1 wrn18_2      # these names
    python tests/timm_suite.py all                  # every name

The tests come from the source distribution of the installed timm and are not kept in this tree. Our modules are added
to its FEAT_INTER_FILTERS, without which the tests of intermediates pass a plugin by. Tests that fetch weights run for
those that are on this machine. Every name must have every kind of test: a filter that matches nothing
passes too.
"""
from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.weights import find

EXPECTED = {
    'test_model_forward', 'test_model_backward', 'test_model_default_cfgs',
    'test_model_forward_torchscript', 'test_model_forward_features', 'test_model_forward_intermediates',
    'test_model_forward_intermediates_features', 'test_model_forward_fx', 'test_model_backward_fx',
}


def fetch_suite(folder: Path) -> Path:
    """The suite of the installed timm, with our modules registered; returns its test_models.py."""
    subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', ':all:', '--dest', folder,
         f'timm=={timm.__version__}'], check=True)
    with tarfile.open(next(folder.glob('timm-*.tar.gz'))) as archive:
        for member in archive.getmembers():
            if '/tests/' in member.name:
                archive.extract(member, folder, filter='data')
    suite = next(folder.glob('timm-*/tests/test_models.py'))
    text, patched = re.subn(r'^FEAT_INTER_FILTERS = \[', "FEAT_INTER_FILTERS = [\n    'wrn', 'wrn_imagenet',",
                            suite.read_text(), flags=re.M)
    if not patched:
        raise SystemExit(f'timm {timm.__version__}: FEAT_INTER_FILTERS is not where this script expects it')
    suite.write_text('import wrn_timm\n' + text)
    return suite


def _name_of(test_id: str, names: list[str]) -> str | None:
    """`<arch>` or `<arch>.<tag>` of a test of one of these names, else None."""
    match = re.search(rf'[\[-]((?:{"|".join(names)})(?:\.\w+)?)[\]-]', test_id)
    return match and match[1]


def main(names: list[str]) -> int:
    if names == ['all']:
        names = timm.list_models('wrn*')
    unknown = [n for n in names if not timm.is_model(n)]
    if unknown or not names:
        raise SystemExit(f'not registered: {", ".join(unknown)}' if unknown else 'give names, or all')
    with tempfile.TemporaryDirectory() as folder:
        suite = fetch_suite(Path(folder))
        base = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--rootdir', str(suite.parent),
                '-c', os.devnull, '-W', 'ignore', str(suite)]
        listing = subprocess.run([*base, '--collect-only'], cwd=folder, capture_output=True, text=True).stdout
        ids = [line.split('::')[1] for line in listing.splitlines() if '::' in line]
        wanted = [i for i in ids if (name := _name_of(i, names)) and ('pretrained' not in i or find(name))]
        print(f'{len(wanted)} tests of {len(names)} names')
        for name in names:
            kinds = {i.partition('[')[0] for i in wanted if (_name_of(i, names) or '').partition('.')[0] == name}
            if missing := EXPECTED - kinds:
                raise SystemExit(f'{name}: not collected: {", ".join(sorted(missing))}')
        listed = Path(folder) / 'ids.txt'
        listed.write_text('\n'.join(f'{suite}::{i}' for i in wanted))
        return subprocess.run([*base[:-1], f'@{listed}'], cwd=folder).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
