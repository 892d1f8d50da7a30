"""Makes torchvision importable for the tests of detection, also where its compiled operators do not load.

They do not where torchvision was built for another torch than the one that is there (PyPI's is built for CUDA), and
then the bare import fails. Mask R-CNN needs two of them: roi_align has a Python form in torchvision, which it takes by
itself where operators are missing, and non-maximum suppression is written out here.

`make` keeps such a torchvision in a folder of its own, beside the environment: in it, transformers would import it too.
Run as a script, this file tells whether the one in that folder fits, by its exit code.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(sys.prefix) / "torchvision"


@contextmanager
def in_reach() -> Iterator[bool]:
    """Also looks into the folder that `make` fills; whether `import torchvision` works inside."""
    beside = FOLDER.exists()  # after all else: a torchvision of the environment comes first
    if beside:
        sys.path.append(str(FOLDER))
    try:
        yield prepare()
    finally:
        # Processes started later get this path, and do not come by here before they import transformers.
        if beside:
            sys.path.remove(str(FOLDER))


def prepare() -> bool:
    """Defines what is missing of a torchvision that is there; whether there is one."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    if "torchvision" in sys.modules:
        return True
    if not operators_load(Path(spec.origin).parent):
        _define_operators()
    return True


def operators_load(package: Path) -> bool:
    """Whether the compiled operators of a torchvision are of this torch's build."""
    try:
        torch.ops.load_library(next(package.glob("_C*.so")))
    except (OSError, StopIteration):
        return False
    return True


def _define_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    import torchvision.extension

    torchvision.extension._library_of_tests = library  # what is let go of is undefined again
    # Lets nms through; roi_align has taken its Python form by now, which is not to be compiled for each size.
    torchvision.extension._has_ops = lambda: True
    align = sys.modules["torchvision.ops.roi_align"]
    align._roi_align = align._roi_align.__wrapped__


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that no better one overlaps by more than the threshold, best first."""
    from torchvision.ops import box_iou

    order = scores.argsort(descending=True, stable=True)
    overlaps = (box_iou(boxes[order], boxes[order]) > iou_threshold).triu(1)
    kept = torch.ones_like(order, dtype=torch.bool)
    for i in range(len(order)):
        if kept[i]:
            kept &= ~overlaps[i]
    return order[kept]


if __name__ == "__main__":
    sys.exit(not operators_load(FOLDER / "torchvision"))
