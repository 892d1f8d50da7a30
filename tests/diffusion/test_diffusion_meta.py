"""A reduced network waits for no device: every network, way and clustering on meta tensors, where reading a value
raises.

Flux's grid is given: without, it is read from `img_ids`, once a picture.
"""

import pytest
import torch
from diffusion_models import NETWORKS, SETTINGS, predict
from diffusion_ways import WAYS, grid_of, on_every_network, sample

from ailurus_hf import ailurus_status, apply_ailurus
from ailurus_hf.clustering import clustering_names

META = torch.device("meta")
ON_A_DEVICE = {
    "LongCat-Image": "it cannot be told its grid, which is read from ids once a picture",
    "Lumina 2": "it reads the lengths of texts itself",
    "Stable Video Diffusion": "it makes a number on the CPU, where it mixes frames",
}


def reads_nothing(name, **fields):
    if name in ON_A_DEVICE:
        pytest.skip(ON_A_DEVICE[name])
    with META:
        network = NETWORKS[name].make().eval()
    apply_ailurus(network, **{**SETTINGS, **fields})
    with META:
        predict(network, name, sample(name).to(META), **grid_of(name))
    (location, *_) = ailurus_status(network).locations
    assert location.num_clusters < location.num_tokens


@on_every_network
@pytest.mark.parametrize("way", WAYS)
def test_no_network_reads_a_value(name, way):
    reads_nothing(name, **WAYS[way])


@pytest.mark.parametrize("name", ["UNet", "Flux", "Wan"])
@pytest.mark.parametrize("clustering", clustering_names())
def test_no_clustering_reads_a_value(name, clustering):
    reads_nothing(name, clustering=clustering)
