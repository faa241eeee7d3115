"""Modalities of real scans whose truth is known: told by their names, and by DICOM's descriptions and parameters."""

from collections import Counter
from pathlib import Path

import pytest

from tools.curate.find import Source, find
from tools.curate.header import read_record
from tools.curate.modality import by_parameters, decide
from tools.curate.privacy import Pseudonyms
from tools.curate.rules import Rules

PSEUDONYMS = Pseudonyms("0123456789abcdef")
# Series of `dicom_and_formats` with what they are, by hand; "" is none of the five.
SERIES = {
    "siemens_brain_tumour_t1post_flair_and_derived_crop.zip!Study3/11-": "t1ce",
    "siemens_brain_tumour_t1post_flair_and_derived_crop.zip!Study3/36468-": "flair",
    "siemens_t1_prone_sagittal.zip": "t1",
    "siemens_t1_jpeg2000_fragmented": "t1",
    "siemens_t1_jpeg_lossless_fragmented": "t1",
    "nibabel_nicom/philips_mprage": "t1",
    "pydicom_single_files/data_MR2_J2KI": "t1",
    "ge_fmri_4d_in_one_folder": "",
    "nibabel_nicom/csa_slice_norm": "",
    "philips_classic_fmri": "",
    "philips_enhanced_multiframe": "",
    "siemens_12bit_signed_and_unsigned": "",
    "siemens_mosaic_fmri/mr_0003": "",
    "siemens_mosaic_fmri/mr_0005": "",
    "transfer_syntaxes": "",
}


def records(folder: Path, scratch: Path):
    for found in find(Source("x", str(folder)), scratch, PSEUDONYMS, Rules()):
        yield found.place.partition("/")[2], read_record(found, PSEUDONYMS)


def test_names_tell_the_modality(real_data, tmp_path):
    told: Counter = Counter()
    for folder in (real_data / "unlabelled_pool", real_data / "brain_mri" / "images"):
        for place, record in records(folder, tmp_path):
            name = Path(place).name.partition(".")[0]
            truth = Path(place).parent.name or name.rpartition("_")[2]
            if "animal" not in record["words"]:
                told[truth, decide({**record, "folder_words": []})[0]] += 1
    wrong = {key for key in told if key[1] not in (key[0], "")}
    assert not wrong
    right, silent = (sum(n for key, n in told.items() if (key[0] == key[1]) is same) for same in (True, False))
    assert (right, silent) == (27, 2)


@pytest.fixture(scope="module")
def dicom(real_data, tmp_path_factory) -> dict:
    """A record of each of the series."""
    found = {}
    for place, record in records(real_data / "dicom_and_formats", tmp_path_factory.mktemp("unpacked")):
        name = next((name for name in SERIES if place.startswith(name)), "")
        if name and record["kind"] == "dicom" and "modality_tags" in record:
            found.setdefault(name, record)
    assert set(found) == set(SERIES)
    return found


@pytest.mark.parametrize("words", [True, False], ids=["description and parameters", "parameters alone"])
def test_dicom_tells_the_modality(dicom, words):
    told = {
        name: decide(record)[0] if words else by_parameters(record["modality_tags"])[0]
        for name, record in dicom.items()
    }
    # Without its description the field map is a gradient echo of a short TR and TE, which a T1 is, too.
    other = {} if words else {"nibabel_nicom/philips_mprage": "", "philips_enhanced_multiframe": "t1"}
    assert {name: told[name] for name in told if told[name] != SERIES[name]} == other
