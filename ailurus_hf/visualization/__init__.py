"""Pictures of what token reduction does: which tokens were merged, what is left of the image, where predictions change.

Every function takes a PIL image or an array and returns a PIL image; nothing is shown or written.

    clusters, grid = status.last_clusters, status.last_grid          # after a forward of a reduced model
    draw_assignment(image, clusters, grid).save("assignment.png")    # the paper's Fig. 2
"""

from ..extras import needs_extra

with needs_extra("vision", "ailurus_hf.visualization"):
    from .assignments import draw_assignment
    from .comparisons import compare_predictions
    from .differences import colorize_labels, draw_difference, overlay_labels
    from .palettes import class_palette, distinct_colors
    from .rebuilt import reconstruct_image
    from .side_by_side import side_by_side

__all__ = [
    "class_palette",
    "colorize_labels",
    "compare_predictions",
    "distinct_colors",
    "draw_assignment",
    "draw_difference",
    "overlay_labels",
    "reconstruct_image",
    "side_by_side",
]
