"""Charts for the READMEs."""
from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

INK = '#7d858f'  # readable on GitHub's light and dark pages alike
COLORS = ('#9aa7b5', '#4c8dff', '#f0803c', '#2da44e', '#a475f9', '#d4a72c', '#e5534b')


def draw_transfer(axes: Axes, data: dict[str, dict[str, list[float | None]]]) -> None:
    """Draw a group of bars per method, with one colour per set of weights and standard deviations as whiskers."""
    methods = list(dict.fromkeys(m for scores in data.values() for m in scores))
    width = 0.84 / len(data)
    for i, (name, scores) in enumerate(data.items()):
        at = [methods.index(m) + (i - (len(data) - 1) / 2) * width for m in scores]
        heights, spread = zip(*scores.values(), strict=True)
        whiskers = [math.nan if s is None else s for s in spread]
        bars = axes.bar(at, heights, 0.9 * width, yerr=whiskers, label=name, color=COLORS[i],
                        error_kw={'ecolor': INK, 'capsize': 3})
        axes.bar_label(bars, fmt='%.0f', padding=2, color=INK, fontsize=9)
    axes.set(xticks=range(len(methods)), xticklabels=methods, ylabel='mean per-class accuracy, %', ylim=(0, 90))
    axes.legend(frameon=False, labelcolor=INK, loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3)


def chart_is_current(path: Path, data: Any) -> bool:
    """Whether a chart shows this data. The file stores its data, because pixels depend on fonts and versions."""
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return image.text.get('Description') == json.dumps(data)


def write_chart(path: Path, data: Any, draw: Callable[[Axes, Any], None]) -> None:
    """Draw a chart on a transparent background."""
    figure = Figure(figsize=(8, 3.6), layout='constrained', facecolor='none')
    axes = figure.add_subplot(facecolor='none')
    axes.tick_params(colors=INK)
    axes.spines[['top', 'right']].set_visible(False)
    axes.spines[['left', 'bottom']].set_color(INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    draw(axes, data)
    figure.savefig(path, dpi=150, metadata={'Description': json.dumps(data), 'Software': None})
