"""Run a tool of this checkout from any folder: python path/to/tools NAME [ARGUMENTS]."""

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def names() -> dict[str, Path]:
    """Return the tools: their names and files."""
    files = [*FOLDER.glob("*.py"), *FOLDER.glob("*/*.py")]
    named = {".".join(file.relative_to(FOLDER).with_suffix("").parts): file for file in sorted(files)}
    packages = {name.removesuffix(".__main__"): file for name, file in named.items() if name.endswith(".__main__")}
    tools = {name: file for name, file in named.items() if name.partition(".")[0] not in packages}
    return packages | {name: file for name, file in tools.items() if not name.rpartition(".")[2].startswith("_")}


def main() -> None:
    known = names()
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        print(__doc__, "\n")
        for name, file in sorted(known.items()):
            about = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
            if "if __name__ ==" in file.read_text():
                print(f"  {name:<18}{about}")
        sys.exit(0 if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help") else f"\nThere is no tool {sys.argv[1]}.")
    # In the place of this folder, so that whatever else is called `tools` or `custom` is not found.
    sys.path[0] = str(FOLDER.parent)
    sys.argv.pop(0)
    runpy.run_module(f"tools.{sys.argv[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
