"""The study of a step on a GPU runs on a CPU too, as far as there is one; a GPU is measured by the study itself."""

import json

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask, get_window_size

from tests.conftest import fork_server
from tools.studies import gpu_step

SMALLEST = ["--feature_size", "12", "--patch_size", "64", "32", "32", "--steps", "1"]


def test_parts_are_right_and_written_as_they_come(tmp_path, capsys):
    fork_server()
    names = ["profile", "an iteration", "all: also attention, casts and windows"]
    assert gpu_step.main([str(tmp_path), *SMALLEST, "--minutes", "5", "--only", *names]) == 0
    lines = [json.loads(line) for line in (tmp_path / "gpu_step.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == names and not any("failed" in line for line in lines)
    assert capsys.readouterr().out == (tmp_path / "gpu_step.md").read_text()
    assert all(ms > 0 for ms in lines[1]["ms_of"].values())
    assert lines[2]["right"] and lines[2]["ms"] > 0 and 0 < lines[2]["gradient_error"] < 1e-3
    assert all(each["ms"] > 0 and each["floor_ms"] > 0 for each in lines[0]["families"].values())


def test_a_part_that_fails_hangs_or_dies_stops_no_other():
    fork_server()
    worker = gpu_step.Worker({"patch_size": [0, 0, 0]})
    assert "failed" in worker("what the card can do", 60) and worker.process is None
    assert worker("profile", 0) == {"failed": "not in 0 s"} and worker.process is None
    worker.settings = {"patch_size": [4, 4, 4]}
    assert worker("what the card can do", 60)["GB/s"] > 0
    worker.process.kill()
    worker.process.join()
    assert worker("what the card can do", 60) == {"failed": "the process died"}


def test_bytes_and_operations_are_counted_as_by_hand():
    image, weight = torch.rand(1, 3, 6, 5, 4), torch.rand(2, 3, 3, 3, 3, requires_grad=True)
    with gpu_step.Count() as count:
        F.conv3d(image, weight, padding=1).sum().backward()
    found = count.found["convolutions"]
    products = 2 * 3 * 27 * 120  # forward; as many for the gradient of the weight, none for that of the image
    assert found["operations"] == 2 * 2 * products
    moved = image.nbytes + weight.nbytes + 2 * 120 * 4
    assert found["bytes"] == 2 * moved + weight.nbytes  # the gradient of the weight, which the backward pass also reads


@pytest.mark.parametrize("dims", [(8, 7, 5), (6, 6, 6)])
def test_windows_by_a_gather_are_monai_s(dims):
    torch.manual_seed(0)
    blocks = [SwinTransformerBlock(6, 2, (4, 4, 4), shift).double() for shift in ((0, 0, 0), (2, 2, 2))]
    for block in blocks:
        x = torch.rand(2, *dims, 6, dtype=torch.float64, requires_grad=True)
        window, shift = get_window_size(dims, block.window_size, block.shift_size)
        mask = compute_mask([-(-d // w) * w for d, w in zip(dims, window, strict=True)], window, shift, "cpu").double()
        expected = block.forward_part1(x, mask)
        found = gpu_step.gather_windows(block, x, mask)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(y.square().sum(), [x, *block.attn.parameters()]) for y in (found, expected)]
        torch.testing.assert_close(*gradients)
