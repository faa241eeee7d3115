"""Inference by ONNX Runtime, which on a CPU takes less time than torch."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from custom.errors import BadInput
from custom.files import replacing

logger = logging.getLogger(__name__)
MOST = 1e-3  # difference of an export from its network, on average, as a share of the values


class OnnxRuntime(nn.Module):
    """Compute what a network computes by ONNX Runtime, on a CPU.

    At the first windows the network is exported to the file, unless it is there. Both then get the same noise, so that
    an export of other weights is noticed.

    Args:
        network: of torch, on the CPU. Its weights may be loaded later.
        file: ONNX, read or written.

    Raises:
        BadInput: where packages are missing.
    """

    def __init__(self, network: nn.Module, file: str) -> None:
        super().__init__()
        if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if not find_spec(name)]:
            raise BadInput(f"Inference by ONNX Runtime needs more packages: pip install {' '.join(missing)}.")
        self.network, self.file = network, Path(file)
        self.session: Any = None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return that of the network, whose weights a config loads by the name of this one."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the network."""
        return self.network.load_state_dict(*args, **kwargs)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the network's output.

        Args:
            windows: (B, C, X, Y, Z); X, Y and Z are those of the first windows, B may change.

        Raises:
            BadInput: for a file that is no export of this network with these weights, for windows of this size.
        """
        if self.session is None:
            self.open(windows)
        return self.run(windows)

    def open(self, windows: torch.Tensor) -> None:
        import onnxruntime  # no requirement of a bundle

        noise = torch.rand(windows[:1].shape, generator=torch.Generator().manual_seed(0))
        if not self.file.is_file():
            self.export(noise)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        expected = self.network(noise)
        try:
            self.session = onnxruntime.InferenceSession(self.file, options, providers=["CPUExecutionProvider"])
            found = self.run(noise)
            same = (found - expected).abs().mean() <= MOST * expected.abs().mean()
        except Exception as error:  # ONNX Runtime's have no class in common
            raise BadInput(f"{self.file} can't be used ({error}); delete it, and it is exported again.") from error
        if not same:
            raise BadInput(f"{self.file} is an export of other weights; delete it, and it is exported again.")

    def export(self, window: torch.Tensor) -> None:
        logger.info(f"Exporting the network to {self.file}, once; this takes minutes.")
        logging.getLogger("onnx_ir").setLevel(logging.WARNING)  # it tells of each constant
        pair = window.expand(2, -1, -1, -1, -1)  # of one window the exporter makes a model for batches of one
        how: dict[str, Any] = {
            "dynamo": True,
            "dynamic_shapes": ({0: torch.export.Dim("batch")},),
            "external_data": False,
            "verbose": False,
        }
        try:
            with replacing(self.file) as part:
                torch.onnx.export(self.network, (pair,), part, **how)
        except OSError as error:
            raise BadInput(
                f"{self.file} can't be written ({error.strerror}); name another file with --network#file."
            ) from error

    def run(self, windows: torch.Tensor) -> torch.Tensor:
        (name,) = (entry.name for entry in self.session.get_inputs())
        (values,) = self.session.run(None, {name: windows.numpy()})
        return torch.from_numpy(values)
