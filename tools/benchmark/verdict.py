"""What the fine-tunings say: tables, tests, pictures, and a page with the answer."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import wilcoxon

from custom.evaluation.report import STYLE, escaped, picture
from custom.evaluation.report import table as html_table
from custom.files import write_text
from custom.text import markdown_table
from tools.benchmark.runs import Result
from tools.benchmark.task import SCRATCH

OURS, RIVALS = "DAE", (SCRATCH, "token masking")  # of the paired tests
FLAT = 0.005  # gain of the validation Dice by twice the iterations, below which a training has converged
RESAMPLED = 10_000  # times, for an interval


class Found:
    """The results of a grid: by method, number of labelled cases, and iterations."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results
        self.methods = list(dict.fromkeys(result.run.method for result in results))
        self.counts = sorted({result.run.labelled for result in results})

    def lengths(self, count: int) -> list[int]:
        """Return the iterations that were tried with a number of labelled cases."""
        return sorted({result.run.iterations for result in self.results if result.run.labelled == count})

    def cell(self, method: str, count: int, iterations: int) -> list[Result]:
        """Return the results of all seeds, in their order."""
        here = [result for result in self.results if result.run[:3] == (method, count, iterations)]
        return sorted(here, key=lambda result: result.run.seed)

    def dice(self, method: str, count: int, iterations: int) -> np.ndarray:
        """Return the Dice (seed, case)."""
        cell = self.cell(method, count, iterations)
        return np.array([[result.dice[case] for case in sorted(result.dice)] for result in cell])

    def mean(self, method: str, count: int, iterations: int) -> float:
        """Return the mean Dice over cases and seeds, NaN where nothing was run."""
        return float(self.dice(method, count, iterations).mean()) if self.cell(method, count, iterations) else np.nan

    def flat(self, count: int) -> bool:
        """Tell whether scratch, by its validation, has gained little by its last doubling of the iterations."""
        ends = [
            np.mean([list(result.curve.values())[-1] for result in self.cell(SCRATCH, count, length)])
            for length in self.lengths(count)[-2:]
        ]
        return len(ends) == 2 and ends[1] - ends[0] < FLAT


def p_value(ours: np.ndarray, theirs: np.ndarray, by_case: bool) -> float:
    """Test whether two methods differ, by Wilcoxon's signed ranks of paired Dice; two-sided.

    Args:
        ours, theirs: Dice (seed, case) of the same seeds and cases.
        by_case: pair the cases, each with its mean over the seeds; else all pairs of case and seed, of which those of
            one case are not independent.
    """
    difference = (ours - theirs).mean(0) if by_case else (ours - theirs).ravel()
    return float(wilcoxon(difference).pvalue) if difference.any() else 1.0


def interval(difference: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of paired differences (seed, case): seeds and cases are drawn again."""
    random = np.random.default_rng(0)
    seeds, cases = (random.integers(size, size=(RESAMPLED, size)) for size in difference.shape)
    means = difference[seeds[:, :, None], cases[:, None, :]].mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def table(found: Found) -> str:
    """Return Markdown tables of the mean Dice of each method and label count, and of the paired tests."""
    several = max(len(found.lengths(count)) for count in found.counts) > 1
    columns = [(count, length) for count in found.counts for length in found.lengths(count)]
    head = [f"{c} labels" + (f", {length} iterations" if several else "") for c, length in columns]
    means: list[list] = [["pre-training", *head]]
    for method in found.methods:
        cells = [[np.mean(list(result.dice.values())) for result in found.cell(method, *column)] for column in columns]
        means.append(
            [
                method,
                *(f"{np.mean(dice):.4f} ± {np.std(dice):.4f} (n = {len(dice)})" if dice else "-" for dice in cells),
            ]
        )
    tests: list[list] = [
        ["labels", "iterations", f"{OURS} against", "difference", "of each seed", "p, cases and seeds", "p, cases"],
    ]
    for column in columns:
        for rival in RIVALS:
            ours, theirs = (found.dice(method, *column) for method in (OURS, rival))
            if len(ours) and ours.shape == theirs.shape:
                seeds = ours.mean(1) - theirs.mean(1)
                apart = ", ".join(f"{difference:+.3f}" for difference in seeds)
                p = [f"{p_value(ours, theirs, by_case):.2g}" for by_case in (False, True)]
                tests.append([*column, rival, f"{np.mean(seeds):+.4f}", apart, *p])
    return "\n\n".join(markdown_table(rows) for rows in (means, tests) if len(rows) > 1) + "\n"


def answers(found: Found) -> list[str]:
    """Return for each start and number of labelled cases what it gains over scratch, and what it saves."""
    lines = []
    for method in found.methods:
        for count in found.counts if method != SCRATCH else []:
            last = found.lengths(count)[-1]
            ours, theirs = (found.dice(name, count, last) for name in (method, SCRATCH))
            if not len(ours) or ours.shape != theirs.shape:
                continue
            gain, (low, high) = (ours - theirs).mean(), interval(ours - theirs)
            sure = "more than chance" if low > 0 or high < 0 else "no more than chance"
            few, gains = f"{count} label{'s' * (count > 1)}", "gains" if gain >= 0 else "loses"
            text = (
                f"With {few}, {method} {gains} {abs(gain):.3f} Dice after {last} iterations (95 % interval {low:+.3f} "
                f"to {high:+.3f}, {sure}): {ours.mean():.3f} against {theirs.mean():.3f} from scratch."
            )
            lengths = found.lengths(count)
            if len(lengths) > 1:
                text += saved(found, method, count) + (
                    " Scratch has converged." if found.flat(count) else " Scratch has not converged yet."
                )
            lines.append(text)
    return lines


def saved(found: Found, method: str, count: int) -> str:
    """Return a sentence on the iterations that a start needs to reach the best of scratch."""
    lengths = found.lengths(count)
    best = max(lengths, key=lambda length: found.mean(SCRATCH, count, length))
    goal = found.mean(SCRATCH, count, best)
    reached = [length for length in lengths if found.mean(method, count, length) >= goal]
    if not reached:
        return f" It does not reach scratch's best, {goal:.3f}."
    share = 1 - reached[0] / best
    less = f"{share:.0%} fewer than" if share > 0 else "as many as" if share == 0 else "more than"
    return f" It reaches scratch's best, {goal:.3f}, with {reached[0]} iterations, {less} scratch's {best}."


def draw(found: Found, out: Path) -> None:
    """Draw the Dice over the number of labels and over the iterations, and the curves within the longest trainings."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for place, method in enumerate(found.methods):
        known = []
        for count in found.counts:
            means = [np.mean(list(r.dice.values())) for r in found.cell(method, count, found.lengths(count)[-1])]
            if means:  # side by side, so that each bar is seen
                known.append((count * 1.015**place, np.mean(means), np.std(means)))
        axis.errorbar(*np.transpose(known), marker="o", capsize=3, label=method)
    axis.set(xscale="log", xlabel="labelled cases", ylabel="mean Dice", xticks=found.counts, xticklabels=found.counts)
    axis.minorticks_off()
    figure.legend(*axis.get_legend_handles_labels(), title="pre-training", loc="outside right upper")
    figure.savefig(out / "dice_over_labels.png", dpi=120)
    draw_rows(found, out / "learning_curves.png", within=True)
    draw_rows(found, out / "dice_over_iterations.png", within=False)


def draw_rows(found: Found, file: Path, within: bool) -> None:
    """Draw Dice over iterations, a panel for each number of labelled cases.

    Args:
        within: the validation Dice within the longest trainings; else the Dice of trainings of each length.
    """
    counts = found.counts
    figure = Figure(figsize=(4 * len(counts) + 2, 4), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, len(counts), squeeze=False, sharex=within, sharey=True)[0]
    for axis, count in zip(axes, counts, strict=True):
        lengths = found.lengths(count)
        for method in found.methods:
            if within:
                curves = [result.curve for result in found.cell(method, count, lengths[-1])]
                if curves and curves[0]:
                    mean = np.mean([list(curve.values()) for curve in curves], axis=0)
                    axis.plot(list(curves[0]), mean, marker=".", label=method)
            elif known := [length for length in lengths if found.cell(method, count, length)]:
                seeds = [found.dice(method, count, length).mean(1) for length in known]
                bars = [np.std(dice) for dice in seeds]
                axis.errorbar(known, [np.mean(dice) for dice in seeds], bars, marker="o", capsize=3, label=method)
        axis.set(title=f"{count} labelled cases", xlabel="iteration" if within else "iterations")
        if not within:
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [str(length) for length in lengths])
    axes[0].set_ylabel("mean Dice, validation" if within else "mean Dice")
    figure.legend(*axes[-1].get_legend_handles_labels(), title="pre-training", loc="outside right upper")
    figure.savefig(file, dpi=120)


def page(found: Found, section: str, out: Path) -> str:
    """Return the HTML of the answer: sentences, pictures, the budgets."""
    cases = len(found.results[0].dice)
    rows: list[tuple] = [("labels", "iterations", "start", "Dice of each seed", "mean Dice", "CPU minutes")]
    for count in found.counts:
        for length in found.lengths(count):
            for method in found.methods:
                cell = found.cell(method, count, length)
                if cell:
                    dice = [np.mean(list(result.dice.values())) for result in cell]
                    minutes = np.mean([result.cpu_seconds for result in cell]) / 60
                    seeds = " ".join(f"{value:.3f}" for value in dice)
                    rows.append((count, length, method, seeds, f"{np.mean(dice):.3f}", f"{minutes:.1f}"))
    sentences = "".join(f"<li>{escaped(line)}</li>" for line in answers(found))
    names = ("dice_over_iterations", "dice_over_labels", "learning_curves")
    pictures = "".join(picture(out / f"{name}.png") for name in names)
    how = (
        f"Mean foreground Dice of {cases} cases for {section}, which no fine-tuning has seen. What is compared has the "
        "same labelled cases, order, iterations and schedule, and the last weights count. The interval draws cases and "
        f"seeds again. Scratch has converged when twice the iterations gain it less than {FLAT} on validation."
    )
    body = f"<h1>Does the pre-training help?</h1><ul>{sentences}</ul><p>{escaped(how)}</p>{pictures}"
    body += f"<h2>Each start, with its budget</h2>{html_table(rows)}"
    head = f'<meta charset="utf-8"><title>Does the pre-training help?</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def write(results: Sequence[Result], section: str, out: Path) -> str:
    """Write runs.csv, table.md, the pictures and verdict.html; return the table and the answers."""
    with (out / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["method", "count", "iterations", "seed", "section", "cases", "dice", "seconds", "cpu_seconds", "folder"]
        )
        for result in results:
            dice, folder = list(result.dice.values()), result.run.folder(out).relative_to(out)
            times = f"{result.seconds:.0f}", f"{result.cpu_seconds:.0f}"
            writer.writerow([*result.run, section, len(dice), f"{np.mean(dice):.6f}", *times, folder])
    found = Found(results)
    text = table(found)
    write_text(out / "table.md", text)
    draw(found, out)
    write_text(out / "verdict.html", page(found, section, out))
    return "\n".join([text, *answers(found)])
