"""Ways of clustering a token grid, one file each; all return TokenClusters."""

from .density_peaks import spatial_density_peaks
from .local_kmeans import local_kmeans

__all__ = ["local_kmeans", "spatial_density_peaks"]
