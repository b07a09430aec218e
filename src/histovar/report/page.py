"""Write a report as one HTML file with Bokeh; its scripts are in the file, so that it needs no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from bokeh.document import Document
from bokeh.embed import file_html
from bokeh.events import DocumentReady
from bokeh.layouts import column, row
from bokeh.models import (
    BoxZoomTool,
    ColorBar,
    ColumnDataSource,
    CustomJS,
    DataTable,
    Div,
    HoverTool,
    LinearColorMapper,
    NumberFormatter,
    PanTool,
    Range1d,
    ResetTool,
    SaveTool,
    Select,
    Slider,
    StringFormatter,
    TableColumn,
    TabPanel,
    Tabs,
    UIElement,
    WheelZoomTool,
)
from bokeh.palettes import Magma256, Viridis256
from bokeh.plotting import figure
from bokeh.resources import INLINE
from jinja2 import Template
from numpy.typing import NDArray
from PIL import Image

from histovar._atomic import atomic_file
from histovar._version import __version__

from .content import LOWER, MEAN, MEASURED, STD, UPPER, Content, Coverage, Section

# Number of steps between a gene's smallest and largest value: hover values are exact to a thousandth of its range.
STEPS = 1000
# Code of missing values.
MISSING = np.iinfo(np.uint16).max
# Colour scales span these percentiles, so that a single spot does not decide them.
PERCENTILES = (1, 99)
# Longest side of an image in pixels, and its JPEG quality.
LONGEST_SIDE, JPEG_QUALITY = 1600, 85
# Sizes on the page, in pixels.
MAP_SIZE, MAP_CARD_WIDTH, DETAILS_WIDTH, NUMBER_WIDTH, SCROLLBAR_WIDTH = 600, 770, 514, 52, 18
OPACITY = 0.7
GENERATOR = "histovar report"

TEMPLATE = Template(
    """{% extends base %}
{% block preamble %}
<meta name="generator" content="{{ generator }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  body { margin: 0; background: #f4f5f7; }
</style>
{% endblock %}"""
)
CARD = {
    "background": "#ffffff",
    "border": "1px solid #dfe3e8",
    "border-radius": "8px",
    "padding": "14px",
    "box-shadow": "0 1px 2px rgba(31, 41, 51, 0.05)",
}
TEXT = """
:host { font: 14px/1.45 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1f2933; }
h1 { font-size: 22px; margin: 0 0 2px; } h2 { font-size: 15px; margin: 0 0 6px; } p { margin: 0 0 6px; }
.quiet { color: #616e7c; } ul { margin: 0; padding-left: 18px; } li { margin: 2px 0; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 4px 10px 4px 0; border-bottom: 1px solid #edf0f3; }
th { font-weight: 600; color: #52606d; } td.number, th.number { text-align: right; }
"""

# JavaScript: show the selected gene, quantity and section.
SHOW = """
const s = section.options.indexOf(section.value)
const g = gene.options.indexOf(gene.value)
const q = quantity.options.findIndex(([name]) => name == quantity.value)
const {x, y, spot} = sections[s].data
const n = x.length
const data = {x, y, spot}
for (let k = 0; k < quantities.length; k++) {
  const at = code => code == missing ? NaN : lows[k][g] + code * steps[k][g]
  data[quantities[k]] = Float32Array.from({length: n}, (_, i) => at(codes[s][k][g * n + i]))
}
data.shown = data[quantity.value]
spots.data = data
mapper.setv({palette: palettes[q], low: colours[q][0][g], high: colours[q][1][g]})
bar.title = `${quantity.options[q][1]} [${units[q]}]`
map.title.text = sections.length > 1 ? `${gene.value} in ${section.value}` : gene.value
if (images[s] != null) image.data = images[s].data
for (const glyph of picture) glyph.visible = images[s] != null
circle.radius = {value: radii[s]}
"""
# JavaScript: set the axes to the region of the selected section.
FRAME = """
const [left, right, bottom, top] = frames[section.options.indexOf(section.value)]
map.x_range.setv({start: left, end: right, reset_start: left, reset_end: right})
map.y_range.setv({start: bottom, end: top, reset_start: bottom, reset_end: top})
"""
# JavaScript: select the gene of a clicked row of the table.
CHOOSE = "if (cb_obj.indices.length > 0) gene.value = table.data.gene[cb_obj.indices[0]]"


def write_page(content: Content, path: Path) -> None:
    """Write a report as an HTML file.

    Parameters
    ----------
    content
        Content of the report.
    path
        File to write; an existing file is replaced.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    document = Document(title=content.title)
    page, show = _page(content)
    document.add_root(page)
    document.js_on_event(DocumentReady, show)
    variables = {"generator": f"{GENERATOR} {__version__}"}
    html = file_html(document, INLINE, template=TEMPLATE, template_variables=variables)
    with atomic_file(path) as file:
        file.write_text(html, encoding="utf-8")


def _page(content: Content) -> tuple[UIElement, CustomJS]:
    """Make the page, and the script that shows its first gene."""
    table = ColumnDataSource(content.table.reset_index())
    tissue, show = _map(content, table)
    details = [TabPanel(title="Genes", child=_genes(content, table))]
    if content.coverage is not None:
        details.append(TabPanel(title="Calibration", child=_calibration(content.coverage)))
    if content.scores is not None:
        details.append(TabPanel(title="Scores", child=_text(_scores(content.scores))))
    details.append(TabPanel(title="Model", child=_text(_facts(content.facts))))
    tabs = column(Tabs(tabs=details, width=DETAILS_WIDTH), styles=CARD)
    head = [_text(_heading(content), styles={"padding": "4px 2px"})]
    if content.cautions:
        amber = CARD | {"background": "#fffbea", "border": "1px solid #f7d070"}
        head.append(_text(f"<h2>Be careful</h2><ul>{_items(content.cautions)}</ul>", styles=amber))
    body = row(tissue, tabs, spacing=14, styles={"flex-wrap": "wrap"})
    return column(*head, body, spacing=12, sizing_mode="stretch_width", styles={"padding": "16px 20px"}), show


def _text(html: str, **options: Any) -> Div:
    return Div(text=html, stylesheets=[TEXT], sizing_mode="stretch_width", **options)


def _items(sentences: Iterable[str]) -> str:
    return "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)


def _heading(content: Content) -> str:
    summary = (
        f"Expression predicted from H&amp;E: {len(content.genes):,} genes, in {escape(content.units)}. Intervals "
        f"should contain {100 * content.confidence_level:g} % of measured values."
    )
    return f'<h1>{escape(content.title)}</h1><p class="quiet">{summary}</p>'


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts.items())
    return f"<h2>Prediction and model</h2><table>{rows}</table>"


def _scores(scores: pd.DataFrame) -> str:
    """Make the table of scores, one row per score, since there are more scores than sections."""
    head = "".join(f'<th class="number">{escape(str(name))}</th>' for name in scores.index)
    names = [name for name in scores if scores[name].notna().any()]
    cells = ["".join(f'<td class="number">{value:.4g}</td>' for value in scores[name]) for name in names]
    body = "".join(f"<tr><th>{escape(str(name))}</th>{c}</tr>" for name, c in zip(names, cells, strict=True))
    note = '<p class="quiet">By histovar.tl.evaluate; formulas are in the documentation of histovar.</p>'
    return f"<h2>Scores against measured expression</h2>{note}<table><tr><th></th>{head}</tr>{body}</table>"


def _map(content: Content, table: ColumnDataSource) -> tuple[UIElement, CustomJS]:
    """Make the map below the widgets that select its content; clicking a row of the table of genes selects, too."""
    first = content.sections[0]
    quantities = list(first.values)
    labels = _labels(content, quantities)
    lows, steps, codes = _quantized(content.sections, quantities)
    spots = ColumnDataSource({name: [] for name in ("x", "y", "spot", "shown", *quantities)})
    sections = [
        ColumnDataSource({"x": s.coordinates[:, 0], "y": s.coordinates[:, 1], "spot": s.spots})
        for s in content.sections
    ]
    frames = [_frame(s) for s in content.sections]
    images = [_image(s) for s in content.sections]
    image = ColumnDataSource({"url": [], "x": [], "y": [], "w": [], "h": []})
    left, right, bottom, top = frames[0]
    tissue = figure(
        name="map",
        frame_width=MAP_SIZE,
        frame_height=MAP_SIZE,
        x_range=Range1d(left, right),
        y_range=Range1d(bottom, top),
        tools=[PanTool(), BoxZoomTool(match_aspect=True), ResetTool(), SaveTool()],
        x_axis_label="x [pixels of the slide]",
        y_axis_label="y [pixels of the slide]",
        title=" ",
        toolbar_location="above",
    )
    wheel = WheelZoomTool()
    tissue.add_tools(wheel)
    tissue.toolbar.active_scroll = wheel
    tissue.grid.visible = False
    tissue.outline_line_color = None
    tissue.title.text_font_size = "15px"
    picture = tissue.image_url(url="url", x="x", y="y", w="w", h="h", anchor="top_left", source=image)
    # The script sets the range to that of the gene. An initial range reserves room for numbers beside the colour bar.
    mapper = LinearColorMapper(palette=Viridis256, low=0, high=1, nan_color="rgba(0, 0, 0, 0)")
    circles = tissue.circle(
        "x",
        "y",
        radius=first.diameter / 2,
        source=spots,
        fill_color={"field": "shown", "transform": mapper},
        fill_alpha=OPACITY,
        line_color=None,
        hover_line_color="#111111",
    )
    tips = [(labels[name], f"@{{{name}}}{{0.000}}") for name in quantities]
    tissue.add_tools(HoverTool(renderers=[circles], tooltips=[("spot", "@spot"), *tips]))
    bar = ColorBar(color_mapper=mapper, title=" ", width=14, padding=6, title_text_font_style="normal", margin=20)
    tissue.add_layout(bar, "right")

    section = Select(title="Section", value=first.label, options=[s.label for s in content.sections], width=120)
    gene = Select(
        title=f"Gene ({len(content.genes):,})", value=content.table.index[0], options=content.genes, width=190
    )
    quantity = Select(title="Show", value=MEAN, options=[(name, labels[name]) for name in quantities], width=180)
    opacity = Slider(title="Opacity of the spots", start=0, end=1, step=0.05, value=OPACITY, width=150)
    opacity.js_link("value", circles.glyph, "fill_alpha")
    show = CustomJS(
        code=SHOW,
        args={
            **{"section": section, "gene": gene, "quantity": quantity, "sections": sections, "spots": spots},
            **{"quantities": quantities, "codes": codes, "lows": lows, "steps": steps, "missing": MISSING},
            **{"mapper": mapper, "bar": bar, "map": tissue, "colours": _colours(content.sections, quantities)},
            "palettes": [Magma256 if name == STD else Viridis256 for name in quantities],
            **{"units": [content.units] * len(quantities), "images": images, "image": image, "picture": [picture]},
            **{"circle": circles.glyph, "radii": [s.diameter / 2 for s in content.sections]},
        },
    )
    for widget in (section, gene, quantity):
        widget.js_on_change("value", show)
    section.js_on_change("value", CustomJS(code=FRAME, args={"section": section, "frames": frames, "map": tissue}))
    table.selected.js_on_change("indices", CustomJS(code=CHOOSE, args={"gene": gene, "table": table}))
    chooser = row(*([section] if len(sections) > 1 else []), gene, quantity, opacity, spacing=8)
    return column(chooser, tissue, _text(_legend(quantities)), width=MAP_CARD_WIDTH, styles=CARD), show


def _labels(content: Content, quantities: list[str]) -> dict[str, str]:
    """Names of the quantities on the page."""
    tail = 50 * (1 - content.confidence_level)
    names = {
        MEAN: "predicted mean",
        STD: "standard deviation",
        LOWER: f"lower bound ({tail:.3g} %)",
        UPPER: f"upper bound ({100 - tail:.3g} %)",
        MEASURED: "measured",
    }
    return {name: names[name] for name in quantities}


def _legend(quantities: list[str]) -> str:
    shared = "Mean and measured share one colour scale. " if MEASURED in quantities else ""
    return (
        '<p class="quiet">Scroll to zoom, drag to move, point at a spot for its values; click a row of the table of '
        f"genes to see that gene. {shared}The colour scale of a gene is the same in all sections, from the "
        f"{PERCENTILES[0]}st to the {PERCENTILES[1]}th percentile.</p>"
    )


def _quantized(
    sections: list[Section], quantities: list[str]
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]], list[list[NDArray[np.uint16]]]]:
    """Quantise values to whole steps from each gene's smallest value.

    Returns
    -------
    lows, steps
        Smallest value and step, for each quantity (n_genes,).
    codes
        Number of steps, for each section and quantity (n_genes * n_spots,), gene by gene.
    """
    lows, steps = [], []
    codes: list[list[NDArray[np.uint16]]] = [[] for _ in sections]
    for name in quantities:
        values = np.hstack([s.values[name] for s in sections])
        defined = ~np.isnan(values)
        low = values.min(1, where=defined, initial=np.inf)
        low = np.where(np.isfinite(low), low, 0)
        high = np.maximum(values.max(1, where=defined, initial=-np.inf), low)
        step = np.where(high > low, (high - low) / STEPS, 1)
        lows.append(low.astype(np.float32))
        steps.append(step.astype(np.float32))
        for section_codes, s in zip(codes, sections, strict=True):
            code = np.round((s.values[name] - low[:, None]) / step[:, None])
            section_codes.append(np.where(np.isnan(code), MISSING, code).astype(np.uint16).ravel())
    return lows, steps, codes


def _colours(sections: list[Section], quantities: list[str]) -> list[list[NDArray[np.float64]]]:
    """Ends of the colour scale of each quantity and gene; mean and measured share one scale."""
    ends = {}
    for name in quantities:
        values = np.hstack([s.values[name] for s in sections])
        defined = np.asarray(np.isfinite(values).all(1))
        ends[name] = np.percentile(np.where(defined[:, None], values, 0), PERCENTILES, axis=1)
        if not defined.all():  # genes that were not measured
            ends[name] = np.where(defined, ends[name], ends[MEAN])
    if MEASURED in ends:
        low = np.minimum(ends[MEAN][0], ends[MEASURED][0])
        ends[MEAN] = ends[MEASURED] = np.stack([low, np.maximum(ends[MEAN][1], ends[MEASURED][1])])
    return [[low, np.maximum(high, low + 1e-6)] for low, high in ends.values()]


def _frame(section: Section) -> tuple[float, float, float, float]:
    """Square around the image or the spots: left, right, bottom, top; y runs down."""
    left, top, right, bottom = section.corners
    half = max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - half, x + half, y + half, y - half


def _image(section: Section) -> ColumnDataSource | None:
    """Encode the H&E image as JPEG for the page."""
    if section.image is None:
        return None
    picture = Image.fromarray(np.ascontiguousarray(section.image))
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    left, top, right, bottom = section.corners
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return ColumnDataSource({"url": [url], "x": [left], "y": [top], "w": [right - left], "h": [bottom - top]})


def _genes(content: Content, table: ColumnDataSource) -> UIElement:
    """Make the table of genes, the best predicted first if known."""
    titles = {
        "mean": "mean",
        "std": "sd",
        "pearson": "r here",
        "expected_pearson": "exp. r",
        "lower": "from",
        "upper": "to",
        "share_of_ceiling": "share",
        "q_value": "q",
    }
    explanations = {
        "mean": "mean and sd: average predicted mean and standard deviation over all spots",
        "pearson": "r here: Pearson correlation of prediction and measurement within sections, averaged",
        "expected_pearson": f"exp. r: expected correlation, with its interval, on {content.expected_on}",
        "share_of_ceiling": "share: expected correlation over the largest that counting noise allows",
        "q_value": "q: false discovery rate of calling the gene predictable",
    }
    available = [name for name in titles if name in content.table]
    name_width = DETAILS_WIDTH - SCROLLBAR_WIDTH - NUMBER_WIDTH * len(available)
    columns = [TableColumn(field="gene", title="gene", formatter=StringFormatter(font_style="bold"), width=name_width)]
    for name in available:
        formatter = NumberFormatter(
            format="0.0000" if name == "q_value" else "0.00", nan_format="-", text_align="right"
        )
        columns.append(TableColumn(field=name, title=titles[name], formatter=formatter, width=NUMBER_WIDTH))
    grid = DataTable(
        source=table,
        columns=columns,
        index_position=None,
        width=DETAILS_WIDTH,
        height=560,
        row_height=26,
        reorderable=False,
        autosize_mode="none",
        name="genes",
    )
    notes = _items(explanations[name] for name in available if name in explanations)
    return column(grid, _text(f'<ul class="quiet">{notes}</ul>'), width=DETAILS_WIDTH)


def _calibration(coverage: Coverage) -> UIElement:
    """Plot coverage against nominal level, like :func:`histovar.pl.calibration`."""
    shares, covered = coverage.shares, coverage.covered
    low, high = np.quantile(covered, [0.1, 0.9], axis=1)
    chart = figure(
        width=DETAILS_WIDTH - 40,
        height=DETAILS_WIDTH - 60,
        x_range=Range1d(0, 1),
        y_range=Range1d(0, 1),
        x_axis_label="nominal level of the interval",
        y_axis_label="share of spots inside",
        toolbar_location=None,
        title=f"{coverage.kind}, {'calibrated' if coverage.calibrated else 'not calibrated'}",
    )
    chart.line([0, 1], [0, 1], color="#7b8794", line_dash="dashed")
    chart.varea(shares, low, high, color="#2b6cb0", alpha=0.2, legend_label="middle 80 % of genes")
    chart.line(shares, covered.mean(1), color="#2b6cb0", width=2, legend_label="mean over genes")
    source = ColumnDataSource({"nominal": shares, "inside": covered.mean(1)})
    points = chart.scatter("nominal", "inside", source=source, color="#2b6cb0", size=6)
    tips = [("nominal", "@nominal{0.00}"), ("inside", "@inside{0.000}")]
    chart.add_tools(HoverTool(renderers=[points], tooltips=tips))
    chart.legend.location = "top_left"
    chart.legend.border_line_color = None
    chart.outline_line_color = None
    text = (
        '<p class="quiet">Intervals are right on the dashed line, too wide above it, too narrow below it. Measured on '
        f"{coverage.n_spots:,} spots of all sections.</p>"
    )
    return column(chart, _text(text), width=DETAILS_WIDTH)
