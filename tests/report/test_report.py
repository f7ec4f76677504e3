import copy
import functools
import json
import operator
import re
import sys
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import report_runs as made
from html_page import HtmlPage
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from metawrap.cli import main
from metawrap.errors import ArgumentError, CheckpointError, MetaWrapError
from metawrap.report import draw_report_pictures, gather, write_report_page
from metawrap.report.charts import Chart, ChartPanel, State, layout, whole_ticks
from metawrap.report.page import plotly_library, render
from metawrap.report.pictures import _common_place, _draw_panel

DRAWN = ("curves", "classes", "embedding", "rates", "steps", "msl", "norms", "episode")
HOSTILE = "</script><script>window['hacked']=1</script><img src=x onerror='window[\"hacked\"]=1'>&amp;$x"


class Page(HtmlPage):
    """The report, with the JSON of its panels and charts."""

    def __init__(self, text):
        super().__init__(text)
        self.scripts = [(attributes.get("type"), script) for attributes, script in self.elements("script")]
        self.code = [code for _, code in self.elements("code")]
        self.panels = [json.loads(text, parse_constant=pytest.fail) for kind, text in self.scripts if kind]
        self.charts = {chart["name"]: chart for panel in self.panels for chart in panel["charts"]}

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def state(self, chart, choice=0):
        return self.charts[chart]["states"][choice]

    def named(self, chart, dash="solid"):
        """The lines of a chart by name; of curves those of validation, or, dotted, those of training."""
        lines = [trace for trace in self.state(chart)["data"] if trace.get("line", {}).get("dash", dash) == dash]
        return {trace["name"]: trace for trace in lines if "name" in trace}

    def panel(self, chart):
        [panel] = [panel for panel in self.panels if any(each["name"] == chart for each in panel["charts"])]
        return panel

    def band(self, label):
        """The shade around the line of the validation accuracy, which comes after that of training."""
        *_, band = [t for t in self.state("curves-accuracy")["data"] if t.get("fill") and t["legendgroup"] == label]
        return band


def page_of(*paths):
    return Page(render(gather([Path(path) for path in paths]), plotly_library()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return page_of(made.make_run(tmp_path_factory.mktemp("alone") / "run"))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """MAML++ with seeds 0 and 1, and MAML, which recorded no rates, weights or norms, with seed 0."""
    place = tmp_path_factory.mktemp("both")
    made.make_seeds(place / "plus", [0, 1])
    made.make_run(place / "maml", method="maml")
    lines = [{"epoch": epoch, "step_losses": [None, None, 1.0]} for epoch in range(1, 5)]
    made.write_lines(place / "maml" / "insight.jsonl", lines)
    return page_of(place / "plus", place / "maml")


def test_curves_are_the_mean_and_deviation_of_the_logs_over_seeds(both):
    records = np.array([[made.log_line(seed, e)["validation_accuracy"] for e in range(1, 5)] for seed in (0, 1)])
    middle, deviation = 100 * records.mean(0), 100 * records.std(0, ddof=1)
    line, band = both.named("curves-accuracy")["plus (MAML++)"], both.band("plus (MAML++)")
    assert line["x"] == [1, 2, 3, 4]
    assert line["y"] == pytest.approx(middle)
    assert band["x"] == [1, 2, 3, 4, 4, 3, 2, 1]
    assert band["y"] == pytest.approx([*(middle + deviation), *(middle - deviation)[::-1]])
    losses = [np.mean([made.log_line(seed, e)["train_loss"] for seed in (0, 1)]) for e in range(1, 5)]
    assert both.named("curves-loss", "dot")["plus (MAML++)"]["y"] == pytest.approx(losses)


def test_the_band_of_one_run_is_its_interval_over_tasks(alone):
    expected = [100 * (made.log_line(0, e)["validation_accuracy"] + (0.05 + 0.001 * e)) for e in range(1, 5)]
    assert alone.band("validation")["y"][:4] == pytest.approx(np.minimum(expected, 100))
    assert sum("fill" in trace for trace in alone.state("curves-accuracy")["data"]) == 1


@pytest.mark.parametrize(("chart", "bias"), [("rates-0", False), ("rates-1", True)])
def test_rates_have_layers_on_the_axis_a_line_for_each_step_and_a_slide_for_each_epoch(alone, chart, bias):
    assert alone.panel(chart)["slides"] == [["1", "2", "3", "4"]]
    [state] = alone.charts[chart]["states"]
    assert state["layout"]["xaxis"]["ticktext"] == list(made.LAYERS)
    assert [trace["name"] for trace in state["data"]] == ["step 1", "step 2", "step 3"]
    for epoch, slide in enumerate(state["slides"], start=1):
        for step, trace in enumerate(slide):
            assert trace["y"] == [made.rate(0, epoch, layer, step, bias) for layer in range(3)]
    assert [trace["y"] for trace in state["data"]] == [trace["y"] for trace in state["slides"][-1]]
    # Negative rates are inside of an axis that stays and shows zero.
    values = [value for slide in state["slides"] for trace in slide for value in trace["y"]]
    axis = state["layout"]["yaxis"]
    assert axis["range"][0] < min(values) == -0.12
    assert max(values) < axis["range"][1]
    assert axis["zeroline"] is True


def test_each_seed_has_a_dash_of_its_own_beside_other_methods_and_a_colour_of_its_own_alone(both, tmp_path):
    state = both.state("rates-0")
    lines = [trace for trace in state["data"] if "meta" in trace]
    assert len(lines) == 2 * made.STEPS
    own = both.named("curves-loss")["plus (MAML++)"]["line"]["color"]
    styles = {trace["meta"]["run"]: (trace["line"]["color"], trace["line"]["dash"]) for trace in lines}
    assert styles == {"plus (MAML++), seed 0": (own, "solid"), "plus (MAML++), seed 1": (own, "dash")}
    alone = page_of(made.make_seeds(tmp_path / "plus", [0, 1])).state("rates-0")["data"]
    assert len({trace["line"]["color"] for trace in alone}) == 2
    last = [slide["y"] for slide in state["slides"][-1] if "y" in slide]
    assert last == [
        [made.rate(seed, 4, layer, step) for layer in range(3)] for seed in (0, 1) for step in range(made.STEPS)
    ]


def test_a_run_that_lags_has_gaps_at_the_epochs_that_it_lacks(tmp_path):
    made.make_run(tmp_path / "a")
    made.make_run(tmp_path / "b", seed=1, epochs=2)
    state = page_of(tmp_path / "a", tmp_path / "b").state("rates-0")
    drawn = zip(state["slides"][3], state["data"], strict=True)
    lagging = [slide for slide, trace in drawn if trace.get("meta", {}).get("run", "").endswith("seed 1")]
    assert lagging == [{"y": [None] * 3}] * made.STEPS
    entries = [[each["name"] for each in slide if "name" in each] for slide in state["slides"]]
    label = "a (MAML++), seed 1"  # The legend agrees with the slider.
    assert [names[1] for names in entries] == [label, label, f"{label}: no epoch 3", f"{label}: no epoch 4"]
    assert _common_place(State(**state)) == 1  # The pictures show the last epoch that both runs have.


def test_accuracy_by_step_has_each_run_with_its_interval(both):
    lines = {trace["name"]: trace for trace in both.state("steps")["data"]}
    for name, seed in (("plus (MAML++), seed 0", 0), ("plus (MAML++), seed 1", 1), ("MAML", 0)):
        trace = lines[name]
        steps = made.final(seed)["steps"]
        assert trace["customdata"] == [0, 1, 2, 3]
        assert trace["y"] == pytest.approx([100 * each["accuracy"] for each in steps])
        assert trace["error_y"]["array"] == pytest.approx([100 * each["interval"] for each in steps])
        assert np.round(trace["x"]).tolist() == [0, 1, 2, 3]
    assert lines["chance"]["y"] == [50, 50]


def test_classes_are_shown_by_accuracy_and_confusions_by_name(alone):
    bars, [table] = alone.state("classes-accuracy"), alone.state("classes-confusion")["data"]
    assert bars["layout"]["yaxis"]["ticktext"] == ["Greek/beta", "Greek/alpha"]
    assert bars["data"][0]["x"] == [25, 70]
    assert bars["data"][0]["text"] == ["2 of 8", "7 of 10"]
    assert alone.state("classes-confusion")["layout"]["xaxis"]["ticktext"] == ["Greek/alpha", "Greek/beta"]
    assert table["z"] == [[70, 30], [75, 25]]
    assert table["text"] == [["7", "3"], ["6", "2"]]


def test_of_many_classes_both_ends_and_the_most_frequent_confusions_are_shown(tmp_path):
    run = made.make_run(tmp_path / "many")
    shown = [{"class": f"c{number:02}", "targets": 100, "right": number} for number in range(60)]
    wrong = [{"class": "a", "taken_for": f"b{n:02}", "times": 60 - n, "targets": 120} for n in range(60)]
    told = made.final(0) | {"classes": {"count": 3000, "shown": shown, "confusions": wrong}}
    made.write(run / "final_insight.json", told)
    page = page_of(run)
    names = page.state("classes-accuracy")["layout"]["yaxis"]["ticktext"]
    ends = [f"c{number:02}" for number in (*range(20), *range(40, 60))]
    assert names == [*ends[:20], "… 2960 more", *ends[20:]]
    assert page.state("classes-confusion")["layout"]["yaxis"]["ticktext"] == [
        f"a → b{number:02}" for number in range(20)
    ]
    assert page.state("classes-confusion")["data"][0]["x"] == pytest.approx([(60 - n) / 1.2 for n in range(20)])


def test_the_plane_shows_support_and_targets_by_class_and_whether_they_are_right(alone):
    state = alone.state("embedding")
    points = {(t["name"], t["marker"]["symbol"]): list(zip(t["x"], t["y"], strict=True)) for t in state["data"]}
    assert points == {
        ("Greek/alpha", "star"): [(0, 1)],
        ("Greek/beta", "star"): [(0.5, 0)],
        ("Greek/alpha", "circle"): [(1, -1)],
        ("Greek/alpha", "x"): [(1.5, -2)],
        ("Greek/beta", "x"): [(2, -3), (2.5, -4)],
    }
    assert [trace["name"] for trace in state["data"] if trace["showlegend"]] == ["Greek/alpha", "Greek/beta"]
    assert state["layout"]["xaxis"]["title"]["text"] == "component 1, 75 % of the variance"


def test_an_embedding_method_has_what_suits_it_before_the_rest_and_one_line_of_what_it_lacks(tmp_path):
    run = made.make_run(tmp_path / "protonet", method="protonet")
    made.write_lines(run / "insight.jsonl", [{"epoch": 1}])
    made.write(run / "final_insight.json", made.final(0) | {"steps": []})
    page = page_of(run)
    assert page.attributes("id", "section")[:4] == ["curves", "classes", "embedding", "episodes"]
    assert page.text.count("Not shown of") == 1
    assert page.text.index("Not shown of ProtoNet: Learned inner rates") > page.text.index("Machine Where training ran")


def test_ticks_are_whole_numbers_and_at_most_eleven():
    for most in (1, 3, 10, 11, 100, 12_345):
        distance = whole_ticks(most)["dtick"]
        assert distance == int(distance) >= 1
        assert 1 <= most // distance <= 10


def test_multi_step_loss_shows_weights_and_losses_of_the_log(alone):
    weights, losses = (alone.named(name) for name in ("step-weights", "step-losses"))
    lines = [made.insight_line(0, epoch) for epoch in range(1, 5)]
    for step in range(made.STEPS):
        assert weights[f"step {step + 1}"]["y"] == [line["step_weights"][step] for line in lines]
        assert losses[f"step {step + 1}"]["y"] == [line["step_losses"][step] for line in lines]


def test_norms_show_medians_and_bars_to_the_quartiles_of_each_run(both):
    assert both.panel("norms-running-mean")["choices"] == ["plus (MAML++), seed 0", "plus (MAML++), seed 1"]
    for epoch, slide in enumerate(both.state("norms-running-var", choice=1)["slides"], start=1):
        norms = made.insight_line(1, epoch)["norms"]
        for step, trace in enumerate(slide):
            assert trace["y"] == [norms[f"conv{layer}.norm"]["running_var"]["median"][step] for layer in (0, 1)]
            assert trace["error_y"]["array"] == pytest.approx([0.3, 0.3])
            assert trace["error_y"]["arrayminus"] == pytest.approx([0.2, 0.2])
    assert epoch == 4


def test_plotly_knows_every_attribute_of_every_chart(both):
    for chart in both.charts.values():
        for state in chart["states"]:
            go.Figure(data=state["data"], layout=state["layout"])
            for slide in state["slides"]:
                go.Figure(data=[trace | more for trace, more in zip(state["data"], slide, strict=True)])


def test_words_of_the_page(both, alone):
    """What a method lacks is explained; the table has the deviation over seeds, or the interval of one run."""
    deviation = f"{np.mean([81.2, 82.2]):.2f} ± {np.std([81.2, 82.2], ddof=1):.2f} %"
    for words in (
        "Not shown of MAML: Learned inner rates (its inner rates were not learned, or it takes no inner steps); "
        "Multi-step loss (its multi-step loss is off); Batch norm, step by step (its network has no batch norm).",
        deviation,
        "81.20 ± 1.23 %",
        "batch transductive *",
        "support inductive ",
    ):
        assert words in both.text
    for words in ("Abacus 9", "msl_epochs", "inner_steps"):
        assert words in alone.text
    assert re.search(r"What differs setting plus \(MAML\+\+\) MAML method maml\+\+ maml ", both.text)
    assert alone.code[0] == "metawrap train --data omniglot --set msl_epochs=2"
    assert both.code[0] == "metawrap train --seeds 0,1"


def test_the_episode_shows_images_predictions_and_confusion(alone):
    assert alone.attributes("src", "img") == [f"data:image/png;base64,{made.png(shade)}" for shade in (10, 30, 20, 40)]
    assert "Test task 1 (the first test task): 1 of 4 targets right" in alone.text
    confusion = re.search(r"by prediction \(columns\) 0 1 (.*?) Final test", alone.text).group(1)
    assert confusion == "0 1 1 1 2 ·"
    assert "✗ 0 70" in alone.text


def test_the_page_names_every_section_in_its_contents_and_needs_no_network(both):
    anchors = both.attributes("id", "section")
    assert both.attributes("href", "a") == [f"#{anchor}" for anchor in anchors]
    assert len(anchors) == 12
    for address in both.attributes("src") + both.attributes("href"):
        assert address.startswith(("data:", "#")), address


def test_what_a_run_says_is_text_and_never_markup(tmp_path):
    run = made.spoilt_run(tmp_path / "<b>run", HOSTILE)
    page = page_of(run)
    # Every text of the run, in its captions too, is a text of the page: the tags are those of a run of harmless words.
    assert page.names == page_of(made.spoilt_run(tmp_path / "run", "word")).names
    assert page.code[0] == HOSTILE
    captions = [text for _, text in page.elements("span")]
    assert f"Rates of the {HOSTILE}" in captions
    assert [kind for kind, _ in page.scripts].count(None) == 2
    assert not page.attributes("onerror")
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.attributes("src", "img"))
    assert "hacked" not in "".join(text for kind, text in page.scripts if kind is None)
    # Plotly reads tags in texts.
    for text in page.state("rates-0")["data"][0]["text"] + [page.state("embedding")["data"][0]["name"]]:
        assert "<" not in text
        assert "&lt;/script&gt;" in text
    names = [path.name for path in draw_report_pictures(gather([run]), tmp_path / "png")]
    assert names == [f"report-{name}.png" for name in DRAWN]
    for name in names:
        with Image.open(tmp_path / "png" / name) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(10**7)) > 10


def everywhere(value, text, numbers):
    """The same lists and tables, with this text for each text (and number), and beside each name."""
    if isinstance(value, dict):
        named = {name: everywhere(each, text, numbers) for name, each in value.items()}
        return named | {text: [text, {text: text}]}
    if isinstance(value, list):
        return [everywhere(each, text, numbers) for each in value]
    return text if numbers or isinstance(value, str) else value


@pytest.mark.parametrize("numbers", [False, True], ids=["texts", "texts and numbers"])
def test_a_text_in_any_field_of_any_file_adds_no_tag(tmp_path, numbers):
    found = {}
    for text in ("word", HOSTILE):
        run = made.spoilt_run(tmp_path / text[:4].strip("</"), text)
        for file in run.iterdir():
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            kept = [{name: line[name] for name in ("epoch", "seeds") if name in line} for line in lines]
            lines = [everywhere(line, text, numbers) | own for line, own in zip(lines, kept, strict=True)]
            made.write_lines(file, lines)
        found[text] = page_of(run)
        assert text in "".join(found[text].texts)
    assert found[HOSTILE].names == found["word"].names
    assert not found[HOSTILE].attributes("onerror")


def test_a_run_of_an_older_version_shows_what_it_has(tmp_path):
    page = page_of(made.make_run(tmp_path / "old", insight=False))
    assert set(page.charts) == {"curves-accuracy", "curves-loss"}
    assert "Not shown of old (MAML++): The run is from a version of metawrap that recorded less." in page.text
    assert "81.20" in page.text
    assert page.code[0] == "metawrap train --resume"


def test_a_run_that_has_just_begun_is_shown_without_charts(tmp_path):
    run = made.make_run(tmp_path / "new", epochs=0)
    (run / "result.json").unlink()
    (run / "final_insight.json").unlink()
    page = page_of(run)
    assert page.charts == {}
    assert "not tested yet" in page.text
    assert "Not shown of new (MAML++): It has no finished epoch yet." in page.text


def test_numbers_that_are_none_do_not_reach_the_page(tmp_path):
    run = made.make_run(tmp_path / "diverged")
    records = [made.log_line(0, epoch) | {"validation_loss": float("nan"), "train_loss": None} for epoch in range(1, 5)]
    made.write_lines(run / "log.jsonl", records)
    lines = [made.insight_line(0, epoch) for epoch in range(1, 5)]
    lines[2]["rates"]["linear.weight"] = [float("inf"), float("nan"), 1e400]
    lines[1]["norms"]["conv0.norm"]["weight"] |= {"low": [-1.5e308] * made.STEPS, "high": [1.5e308] * made.STEPS}
    made.write_lines(run / "insight.jsonl", lines)
    told = made.result(0, made.SETTINGS)
    told["test"]["norms"]["support"]["after"] = {"accuracy": float("nan"), "interval": float("inf")}
    made.write(run / "result.json", told)
    page = page_of(run)  # Parsed without NaN and Infinity.
    assert page.state("curves-loss")["data"] == []
    assert page.state("rates-0")["slides"][2][1]["y"][2] is None
    low, high = page.state("norms-weight")["layout"]["yaxis"]["range"]
    assert 0 < low < high < 10


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inside, (*path, key))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("junk", [None, "x", True, [{}, "y"], {"median": 3}, 10**400], ids=range(6))
def test_junk_anywhere_in_the_files_leaves_a_report_of_the_rest(tmp_path, junk):
    run = made.make_run(tmp_path / "run", epochs=2)
    for name, content in (
        ("insight.jsonl", made.insight_line(0, 2)),
        ("final_insight.json", made.final(0)),
        ("result.json", made.result(0, made.SETTINGS)),
        ("log.jsonl", made.log_line(0, 2)),
    ):
        before = (run / name).read_text()
        seen = set()
        for path in places(content):
            # One place of a kind: rates and norms are many alike.
            kind = tuple("#" if isinstance(key, int) or "." in str(key) else key for key in path)
            if path and kind not in seen:
                seen.add(kind)
                spoilt = copy.deepcopy(content)
                functools.reduce(operator.getitem, path[:-1], spoilt)[path[-1]] = junk
                made.write_lines(run / name, [spoilt])
                assert render(gather([run]), "")
        (run / name).write_text("[1, 2\n{torn")
        assert render(gather([run]), "")
        (run / name).write_text(before)


def test_runs_that_differ_in_their_seed_are_one_group_and_others_are_told_apart(tmp_path):
    changes = {
        "deep-seed0": {},
        "deep-seed3": {"seed": 3, "device": "cuda"},
        "short mamlpp": {"inner_steps": 1},
        "proto-net": {"method": "protonet"},
        "x": {"recipe": "mini-imagenet-5way-1shot-maml", "method": "maml"},
    }
    groups = gather([made.make_run(tmp_path / name, **each) for name, each in changes.items()])
    labels = ["deep (MAML++)", "short mamlpp", "ProtoNet", "mini-imagenet-5way-1shot-maml"]
    assert [group.label for group in groups] == labels
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 3], [0], [0], [0]]


def test_a_repeated_run_is_a_group_of_its_own_named_by_its_folder(tmp_path):
    a, b = made.make_run(tmp_path / "one" / "mamlpp"), made.make_run(tmp_path / "two" / "mamlpp")
    assert [group.label for group in gather([a, b, a])] == [f"MAML++ ({a})", f"MAML++ ({b})"]


def test_a_folder_of_runs_is_all_of_them(tmp_path):
    made.make_run(tmp_path / "maml", method="maml")
    made.make_seeds(tmp_path / "plus", [0, 1])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("{torn")
    assert [(group.label, len(group.runs)) for group in gather([tmp_path])] == [("MAML", 1), ("plus (MAML++)", 2)]


def test_a_long_run_has_a_slider_of_few_epochs_with_the_first_and_the_last(tmp_path):
    page = page_of(made.make_run(tmp_path / "long", epochs=150))
    [names] = page.panel("rates-0")["slides"]
    assert page.state("curves-loss")["layout"]["xaxis"]["dtick"] == 20
    assert (names[0], names[-1]) == ("1", "150")
    assert len(names) == 40
    assert len(page.state("rates-0")["slides"]) == 40


def test_pictures_are_written_for_what_there_is(tmp_path):
    run = made.make_run(tmp_path / "old", insight=False)
    assert draw_report_pictures(gather([run]), tmp_path / "png") == [tmp_path / "png" / "report-curves.png"]
    assert [path.name for path in (tmp_path / "png").iterdir()] == ["report-curves.png"]


@pytest.mark.parametrize("length", [3, 30, 90])
def test_the_legend_of_a_picture_is_as_wide_as_the_picture_at_most(length):
    figure, marker = Figure(layout="constrained"), {"size": 9, "symbol": "circle", "color": "#336699"}
    names = [f"{('Granny-Smith Apple, ' * 5)[:length]}{number}" for number in range(7)]
    points = {
        "type": "scatter",
        "mode": "markers",
        "line": {"color": "#336699", "width": 1},
        "x": [0, 1],
        "y": [0, 1],
        "marker": marker,
    }
    axes = layout("component 1", "component 2", height=460)
    state = State([points | {"name": name, "legendgroup": name, "showlegend": True} for name in names], axes)
    _draw_panel(figure, ChartPanel([Chart("embedding", "", [state])], ["task 0"], [[]]))
    FigureCanvasAgg(figure).draw()
    extent = figure.legends[0].get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.x1


def test_the_command_writes_the_page_and_the_pictures(tmp_path, capsys):
    run = made.make_run(tmp_path / "run", insight=False)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"Report: {run / 'report.html'}\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    out = tmp_path / "new" / "page.html"
    assert main(["report", str(run), "--out", str(out), "--png", str(tmp_path / "png")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Report: {out}",
        f"Picture: {tmp_path / 'png' / 'report-curves.png'}",
    ]
    assert out.exists()


def test_what_is_no_run_and_where_nothing_can_be_written_is_said_in_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("Error: There is no run in ")
    run = made.make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match=r"out: cannot write .*file/page\.html.*folder of yours"):
        write_report_page(gather([run]), tmp_path / "file" / "page.html")
    with pytest.raises(ArgumentError, match=r"png: cannot write .*folder of yours"):
        draw_report_pictures(gather([run]), tmp_path / "file")
    with pytest.raises(CheckpointError, match="no run in"):
        gather([tmp_path / "file"])


@pytest.mark.parametrize(
    ("module", "flags", "words"),
    [("plotly.offline", [], r"metawrap\[report\]"), ("matplotlib.figure", ["--png", "png"], r"metawrap\[plot\]")],
)
def test_a_missing_library_is_named_with_the_way_to_install_it(tmp_path, monkeypatch, module, flags, words):
    groups = gather([made.make_run(tmp_path / "run")])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MetaWrapError, match=f'pip install "{words}"'):
        draw_report_pictures(groups, tmp_path) if flags else write_report_page(groups, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
