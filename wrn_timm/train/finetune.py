"""Fine-tune pretrained weights on photographs: from a folder of images to weights, metrics and a report."""
from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.utils import random_seed

from ..card import finish_weights_folder
from ..data.images import ImageFiles
from ..data.splits import ENOUGH_TO_CHOOSE, Split, data_name, read_split, source_root, write_split
from ..data.timm_sets import is_named
from ..files import atomic_write, write_json
from ..names import some
from ..recipes import FinetuneConfig
from ..weights import eval_transform, export_weights, open_model, weights_name
from .accelerator import kept_accumulation, make_accelerator
from .finetune_loop import BatchTooLarge, Finetuner, Fitted
from .linear import LinearFit, temperature
from .machine import Machine, environment, in_float32, kept_random_state
from .measure import Features, Predictions, largest_batch, predict
from .metrics import classification_metrics, summarise
from .prepare import (
    build_model,
    check_policy,
    prepare_named,
    prepare_split,
    preprocessing,
    size_advice,
    split_name,
    training_set,
)
from .probe import extract_features
from .report import write_report
from .run import TIME_BUDGET, RunControl, RunDir, agreed, any_process, check_place, planned_runs, run_each

__all__ = ['finetune', 'finetune_seeds']

_logger = logging.getLogger(__name__)

_LEAST_STEPS = 20  # per epoch, with batch size 'auto'


@kept_random_state()
@kept_accumulation()
def finetune(
        config: FinetuneConfig,
        data: str | Path,
        out: str | Path,
        machine: Machine = Machine(),  # noqa: B008  (it is frozen)
        on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any] | None:
    """Fine-tune on `data` and write weights, metrics and a report to a run directory.

    Under `torchrun` or `accelerate launch`, the processes share each batch, and only the first one writes files. A
    resumed run continues after its last complete epoch; on a CPU the result is that of an uninterrupted run.

    Args:
        config: Model, split, optimizer, augmentation... (the options of the command).
        data: Folder of class folders (optionally split into `train/` and `test/`), `FILE.csv`, `caltech101:DIR`, or a
            data set known to timm (`hfds/...`).
        out: Run directory.
        machine: Device, workers, time budget... An epoch that would not finish within the time budget is not started,
            except the first.
        on_epoch: Called with each epoch's row of the history.

    Returns:
        The metrics of the best weights on the test files, as written to `metrics.json`; None if SIGTERM or Ctrl-C
        stopped the run during training.

    Raises:
        FileExistsError: `out` already holds a run.
        FileNotFoundError: The data does not exist, or there is no run to resume.
        ValueError: A setting or the data cannot be used; the message says which.
        FloatingPointError: The loss is no longer finite.
        RuntimeError: Out of memory, or the weights cannot be loaded.
    """
    started, deadline = time.monotonic(), machine.deadline()
    check_policy(config.auto_augment)
    if unused := config.unused():
        _logger.warning('no effect on a classifier that is fitted to features: %s; --no-cache trains it with these '
                        'settings', ', '.join(unused))
    accelerator = make_accelerator(config, machine.device)
    with accelerator.local_main_process_first():  # it may download weights, which the others then find
        model = build_model(config)
    run, split, found = _open_run(config, model, str(data), Path(out), accelerator, machine)
    if config.cached and machine.resume and (finished := _finished(run)):  # fitted again, it might differ slightly
        return finished
    random_seed(config.seed)  # regardless of what was drawn before
    model.reset_classifier(len(split.train.classes))
    model.to(accelerator.device, memory_format=torch.channels_last)
    transforms, cfg = preprocessing(config, model, data_name(str(data)), split.train.classes)
    job = _Job(config, model, split, found | {'data': str(data)}, transforms, cfg, RunControl(run, deadline, 1.),
               accelerator, machine, on_epoch)
    began = time.monotonic()
    network, fitted = _train_with_room(job)
    if fitted.interrupted:
        job.control.log_stop(job.control.reason_to_stop() or 'another process')
        return None
    train_seconds = (job.earlier or 0.) + time.monotonic() - began
    if fitted.stopped:
        _logger.info('stopped by %s after epoch %d%s', fitted.stopped, fitted.history[-1]['epoch'],
                     '; it can be continued with --resume' if fitted.stopped == TIME_BUDGET else '')
    best_epoch = _export(job, network, fitted) if accelerator.is_main_process else fitted.best_epoch()
    accelerator.wait_for_everyone()
    return _test(job, fitted, best_epoch, train_seconds, started)


def _finished(run: RunDir) -> dict[str, Any] | None:
    """The metrics of a finished run; None if it is not finished."""
    file = run.path / 'metrics.json'
    metrics = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else None
    return None if metrics and metrics['stopped'] == TIME_BUDGET else metrics


@dataclasses.dataclass
class _Job:
    """A run in progress.

    Attributes:
        found: Facts about the data for the report, from `prepare_split`, and its location as `data`.
        transforms: Transforms of the 'train' and the 'test' files.
        cfg: Fields that the exported weights' `pretrained_cfg` adds to the network's own.
        earlier: Seconds of training before the run was resumed; None until the checkpoint is read.
    """
    config: FinetuneConfig
    model: torch.nn.Module
    split: Split
    found: dict[str, Any]
    transforms: dict[str, Any]
    cfg: dict[str, Any]
    control: RunControl
    accelerator: Accelerator
    machine: Machine
    on_epoch: Callable[[dict[str, float]], None] | None
    earlier: float | None = None

    @property
    def size(self) -> int:
        """Side of the input, in pixels."""
        return self.cfg['input_size'][-1]


def _test(job: _Job, fitted: Fitted, best_epoch: int, train_seconds: float, started: float) -> dict[str, Any]:
    """Measure `best/` on the test files and write the results."""
    config, split, found, accelerator = job.config, job.split, job.found, job.accelerator
    best = open_model(str(job.control.run.path / 'best')).to(accelerator.device, memory_format=torch.channels_last)
    transform = eval_transform(best)
    with in_float32():  # as in `validate`
        result = predict(best, split.test.as_dataset(transform), accelerator, job.machine.workers, 'testing',
                         job.machine.progress)
    _check_readable(result, job.machine)
    metrics = classification_metrics(result.logits, result.labels, split.train.classes) | {
        'dataset': data_name(found['data']), 'split': found.get('split'), 'tested_on': found.get('tested_on', ''),
        'input_size': job.size, 'used': _used(job), 'best_epoch': best_epoch,
        'chosen_by': _chosen_by(config, fitted, split),
        **({'penalty': fitted.penalty, 'temperature': fitted.temperature} if config.cached else {}),
        'epochs': len(fitted.history), 'stopped': fitted.stopped,
        'train_files': len(split.train), 'holdout_files': len(split.holdout or ()),
        'leaks': found.get('leaks', []), 'skipped': [*found.get('bad', []), *fitted.bad, *result.bad],
        'train_seconds': round(train_seconds, 1),
        'seconds': round((job.earlier or 0.) + time.monotonic() - started, 1),
        'mixed_precision': accelerator.mixed_precision, 'environment': environment(accelerator.device),
        'measured_by': 'wrn-timm finetune'}
    if accelerator.is_main_process:
        _finish(job, metrics, best, result, transform)
    accelerator.wait_for_everyone()
    return metrics


def _chosen_by(config: FinetuneConfig, fitted: Fitted, split: Split) -> str:
    """How the weights in `best/` were chosen, in words."""
    if config.cached:
        return 'files that the classifier was not fitted to'
    if split.holdout and not fitted.last:
        return 'held-out files'
    return 'the end of the run' if fitted.stopped else 'the end of the schedule'


def _used(job: _Job) -> dict[str, Any]:
    """The settings that had an effect, with 'auto' and the like replaced by the values used."""
    config, split, precision = job.config, job.split, job.accelerator.mixed_precision
    found_out = {'model': weights_name(config.model), 'split': job.found.get('split'), 'input_size': job.size,
                 'holdout': f'{len(split.holdout)} files' if split.holdout else 'none',
                 'precision': 'float32' if precision == 'no' else precision}
    if not config.cached:
        found_out['batch_size'] = min(config.batch_size, len(split.train))
    return config.used() | found_out


def _settings(config: FinetuneConfig, data: str) -> dict[str, Any]:
    return {'finetune': config, 'data': data_name(data)}


def _room(config: FinetuneConfig, model: torch.nn.Module) -> int:
    """Size in bytes of `last/`, `best/` and the checkpoints: the last two, the best and the one being written."""
    def size(module: torch.nn.Module) -> int:
        return sum(t.nbytes for t in module.state_dict().values())

    checkpoint = 0 if config.cached else size(model) * (3 if config.ema_decay else 2)  # with momentum
    return 2 * size(model) + 4 * checkpoint


def _open_run(
        config: FinetuneConfig,
        model: torch.nn.Module,
        data: str,
        out: Path,
        accelerator: Accelerator,
        machine: Machine,
) -> tuple[RunDir, Split, dict[str, Any]]:
    """Open the run directory and split the data; the first process writes the split, and the others read it."""
    main, named = accelerator.is_main_process, is_named(data)
    split, found, settings = None, {}, _settings(config, data)
    if Path(data).is_dir() and out.resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(f'{out} lies in {data}, where the next run would read its plots as photographs; choose an '
                         f'--out outside it')
    if main:
        RunDir.check(out, settings, machine.resume)
        check_place(out, 0 if machine.resume else _room(config, model))
    if named:
        with accelerator.local_main_process_first():
            split, found = prepare_named(config, data, machine.download)
        streamed = any(part and part.streamed for part in (split.train, split.holdout, split.test))
        if streamed and accelerator.num_processes > 1:
            raise ValueError(f'{data} is a stream, which only one process can read; run without torchrun')
    elif main:
        split, found = prepare_split(config, data, machine, out if machine.resume else None)
    run = RunDir(out, settings, machine.resume, write=main, device=accelerator.device)
    if main and not named:
        atomic_write(run.path / 'split.csv', write_split(split, source_root(data)))
        write_json(run.path / 'scan.json', found)
    accelerator.wait_for_everyone()
    return run, split or read_split(run.path / 'split.csv', source_root(data)), found


def _train_with_room(job: _Job) -> tuple[torch.nn.Module, Fitted]:
    """Run `_train`; batch size 'auto' becomes the largest that fits memory."""
    find = job.config.batch_size == 'auto' and not job.config.cached
    if find:
        most = max(8, min(256, len(job.split.train) // _LEAST_STEPS // job.accelerator.num_processes))
        found = _find_batch_size(job.model, job.cfg['input_size'], job.accelerator, most)
        job.config = dataclasses.replace(job.config, batch_size=found)
    _announce(job)
    before = copy.deepcopy(job.model.state_dict()) if find else {}
    while True:
        try:
            return _train(job)
        except BatchTooLarge as e:  # the trial did not include the optimizer and the EMA weights
            if not (find and e.fits) or job.accelerator.num_processes > 1:
                raise
            smaller = e.fits
        _logger.info('retrying with batch size %d', smaller)
        job.config = dataclasses.replace(job.config, batch_size=smaller)
        job.accelerator.free_memory()
        job.model.load_state_dict(before)
        job.model.requires_grad_(True)  # the new optimizer would leave out frozen parameters
        job.machine = dataclasses.replace(job.machine, resume=True)  # from the last checkpoint, if there is one


def _announce(job: _Job) -> None:
    """Log what is about to be trained, with advice on the settings."""
    config, split = job.config, job.split
    held_out = len(split.holdout or ())
    _logger.info('%d classes, %d files to train on, %d held out, %d to test on', len(split.train.classes),
                 len(split.train), held_out, len(split.test))
    _logger.info('%s at %d px on %s: %s', config.model, job.size, job.accelerator.device,
                 'a classifier is fitted to its features' if config.cached else
                 f'{config.epochs} epochs, batch size {min(config.batch_size, len(split.train))}')
    if advice := size_advice(job.model, job.size, job.found.get('side', 0)):
        _logger.warning('%s', advice)
    if not config.cached and 0 < held_out < ENOUGH_TO_CHOOSE:
        _logger.info('only %d files are held out, too few to choose the best epoch (each is %.1f points), so the '
                     'last epoch is used unless the run stops early; to train on them too, give --holdout 0 if they '
                     'were drawn from the training files, or else move them there', held_out, 100 / held_out)


def _train(job: _Job) -> tuple[torch.nn.Module, Fitted]:
    """Train; returns what was fitted (the model or its classifier) and the result."""
    config, split, accelerator, machine = job.config, job.split, job.accelerator, job.machine
    holdout = split.holdout.as_dataset(job.transforms['test']) if split.holdout else None
    class_weights = _balance(split.train) if config.class_weights else None
    bad: list[str] = []
    if config.cached:
        train, holdout = (
            dataset and _keep(extract_features(job.model, dataset, accelerator, machine), bad, machine)
            for dataset in (split.train.as_dataset(job.transforms['test']), holdout))
        loss = functools.partial(
            F.cross_entropy, weight=None if class_weights is None else class_weights.to(accelerator.device))
        linear = LinearFit(train, holdout, len(split.train.classes), loss, config.seed, accelerator.device)
        network = job.model.get_classifier()
        fitted = _fit_classifier(network, linear, job)
    else:
        network, memory = job.model, machine.image_memory * 1e9
        room = len(holdout or ()) * 3 * job.size ** 2 * 4
        # gathering needs three times this memory, and several processes would exchange the images
        if isinstance(split.holdout, ImageFiles) and 3 * room <= memory and accelerator.num_processes == 1:
            holdout = _keep(predict(torch.nn.Identity(), holdout, accelerator, workers=machine.workers), bad, machine)
            memory -= room
        train = training_set(config, split, job.transforms['train'], job.size, memory)
        finetuner = Finetuner(network, config, accelerator, job.control, machine, job.on_epoch)
        if job.earlier is None:  # a retry with a smaller batch resumes this process's own work
            job.earlier = finetuner.seconds
        with job.control:
            fitted = finetuner.fit(train, holdout, class_weights)
    return network, dataclasses.replace(fitted, bad=[*bad, *fitted.bad])


def _fit_classifier(classifier: torch.nn.Linear, linear: LinearFit, job: _Job) -> Fitted:
    """Fit the classifier to features; each penalty tried counts as an epoch, and `last/` and `best/` are the same."""
    began, history, best, stopped, run = time.monotonic(), [], None, '', job.control.run
    with job.control:
        for row, logits in linear.path():
            seconds = round(time.monotonic() - began, 1)
            history.append({'epoch': len(history) + 1, **row, 'seconds': seconds})
            if best is None or row['holdout_accuracy'] > best['holdout_accuracy']:
                best, its_logits = history[-1], logits
            if run.write:
                run.log('penalty %.0e  loss %.3f  held-out accuracy %5.1f %%  %.0f s', row['penalty'],
                        row['train_loss'], row['holdout_accuracy'], seconds)
                if job.on_epoch:
                    job.on_epoch(history[-1])
            if stopped := agreed(job.control.reason_to_stop()):
                break
    interrupted, = any_process(job.control.signalled, device=job.accelerator.device)
    divisor = temperature(its_logits, linear.labels)
    weight, bias = linear.weight(best['penalty'], divisor)
    with torch.no_grad():
        classifier.weight.copy_(weight)
        if classifier.bias is not None:
            classifier.bias.copy_(bias)
    if not interrupted:  # there are no checkpoints, so it will start over
        run.write_history(history)
    return Fitted(classifier, history, [], stopped, interrupted, penalty=best['penalty'], temperature=divisor)


def _keep(found: Predictions, bad: list[str], machine: Machine) -> Features:
    _check_readable(found, machine)
    bad += found.bad
    return Features(found.logits, found.labels)


def _check_readable(found: Predictions, machine: Machine) -> None:
    if found.bad and machine.on_bad == 'fail':
        raise ValueError(some(found.bad, '; '))


def _find_batch_size(
        model: torch.nn.Module,
        size: tuple[int, int, int],
        accelerator: Accelerator,
        most: int,
) -> int:
    """The largest batch size, over all processes, that fits their memory; at most `most` images per process."""
    before = copy.deepcopy(model.state_dict())  # the trial changes BatchNorm's statistics

    def step(n: int) -> None:
        images = torch.zeros(n, *size, device=accelerator.device).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            loss = model.train()(images).float().sum()
        loss.backward()

    found = largest_batch(step, most)
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    if not found:
        raise RuntimeError(f'not even one image of {size[-1]} px fits into the memory of {accelerator.device}; '
                           f'choose a smaller --input-size or --model')
    found = int(accelerator.gather(torch.tensor([found], device=accelerator.device)).min()) * accelerator.num_processes
    _logger.info('batch size %d', found)
    return found


def _balance(files: ImageFiles) -> torch.Tensor:
    counts = torch.bincount(torch.tensor(files.labels), minlength=len(files.classes)).float()
    return counts.sum() / (len(counts) * counts)


def _export(job: _Job, network: torch.nn.Module, fitted: Fitted) -> int:
    """Write `last/` and `best/`; returns the epoch of `best/`. `network` is what was fitted (see `_train`)."""
    run = job.control.run
    network.load_state_dict(fitted.network.state_dict())
    export_weights(job.model, run.path / 'last', job.cfg)
    epoch, last = fitted.best_epoch(), fitted.history[-1]['epoch']
    if not (fitted.last or fitted.penalty):  # otherwise `network` already holds the best
        if best := run.load_best():
            network.load_state_dict(best['ema'] or best['model'])
            epoch = best['epoch']
        elif last != epoch:
            run.log('the checkpoint of epoch %d, the best on held-out files, is lost; best/ holds epoch %d, the last',
                    epoch, last, level=logging.WARNING)
            epoch = last
    export_weights(job.model, run.path / 'best', job.cfg)
    return epoch


def _finish(job: _Job, metrics: dict[str, Any], model: torch.nn.Module, result: Predictions, transform: Any) -> None:
    run = job.control.run
    write_report(run.path, metrics, model, job.split.test, result, transform, job.found)
    recipe = _without_paths(json.loads(run.recipe_file.read_text(encoding='utf-8')))
    for folder in (run.path / 'best', run.path / 'last'):
        write_json(folder / 'recipe.json', recipe)
        for file in ('history.csv', 'curves.png'):
            atomic_write(folder / file, functools.partial(shutil.copyfile, run.path / file))
    finish_weights_folder(run.path / 'best', metrics)
    write_json(run.path / 'metrics.json', metrics)  # last, because it marks the run as finished


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with names in place of local paths, for a weights folder that may be published."""
    settings = recipe['finetune']
    names = {'model': weights_name(settings['model']), 'split': split_name(settings['split'])}
    return {**recipe, 'finetune': settings | names}


def finetune_seeds(
        config: FinetuneConfig,
        data: str | Path,
        out: str | Path,
        seeds: int = 1,
        machine: Machine = Machine(),  # noqa: B008  (it is frozen)
        on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any] | None:
    """Fine-tune once for each of `seeds` seeds, starting with `config.seed`.

    A single run is written to `out`, several to `out/seed-N`. With several runs, the returned summary without `runs` is
    also written to `out/metrics.json`.

    Returns:
        A summary with `way`, `dataset`, `protocol`, `input_size`, `epochs` (if there are any), `stem`, `seeds`,
        `seconds` (total), `settings` (the fields of `config`, except `model`, that are not the default) and `runs`
        (the metrics of each run), and with the `mean`, the sample standard deviation `std` and the `values` of `top1`,
        `mean_per_class` and `ece`. None if a run was stopped by SIGTERM or Ctrl-C, or if one of several ran out of the
        time budget, which they share.

    Raises:
        What `finetune` raises; finished runs are kept. With `resume`, they are skipped.
    """
    first = int(os.environ.get('RANK', 0)) == 0
    planned = planned_runs(config, out, seeds, machine.resume)
    for own, folder, resume in planned if first else ():  # check all of them before the first run
        RunDir.check(folder, _settings(own, str(data)), resume)
    runs = run_each(planned, lambda own, folder, left: finetune(own, data, folder, left, on_epoch), machine)
    if runs is None:
        return None
    config = dataclasses.replace(config, split=split_name(config.split))  # the summary may be published
    summary = {
        'way': config.train if config.pretrained else 'from scratch', 'dataset': runs[0]['dataset'],
        'protocol': runs[0]['split'], 'input_size': runs[0]['input_size'],
        **({} if config.cached else {'epochs': max(run['epochs'] for run in runs)}),
        'stem': config.stem, 'seeds': seeds,
        'seconds': round(sum(run['seconds'] for run in runs), 1),
        'settings': {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
                     if f.name != 'model' and getattr(config, f.name) != f.default},
        **{key: summarise([run[key] for run in runs]) for key in ('top1', 'mean_per_class', 'ece')}}
    if seeds > 1 and first:
        write_json(Path(out) / 'metrics.json', summary)
    return {**summary, 'runs': runs}
