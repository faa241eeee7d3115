"""Curate an archive of DICOM and other files to a checked, deduplicated and split pre-training set.

    python -m tools.curate SET /archive/ct lidc=/data/LIDC-IDRI t1=/data/ixi/T1
    python -m tools.curate SET --recipe RECIPE.json --root /data
    python -m tools.curate plan SET RECIPE.json --root /data
    python -m tools.curate audit PRETRAIN.json TEST.json...
    python -m tools.curate where SET ID SOURCE...

A SOURCE is a folder or a file, NAME=PATH to have it called so in the report, or MODALITY=PATH (NAME,MODALITY=PATH) to
say what its volumes without DICOM headers are. The same command goes on after a stop. docs/howto/curate.md tells all.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

NEEDED = [name for name in ("SimpleITK", "dcm2niix", "pebble", "pydicom") if importlib.util.find_spec(name) is None]
if NEEDED:
    print(f"curate: {NEEDED[0]} is missing; `pip install -e '.[curate]'` brings all that it needs.", file=sys.stderr)
    sys.exit(2)

from custom.errors import BadInput  # noqa: E402
from tools._cli import say, tool  # noqa: E402
from tools.curate import recipe as recipes  # noqa: E402
from tools.curate import report  # noqa: E402
from tools.curate.audit import audit, describe  # noqa: E402
from tools.curate.find import read_sources  # noqa: E402
from tools.curate.page import write_page  # noqa: E402
from tools.curate.rules import MODALITIES, Rules, read_rules  # noqa: E402
from tools.curate.run import alone, curate, where  # noqa: E402


def curate_arguments(add: Callable) -> None:
    add("out", metavar="SET", help="folder to write, made if missing")
    add("source", metavar="SOURCE", nargs="*", help="folder or file, NAME=PATH or MODALITY=PATH")
    add("--name", metavar="ID=MODALITY", nargs="+", default=[], help="use volumes that were listed as uncertain")
    add("--rule", metavar="NAME=VALUE", nargs="+", default=[], help="another limit; docs/howto/curate.md lists them")
    add("--rules", metavar="FILE.json", help="limits as a JSON object")
    add("--recipe", metavar="FILE.json", help="sources, rules and the counts that must come out, instead of SOURCE")
    add("--root", metavar="DIR", default=".", help="where the recipe's paths start (%(default)s)")
    add("--salt", metavar="FILE", help="secret of the pseudonyms, to have the same ones in several sets")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")


def run_curate(options: argparse.Namespace) -> None:
    """Curate, then write list, report and page, and print a summary and the next step."""
    out, recipe = Path(os.path.abspath(options.out)), None
    if bool(options.source) is bool(options.recipe):
        raise BadInput("Name sources, or a --recipe that does: one of both.")
    if options.workers < 1:
        raise BadInput(f"--workers must be at least 1, not {options.workers}.")
    if options.recipe:
        recipe = recipes.read_recipe(options.recipe, options.root)
        sources, rules = recipe.sources, recipe.rules
        if missing := [source.path for source in sources if not os.path.exists(source.path)]:
            raise BadInput(f"The source {missing[0]} of the recipe does not exist; paths start from --root.")
    else:
        sources, rules = read_sources(options.source), read_rules(options.rules, options.rule)
    named = dict(_named(text) for text in options.name)
    with alone(out):
        rows = curate(out, sources, rules, options.workers, options.salt, named)
        table, page = report.write_table(rows, out), write_page(rows, out)
        say(report.summary(rows))
        report.check_used(rows)
        report.write_datalist(rows, out)
    if recipe:
        say(recipes.compare(recipe, rows)[0])
    say(f"Each series with its reason: {table}\nTo look at: {page}\nNext:\n{report.next_step(out)}")


def _named(text: str) -> tuple[str, str]:
    id_, sign, name = text.partition("=")
    if not sign or name not in MODALITIES:
        raise BadInput(f"--name {text} is not of the form ID=MODALITY, with one of {', '.join(MODALITIES)}.")
    return id_, name


def plan_arguments(add: Callable) -> None:
    add("out", metavar="SET", help="folder that the set will be made in")
    add("recipe", metavar="RECIPE.json")
    add("--root", metavar="DIR", default=".", help="where the recipe's paths start (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")


def run_plan(options: argparse.Namespace) -> None:
    """Print what a recipe takes."""
    say(recipes.plan(recipes.read_recipe(options.recipe, options.root), Path(options.out), options.workers))


def audit_arguments(add: Callable) -> None:
    add("pretrain", metavar="PRETRAIN.json", help="data list of the pre-training")
    add("test", metavar="TEST.json", nargs="+", help="data lists to test on; all their sections count")
    add("--rule", metavar="NAME=VALUE", nargs="+", default=[], help="another limit for near twins")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")


def run_audit(options: argparse.Namespace) -> None:
    """Print which test cases the pre-training has seen."""
    say(describe(*audit(options.pretrain, options.test, options.workers, read_rules(None, options.rule))))


def where_arguments(add: Callable) -> None:
    add("out", metavar="SET", help="folder that was curated")
    add("id", metavar="ID", help="of a line in its report.csv")
    add("source", metavar="SOURCE", nargs="+", help="the sources, as they were given")


def run_where(options: argparse.Namespace) -> None:
    """Print the files of a series: the set itself holds no path."""
    out = Path(os.path.abspath(options.out))
    if not (out / "state.sqlite").is_file():
        raise BadInput(f"{out} is no set that `python -m tools.curate` made.")
    with alone(out):
        say("\n".join(where(out, options.id, read_sources(options.source), Rules())))


COMMANDS = {
    "curate": (curate_arguments, run_curate, "the same command goes on from here"),
    "plan": (plan_arguments, run_plan, "nothing was written"),
    "audit": (audit_arguments, run_audit, "nothing was written"),
    "where": (where_arguments, run_where, "nothing was written"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 2 (one sentence on stderr says why) or 130 (Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and argv[0] in COMMANDS else "curate"
    arguments, run, stopped = COMMANDS[name]
    return tool("curate" if name == "curate" else f"curate {name}", __doc__, arguments, run, stopped)(argv)


if __name__ == "__main__":
    sys.exit(main())
