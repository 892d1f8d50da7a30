"""Cross-frame attention and group norm against the same by hand; clusters of single frames and of whole videos."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusion_models import LATENTS, SETTINGS, latents, make_network, predict, text
from traces import traces

from ailurus_hf import AiluRusError, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.clustering import DensityPeaks, local_kmeans
from ailurus_hf.diffusion.apply import reducers_of
from ailurus_hf.diffusion.forward_state import ForwardState
from ailurus_hf.diffusion.frames import MODES, Frames, JointClusters
from ailurus_hf.diffusion.processor import Assigned
from ailurus_hf.diffusion.stacks import convolution_norms, find_stacks
from ailurus_hf.pipelines.controlvideo.cross_frame import CrossFrameAttention, CrossFrameProcessor
from ailurus_hf.pipelines.controlvideo.shared_norm import SharedGroupNorm

COUNT = 3
WAYS = {
    "blocks": {},
    "merged projections": {"projections": "merged"},
    "attention": {"scope": "attention"},
    "keys and values": {"scope": "attention", "reduce": "kv"},
    "density peaks": {"clustering": "density_peaks"},
}
in_every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
by_frame_or_jointly = pytest.mark.parametrize("frames", ["each", "joint"])


def layer():
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8).eval()
    with torch.no_grad():
        attn.to_q.weight.mul_(8)
        attn.to_k.weight.mul_(8)
    return attn


def by_hand(attn, tokens, mode, count, counts=None):
    """Every frame's softmax over the keys of its frames, written out; counts: how many tokens each key stands for."""
    out = torch.empty_like(tokens)
    for number in range(len(tokens)):
        first, frame = number - number % count, number % count
        taken = {
            "full": range(count),
            "sparse_causal": [0, max(frame - 1, 0)],
            "first": [0],
            "own": [frame],
            "first_two": [0, 1],
        }[mode]
        keys = torch.cat([tokens[first + other] for other in taken])
        weight = torch.ones(len(keys)) if counts is None else torch.cat([counts[first + other] for other in taken])
        heads = []
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            logits = attn.to_q(tokens[number])[:, part] @ attn.to_k(keys)[:, part].T / 8**0.5
            e = weight * (logits - logits.amax(1, keepdim=True)).exp()
            heads.append(e / e.sum(1, keepdim=True) @ attn.to_v(keys)[:, part])
        out[number] = attn.to_out[0](torch.cat(heads, 1))
    return out


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_equals_the_softmax_written_by_hand(mode, halves):
    attn, tokens = layer(), torch.randn(halves * 4, 10, 16)
    want = by_hand(attn, tokens, mode, 4)
    for at_once in (None, 1, 3, 4, 9):
        processor = CrossFrameProcessor(Frames.attending(mode, range(4)), frames_at_once=at_once)
        torch.testing.assert_close(processor(attn, tokens), want, rtol=1e-4, atol=1e-5)
    counts = torch.randint(1, 9, (halves * 4, 10)).float()
    want = by_hand(attn, tokens, mode, 4, counts)
    for at_once in (None, 3):
        processor = CrossFrameProcessor(Frames.attending(mode, range(4)), frames_at_once=at_once)
        got = processor(attn, tokens, None, counts.log()[:, None])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    # The other frames matter, and attention is not uniform.
    plain = AttnProcessor2_0()(attn, tokens)
    assert ((want - plain).abs().max() > 1e-2) and (
        mode == "own" or (by_hand(attn, tokens, mode, 4) - plain).norm() > 1
    )


def test_cross_attention_is_left_as_it_is():
    attn = Attention(16, cross_attention_dim=8, heads=2, dim_head=8)
    tokens, prompt = torch.randn(4, 10, 16), torch.randn(4, 5, 8)
    got = CrossFrameProcessor(Frames.attending("full", range(4)))(attn, tokens, prompt)
    torch.testing.assert_close(got, AttnProcessor2_0()(attn, tokens, prompt))


def test_what_does_not_fit_is_named():
    attn, frames = layer(), Frames.attending("full", range(4))
    with pytest.raises(AiluRusError, match=r"batch of 4 frames.*6 images"):
        CrossFrameProcessor(frames)(attn, torch.randn(6, 10, 16))
    with pytest.raises(AiluRusError, match=r"\(4, 1, 10\), got \(4, 10, 10\)"):
        CrossFrameProcessor(frames)(attn, torch.randn(4, 10, 16), None, torch.zeros(4, 10, 10))
    with pytest.raises(AiluRusError, match="at least 1, got 0"):
        CrossFrameProcessor(frames, frames_at_once=0)
    with pytest.raises(AiluRusError, match=r"'full'.*'all'"):
        Frames.attending("all", range(4))
    with pytest.raises(AiluRusError, match="2 frames, got 1"):
        Frames.attending("first_two", [0])
    with pytest.raises(AiluRusError, match="'some'"):
        apply_ailurus(make_network("UNet"), frames="some")


def of_video(network, x, mode="full", count=COUNT, **options):
    """The UNet's output on a batch of frames with one prompt for all."""
    same = {"encoder_hidden_states": text(len(x) // count).repeat_interleave(count, 0).to(x.dtype)}
    with CrossFrameAttention(network, Frames.attending(mode, range(count)), **options):
        return predict(network, "UNet", x, **same)


def frames_of_noise(videos=1, size=LATENTS, count=COUNT):
    return latents((4, *size), batch=videos * count)


def test_a_network_is_put_back_as_it_was():
    network, x = make_network("UNet"), frames_of_noise()
    plain, before = predict(network, "UNet", x), traces(network)
    joined = of_video(network, x)
    assert (joined - plain).abs().max() > 1e-2 * plain.abs().max()
    with pytest.raises(RuntimeError), CrossFrameAttention(network, Frames.attending("full", range(COUNT))):
        raise RuntimeError
    assert traces(network) == before and torch.equal(predict(network, "UNet", x), plain)
    # Halves of a batch do not see each other, and a frame alone attends to itself.
    twice = of_video(network, torch.cat([x, 2 * x]))
    same = {"rtol": 1e-4, "atol": 1e-4 * plain.abs().max().item()}
    torch.testing.assert_close(twice[:COUNT], joined, **same)
    torch.testing.assert_close(of_video(network, x[:1], count=1), predict(network, "UNet", x[:1]), **same)
    torch.testing.assert_close(
        of_video(network, x, "own"), predict(network, "UNet", x, encoder_hidden_states=text(1).repeat(3, 1, 1)), **same
    )


@by_frame_or_jointly
@in_every_way
def test_identity_where_no_token_has_to_go(way, frames):
    network, x = make_network("UNet"), frames_of_noise()
    plain = of_video(network, x)
    apply_ailurus(network, **{**SETTINGS, **way, "keep_ratio": 1.0, "frames": frames})
    torch.testing.assert_close(of_video(network, x), plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@by_frame_or_jointly
@in_every_way
@pytest.mark.parametrize("size", [LATENTS, (9, 14), (5, 30)])
def test_on_and_off(way, frames, size):
    network, x = make_network("UNet"), frames_of_noise(2, size)
    plain, before = of_video(network, x), traces(network)
    apply_ailurus(network, **SETTINGS, **way, frames=frames)
    reduced = of_video(network, x)
    assert reduced.isfinite().all() and (reduced - plain).abs().max() > 1e-3 * plain.abs().max()
    assert torch.equal(of_video(network, x), reduced)
    torch.testing.assert_close(of_video(network, x, frames_at_once=2), reduced, rtol=1e-3, atol=1e-3)
    # One video gives the same alone and in a batch.
    torch.testing.assert_close(
        of_video(network, x[:COUNT]), reduced[:COUNT], rtol=1e-3, atol=1e-3 * plain.abs().max().item()
    )
    assert torch.equal(of_video(remove_ailurus(network), x), plain) and traces(network) == before


def stack_outputs(network, inputs, mode="full"):
    """What each stack makes of a map of its own: convolutions lie between them in the network."""
    out = {}
    reducers = reducers_of(network)
    with CrossFrameAttention(network, Frames.attending(mode, range(COUNT))), torch.no_grad():
        for stack in find_stacks(network):
            if reducers:
                reducers[0][1].forwards.begin(ForwardState(max(LATENTS), True, False, {}))
            x = inputs(stack.module.config.in_channels)
            out[stack.name] = stack.module(x, encoder_hidden_states=text(1).repeat(COUNT, 1, 1), return_dict=False)[0]
            if reducers:
                reducers[0][1].forwards.end()
    return out


@by_frame_or_jointly
@in_every_way
@pytest.mark.parametrize("mode", ["full", "sparse_causal", "first"])
def test_equals_plain_on_duplicated_pixels(way, frames, mode):
    """Every pixel four times, and every fourth column like the one before, so that clusters differ in size."""

    def duplicated(channels):
        small = latents((channels, LATENTS[0] // 2, LATENTS[1] // 2), batch=COUNT)
        small[..., 1::4] = small[..., 0::4]
        return small.repeat_interleave(2, -1).repeat_interleave(2, -2)

    # Over space and time, local k-means starts from cells of several frames; density peaks find what is equal.
    if frames == "joint" and mode == "full":
        way = {**way, "clustering": DensityPeaks(num_spatial_neighbors=0)}
    network = make_network("UNet")
    plain = stack_outputs(network, duplicated, mode)
    apply_ailurus(network, **SETTINGS, **way, frames=frames)
    reduced = stack_outputs(network, duplicated, mode)
    assert all(p.num_tokens == 4 * p.num_clusters for p in ailurus_status(network).locations)
    for name, want in plain.items():
        torch.testing.assert_close(reduced[name], want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@in_every_way
def test_a_still_video_is_kept_once(way):
    """Frames that are all alike: a third of the tokens hold them, if clusters reach through time."""
    still = lambda channels: latents((channels, *LATENTS), batch=1).repeat(COUNT, 1, 1, 1)  # noqa: E731
    network = make_network("UNet")
    plain = stack_outputs(network, still)
    settings = {**SETTINGS, "keep_ratio": 1 / COUNT, **way}
    if settings.get("clustering") == "density_peaks":
        settings["clustering"] = DensityPeaks(num_spatial_neighbors=0)
    errors = {}
    for frames in ("each", "joint"):
        reduced = stack_outputs(apply_ailurus(network, **settings, frames=frames), still)
        errors[frames] = max((reduced[n] - plain[n]).abs().max().item() / plain[n].abs().max().item() for n in plain)
    assert errors["joint"] < 1e-5 < 1e-2 < errors["each"]
    assert ailurus_status(network).last_grid == (COUNT, *LATENTS)


def test_joint_clusters_are_the_joint_softmax_over_representatives():
    attn, tokens = layer(), torch.randn(2 * COUNT, 24, 16)
    clusters = JointClusters(local_kmeans(tokens.view(2, -1, 16), (COUNT, 4, 6), COUNT * 6), COUNT)
    torch.testing.assert_close(
        clusters.unmerge(clusters.merge(clusters.unmerge(clusters.merge(tokens)))),
        clusters.unmerge(clusters.merge(tokens)),
    )
    with torch.no_grad():
        merged = clusters.clusters.merge(tokens.view(2, -1, 16))
        want = clusters.clusters.unmerge(by_hand(attn, merged, "own", 1, clusters.clusters.counts)).view_as(tokens)
        reducing = CrossFrameProcessor(Frames.attending("full", range(COUNT)))
        reducing.source.assigned = lambda layer, tokens: Assigned(clusters, clusters)
        torch.testing.assert_close(reducing(attn, tokens), want, rtol=1e-4, atol=1e-5)


def test_halves_share_an_assignment_and_frames_have_their_own():
    network, x = make_network("UNet"), frames_of_noise(2)
    for frames in ("each", "joint"):
        of_video(apply_ailurus(network, **SETTINGS, frames=frames, share_cfg=True), x)
        assigned = ailurus_status(network).last_clusters.assignment
        half = len(assigned) // 2
        assert half == (COUNT if frames == "each" else 1) and torch.equal(assigned[:half], assigned[half:])
    with pytest.raises(AiluRusError, match="1 videos of 2 frames"):
        of_video(network, x[:2], count=2)


def test_flops_count_the_keys_of_all_frames():
    network, x = make_network("UNet"), frames_of_noise()
    apply_ailurus(network, **SETTINGS)
    saved = {}
    for mode in ("own", "full"):
        of_video(network, x, mode)
        location = ailurus_status(network).locations[0]
        saved[mode] = location.flops - location.reduced_flops
    heads_wide, tokens = 16, LATENTS[0] * LATENTS[1]
    more = 4 * heads_wide * tokens * (COUNT - 1) * tokens * (1 - 1 / 16)
    assert saved["full"] - saved["own"] == pytest.approx(more)


@by_frame_or_jointly
def test_half_precision(frames):
    x = frames_of_noise()
    exact = of_video(apply_ailurus(make_network("UNet"), **SETTINGS, frames=frames), x)
    network = apply_ailurus(make_network("UNet").to(torch.bfloat16), **SETTINGS, frames=frames)
    half = of_video(network, x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.cosine_similarity(half.float().flatten(), exact.flatten(), 0) > 0.9


def test_group_norm_over_frames_equals_the_one_by_hand():
    network = make_network("UNet")
    before = traces(network)
    norms = convolution_norms(network)
    x = frames_of_noise(2) * torch.arange(1.0, 7).view(6, 1, 1, 1)
    assert len(norms) == 2 * sum("ResnetBlock2D" in type(m).__name__ for m in network.modules()) + 1
    with SharedGroupNorm(network, Frames.attending("full", range(COUNT))), torch.no_grad():
        for norm in norms:
            maps = torch.randn(6, norm.num_channels, 5, 7) * torch.arange(1.0, 7).view(6, 1, 1, 1)
            grouped = maps.view(2, COUNT, norm.num_groups, -1)
            mean = grouped.mean((1, 3), keepdim=True)
            deviation = (grouped.var((1, 3), unbiased=False, keepdim=True) + norm.eps).sqrt()
            want = ((grouped - mean) / deviation).view_as(maps) * norm.weight.view(1, -1, 1, 1) + norm.bias.view(
                1, -1, 1, 1
            )
            torch.testing.assert_close(norm(maps), want, rtol=1e-4, atol=1e-5)
        shared = predict(network, "UNet", x)
    assert traces(network) == before
    plain = predict(network, "UNet", x)
    assert (shared - plain).abs().max() > 1e-2 * plain.abs().max()
    # In a ControlNet there is no last norm.
    control = make_network("ControlNet")
    assert len(convolution_norms(control)) == 2 * sum("ResnetBlock2D" in type(m).__name__ for m in control.modules())
