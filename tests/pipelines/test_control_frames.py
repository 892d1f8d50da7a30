"""Control frames as a clip, a generator, one picture, and pictures of 16 bits."""

import numpy as np
import pytest
import torch
from PIL import Image
from video_clips import moving_square
from video_models import make_pipeline

from ailurus_hf import AiluRusError
from ailurus_hf.pipelines.controlvideo.control_frames import as_frames
from ailurus_hf.video import open_clip, write_video


def pixels(frames):
    return np.stack([np.asarray(frame) for frame in frames])


def test_whatever_can_be_iterated_is_the_list_of_it(tmp_path):
    frames = moving_square(3, (24, 24))
    write_video(tmp_path / "clip", frames)
    clip = open_clip(tmp_path / "clip")
    for given in (frames, tuple(frames), (frame for frame in frames), clip, iter(clip)):
        assert np.array_equal(pixels(as_frames(given)), pixels(frames))
    assert np.array_equal(pixels(as_frames(frames[0])), pixels(frames[:1]))


def test_the_pipeline_takes_a_clip_and_one_picture(tmp_path):
    frames = moving_square(2, (24, 24))
    write_video(tmp_path / "clip", frames)
    pipe = make_pipeline()

    def run(given):
        noise = torch.Generator().manual_seed(0)
        return pipe("x", given, num_inference_steps=1, output_type="latent", generator=noise).frames

    assert torch.equal(run(open_clip(tmp_path / "clip")), run(frames))
    assert torch.equal(run(frames[0]), run(frames[:1]))


def test_pictures_of_16_bits_are_not_white():
    ramp = np.tile(np.linspace(0, 65535, 24).astype(np.uint16), (16, 1))
    (frame,) = as_frames(Image.fromarray(ramp))
    assert frame.mode == "RGB"
    assert np.array_equal(np.asarray(frame)[..., 0], np.round(ramp / 257).astype(np.uint8))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "at least 1 frame, got 0"),
        (iter(()), "at least 1 frame, got 0"),
        (torch.zeros(0, 3, 8, 8), "at least 1 frame, got 0"),
        (7, "got int"),
        ("clip.mp4", "got str"),
        (np.zeros((2, 8, 8, 3), np.uint8), "got ndarray"),
    ],
)
def test_what_is_no_frames_is_refused(given, told):
    with pytest.raises(AiluRusError, match=told):
        as_frames(given)
