"""Frames half way: motion is followed, hidden parts come from the frame that shows them, any callable plugs in."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ailurus_hf import AiluRusError
from ailurus_hf.video import FlowInterpolator, NetworkInterpolator
from ailurus_hf.video.interpolation import disagreement, optical_flow, warp
from ailurus_hf.video.rife import RIFE


def texture(height: int, width: int, seed: int, smoothness: float = 2.0) -> np.ndarray:
    picture = np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)
    picture = cv2.GaussianBlur(picture, (0, 0), smoothness)
    return (picture - picture.min()) / (picture.max() - picture.min())


def scene(x: int) -> np.ndarray:
    """A textured square at x over another texture, [96, 128, 3]."""
    picture = texture(96, 128, 0)
    picture[30:62, x : x + 32] = texture(32, 32, 1)
    return picture


def tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None]


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean()))


@pytest.mark.parametrize("distance", [4, 8])
def test_a_moved_square_is_half_way(distance: int) -> None:
    before, middle, after = (tensor(scene(20 + x)) for x in (0, distance // 2, distance))
    made = FlowInterpolator()(before, after)
    blended = (before + after) / 2
    assert decibels(made, middle) > decibels(blended, middle) + 6
    # What both sides hide, or one uncovers, is no ghost of the square either.
    around = (..., slice(28, 64), slice(16, 20 + distance + 36))
    assert (made - middle)[around].abs().mean() < 0.5 * (blended - middle)[around].abs().mean()


def test_what_one_side_hides_comes_from_the_other() -> None:
    before, middle, after = (tensor(scene(20 + x)) for x in (0, 3, 6))
    error = (FlowInterpolator()(before, after) - middle).abs()[..., 30:62, :]
    # Beside the square; blended alike from both sides, it would be 0.038.
    assert error[..., 55:61].mean() < 0.028 and error[..., 17:23].mean() < 0.028


def test_where_flows_meet_the_better_one_stays() -> None:
    before, middle, after = (tensor(scene(20 + x)) for x in (0, 4, 8))
    error = (FlowInterpolator()(before, after) - middle).abs()[..., 32:60, 26:54]
    assert error.mean() < 0.003  # inside the square; with the worse one 0.004


def test_a_moving_picture_as_a_whole() -> None:
    whole = texture(64, 120, 3, 3.0)
    before, middle, after = (tensor(np.ascontiguousarray(whole[:, x : x + 96])) for x in (0, 3, 6))
    made = FlowInterpolator()(before, after)
    inside = (..., slice(8, -8), slice(8, -8))
    assert (made - middle)[inside].abs().max() < 0.05


def test_what_stands_still_stays() -> None:
    picture = tensor(scene(20))
    assert (FlowInterpolator()(picture, picture) - picture).abs().max() < 1e-6


def test_frames_of_a_batch_do_not_mix() -> None:
    before, after = (torch.cat([tensor(scene(20 + x)), tensor(scene(60 - x))]) for x in (0, 6))
    together = FlowInterpolator()(before, after)
    alone = [FlowInterpolator()(before[i : i + 1], after[i : i + 1]) for i in range(2)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8), (17, 40), (64, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_size_and_precision(size: tuple[int, int], dtype: torch.dtype) -> None:
    before, after = (torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    made = FlowInterpolator()(before, after)
    assert made.shape == before.shape and made.dtype == dtype
    assert made.isfinite().all() and made.min() >= 0 and made.max() <= 1


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(AiluRusError, match=r"got \[1, 3, 8, 8\] and \[1, 3, 8, 9\]"):
        FlowInterpolator()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(AiluRusError, match=r"\[3, 8, 8\]"):
        FlowInterpolator()(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))


def test_flow_warp_and_disagreement() -> None:
    first, second = scene(20), scene(25)
    forth, back = optical_flow(first, second), optical_flow(second, first)
    assert np.median(forth[40:52, 30:42, 0]) == pytest.approx(5, abs=0.3)
    assert np.abs(warp(second, forth) - first)[40:52, 30:42].max() < 0.1
    apart = disagreement(forth, back)
    assert apart[40:52, 30:42].max() < 0.5 and apart[5:20, 5:120].max() < 0.5
    assert apart[34:58, 52:57].mean() > 1  # hidden by the square in the second picture
    ramp = np.arange(12, dtype=np.float32).reshape(1, 12, 1).repeat(3, 0)
    moved = warp(ramp, np.full((3, 12, 2), (1.5, 0), np.float32)).reshape(3, 12)
    assert np.allclose(moved[1], np.minimum(np.arange(12) + 1.5, 11))


class Brighter(torch.nn.Module):
    """The second frame, twice as bright; takes sides of whole 32s alone, as RIFE does."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        half = torch.nn.functional.avg_pool2d(before * 0, 32)
        return after * 2 + half.repeat_interleave(32, 2).repeat_interleave(32, 3)


def test_a_network_and_one_in_a_file(tmp_path: Path) -> None:
    before, after = torch.zeros(2, 3, 20, 45), torch.rand(2, 3, 20, 45)
    made = NetworkInterpolator(Brighter())(before, after)
    assert torch.equal(made, (2 * after).clamp(max=1))
    pair = (torch.zeros(1, 3, 32, 64), torch.zeros(1, 3, 32, 64))
    torch.export.save(torch.export.export(Brighter(), pair), tmp_path / "brighter.pt2")
    assert torch.equal(NetworkInterpolator.from_file(tmp_path / "brighter.pt2")(before, after), made)
    (tmp_path / "text.pt2").write_text("no network")
    with pytest.raises(AiluRusError, match=r"text.pt2 is no network saved by torch.export.save"):
        NetworkInterpolator.from_file(tmp_path / "text.pt2")
    with pytest.raises(AiluRusError, match=r"no such file: .*nowhere.pt2"):
        NetworkInterpolator.from_file(tmp_path / "nowhere.pt2")


def save_rife(path: Path, weight_of: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A file as RIFE's own: saved from DistributedDataParallel, with the teacher of its training."""
    weights = {name: weight_of(name, weight) for name, weight in RIFE().state_dict().items()}
    torch.save({f"module.{n}": w for n, w in (*weights.items(), ("block_tea.conv0.0.0.bias", torch.ones(3)))}, path)
    return path


def test_rife_is_what_its_own_code_computes(tmp_path: Path) -> None:
    """Values of IFNet_HDv3.py in ControlVideo's repository, for the same weights and frames."""
    names = sorted(RIFE().state_dict())  # the teacher's come last, block_tea

    def weight_of(name: str, weight: torch.Tensor) -> torch.Tensor:
        phases = 12.9898 * torch.arange(weight.numel(), dtype=torch.float64) + 7 * names.index(name)
        return (0.1 * phases.sin()).float().view_as(weight)

    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    before, after = (
        torch.stack([0.5 + 0.5 * torch.sin((x - s) / across + y / down) for across, down in ((3, 5), (4, -6), (5, 4))])[
            None
        ]
        for s in (0, 4)
    )
    made = NetworkInterpolator.from_file(save_rife(tmp_path / "flownet.pkl", weight_of)).network(before, after)
    assert made[0, :, 5, 7].tolist() == pytest.approx([0.687589, 0.652671, 0.853939], abs=2e-4)
    assert made[0, :, 20, 40].tolist() == pytest.approx([0.207815, 0.370037, 0.495500], abs=2e-4)
    assert made.mean().item() == pytest.approx(0.505835, abs=1e-4)
    assert (made - (before + after) / 2).abs().max() > 0.1


@pytest.mark.parametrize("size", [(64, 64), (50, 71)])
def test_rife_takes_any_size_and_either_frame_first(tmp_path: Path, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    file = save_rife(tmp_path / "flownet.pkl", lambda name, weight: 0.1 * torch.randn_like(weight))
    before, after = torch.rand(2, 2, 3, *size)
    run = NetworkInterpolator.from_file(file)
    made = run(before, after)
    assert made.shape == before.shape and (made - (before + after) / 2).abs().mean() > 0.01
    assert torch.allclose(made, run(after, before), atol=1e-4)


def test_other_weights_are_no_rife(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pkl")
    (tmp_path / "text.pkl").write_text("no weights")
    for name in ("other.pkl", "text.pkl"):
        with pytest.raises(
            AiluRusError, match=rf"{name} has no weights of RIFE .* block0.conv0.0.0.weight of \[45, 11"
        ):
            NetworkInterpolator.from_file(tmp_path / name)
