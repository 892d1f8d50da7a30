"""Figures: what is drawn, that nothing is shown or kept, and one clear error for numbers that do not go together."""

import sys

import pytest

from ailurus_hf.visualization import plot_front, plot_similarity

pytest.importorskip("matplotlib")


def test_the_front_is_a_line_and_the_choice_a_star() -> None:
    figure = plot_front(
        [0.0, 0.02, 0.03], [1.4, 2.6, 2.1], [0, 1], labels=["a", "b", "c"], chosen=1, loss_means="lost", title="why"
    )
    (axes,) = figure.axes
    _, front = axes.lines
    assert front.get_xydata().tolist() == [[0.0, 1.4], [0.02, 2.6]]
    beaten, on_front, chosen = axes.collections
    assert beaten.get_offsets().tolist() == [[0.03, 2.1]] and len(on_front.get_offsets()) == 2
    assert chosen.get_offsets().tolist() == [[0.02, 2.6]]
    assert {text.get_text() for text in axes.texts} == {"plain", "a", "b"}
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == ("lost", "speed-up", "why")
    with pytest.raises(ValueError, match="2 losses do not go with 1"):
        plot_front([0.0, 0.1], [1.0], [0])


def test_similarity_is_a_line_a_setting_with_a_mark_of_its_own() -> None:
    values = {"ward": [1.0, 0.98, 0.97], "copy": [1.0, 0.9, 0.8]}
    (axes,) = plot_similarity(values, location=1, title="ViT, 2700 tokens in 675 clusters").axes
    lines = axes.lines[:2]
    assert [line.get_ydata().tolist() for line in lines] == list(values.values())
    assert [line.get_label() for line in lines] == list(values)
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == 2
    assert axes.get_title(loc="left") == "ViT, 2700 tokens in 675 clusters"
    with pytest.raises(ValueError, match="at least one setting"):
        plot_similarity({})


def test_figures_are_none_of_pyplots() -> None:
    plot_similarity({"ward": [1.0]})
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []
