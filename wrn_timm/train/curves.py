"""The curves of a run: loss, accuracy and learning rate over its epochs."""
from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['plot_history']


def _log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, with ticks even if the values differ little."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
    low, high = (float(value) for value in axes.dataLim.intervaly)
    if not 0 < low <= high < math.inf:  # a loss of 0
        return
    axes.set_yscale('log')
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(5))
    axes.yaxis.set_minor_locator(NullLocator())


def _plain_number(value: float) -> str:
    """A number in plain decimal notation: 0.0005, not 5e-04 or 0.0005000000000000001."""
    return np.format_float_positional(float(f'{value:.6g}'), trim='-')


def plot_history(history: list[dict[str, float]], path: Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs, or over the penalties of a classifier on features."""
    from matplotlib.figure import Figure
    groups = {'loss': [], 'accuracy, %': [], 'learning rate': [], 'penalty': []}
    for column in history[-1]:
        if column.endswith('loss'):
            groups['loss'].append(column)
        elif column.endswith('accuracy'):
            groups['accuracy, %'].append(column)
        elif column == 'lr':
            groups['learning rate'].append(column)
        elif column == 'penalty':
            groups['penalty'].append(column)
    groups = {title: columns for title, columns in groups.items() if columns}
    figure = Figure(figsize=(12, 4), layout='constrained')
    epochs = [row['epoch'] for row in history]
    for axes, (title, columns) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for column in columns:
            axes.plot(epochs, [row[column] for row in history], label=column.replace('_', ' '), marker='.')
        axes.set(xlabel='penalties tried' if 'penalty' in groups else 'epoch', title=title)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if title in ('loss', 'penalty'):
            _log_scale(axes)
        axes.yaxis.set_major_formatter(lambda value, _: _plain_number(value))
        if column not in ('lr', 'penalty'):  # the title names these
            axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.15), ncols=len(columns), frameon=False)
    figure.savefig(path, dpi=100)
