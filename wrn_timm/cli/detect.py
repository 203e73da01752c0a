"""Train a detector on photographs with boxes, evaluate it, and find objects with it.

    wrn-timm detect --data DIR --out RUN                         # Pascal VOC, COCO or YOLO
    wrn-timm detect --data DIR --out RUN --model wrn50_2.racm_in1k --epochs 30
    wrn-timm detect --model RUN photo.jpg FOLDER                 # find objects with a trained detector
    wrn-timm detect --model RUN FOLDER --csv --draw DRAWN > objects.csv
"""
from __future__ import annotations

import csv
import dataclasses
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pycocotools  # noqa: F401  (needed to measure the detector, after hours of training)
import torch

from ..detection import open_detector
from ..names import as_cell, counted, printable
from ..recipes import DetectConfig
from ..train.detector import asked_before, train_detectors
from ..train.find_objects import ImageObjects, coco_image_id, coco_results, draw_objects, find_in_files
from ..train.machine import Machine, usable_cores
from ..train.predict import find_images
from .common import STOPPED, Training, log_to_terminal, machine_of, pass_any_name, reports_errors, resumable
from .finetune import spread
from .options import option, parse
from .predict import named

PURPOSES = {
    'Main options': (
        'images', 'data', 'out', 'model', 'detector', 'pretrained', 'image_size', 'epochs', 'batch_size', 'lr', 'seeds',
        'resume'),
    'Finding objects': ('threshold', 'json', 'csv', 'coco', 'draw'),
    'Data': ('train_split', 'test_split', 'on_bad'),
    'Network': ('frozen_stages', 'out_channels', 'anchor_scale', 'rois', 'max_objects'),
    'Optimisation': ('opt', 'weight_decay', 'warmup_steps', 'flip', 'seed'),
    'Machine': ('device', 'precision', 'workers', 'time_budget'),
    'Output': ('messages', 'traceback'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectOptions(Training):
    """Command-line options in addition to the settings of the detector."""
    images: tuple[str, ...] = option((), 'IMAGE', positional=True)
    """Photographs and folders to find objects in, with the detector of --model RUN (default: the run in --out); -
    reads a list from standard input. Nothing is trained then."""
    data: str = option('', 'DIR')
    """Photographs with boxes: a folder in Pascal VOC, COCO or YOLO format (found automatically), or coco:FILE.json.
    """
    out: str = 'runs/detect'
    resume: bool = False
    """Continue the run in --out with its own settings; give its --data again."""
    seeds: int = 1
    """Number of runs, each with its own seed; their mean and standard deviation are written too."""
    threshold: float | None = None
    """Lowest score to report, 0 to 1. The default is the threshold with the highest F1 on the test photographs of the
    run; with --coco it is 0."""
    json: bool = False
    """Print the objects as one JSON list."""
    csv: bool = False
    """Print one line per object: image, label, score, xmin, ymin, xmax, ymax, error."""
    coco: bool = False
    """Print the objects as COCO results. Their image_id is the number in the file's name, or the name; category_id
    counts the detector's classes from 1."""
    draw: str = option('', 'FOLDER')
    """Write copies of the photographs, with the objects drawn on them, to this folder. Earlier drawings in it are
    replaced; other files are kept."""
    workers: int = min(8, usable_cores()) if torch.cuda.is_available() else 0
    """Processes that read photographs."""
    on_bad: Literal['skip', 'fail'] = 'skip'
    """What to do with bad boxes and unreadable files: skip leaves them out and lists them, fail stops the run."""
    messages: Literal['text', 'json', 'quiet'] = 'text'
    """What training prints: lines and a progress bar, a JSON object per line, or errors only."""

    def __post_init__(self):
        super().__post_init__()
        if not (self.data or self.images):
            raise ValueError('--data is missing: give the folder of a data set with boxes to train on, or photographs '
                             'and --model RUN to find objects')
        if self.data and self.images:
            raise ValueError('give --data to train, or photographs to find objects in, not both')
        for name in ('threshold', 'json', 'csv', 'coco', 'draw') if self.data else ():
            if getattr(self, name) not in (None, False, ''):
                raise ValueError(f'--{name} is for finding objects in photographs; leave it out with --data')
        for name, default in (('resume', False), ('seeds', 1)) if self.images else ():
            if getattr(self, name) != default:
                raise ValueError(f'--{name} is for training; leave it out with photographs')
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f'threshold is {self.threshold}; it must be from 0 to 1')
        if self.json + self.csv + self.coco > 1:
            raise ValueError('choose one of --json, --csv and --coco')


_COLUMNS = ('image', 'label', 'score', 'xmin', 'ymin', 'xmax', 'ymax', 'error')


def rows(found: ImageObjects) -> list[list[Any]]:
    """CSV lines of a photograph; a photograph without objects has one line too."""
    lines = [[as_cell(found.image), as_cell(o.label), o.score, *o.box, ''] for o in found.objects]
    return lines or [[as_cell(found.image), *[''] * 6, as_cell(found.error)]]


def print_text(found: ImageObjects) -> None:
    print(printable(found.image) + (': no objects' if not (found.objects or found.error) else ''))
    for o in found.objects:
        box = ', '.join(f'{v:.0f}' for v in o.box)
        print(f'  {100 * o.score:5.1f} %  {printable(o.label):20} box {box}')
    if found.error:
        print(f'  error: {printable(found.error)}')


def show(results: Iterable[ImageObjects], options: DetectOptions, classes: Sequence[str]) -> int:
    """Print the objects in the chosen format, draw them, and return the number of files that could not be read."""
    table, whole, failed, taken = csv.writer(sys.stdout, lineterminator='\n'), [], 0, set()
    images: dict[int | str, str] = {}
    if options.csv:
        table.writerow(_COLUMNS)
    for found in results:
        failed += bool(found.error)
        if options.csv:
            table.writerows(rows(found))
        elif options.json:
            whole.append(found.as_json())
        elif options.coco:
            whole += coco_results(found, classes)
            first = images.setdefault(coco_image_id(found.image), found.image)
            if first != found.image:
                print(f'warning: {printable(first)} and {printable(found.image)} have the same image_id',
                      file=sys.stderr)
        else:
            print_text(found)
        if options.draw and not found.error:
            draw_objects(found, classes, Path(options.draw), taken)
    if options.json or options.coco:
        print(json.dumps(whole, indent=2))
    return failed


def run_finding(options: DetectOptions, model: str) -> int:
    """Find objects with a trained detector, and return the exit code."""
    pass_any_name()
    names, drawn = list(named(options.images)), Path(options.draw).resolve() if options.draw else None
    if mixed := next((name for name in names if drawn and Path(name).resolve().parent == drawn), None):
        raise ValueError(f'{options.draw} is the folder of {mixed}; choose another --draw, so that drawings are '
                         f'not mixed with photographs')
    detector = open_detector(model, options.device)
    paths = (path for path in find_images(names) if Path(path).resolve().parent != drawn)
    threshold = 0. if options.coco and options.threshold is None else options.threshold
    if failed := show(find_in_files(detector, paths, threshold), options, detector.classes):
        print(f"{counted(failed, 'file')} could not be read", file=sys.stderr)
    return 1 if failed else 0


def run_training(options: DetectOptions, config: DetectConfig) -> int:
    """Train, print the results, and return the exit code."""
    text = options.messages == 'text'
    machine = machine_of(options, Machine, progress=None if text else False)

    def emit(row: dict[str, Any]) -> None:
        if options.messages == 'json':
            print(json.dumps(row), flush=True)

    with resumable(options.out):
        result = train_detectors(config, options.data, options.out, options.seeds, machine, emit)
    if result is None:
        return STOPPED
    emit(result if options.seeds > 1 else result['runs'][0])
    if text:
        first, seeds = result['runs'][0], f", {options.seeds} seeds" if options.seeds > 1 else ''
        print(f"mAP@0.5 {spread(result['map_50'])} %, mAP@0.5:0.95 {spread(result['map'])} % on {first['images']} "
              f"photographs{seeds}; see {printable(options.out)}/{'seed-*/' * bool(seeds)}report.html")
    return 0


@reports_errors
def main(argv: Sequence[str]) -> int:
    def start(options: DetectOptions) -> DetectConfig:
        return asked_before(Path(options.out)) if options.resume else DetectConfig()

    options, config = parse(argv, ('detect', __doc__), DetectOptions, DetectConfig, start, PURPOSES)
    log_to_terminal(logging.INFO if options.messages == 'text' else logging.ERROR)
    if options.images:
        untrained = DetectConfig(model=config.model)
        if given := next((k for k, v in vars(config).items() if v != getattr(untrained, k)), ''):
            raise ValueError(f"--{given.replace('_', '-')} is for training; a trained detector has its own, so leave "
                             f"it out with photographs")
        return run_finding(options, options.out if config.model == 'auto' else config.model)
    return run_training(options, config)
