"""Charts: in a page and as pictures, for those who see them and those who do not."""

import io

from fanformer.report.charts import Chart, Line
from tests.pages import Reader

LINES = [Line("ours", 0, 0, [1000.0, 2e6], [8.25, 2.5]), Line("theirs", 1, 0, [1000.0, 2e6], [8.25, 3.0])]


def test_a_chart_says_in_words_where_its_lines_begin_and_end():
    html = Chart(LINES, "Loss & time", "tokens", "nats", "loss").html()
    Reader(html)  # balanced
    told = "Loss &amp; time. nats over tokens. ours: 8.25 at 1k, 2.5 at 2M; theirs: 8.25 at 1k, 3 at 2M."
    assert f'role="img" aria-label="{told}"' in html
    lost = Line("lost", 0, 0, [0.001, 0.1], [2.5, float("inf")])
    assert "lost: 2.5 at 0.001, diverged at 0.1." in Chart([lost], "t", "x", "y", "lost", markers=True).in_words()
    many = [Line(f"line {number}", number, 0, [1.0], [1.0]) for number in range(15)]
    assert "line 11: 1 at 1, 1 at 1; and 3 more lines." in Chart(many, "t", "x", "y", "many").in_words()


def test_labels_of_an_axis_do_not_run_into_each_other():
    for places, fewest, most in (([0.001, 9.0], 4, 6), ([80_000.0, 160_000.0], 3, 12), ([100.0, 20_000.0], 4, 9)):
        html = Chart([Line("one", 0, 0, places, [1.0, 2.0])], "t", "x", "y", "n").html()
        ticks = html.partition('id="n-ytick_1"')[0].count("<text") - 1  # the axis has a name too
        assert fewest <= ticks <= most, (places, ticks)


def test_a_picture_holds_the_same_chart():
    from matplotlib import image

    png = Chart(LINES, "title", "x", "y", "name").png()
    pixels = image.imread(io.BytesIO(png))
    assert pixels.shape[1] > pixels.shape[0] > 400
    assert png != Chart(LINES[:1], "title", "x", "y", "name").png()
    assert png == Chart(LINES, "title", "x", "y", "name").png()
