"""A unit test in the form of MONAI's model zoo: copy it there as `ci/unit_tests/test_NAME.py`, NAME being the bundle's.

It trains for an epoch, evaluates and infers, small and on noise, by the zoo's runner or by `python -m unittest` in the
zoo's folder. The bundle lies in `models/NAME`.
"""

import json
import sys
import tempfile
import unittest
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.bundle import ConfigWorkflow

BUNDLE = Path("models", Path(__file__).stem.removeprefix("test_")).resolve()
SMALL = {"feature_size": 12, "patch_size": [64, 32, 32], "overlap": 0, "num_workers": 0}
QUICK = {"max_epochs": 1, "val_interval": 1, "val_pictures": 0}


class TestBundle(unittest.TestCase):
    def run_configs(self, kind: str, *names: str, **values) -> None:
        files = [str(BUNDLE / f"configs/{name}.json") for name in names]
        workflow = ConfigWorkflow(files, workflow_type=kind, bundle_root=str(BUNDLE), logging_file=False, **values)
        workflow.initialize()
        self.assertFalse(workflow.check_properties())
        workflow.run()
        workflow.finalize()

    def test_train_evaluate_and_infer(self) -> None:
        metadata = json.loads((BUNDLE / "configs/metadata.json").read_text())
        classes = metadata["network_data_format"]["outputs"]["pred"]["num_channels"]
        modality = json.loads((BUNDLE / "configs/inference.json").read_text())["modality"]
        noise = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            for n in range(2):
                image, label = noise.integers(-900, 900, (40, 40, 40)), noise.integers(0, classes, (40, 40, 40))
                for name, array in (("image", image), ("label", label)):
                    nib.Nifti1Image(array.astype(np.int16), np.eye(4)).to_filename(f"{folder}/{name}{n}.nii.gz")
            cases = [{"image": f"image{n}.nii.gz", "label": f"label{n}.nii.gz", "modality": modality} for n in range(2)]
            datalist = Path(folder, "datalist.json")
            datalist.write_text(json.dumps({"training": cases[:1], "validation": cases[1:]}))
            places = {"output_dir": f"{folder}/run", "ckpt_dir": f"{folder}/run/models"}
            trained = {"datalist": str(datalist), **places, **SMALL, **QUICK}
            self.run_configs("train", "train", **trained)
            self.run_configs("train", "train", "evaluate", **trained)
            scan = {"dataset_dir": f"{folder}/image1.nii.gz", "ckpt_dir": places["ckpt_dir"], **SMALL}
            del scan["num_workers"]
            self.run_configs("inference", "inference", output_dir=f"{folder}/out", **scan)
            self.assertTrue(list(Path(folder, "out").glob("*.nii.gz")))


sys.path.insert(0, str(BUNDLE))

if __name__ == "__main__":
    unittest.main()
