"""Losses of outputs whose labels are not simply the greatest of their logits."""

from types import SimpleNamespace

import pytest
import torch

from ailurus_hf.evaluation import agreement


def output(**fields):
    return SimpleNamespace(**fields)


def queries(*rows):
    return torch.tensor([rows]).float()


BOXES = queries([0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.1, 0.1])
# One object and, the last class, two times none.
FOUND = queries([5, 0, 0], [0, 0, 5], [0, 0, 5])


def test_one_class_is_there_or_not():
    assert agreement.loss(output(logits=queries([1.0], [-1.0])), output(logits=queries([1.0], [2.0]))) == 0.5


def test_a_lost_object_counts_and_queries_without_one_do_not():
    plain = output(logits=FOUND, pred_boxes=BOXES)
    assert agreement.loss(plain, plain) == pytest.approx(0)
    lost = queries([0, 0, 5], [0, 0, 5], [0, 0, 5])
    assert agreement.loss(plain, output(logits=lost, pred_boxes=BOXES)) == 1
    elsewhere = BOXES.clone()
    elsewhere[0, 1] += 0.3
    assert agreement.loss(plain, output(logits=FOUND, pred_boxes=elsewhere)) == pytest.approx(0)
    assert agreement.MEANING[agreement.kind_of(plain)] == "share of objects lost or moved"


def test_a_box_that_moved_loses_what_no_longer_overlaps():
    shifted = BOXES.clone()
    shifted[0, 0, 0] += 0.1  # half of the box: a third of the union is left
    loss = agreement.loss(output(logits=FOUND, pred_boxes=BOXES), output(logits=FOUND, pred_boxes=shifted))
    assert loss == pytest.approx(2 / 3)


def test_where_nothing_is_found_no_object_may_appear():
    nothing = output(logits=queries([0, 0, 5], [0, 0, 5]), pred_boxes=BOXES[:, :2])
    assert agreement.loss(nothing, nothing) == pytest.approx(0)
    one = output(logits=queries([5, 0, 0], [0, 0, 5]), pred_boxes=BOXES[:, :2])
    assert agreement.loss(nothing, one) == pytest.approx(0.5)


def test_masks_of_queries_are_labels_of_pixels():
    """EoMT, Mask2Former: a pixel's label is the class of the query whose mask covers it."""
    masks = torch.full((1, 2, 2, 5), -9.0)
    masks[0, 0, 0] = masks[0, 1, 1] = 9.0  # one query a row
    classes = queries([9, 0, -9], [0, 9, -9])
    plain = output(masks_queries_logits=masks, class_queries_logits=classes)
    other = masks.clone()
    other[0, :, 0, 0] = torch.tensor([-9.0, 9.0])
    assert agreement.loss(plain, plain) == 0
    reduced = output(masks_queries_logits=other, class_queries_logits=classes)
    assert agreement.loss(plain, reduced) == pytest.approx(0.1)


def test_an_embedding_of_an_image_is_a_feature():
    one, other = queries([1.0, 0.0])[0], queries([0.0, 1.0])[0]
    assert agreement.loss(output(image_embeds=one), output(image_embeds=other)) == 1
