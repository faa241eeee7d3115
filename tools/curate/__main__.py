"""Curate an archive of DICOM and other files to a checked, deduplicated and split pre-training set.

    python -m tools.curate SET /archive/ct lidc=/data/LIDC-IDRI t1=/data/ixi/T1
    python -m tools.curate audit PRETRAIN.json TEST.json
    python -m tools.curate plan RECIPE.json
    python -m tools.curate where SET ID SOURCE...

A SOURCE is a folder or a file, NAME=PATH to have it called so in the report, or MODALITY=PATH (NAME,MODALITY=PATH) to
say what its volumes without DICOM headers are. The same command goes on after a stop. docs/curate.md tells all.
"""

import argparse
import os
import sys
from pathlib import Path

from custom.errors import BadInput
from tools.curate import report
from tools.curate.find import read_sources
from tools.curate.page import write_page
from tools.curate.rules import MODALITIES, read_rules
from tools.curate.run import alone, curate


def run(options: argparse.Namespace) -> None:
    """Curate, then write list, report and page, and print a summary and the next step."""
    out, rules = Path(os.path.abspath(options.out)), read_rules(options.rules, options.rule)
    sources = read_sources(options.source)
    named = dict(_named(text) for text in options.name)
    with alone(out):
        rows = curate(out, sources, rules, options.workers, options.salt, named)
        table, page = report.write_table(rows, out), write_page(rows, out)
        print(report.summary(rows))
        report.check_used(rows)
        report.write_datalist(rows, out)
    print(f"Each series with its reason: {table}\nTo look at: {page}\nNext:\n{report.next_step(out)}")


def _named(text: str) -> tuple[str, str]:
    id_, sign, name = text.partition("=")
    if not sign or name not in MODALITIES:
        raise BadInput(f"--name {text} is not of the form ID=MODALITY, with one of {', '.join(MODALITIES)}.")
    return id_, name


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 2 (one sentence on stderr says why) or 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    about, _, usage = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.curate", description=about, epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("out", metavar="SET", help="folder to write, made if missing")
    add("source", metavar="SOURCE", nargs="+", help="folder or file, NAME=PATH or MODALITY=PATH")
    add("--name", metavar="ID=MODALITY", nargs="+", default=[], help="use volumes that were listed as uncertain")
    add("--rule", metavar="NAME=VALUE", nargs="+", default=[], help="another limit; docs/curate.md lists them")
    add("--rules", metavar="FILE.json", help="limits as a JSON object")
    add("--salt", metavar="FILE", help="secret of the pseudonyms, to have the same ones in several sets")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")
    try:
        run(parser.parse_args(argv))
    except BadInput as error:
        print(f"curate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("curate: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
