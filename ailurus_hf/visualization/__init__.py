"""Pictures of what token reduction does: which tokens were merged, what is left of the image, where predictions change.

Pictures are PIL images, plots are matplotlib figures; nothing is shown or written.

    clusters, grid = status.last_clusters, status.last_grid          # after a forward of a reduced model
    draw_assignment(image, clusters, grid).save("assignment.png")    # the paper's Fig. 2
"""

from ..extras import needs_extra

with needs_extra("vision", "ailurus_hf.visualization"):
    from .assignments import draw_assignment
    from .comparisons import class_legend, compare_predictions
    from .differences import colorize_labels, difference_legend, draw_difference, overlay_labels
    from .figures import plot_front, plot_similarity
    from .palettes import class_palette, distinct_colors
    from .rebuilt import reconstruct_image
    from .report import ComparedImage, comparison_page
    from .sheets import LegendEntry, Panel, draw_sheet
    from .side_by_side import side_by_side
    from .token_counts import draw_token_counts, token_count_legend

__all__ = [
    "ComparedImage",
    "LegendEntry",
    "Panel",
    "class_legend",
    "class_palette",
    "colorize_labels",
    "compare_predictions",
    "comparison_page",
    "difference_legend",
    "distinct_colors",
    "draw_assignment",
    "draw_difference",
    "draw_sheet",
    "draw_token_counts",
    "overlay_labels",
    "plot_front",
    "plot_similarity",
    "reconstruct_image",
    "side_by_side",
    "token_count_legend",
]
