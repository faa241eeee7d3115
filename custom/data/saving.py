"""Save what was made of a scan at the scan's own place."""

import os
from collections.abc import Mapping
from pathlib import Path

import nibabel
import numpy as np
from monai.config import PathLike
from monai.data import ImageWriter, NibabelWriter
from monai.transforms import SaveImage

from custom.data.nifti import corner_distance_mm
from custom.errors import BadInput

MARK = b"written by DAE Bundles"  # in the header


class PlaceWriter(NibabelWriter):
    """MONAI's `NibabelWriter`, which keeps all that the scan's NIfTI header says of where it lies.

    That is its sform and qform with both codes, `pixdim` and the unit. `NibabelWriter` writes one affine as both, with
    the code 1, so that programs which take the other form put scan and label map apart. Nothing else is kept: a header
    may also hold what says who the patient is. A file that it has not written itself, such as a label map that somebody
    drew or corrected, is not overwritten.

    Args: see `NibabelWriter`; the fields of the header are "place" in the metadata, see `LoadScand`. Without them,
        as of a scan that is not NIfTI, it does what `NibabelWriter` does.
    """

    def set_metadata(self, meta_dict: Mapping, resample: bool = True, **options) -> None:
        super().set_metadata(meta_dict, resample, **options)
        self.header = None
        if "place" in meta_dict:
            self.header = header = nibabel.Nifti1Header()
            header["descrip"] = MARK
            for name, value in meta_dict["place"].items():
                header[name] = np.asarray(value)

    def write(self, filename: PathLike, verbose: bool = False, **kwargs) -> None:
        if self.header is None:
            return super().write(filename, verbose=verbose, **kwargs)
        ImageWriter.write(self, filename, verbose=verbose)
        self.header.set_data_dtype(self.output_dtype)
        # Without an affine: nibabel would write it over the forms.
        image = nibabel.Nifti1Image(self.data_obj.astype(self.output_dtype, copy=False), None, self.header)
        distance_mm = corner_distance_mm(image.header.get_best_affine(), self.affine, image.shape)
        if distance_mm > 1e-2:
            raise ValueError(f"What is saved to {filename} is not on its scan, but up to {distance_mm:g} mm off.")
        file = Path(filename)
        if file.exists() and not _is_ours(file):
            raise BadInput(f"{file} is there already and was not written by this program; name another --output_dir.")
        part = file.with_name(f".{file.name}")  # hidden, so that nobody takes it for a scan
        nibabel.save(image, part)
        os.replace(part, file)


def _is_ours(file: Path) -> bool:
    try:
        return nibabel.load(file).header["descrip"].item() == MARK
    except Exception:  # readers raise whatever another file leads to
        return False


def name_by_case(meta: Mapping, saver: SaveImage) -> dict:
    """Name what `SaveImaged` writes by the case, in its output folder; where a program gives none, by the scan's file.

    A case that is named by a path from elsewhere, as a data list may do, is named by the scan's whole path instead.

    Raises:
        BadInput: for a link in the output folder that leads out of it.
    """
    file = str(meta.get("filename_or_obj", 0))
    name = os.path.normpath(meta.get("case") or os.path.basename(file))
    if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
        name = os.path.abspath(file).lstrip(os.sep)
    folder = saver.folder_layout.output_dir
    home, place = os.path.realpath(folder), os.path.realpath(os.path.join(folder, os.path.dirname(name)))
    if os.path.commonpath([home, place]) != home:
        raise BadInput(f"{name} would be written to {place}, by a link in {folder}; name another --output_dir.")
    return {"subject": name, "idx": None}
