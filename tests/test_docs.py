"""What the documentation names exists: pages, headings, tools, ids, tests, messages; and the paper's authors."""

import ast
import json
import re
from pathlib import Path

import pytest

from tools.__main__ import names
from tools._cli import ROOT, bundles

DOCS = sorted(ROOT.glob("docs/**/*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *DOCS,
    *sorted(ROOT.glob("bundles/*/docs/README.md")),
]
TABLE = ROOT / "docs/reference/ids.md"
# What MONAI's command line takes beside ids, and an id of MONAI's own.
NOT_IDS = {"config_file", "logging_file", "meta_file", "args_file", "tracking"}
# Ids that users may set although they are no plain values, and plain values that are none of theirs.
SETTINGS = {
    *("modalities", "intensity", "labels", "disruptions", "patch_size", "pixdim_mm"),
    *("flip_axes", "rotation_radians"),
}
INTERNAL = {"network", "rank", "pred_keys"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The text without blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose(page))


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target in (a or b for a, b in links(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(found), f"{name_of(page)} links to {target}"


def test_the_readme_links_every_page():
    linked = {(ROOT / (a or b).partition("#")[0]).resolve() for a, b in links(ROOT / "README.md")}
    assert not [name_of(page) for page in PAGES[1:] if page.resolve() not in linked]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_tool_and_script_named_exists(page):
    text = page.read_text()
    assert set(re.findall(r"-m tools\.([\w.]*\w)", text)) - {"NAME"} <= names().keys()
    for file in re.findall(r"\b((?:tools|tests|custom|examples|bundles)/[\w./]+\.\w+)", text):
        assert (ROOT / file).exists(), file


def ids() -> dict[str, dict[str, list]]:
    """Values of each id that a user may set, by bundle."""
    found: dict[str, dict[str, list]] = {}
    for bundle in bundles():
        for file in sorted(set(bundle.glob("configs/*.json")) - {bundle / "configs/metadata.json"}):
            for name, value in json.loads(file.read_text()).items():
                plain = not isinstance(value, dict | list) and name not in INTERNAL and "#" not in name
                if plain or name in SETTINGS:
                    found.setdefault(name, {}).setdefault(bundle.name, []).append(value)
    return found


def table() -> dict[str, list[str]]:
    """Rows of the table of ids: bundles, default, meaning."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TABLE.read_text().splitlines()]
    return {row[0].strip(" |`"): row[1:] for row in rows if len(row) == 4 and row[0].strip(" |").startswith("`")}


def test_the_table_has_every_id_of_the_configs_with_its_bundles_and_defaults():
    found, rows = ids(), table()
    assert rows.keys() == found.keys()
    for name, by_bundle in found.items():
        where, default, _ = rows[name]
        named = [bundle.name for bundle in bundles() if where == "all" or ("seg" in bundle.name) == (where == "seg")]
        assert sorted(by_bundle) == named, name
        literals = {
            json.dumps(value)
            for values in by_bundle.values()
            for value in values
            if not isinstance(value, dict) and not str(value).startswith(("$", "@")) and name != "labels"
        }
        quoted = {text for text in re.findall(r"`([^`]+)`", default) if text not in rows}
        assert quoted == literals, name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_set_ids_that_exist(page):
    known = ids().keys() | NOT_IDS | {"train", "validate", "network_def", "loss"}
    text = page.read_text().replace("\\\n", " ")
    for command in re.findall(r"-m monai\.bundle run (.+)", text):
        used = {id.partition("#")[0] for id in re.findall(r"--([\w#]+)", command)}
        assert used <= known, (page, used - known)


def test_fidelity_names_tests_that_exist():
    tests = set(re.findall(r"def test_(\w+)", "".join(file.read_text() for file in ROOT.glob("tests/**/*.py"))))
    words = re.findall(r"`([a-z_0-9]+)`", (ROOT / "docs/explanation/fidelity.md").read_text())
    named = {word for word in words if word.count("_") > 3}
    assert len(named) > 50 and not named - tests


def messages() -> str:
    """All text in the code, joined; what is filled in is an ellipsis."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        return str(node.value) if isinstance(node, ast.Constant) else "…"

    files = [*ROOT.glob("custom/**/*.py"), *ROOT.glob("tools/**/*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return "\n".join(text(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)).replace("`", "")


def test_troubleshooting_has_the_messages_of_the_code():
    code = messages()
    ours = (ROOT / "docs/troubleshooting.md").read_text().partition("## Without a message")[0]
    rows = re.findall(r"^\| `([^`]+)`", ours, re.MULTILINE)
    assert len(rows) > 20
    for message in rows:
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert re.search(pattern, code), message


def test_the_authors_of_the_paper_are_named_rightly():
    authors = "Valanarasu, Tang, Yang, Xu, Zhao, Li, Patel, Landman, Xu, He, Nath"
    assert ", ".join(re.findall(r"family-names: (\w+)", (ROOT / "CITATION.cff").read_text())) == authors
    entry = re.search(r"author += \{(.+?)\},\n", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert ", ".join(name.split(",")[0].strip() for name in re.split(r"\s+and\s+", entry)) == authors
    for bundle in bundles():
        references = json.loads((bundle / "configs/metadata.json").read_text())["references"]
        assert any(reference.startswith(f"{authors}: Disruptive Autoencoders") for reference in references)
        assert authors in (bundle / "docs/README.md").read_text()
