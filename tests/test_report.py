"""The report: self-contained, nobody named, and honest about what is missing."""

import base64
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image

from sparsecontrast import findings, record
from sparsecontrast.charts import Bar, Dot, Line, bar_chart, dot_chart, line_chart
from sparsecontrast.checkpoint import read_round
from sparsecontrast.errors import MissingDataError
from sparsecontrast.evaluation import evaluate_run, run_dataset
from sparsecontrast.features import load_method
from sparsecontrast.overlays import box_recall, kept_mask, look, overlays, selection_recall, selection_spread
from sparsecontrast.report import write_report
from sparsecontrast.runs import read_metrics, read_run
from tests.tiny import make_run, say_federated

EVIL = "<script>alert('x')</script>&\"'"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = say_federated(make_run(tmp_path_factory.mktemp("report") / "run"))
    evaluate_run(folder, show=False)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


class Page(HTMLParser):
    """Collects tags, links and text, and checks that what opens is closed."""

    VOID = {"meta", "img", "br", "circle", "line", "rect", "path"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.links, self.words, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data", "poster")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(folder, *words):
    return write_report(folder, words, show=False).read_text()


def test_the_report_of_a_real_run_says_all_it_must(run):
    page = Page(read(run))
    said = [
        "3 hospitals trained one image model together", "raw 16 × 16 pixels", "untrained network",
        "guessing would give 50", "procedurally generated phantoms", "hospital_02", "6.0 kB", "two findings",
        "Where the model looks", "annotated boxes", "No file was quarantined", "no differential privacy",
        "python -m simulation data.phantom", "Not a medical device",
    ]  # fmt: skip
    assert not [words for words in said if words not in page.text]
    assert page.tags.count("img") == 4 * 3 and page.tags.count("svg") >= 5


def test_the_report_loads_nothing_and_runs_nothing(run):
    text = read(run)
    page = Page(text)
    assert page.links and all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & set(page.tags)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", re.sub(r"base64,[^\"]*", "", text))


def test_nobody_is_named_and_no_path_is_written(run):
    dataset = run_dataset(read_run(run), show=False)
    (run / "quarantine.csv").write_text(
        "path,reason,stage\n/secret/CANARY_7/a.dcm,cannot open /secret/CANARY_8/a.dcm: torn,decode\n"
    )
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace("overrides:\n", "overrides:\n- data.root=/secret/CANARY_9/cxr\n")
    )
    text = read(run)
    assert not [c for c in ("CANARY", "/secret", str(run), "/tmp/") if c in text]
    frame = dataset.frame
    assert not [
        i
        for column in ("patient_id", "image_id", "path", "study_id")
        for i in frame[column]
        if str(i) in text
    ]
    page = Page(text)
    assert "cannot open …: torn" in page.text and "data.root=…/cxr" in page.text


def test_names_from_data_are_text_never_markup(run):
    rows = read_metrics(run)
    for row in rows:
        if row["site"] == "hospital_00":
            row |= {"site": EVIL, "status": "refused", "code": EVIL}
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    evaluation = json.loads((run / "evaluation.json").read_text())
    for row in evaluation["rows"] + evaluation["differences"]:
        row["task"] = EVIL
        row["site"] = EVIL if row["site"] == "hospital_00" else row["site"]
        row["reason"] = row["reason"] and EVIL
    evaluation["tasks"][0]["name"] = EVIL
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = read(run)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert EVIL in Page(text).text


def test_a_run_without_evaluation_says_how_to_make_it(run):
    (run / "evaluation.json").unlink()
    page = Page(read(run))
    assert "has not been scored yet" in page.text
    assert "sparsecontrast evaluate RUN_FOLDER && sparsecontrast report RUN_FOLDER" in page.text


def test_a_run_that_has_only_its_config_gets_a_report(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.yaml", bare)
    page = Page(read(bare))
    assert "No round has been recorded" in page.text and "No round was trained" in page.text
    assert "0 of 2 rounds" in page.text
    with pytest.raises(MissingDataError, match="no run folder"):
        write_report(tmp_path, show=False)


def test_a_server_without_the_images_shows_none(run):
    rows = [r | {"site": f"st-{r['site']}" if r["site"] else None} for r in read_metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page = Page(read(run))
    assert "none of them is on this machine" in page.text and "img" not in page.tags
    assert "phantoms" not in page.text.split("How it was run")[0]


def test_refused_and_silent_sites_are_counted(run):
    rows = read_metrics(run)
    rows[0] |= {"status": "refused", "code": "payload_norm"}
    rows[1] |= {"status": "silent"}
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    head, *table = record.hospital_table(read_run(run), None)
    lines = {row[0]: dict(zip(head, row, strict=True)) for row in table}
    assert (
        lines[rows[0]["site"]]["refused"] == "1 (payload_norm)"
        and lines[rows[0]["site"]]["rounds"] == "1 of 2"
    )
    assert lines[rows[1]["site"]]["silent"] == "1" and lines["hospital_02"]["rounds"] == "2 of 2"


def test_a_plateau_is_said_aloud(run):
    rows = [r | {"contrast": 2.08, "chance_loss": 2.0794} if r["site"] else r for r in read_metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "hardly learnt anything" in Page(read(run)).text
    rows = [r | {"contrast": 1.5} if r["site"] else r for r in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "hardly learnt anything" not in Page(read(run)).text


def cell(features, value, low, high, metric=findings.LINEAR):
    where = {"task": "t", "label": "x", "site": "pooled", "fraction": 1.0, "metric": metric}
    found = {"value": value, "low": low, "high": high, "reason": None, "n_patients": 50}
    return {"features": features, **where, **found}


def evaluation(*differences):
    return {
        "tasks": [{"name": "t", "labels": ["x"], "site": None, "folds": None}], "trained": "federated",
        "features": ["federated", "pixels"], "bootstrap": 9, "scored_split": "test", "keep": "dense",
        "rows": [cell("federated", 0.7, 0.6, 0.8), cell("pixels", 0.75, 0.65, 0.85)],
        "differences": differences,
    }  # fmt: skip


@pytest.mark.parametrize(("low", "high", "words"), [
    (-0.08, -0.02, "That is worse than raw 16 × 16 pixels (by 5 pairs in 100, interval 2 to 8)."),
    (-0.08, 0.0, "No difference could be shown from raw 16 × 16 pixels."),
    (-0.08, 0.01, "No difference could be shown from raw 16 × 16 pixels."),
    (None, None, "It cannot be compared with raw 16 × 16 pixels."),
])  # fmt: skip
def test_words_follow_the_interval(low, high, words):
    ((title, text),) = findings.sentences(evaluation(cell("federated - pixels", -0.05, low, high)))
    assert title == "t" and text.endswith(words) and "in 70 of 100 pairs (95 % interval 60 to 80)" in text


def test_better_needs_an_interval_above_zero():
    ((_, text),) = findings.sentences(evaluation(cell("federated - pixels", 0.05, 0.01, 0.09)))
    assert "That is better than raw 16 × 16 pixels (by 5 pairs in 100, interval 1 to 9)." in text


@pytest.mark.parametrize("seed", range(4))
def test_box_recall_equals_counting_pixels(seed):
    g = np.random.Generator(np.random.PCG64(seed))
    mask = g.random((4, 4)) < 0.5
    pixels = np.repeat(np.repeat(mask, 8, 0), 8, 1)  # a 32 px image
    boxes = np.c_[g.integers(0, 24, (5, 2)), g.integers(1, 8, (5, 2))].astype(float)
    expected = [pixels[int(y) : int(y + h), int(x) : int(x + w)].mean() for x, y, w, h in boxes]
    np.testing.assert_allclose(box_recall(mask, boxes, 32), expected)
    assert box_recall(mask, np.zeros((0, 4)), 32).shape == (0,)


def test_overlays_show_what_the_method_keeps(trained):
    opened = read_run(trained)
    dataset = run_dataset(opened, show=False)
    method = load_method(opened.config, read_round(trained, 2).tensors)
    drawn = overlays(method, dataset, 4, 0)
    assert [len(o.panels) for o in drawn] == [4] * 4
    assert all(o.kept_of_boxes is not None and 0 <= o.kept_of_boxes <= 1 for o in drawn)
    assert len({o.site for o in drawn[:3]}) == 3  # hospitals in turn
    assert drawn == overlays(method, dataset, 4, 0)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn[0].panels[0].split(",")[1]))))
    assert picture.shape == (224, 224, 3) and picture.std() > 5
    scores, kept, grid = look(method, dataset.images[:5])
    assert scores.shape == (5, grid[0] * grid[1]) and kept_mask(kept[0], grid).sum() == kept.shape[1]


def test_selection_recall_is_one_when_everything_is_kept_and_knows_its_chance(trained):
    opened = read_run(trained)
    dataset = run_dataset(opened, show=False)

    class Everything:
        backbone = load_method(opened.config, read_round(trained, 2).tensors).backbone

        def look(self, images):
            cells = self.backbone.num_cells
            kept = np.tile(np.arange(cells), (len(images), 1))
            import torch

            from sparsecontrast.methods.method import Look

            return Look(torch.zeros(kept.shape), torch.from_numpy(kept), self.backbone.grid)

    found = selection_recall(Everything(), dataset, 20, 0)
    rows = [*found["kinds"], *found["sizes"]]
    assert found["chance"] == 1 and all(k["value"] == pytest.approx(1, abs=1e-5) for k in rows)
    assert sum(k["n_boxes"] for k in found["kinds"]) == sum(k["n_boxes"] for k in found["sizes"])
    assert selection_spread(Everything(), dataset, 0) is None
    real = selection_recall(load_method(opened.config, read_round(trained, 2).tensors), dataset, 20, 0)
    assert real["chance"] < 1 and all(0 <= k["low"] <= k["value"] <= k["high"] <= 1 for k in real["kinds"])


def test_a_healthy_choice_is_said_calmly(run):
    page = Page(read(run))
    assert "The regions kept in full detail follow the image" in page.text and "Alarm:" not in page.text
    assert "letters of several greys and sizes were stamped" in page.text
    assert "half a cell to 2 cells" in page.text and 'class="warn alarm"' not in read(run)


def test_a_choice_that_ignores_the_image_raises_the_alarm(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", "selection=attention")

    def collapsed(config, tensors):
        # what follows the dead convolution sees its bias and the padding: one map for all images
        return load_method(config, {k: v * (k != "saliency.conv1.weight") for k, v in tensors.items()})

    monkeypatch.setattr("sparsecontrast.evaluation.load_method", collapsed)
    spread = evaluate_run(folder, show=False)["selection"]["spread"]
    assert spread["foretold"] == 1 and "foretold" in spread["alarms"]
    text = read(folder)
    assert 'class="warn alarm"' in text and "same places whatever the image shows" in Page(text).text
    assert "follow the image" not in text


def test_a_choice_that_letters_draw_raises_the_alarm(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", "selection=attention")

    def drawn(config, tensors):
        method = load_method(config, tensors)
        grid = method.backbone.grid
        # the thinnest bright stroke of each cell, and no mask
        strokes = lambda x: x - F.avg_pool2d(x, 5, 1, 2)  # noqa: E731
        method._scores = lambda x, generator=None: F.adaptive_max_pool2d(strokes(x), grid).flatten(1)
        method._masked = lambda images, scores: scores
        return method

    monkeypatch.setattr("sparsecontrast.evaluation.load_method", drawn)
    spread = evaluate_run(folder, show=False)["selection"]["spread"]
    assert spread["marker_pull"] > 0.2 and "marker_pull" in spread["alarms"]
    text = Page(read(folder)).text
    kept = f"{100 * (spread['marker_pull'] + spread['marker_base']):.0f} %"
    assert "burnt-in text draws the model's choice" in text and f"{kept} of the regions with a letter" in text


def test_a_choice_that_is_not_learned_is_not_judged(tmp_path):
    folder = make_run(tmp_path / "run", "selection=centre", "data.phantom.patients_per_site=12")
    selection = evaluate_run(folder, show=False)["selection"]
    assert "spread" not in selection and selection["kinds"]
    assert "Alarm:" not in read(folder) and "follow the image" not in read(folder)


def numbers(svg, tag, key):
    return [float(e.get(key)) for e in ET.fromstring(svg).iter(tag)]


def test_charts_are_well_formed_and_escape():
    nan = float("nan")
    line = line_chart([Line(EVIL, [1, 2, 3, 4], [1.0, nan, 2.0, 1.5])], EVIL, "x", "y")
    path = next(ET.fromstring(line).iter("path")).get("d")
    assert path.count("M") == 2 and "nan" not in path  # a gap, not an invented point
    dots = dot_chart([(EVIL, [Dot("a", 0.6, 0.5, 0.7), Dot(EVIL, 0.9, None, None, True)])], EVIL, "x", 0.5)
    low, high = numbers(dots, "circle", "cx")
    assert low < high
    bars = bar_chart([Bar(EVIL, [3, 1]), Bar("b", [0, 8])], ["p", EVIL], EVIL, "x")
    widths = sorted(
        float(r.get("width")) for r in ET.fromstring(bars).iter("rect") if r.get("height") == "15"
    )
    assert np.allclose(np.array(widths) / widths[0], [1, 3, 8], rtol=0.01)
    for svg in (line, dots, bars):
        assert "<script" not in svg
    assert (
        line_chart([], "a", "x", "y") == ""
        and dot_chart([], "a", "x") == ""
        and bar_chart([], [], "a", "x") == ""
    )
    ticks = [
        e.text
        for e in ET.fromstring(line_chart([Line("a", [1], [14.9])], "a", "x", "y", zero=True)).iter("text")
    ]
    assert "0" in ticks
    ET.fromstring(line_chart([Line("flat", [1], [0.0])], "a", "x", "y"))
