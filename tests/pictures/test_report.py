"""The report: the figures that runs are compared by, and a page that needs no other file and fits the window."""

import re
from html.parser import HTMLParser

from pipeline.params import Params, load_params
from pipeline.pictures.report import Heading, build_page, draw_curves, list_changes, summarise_run
from pipeline.prefix.params import PrefixParams
from pipeline.quantization.params import QuantizerInitParams
from stages.report import read_settings
from tests.conftest import ROOT


def evaluation(perplexity, **more):
    settings = {"windows": {"prose": 2}, "targets_per_window": 47, "special_tokens": "none added"}
    return {"perplexity": {"prose": perplexity}, "settings": settings} | more


EVALUATIONS = {
    "original": evaluation(2.0, tasks={"colours": {"acc": 0.5}}),
    "export": evaluation(3.0, tasks={"colours": {"acc": 0.25}}, kl={"prose": 0.125}, average={"acc": 0.4}),
}
PREFIX = {
    "prefix_texts": [" the", "<s>"],
    "outlier_tokens_per_window": 1.0,
    "outlier_tokens_per_window_with_prefix": 0.0,
    "top1_median_ratio": 2000.0,
    "top1_median_ratio_with_prefix": 40.0,
}
SATURATION = [{"block": 3, "key_share": 0.02, "key_sqnr": 11.5, "value_share": 0.0, "value_sqnr": 30.0}]
COSTS = {"model": {"seconds": 90.0, "peak_rss_gib": 0.5}, "export": {"seconds": 30.0, "peak_rss_gib": 1.25}}


def test_summary_of_a_hand_made_run():
    assert summarise_run("W4A4KV4 static", "found (3 tokens)", EVALUATIONS, COSTS, 12.5) == {
        "bits": "W4A4KV4 static",
        "prefix": "found (3 tokens)",
        "ppl": {"prose": 3.0},
        "ratio": {"prose": 1.5},
        "accuracy": {"colours": 0.25},
        "average_accuracy": 0.4,
        "minutes": 2.0,
        "gib": 1.25,
        "mib": 12.5,
    }


HEADING = Heading(
    model="packaged:tiny",
    date="2026-01-31",
    revision="abc1234-dirty",
    versions={"torch": "2.13.0"},
    device="cpu",
    size_mib=12.5,
    original_mib=50.0,
    corpora={"prose": "data/prose", "news": "news"},
)
SAMPLES = {
    "original": [{"prompt": "Once <b>", "token_ids": [1, 2, 3], "pieces": [" upon", " a", " time"]}],
    "quantizer_init": [{"prompt": "Once <b>", "token_ids": [1, 4], "pieces": [" upon", " <i>"]}],
    "finetuning": [{"prompt": "Once <b>", "token_ids": [1, 2], "pieces": [" upon", " a"]}],
}


def build(evaluations=EVALUATIONS, settings=None, pictures=(), costs=COSTS, samples=None, changes=None):
    summary = summarise_run("W4A4KV4 static", "found", evaluations, costs, 12.5)
    return build_page(
        summary,
        heading=HEADING,
        samples=SAMPLES if samples is None else samples,
        changes=changes,
        evaluations=evaluations,
        prefix=PREFIX,
        saturation=SATURATION,
        costs=costs,
        settings=settings or {},
        pictures=pictures,
    )


def test_a_platform_without_memory_figures_leaves_them_out():
    costs = {"model": {"seconds": 90.0}, "export": {"seconds": 30.0}}
    assert "gib" not in summarise_run("W4A4KV4 static", "found", EVALUATIONS, costs, 12.5)
    page = build(costs=costs)
    assert "<td>model</td><td>90.0</td><td></td>" in page
    assert "<td>model</td><td>90.0</td><td>0.50</td>" in build()


def test_page_needs_no_other_file_and_escapes_its_content(tmp_path):
    picture = tmp_path / "curve.png"
    rows = [{"epoch": "0", "train": "", "validation": "2.0"}, {"epoch": "1", "train": "1.5", "validation": "1.0"}]
    assert draw_curves(picture, rows, x="epoch", columns=("train", "validation"), title="a", y_label="b")
    assert not draw_curves(tmp_path / "none.png", [], x="epoch", columns=("train",), title="a", y_label="b")
    page = build(settings={"model": {"source": "a<b"}}, pictures=[picture])
    assert "&lt;s&gt;" in page
    assert "a&lt;b" in page
    assert "<s>" not in page
    assert "<tr><th></th><th>original</th><th>export</th></tr>" in page
    assert "<td>prose, perplexity</td><td>2.00</td><td>3.00</td>" in page
    assert "<td>prose, ratio</td><td>1.00</td><td>1.50</td>" in page
    assert "<td>prose, KL, nats</td><td></td><td>0.125</td>" in page
    assert "<td>prose, top-1 agreement</td><td></td><td></td>" in page
    assert "<td>colours, acc</td><td>0.5</td><td>0.25</td>" in page
    assert "<td>block 3 key</td><td>11.5</td><td>2.00%</td>" in page
    assert page.index("block 3 key") < page.index("block 3 value")
    assert re.findall(r'src="([^"]{,22})', page) == ["data:image/png;base64,"]
    assert "http" not in page


class Boxes(HTMLParser):
    """Collect (tag, its class, the class of the element around it) of every element."""

    def __init__(self, page):
        super().__init__()
        self.around, self.elements, self.viewport, self.style = [""], [], None, ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes.get("class", ""), self.around[-1]))
        if attributes.get("name") == "viewport":
            self.viewport = attributes["content"]
        if tag not in ("meta", "img", "wbr"):
            self.around.append(attributes.get("class", ""))

    def handle_endtag(self, tag):
        self.around.pop()

    def handle_data(self, data):
        if self.elements[-1:] == [("style", "", "")]:
            self.style = self.style or data


def read_rules(style):
    """Return selector -> its declarations, for rules outside of @media."""
    rules = {}
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", re.sub(r"@media.*", "", style)):
        pairs = dict(part.split(":", 1) for part in body.split(";") if ":" in part)
        for selector in selectors.split(","):
            rules.setdefault(selector.strip(), {}).update({k.strip(): v.strip() for k, v in pairs.items()})
    return rules


def test_wide_content_shrinks_breaks_or_scrolls_in_a_box(tmp_path):
    picture = tmp_path / "curve.png"
    assert draw_curves(picture, [{"epoch": 0, "train": 1.0}], x="epoch", columns=("train",), title="a", y_label="b")
    boxes = Boxes(build(settings={"model": {"source": "long/" * 100}}, pictures=[picture]))
    tables = [box for box in boxes.elements if box[0] == "table"]
    assert tables == [("table", name, "table") for name in ("facts", "", "", "")]
    assert {box[0] for box in boxes.elements} >= {"h1", "h2", "p", "pre", "img"}
    assert boxes.viewport == "width=device-width, initial-scale=1"
    rules = read_rules(boxes.style)
    for scrolling in (".table", "pre"):
        assert rules[scrolling]["overflow-x"] == "auto"
        assert rules[scrolling]["max-width"] == "100%"
    assert rules["img"] | {"max-width": "100%", "height": "auto"} == rules["img"]
    assert rules["body"]["overflow-wrap"] == "break-word"
    assert rules["*"]["box-sizing"] == "border-box"  # padding counts: 100 % is never more than the window
    assert not re.search(r"(?<!-)\b(min-)?width: *\d|nowrap", re.sub(r"max-width", "max", boxes.style))


def test_more_corpora_and_tasks_make_the_results_longer_not_wider():
    corpora, tasks = [f"corpus{i}" for i in range(6)], [f"task{i}" for i in range(12)]
    many = {
        name: {
            **EVALUATIONS["original"],
            "perplexity": dict.fromkeys(corpora, 2.0),
            "tasks": {task: {"acc": 0.5} for task in tasks},
        }
        for name in ("original", "original_prefix", "export")
    }
    table = re.search(r"<table>.+?</table>", build(many))[0]
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    assert rows[0] == ["", "original", "original_<wbr>prefix", "export"]  # a narrow window breaks the name there
    assert {len(row) for row in rows} == {4}
    assert len(rows) == 1 + 4 * 6 + 12
    assert rows[-1] == ["task11, acc", "0.5", "0.5", "0.5"]


def test_heading_names_model_revision_versions_sizes_and_corpora():
    page = build()
    for text in ("packaged:tiny", "2026-01-31", "abc1234-dirty", "torch 2.13.0", "12.5 MiB", "50.0 MiB"):
        assert text in page
    assert "prose (data/<wbr>prose), news<" in page


def test_samples_mark_the_first_token_that_differs_from_the_originals():
    page = build()
    assert "<h3>Once &lt;b&gt;</h3>" in page
    assert '<div class="sample"> upon a time</div>' in page
    assert '<div class="sample"> upon<mark> &lt;i&gt;</mark></div>' in page
    assert '<div class="sample"> upon a<mark>(end)</mark></div>' in page
    assert "Samples" not in build(samples={"original": [], "finetuning": []})


def test_changed_settings_come_before_the_folded_list_of_all():
    page = build(settings={"prefix": {"use": "none"}}, changes={"prefix.use": ("found", "none")})
    assert "<td>prefix.use</td><td>&quot;found&quot;</td><td>&quot;none&quot;</td>" in page
    assert page.index("prefix.use") < page.index("<details>") < page.index("use: none")
    assert "All settings are the defaults" in build(changes={})
    assert "default" not in re.sub("<style>.*?</style>", "", build(), flags=re.S)  # no defaults to compare with


def test_changes_of_a_run_are_those_from_the_default_params():
    defaults = read_settings(Params())
    assert list_changes(read_settings(load_params(ROOT / "params.yaml")), defaults) == {}
    changed = Params(prefix=PrefixParams(use="none"), quantizer_init=QuantizerInitParams(mse_samples=8))
    expected = {"prefix.use": ("found", "none"), "quantizer_init.mse_samples": (4, 8)}
    assert list_changes(read_settings(changed), defaults) == expected


def test_changes_are_found_at_any_depth():
    settings = {"a": {"b": {"c": 1, "d": [1]}, "e": 2}, "new": 3}
    defaults = {"a": {"b": {"c": 1, "d": [2]}, "e": None}, "gone": 4}
    expected = {"a.b.d": ([2], [1]), "a.e": (None, 2), "new": (None, 3), "gone": (4, None)}
    assert list_changes(settings, defaults) == expected


def test_every_section_is_linked_from_the_contents():
    page = build()
    links = re.findall(r'<a href="#([a-z-]+)">', page)
    assert links == re.findall(r'<h2 id="([a-z-]+)">', page)
    assert links[0] == "results"


def test_pictures_have_captions(tmp_path):
    picture = tmp_path / "token_maxima_inputs.png"
    assert draw_curves(picture, [{"epoch": 0, "train": 1.0}], x="epoch", columns=("train",), title="a", y_label="b")
    assert "<figcaption>One line far above the others" in build(pictures=[picture])
