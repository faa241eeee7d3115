"""What a volume has to be like: every limit of curation, each a name and a number that a user may set."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from custom.errors import BadInput
from custom.files import read_json
from custom.text import did_you_mean

MODALITIES = ("ct", "t1", "t1ce", "t2", "flair")


@dataclass(frozen=True)
class Rules:
    """Limits, with their defaults.

    Args:
        min_slices: images of a series, and voxels along each side of a volume.
        max_repetitions: volumes of one series that differ in nothing but time; with more of them it is 4D.
        max_tilt_deg: angle between the direction of the slices and the normal of the images (gantry tilt).
        slice_tolerance: how far a slice may lie from where it should, as a share of the slices' distance.
        min_spacing_mm: of any axis.
        max_spacing_mm: of any axis.
        min_extent_mm: of the shortest side of the field of view.
        min_body_mm: of the longest side of what is not background; smaller ones are animals, phantoms or specimens.
        max_empty_share: slices with one value, as a share of those along an axis.
        max_background_share: voxels that have the most frequent value; with more the volume is blank.
        min_grey_values: distinct values; with fewer it is a mask or a label map.
        max_flat_share: voxels of the foreground that equal all their next neighbours; with more it is a label map.
        min_neighbour_correlation: of a voxel with the next one; with less the volume holds noise alone.
        min_soft_tissue_share: voxels of a CT from -200 to 300 HU, of those above -500.
        max_lowest_hu: a CT whose lowest value is higher is not in Hounsfield units.
        max_cut_sides: sides of the volume, of 6, that cut through the anatomy; crops have up to 6.
        min_confidence: of the modality, from 0 to 1; below it the volume is listed as uncertain and not used.
        twin_cosine: from which cosine two local descriptors match.
        twin_votes: matches that lie alike in both volumes; from this number on they are near twins, if these are
        twin_share: of the landmarks of the volume that has fewer; half of them where these are less than 24.
        validation_share: patients held out.
        timeout_s: for reading and converting one series.
        max_file_gb: of one file, and of one unpacked member of an archive.
        max_unpacking: unpacked over packed size of an archive; with more it is taken for a bomb.
    """

    min_slices: int = 10
    max_repetitions: int = 2
    max_tilt_deg: float = 0.5
    slice_tolerance: float = 0.05
    min_spacing_mm: float = 0.2
    max_spacing_mm: float = 10.0
    min_extent_mm: float = 30.0
    min_body_mm: float = 30.0
    max_empty_share: float = 0.75
    max_background_share: float = 0.98
    min_grey_values: int = 12
    max_flat_share: float = 0.6
    min_neighbour_correlation: float = 0.3
    min_soft_tissue_share: float = 0.3
    max_lowest_hu: float = -50.0
    max_cut_sides: int = 6
    min_confidence: float = 0.6
    twin_cosine: float = 0.95
    twin_votes: int = 6
    twin_share: float = 0.12
    validation_share: float = 0.05
    timeout_s: float = 600.0
    max_file_gb: float = 16.0
    max_unpacking: float = 200.0


def read_rules(file: str | None, settings: Sequence[str]) -> Rules:
    """Return the rules of a JSON file, if one is named, with `NAME=VALUE` settings over them.

    Raises:
        BadInput: for a file that is no JSON object, an unknown rule, or a value that is not a number.
    """
    values = read_json(file) if file else {}
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign:
            raise BadInput(f"--rule {setting} is not of the form NAME=VALUE.")
        values[name] = value
    return check_rules(values, file or "--rule")


def check_rules(values: dict, where: str) -> Rules:
    """Return rules with some values set; raise `BadInput`, which says where, for an unknown name or no number."""
    kinds = {name: type(value) for name, value in dataclasses.asdict(Rules()).items()}
    for name, value in values.items():
        if name not in kinds:
            others = did_you_mean(name, kinds) or f"; known are {', '.join(kinds)}."
            raise BadInput(f"{where}: there is no rule {name}{others}")
        try:
            values[name] = kinds[name](float(value))
        except (TypeError, ValueError) as error:
            raise BadInput(f"{where}: the rule {name} takes a number, got {value!r}.") from error
        if not 0 <= values[name] < float("inf"):
            raise BadInput(f"{where}: the rule {name} takes a number from 0 on, got {value}.")
    return Rules(**values)
