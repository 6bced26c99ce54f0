"""Scatter plots as SVG."""

import re
from xml.etree import ElementTree

from prefixquant.scatter import Point, draw_scatter


def draw(points):
    picture = draw_scatter([Point(x, y, "1", 0, "run") for x, y in points], x_label="MiB", y_label="ratio")
    ElementTree.fromstring(picture)  # well-formed
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', picture)
    return picture, [(float(x), float(y)) for x, y in circles]


def test_points_are_placed_by_their_values():
    _, (first, second, third) = draw([(100, 1.0), (200, 2.0), (150, 1.5)])
    assert first[0] < third[0] < second[0]
    assert first[1] > third[1] > second[1]  # y of a picture grows downwards
    assert abs((first[0] + second[0]) / 2 - third[0]) < 0.2


def test_ticks_are_round_numbers_within_the_values():
    picture, _ = draw([(103, 1.17), (189, 1.62)])
    assert [float(text) for text in re.findall(r'text-anchor="end">([\d.]+)<', picture)] == [1.2, 1.4, 1.6]
    assert re.findall(r'text-anchor="middle">(\d+)<', picture) == ["120", "140", "160", "180"]


def test_categories_and_equal_values():
    picture, circles = draw([("W8", 1.0), ("W4 & <b>", 1.0)])
    assert "W4 &amp; &lt;b&gt;" in picture
    assert circles[0][0] > circles[1][0]  # in alphabetical order
    assert circles[0][1] == circles[1][1]
    assert len(draw([(5, 1.0)])[1]) == 1
