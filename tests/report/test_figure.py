"""Figures: drawn for every kind of plan, the same bytes for the same plan, and nothing of matplotlib left changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text
from PIL import Image
from plans import given_plan, pilot, prediction, scored_plan

from axolotl_layersel.plan import Plan
from axolotl_layersel.report import figure as figures
from axolotl_layersel.report.figure import draw
from axolotl_layersel.report.panels import STYLE

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Axes]]:
    """The axes that `draw` makes, by their title."""
    seen: dict[str, Axes] = {}

    def noted(panel: Any) -> Any:
        def drawn(axes: Axes, plan: Plan) -> str:
            about = str(panel(axes, plan))
            seen[axes.get_title(loc="left")] = axes
            return about

        return drawn

    original = figures.panels
    monkeypatch.setattr(figures, "panels", lambda plan: [noted(panel) for panel in original(plan)])
    yield seen


def test_both_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    written = draw(scored_plan(), tmp_path / "new")
    assert written == [tmp_path / "new" / "deviation.png", tmp_path / "new" / "deviation.svg"]
    assert sorted((tmp_path / "new").iterdir()) == written
    with Image.open(written[0]) as picture:
        assert picture.format == "PNG" and picture.width == 1600
        assert not {"Software", "Creation Time"} & set(picture.info)
    assert ElementTree.parse(written[1]).getroot().tag == f"{SVG}svg"


def test_equal_plans_give_equal_bytes_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from plans import scored_plan; "
        "from axolotl_layersel.report.figure import draw; draw(scored_plan(num_layers=5), Path(sys.argv[2]))"
    )
    here = str(Path(__file__).parents[1] / "helpers")
    subprocess.run([sys.executable, "-c", code, here, str(tmp_path / "there")], check=True, timeout=120)
    for written in draw(scored_plan(num_layers=5), tmp_path / "here"):
        assert written.read_bytes() == (tmp_path / "there" / written.name).read_bytes()


def test_the_svg_tells_neither_time_nor_maker(tmp_path: Path) -> None:
    _, svg = draw(scored_plan(num_layers=4), tmp_path)
    text = svg.read_text(encoding="utf-8")
    assert "dc:date" not in text and "dc:creator" not in text and "<script" not in text


@pytest.mark.parametrize("num_layers", [1, 2, 3, 80])
def test_any_depth(tmp_path: Path, num_layers: int, panels: dict[str, Axes], recwarn: Any) -> None:
    assert draw(scored_plan(num_layers=num_layers), tmp_path)
    assert len(panels) == (2 if num_layers == 1 else 4)
    assert not [str(warning.message) for warning in recwarn if "axolotl_layersel" in warning.filename]


def test_the_panels_show_the_plan(tmp_path: Path, panels: dict[str, Axes]) -> None:
    plan = scored_plan(num_layers=30, first_trainable=6, scores={"descent": [0.02] * 29 + [0.42]})
    assert plan.scores and plan.prediction
    scores = plan.scores
    draw(plan, tmp_path)
    assert list(panels) == [
        "Deviation from the label",
        "Share of the descent",
        "Cut that the rows would choose",
        "What every cut keeps and costs",
    ]
    deviation, gain, chosen, trade = panels.values()
    curve = next(line for line in deviation.lines if len(line.get_xdata()) == 31)
    assert list(curve.get_ydata()) == scores.deviation
    band = deviation.collections[0].get_paths()[0].vertices
    top = scores.deviation[30] + 1.96 * scores.deviation_stderr[30]
    assert band[band[:, 0] == 30][:, 1].max() == pytest.approx(top)
    assert [bar.get_height() for bar in gain.patches[:30]] == scores.descent
    colours = [bar.get_facecolor() for bar in gain.patches[:30]]
    assert len(set(colours[:6])) == len(set(colours[6:])) == 1 and colours[5] != colours[6]
    assert [text.get_text() for text in gain.texts] == [f"layer 29: {scores.descent[29]:.2f}"]
    assert sum(bar.get_height() for bar in chosen.patches[1:31]) == pytest.approx(1.0)
    assert list(trade.lines[1].get_ydata()) == scores.retention
    assert list(trade.lines[3].get_ydata()) == plan.prediction.per_cut.step


def test_a_cut_at_zero_has_no_frozen_ground(tmp_path: Path, panels: dict[str, Axes]) -> None:
    draw(scored_plan(first_trainable=0), tmp_path)
    assert [text.get_text() for text in panels["Deviation from the label"].texts] == ["trained"]
    for panel in panels.values():
        cut = [artist for artist in panel.get_children() if str(artist.get_gid()).startswith(("ground-", "edge-"))]
        assert [artist.get_alpha() for artist in cut] == [0.0, 0.0]


def test_a_given_cut_shows_its_costs_if_they_are_known(tmp_path: Path, panels: dict[str, Axes]) -> None:
    assert draw(given_plan(), tmp_path / "nothing") == []
    assert not (tmp_path / "nothing").exists()
    assert len(draw(given_plan(prediction=prediction(num_layers=12, first_trainable=5)), tmp_path)) == 2
    assert list(panels) == ["What every cut costs"]


def test_without_a_prediction_there_is_the_improvement_alone(tmp_path: Path, panels: dict[str, Axes]) -> None:
    assert draw(scored_plan(prediction=None), tmp_path)
    legend = panels["What every cut keeps and costs"].get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == ["improvement"]


def test_the_points_that_a_pilot_measured_stand_beside_the_curve(tmp_path: Path, panels: dict[str, Axes]) -> None:
    draw(scored_plan(scores={"pilot": pilot()}), tmp_path)
    axes = next(axes for title, axes in panels.items() if title.startswith("What every cut"))
    (bars,) = axes.containers
    assert bars.lines[0].get_xydata().tolist() == [[5, 0.8], [10, 0.6]]
    ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
    assert ends == [
        pytest.approx([0.8 - 1.96 * 0.02, 0.8 + 1.96 * 0.02]),
        pytest.approx([0.6 - 1.96 * 0.03, 0.6 + 1.96 * 0.03]),
    ]


def test_no_legend_covers_its_title_and_no_text_leaves_the_figure(tmp_path: Path, panels: dict[str, Axes]) -> None:
    draw(scored_plan(scores={"pilot": pilot()}), tmp_path)
    assert len(panels) == 4
    with matplotlib.style.context(["default", STYLE]):
        for name, axes in panels.items():
            figure = axes.figure
            figure.draw_without_rendering()
            (title,) = (text for text in axes.findobj(Text) if text.get_text() == name)
            if legend := axes.get_legend():
                box = legend.get_window_extent()
                assert box.y1 < title.get_window_extent().y0 and box.x1 <= figure.bbox.x1
            assert axes.xaxis.label.get_window_extent().x1 <= figure.bbox.x1


def test_names_are_text_not_mathematics(tmp_path: Path) -> None:
    """A dollar sign in a name was read as the start of a formula."""
    assert draw(scored_plan(num_layers=3, base_model=r"a$\frac{b$" + "long" * 80), tmp_path)


def test_a_users_own_matplotlib_is_left_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 3, "axes.facecolor": "red"}):
        changed = dict(matplotlib.rcParams)
        styled = draw(scored_plan(num_layers=4), tmp_path / "styled")
        assert dict(matplotlib.rcParams) == changed
    plain = draw(scored_plan(num_layers=4), tmp_path / "plain")
    assert [path.read_bytes() for path in styled] == [path.read_bytes() for path in plain]
    assert dict(matplotlib.rcParams) == before


def test_importing_loads_no_matplotlib_and_drawing_no_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
        "import axolotl_layersel.report.page as page; "
        "assert 'matplotlib' not in sys.modules; from plans import scored_plan; "
        "page.write_report(scored_plan(num_layers=2), Path(sys.argv[2]), config_text=None); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parents[1] / "helpers"), str(tmp_path)], check=True, timeout=120
    )


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        draw(scored_plan(num_layers=2), tmp_path / "file")
