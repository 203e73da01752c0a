"""Seconds and accuracy of training the classifier alone, on features cached once and on the backbone run every epoch.

    python tests/head_speed.py caltech101:DIR [any option of scripts/finetune.py]

Both runs have the same files, order and start, and no augmentation; the time is the training's, with the features'.
"""
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / 'scripts')]

import finetune  # noqa: E402


def main(data, *options):
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in (('cached', []), ('each epoch', ['--no-cache'])):
            run, began = Path(folder) / name, time.monotonic()
            code = finetune.main(['--data', data, '--out', str(run), '--train', 'head', '--no-augment', '--lr', '1',
                                  '--batch-size', '64', *flags, *options])
            if code:
                return code
            metrics = json.loads((run / 'metrics.json').read_text())
            results[name] = {'train_seconds': metrics['train_seconds'], 'mean_per_class': metrics['mean_per_class'],
                             'all_seconds': round(time.monotonic() - began, 1)}
    results['times faster'] = round(results['each epoch']['train_seconds'] / results['cached']['train_seconds'], 1)
    print(json.dumps(results, indent=2))
    return 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
