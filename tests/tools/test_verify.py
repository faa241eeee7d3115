"""A package passes where the repository is not; whatever is wrong with it is told in one sentence."""

import io
import json
import logging
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from custom.files import write_json
from tests.conftest import ROOT
from tools import package, verify

INVALID = sorted((ROOT / "tests" / "fixtures").glob("invalid_*.json"))


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    """A package without weights."""
    return package.build(ROOT / "bundles" / "btcv_ct_segmentation", tmp_path_factory.mktemp("dist"))


@pytest.fixture
def unpacked(zipped, tmp_path):
    """The same, unpacked."""
    return verify.unpack(zipped, tmp_path)


def merge(content, patch):
    """Apply a JSON merge patch (RFC 7386): null takes away."""
    if not isinstance(patch, dict):
        return patch
    content = dict(content) if isinstance(content, dict) else {}
    for name, value in patch.items():
        content[name] = merge(content.get(name), value)
    return {name: value for name, value in content.items() if name not in patch or value is not None}


def sentence(target: Path) -> str:
    """Why a bundle or package fails."""
    with pytest.raises(ValueError) as raised:
        verify.verify(target)
    return str(raised.value)


@pytest.mark.parametrize("fixture", INVALID, ids=lambda path: path.stem)
def test_what_is_wrong_is_told(fixture, unpacked):
    """A fixture has patches of a valid package's files, null for none of it, and what verify has to say."""
    content = json.loads(fixture.read_text())
    for name, patch in content["patch"].items():
        file = unpacked / name
        if patch is None:
            file.unlink()
        elif isinstance(patch, str):
            file.write_text(patch)
        else:
            write_json(file, merge(json.loads(file.read_text()), patch))
    package.write_sums(unpacked, {name: path for name, path in verify.files(unpacked).items() if name != verify.SUMS})
    assert content["sentence"] in sentence(unpacked)


def test_one_byte_is_enough(unpacked):
    for name in ("custom/masking.py", "sample/expected.npy", "docs/segmentation.png", "LICENSE"):
        file = unpacked / name
        if not file.is_file():
            continue
        whole = file.read_bytes()
        file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        assert f"{name} was changed" in sentence(unpacked)
        file.write_bytes(whole)
    verify.check_sums(unpacked)
    (unpacked / "custom" / "masking.py").unlink()
    assert "custom/masking.py is missing" in sentence(unpacked)


def test_a_file_that_was_added_is_named(unpacked):
    (unpacked / "custom" / "more.py").write_text("")
    assert "custom/more.py is not listed in SHA256SUMS" in sentence(unpacked)


def test_one_byte_of_a_zip_is_enough(zipped, tmp_path):
    content = bytearray(zipped.read_bytes())
    content[content.index(b"Local masking")] ^= 1
    (tmp_path / "changed.zip").write_bytes(content)
    assert "damaged: Bad CRC-32 for file 'btcv_ct_segmentation/custom/masking.py'" in sentence(tmp_path / "changed.zip")


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o120777 << 16
    return member


@pytest.mark.parametrize(
    "member, expected",
    [
        ("/tmp/evil", "/tmp/evil would be unpacked outside"),
        ("C:\\evil", "would be unpacked outside"),
        ("bundle/../../evil", "bundle/../../evil would be unpacked outside"),
        ("bundle\\..\\..\\evil", "would be unpacked outside"),
        ("../evil", "../evil would be unpacked outside"),
        ("other/evil", "other/evil lies outside of the bundle's folder bundle"),
        ("evil", "evil lies outside of the bundle's folder bundle"),
        (link("bundle/evil"), "bundle/evil is a link"),
    ],
    ids=str,
)
def test_a_zip_that_reaches_outside_of_its_folder_is_not_unpacked(member, expected, tmp_path):
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        archive.writestr("bundle/LICENSE", "")
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(ValueError, match="evil") as raised:
        verify.unpack(tmp_path / "package.zip", tmp_path / "out")
    assert expected in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_no_zip(tmp_path):
    (tmp_path / "package.zip").write_text("no zip")
    assert "no zip, or damaged" in sentence(tmp_path / "package.zip")
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    (tmp_path / "package.zip").write_bytes(empty.getvalue())
    assert "empty" in sentence(tmp_path / "package.zip")


def test_a_line_for_each_and_an_exit_code(unpacked, tmp_path, capsys):
    (unpacked / "LICENSE").unlink()
    assert verify.main([str(unpacked), str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{unpacked}: FAILED: LICENSE is missing.",
        f"{tmp_path / 'nothing'}: FAILED: there is no such file or folder.",
    ]
    assert logging.root.manager.disable == 0  # it was quiet for itself alone


def test_the_modules_are_the_bundle_s_and_go_when_it_is_done(unpacked):
    here = sys.modules["custom"]
    with verify.modules_of(unpacked):
        import custom.masking

        assert Path(custom.masking.__file__) == unpacked / "custom" / "masking.py"
    assert sys.modules["custom"] is here and not list(unpacked.rglob("__pycache__"))


def test_a_package_passes_where_the_repository_is_not(zipped, foreign_python, tmp_path):
    """With nothing of it but the folder of the tools."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    command = [foreign_python, "tools", "verify", zipped]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{zipped}: ok\n", done.stderr
    assert done.returncode == 0
