"""Real DICOM against the NIfTI volumes that others made of it."""

import nibabel
import numpy as np
import pytest

from tools.curate.convert import convert_dicom
from tools.curate.find import Source, find
from tools.curate.header import read_record
from tools.curate.privacy import Pseudonyms
from tools.curate.rules import Rules
from tools.curate.series import stacks

TUMOUR = "siemens_brain_tumour_t1post_flair_and_derived_crop.zip"


@pytest.mark.parametrize(
    ("source", "words", "reference", "count"),
    [
        ("transfer_syntaxes", [], "dicom_and_formats/transfer_syntaxes/Ref/1.nii", 9),
        (TUMOUR, ["flair"], "brain_mri/images/pgbm003_flair.nii.gz", 1),
        (TUMOUR, ["contrast", "t1", "t1ce"], "brain_mri/images/pgbm003_t1ce.nii.gz", 1),
    ],
)
def test_a_volume_is_that_of_its_reference(real_data, tmp_path, source, words, reference, count):
    pseudonyms = Pseudonyms("0123456789abcdef")
    series, paths = {}, {}
    for found in find(Source("x", str(real_data / "dicom_and_formats" / source)), tmp_path, pseudonyms, Rules()):
        record = read_record(found, pseudonyms)
        if record["kind"] == "dicom" and record["words"] == words and not record.get("reason"):
            paths[found.place] = found.path
            series.setdefault(record["series"], []).append((found.place, record))
    want = nibabel.as_closest_canonical(nibabel.load(real_data / reference))
    made = [stack for files in series.values() for stack in stacks(files, Rules(), pseudonyms)]
    assert len(made) == count
    for stack in made:
        files = [(paths[place], frame) for place, frame in stack.members]
        values, affine, _ = convert_dicom(files, [], stack.record, stack.affine, str(tmp_path), Rules())
        image = nibabel.as_closest_canonical(nibabel.Nifti1Image(values.astype(np.int32), affine))
        assert np.array_equal(np.asanyarray(image.dataobj), np.asanyarray(want.dataobj))
        assert np.allclose(image.affine, want.affine, atol=1e-3)
