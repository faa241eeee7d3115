"""What a picture shows, read from its pixels."""

from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def panels(picture: Path, figure: Figure) -> dict[str, np.ndarray]:
    """Return the colour of each voxel of each panel of a PNG: title of the panel -> (rows going up, columns, 3).

    Args:
        picture: the PNG.
        figure: of the same layout; it says where in the picture the voxels are.
    """
    pixels = matplotlib.image.imread(picture)[..., :3]
    figure.set_dpi(80)
    FigureCanvasAgg(figure).draw()
    found = {}
    for axis in figure.axes:
        rows, columns = axis.images[0].get_array().shape
        places = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
        across, up = axis.transData.transform(places).astype(int).T
        found[axis.get_title()] = pixels[len(pixels) - 1 - up, across].reshape(rows, columns, 3)
    return found


def is_grey(colours: np.ndarray) -> np.ndarray:
    """Return where the colours (..., 3) are greys."""
    return np.ptp(colours, -1) < 0.02
