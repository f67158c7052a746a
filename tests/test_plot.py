"""Pictures: what matplotlib is given, and what the page contains and computes."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from fastattn import masks, plot


@pytest.fixture
def pyplot():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed").use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def softmax_rows(*shape, seed=0):
    weights = np.random.default_rng(seed).gamma(0.3, size=shape)
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


# --- matplotlib ---

def test_heatmap_shows_the_weights_with_tokens_on_the_axes(pyplot):
    weights = softmax_rows(3, 4)
    ax = plot.heatmap(weights, ["a", "$b", "c"], ["w", "x", "y", "z"], title="a head")
    np.testing.assert_array_equal(ax.images[0].get_array(), weights)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", r"\$b", "c"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["w", "x", "y", "z"]
    assert ax.get_title() == "a head" and ax.images[0].get_clim() == (0, weights.max())
    ax.figure.canvas.draw()


def test_tokens_of_keys_are_those_of_queries_by_default(pyplot):
    ax = plot.heatmap(softmax_rows(2, 2), ["one", "two"])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["one", "two"]
    ax = plot.heatmap(softmax_rows(2, 3), ["one", "two"])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "2"]


def test_many_tokens_are_thinned_out(pyplot):
    n = 5 * plot.MOST_LABELS
    ax = plot.heatmap(softmax_rows(n, n), range(n), ax=pyplot.figure().subplots())
    assert list(ax.get_xticks()) == list(range(0, n, 5))
    assert ax.get_yticklabels()[1].get_text() == "5"


@pytest.mark.parametrize(("H", "columns", "places"), [(1, 4, 1), (3, 2, 4), (8, 4, 8)])
def test_heads_draws_each_head_once(pyplot, H, columns, places):
    weights = softmax_rows(H, 5, 5)
    figure = plot.heads(weights, list("abcde"), columns=columns)
    assert len(figure.axes) == places
    for h, ax in enumerate(figure.axes[:H]):
        np.testing.assert_array_equal(ax.images[0].get_array(), weights[h])
        assert ax.get_title() == f"head {h}"
    assert not any(ax.axison for ax in figure.axes[H:])
    # Labels at the left, and below the last picture of each column.
    shown = [ax.get_xlabel() == "key" for ax in figure.axes[:H]], [ax.get_ylabel() == "query" for ax in figure.axes[:H]]
    width = min(H, columns)
    assert shown == ([h + width >= H for h in range(H)], [h % width == 0 for h in range(H)])


def test_masks_are_drawn_by_their_definition(pyplot):
    causal, two = masks.causal(), masks.lengths([2, 3])
    ax = plot.mask(causal, 4, 6)
    np.testing.assert_array_equal(ax.images[0].get_array(), causal.to_dense(4, 6))
    assert ax.get_title() == "causal(): 75.0%"
    figure = plot.masks([causal, two, masks.window(1)], 4, 6, columns=2)
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), two.to_dense(4, 6)[0, 0])
    assert len(figure.axes) == 4


@pytest.mark.parametrize("call", [
    lambda: plot.heatmap(np.ones((2, 2))), lambda: plot.heads(np.ones((1, 2, 2))),
    lambda: plot.mask(masks.causal(), 2, 2), lambda: plot.masks([masks.causal()], 2, 2)])
def test_without_matplotlib_an_error_says_what_to_install(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "fastattn\[plot\]"'):
        call()


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: plot.heatmap(np.ones((1, 2, 2))), ValueError, r"weights must have shape \(L, S\), got \(1, 2, 2\)"),
    (lambda: plot.heatmap(np.ones((2, 2), int)), TypeError, "weights must hold floats, got int64"),
    (lambda: plot.heatmap(np.ones((2, 2)), ["a"]), ValueError, "tokens must have one for each of 2, got 1"),
    (lambda: plot.heatmap(np.ones((2, 2)), key_tokens="abc"), ValueError, "key_tokens must have one for each of 2"),
    (lambda: plot.heads(np.ones((2, 2))), ValueError, r"weights must have shape \(H, L, S\)"),
    (lambda: plot.heads(np.ones((2, 2, 2)), titles=["a"]), ValueError, "titles must have one for each of 2 heads"),
    (lambda: plot.heads(np.ones((2, 2, 2)), columns=0), ValueError, "columns must be at least 1, got 0"),
])
def test_wrong_arguments(call, error, message, pyplot):
    with pytest.raises(error, match=message):
        call()


# --- the page ---

class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._inside = [], [], None
        self.title = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside == "title":
            self.title += data


def read_back(page):
    data = json.loads(page.scripts[0])
    shape = len(data["queries"]), len(data["keys"])
    layers = [np.frombuffer(base64.b64decode(layer["weights"]), "<f2").reshape(layer["heads"], *shape)
              for layer in data["layers"]]
    return data["queries"], data["keys"], layers


def test_the_page_holds_the_weights_and_tokens(tmp_path):
    weights = softmax_rows(2, 3, 4, 5)
    path = plot.html(weights, list("abcd"), tmp_path / "page.html", list("vwxyz"), title="Heads & <layers>")
    page = Page(path.read_text("utf-8"))
    queries, keys, layers = read_back(page)
    assert (queries, keys, page.title) == (list("abcd"), list("vwxyz"), "Heads & <layers>")
    np.testing.assert_array_equal(layers, weights.astype(np.float16))
    # What the docstring promises of float16.
    assert (abs(np.array(layers, np.float64) - weights) <= np.maximum(2.0**-11 * weights, 2.0**-25)).all()


def test_the_page_needs_no_network(tmp_path):
    text = plot.html(softmax_rows(3, 3), None, tmp_path / "page.html").read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|fetch\(|XMLHttpRequest", text)
    tags = Page(text).tags
    assert not [tag for tag, attrs in tags if tag in ("link", "img", "iframe") or {"src", "href"} & set(attrs)]
    policy = next(attrs["content"] for tag, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")


def test_tokens_cannot_break_out_of_the_script(tmp_path):
    tokens = ["</script><script>alert(1)</script>", "<!--", '"\\', "é\u2028", "{{title}}", "{{data}}"]
    text = plot.html(softmax_rows(6, 6), tokens, tmp_path / "page.html").read_text("utf-8")
    page = Page(text)
    assert len(page.scripts) == 2 and read_back(page)[0] == tokens


def test_layers_may_differ_in_heads(tmp_path):
    layers = [softmax_rows(2, 3, 3), softmax_rows(1, 3, 3).astype(np.float16)]
    _, _, found = read_back(Page(plot.html(layers, "abc", tmp_path / "page.html").read_text("utf-8")))
    for a, b in zip(found, layers, strict=True):
        np.testing.assert_array_equal(a, b.astype(np.float16))


@pytest.mark.parametrize(("weights", "message"), [
    (np.ones(3), r"weights must have shape \(L, S\), \(H, L, S\) or \(layers, H, L, S\), got \(3,\)"),
    ([], "weights must have at least one layer"),
    ([np.ones((1, 2, 2)), np.ones((1, 3, 2))], r"same L and S in all layers, got \(2, 2\) and \(3, 2\)"),
    (np.full((2, 2), -0.5), r"weights must be in \[0, 65504\], got -0.5 to -0.5"),
    (np.full((2, 2), np.nan), r"weights must be in \[0, 65504\], got nan"),
    (np.full((2, 2), 65505.0), r"weights must be in \[0, 65504\]"),
])
def test_the_page_refuses_what_it_cannot_show(weights, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot.html(weights, None, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


# As much of a browser as the page asks for: elements that remember what is done to them.
BROWSER = r"""
class Element {
  constructor(tag) { this.tag = tag; this.children = []; this.style = {}; this.drawn = []; this.classes = new Set(); }
  get classList() { return {toggle: (name, on) => on ? this.classes.add(name) : this.classes.delete(name)}; }
  append(...xs) { this.children.push(...xs); }
  replaceChildren(...xs) { this.children = xs; }
  getContext() {
    const element = this;
    return new Proxy({}, {get: (_, name) =>
      name === "createImageData" ? (w, h) => ({data: new Uint8ClampedArray(4 * w * h)}) :
      name === "measureText" ? text => ({width: 7 * text.length}) :
      (...xs) => { element.drawn.push([name, xs]); }, set: () => true});
  }
}
const elements = {}, matrixCanvas = new Element("canvas");
for (const id of ["data", "grid", "status", "queries", "keys", "root", "how", "apart"]) elements[id] = new Element(id);
elements.data.textContent = require("fs").readFileSync(0, "utf-8");
elements.root.checked = false;
globalThis.document = {getElementById: id => elements[id], querySelector: () => matrixCanvas,
                       createElement: tag => new Element(tag)};
"""
QUESTIONS = r"""
const spans = elements.keys.children.filter(x => x instanceof Element);
const answers = {weights: layers.map(layer => Array.from(layer.weights)), thumbnails: []};
for (const line of elements.grid.children) answers.thumbnails.push(line.children.slice(1).map(x => x.title));
answers.image = Array.from(plain.drawn.filter(x => x[0] === "putImageData").pop()[1][0].data);
elements.grid.children[1].children[1].onclick();          // layer 1, head 0
matrixCanvas.onmousemove({offsetX: left + 1.5 * cell, offsetY: top_ + 2.5 * cell});
answers.status = elements.status.textContent;
answers.marked = small.filter(x => x.canvas.classes.has("chosen")).map(x => [x.l, x.h]);
answers.titles = spans.map(span => span.title);
answers.chosen = elements.queries.children.filter(x => x instanceof Element).map(x => x.classes.has("chosen"));
console.log(JSON.stringify(answers));
"""


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def ask(path, questions):
    """What the page's script answers to more script."""
    page = Page(path.read_text("utf-8"))
    script = path.with_suffix(".js")
    script.write_text(BROWSER + page.scripts[1] + questions, "utf-8")
    run = subprocess.run(["node", script], input=page.scripts[0], capture_output=True, text=True, timeout=60,
                         encoding="utf-8")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@needs_node
def test_a_text_that_attends_to_itself_is_shown_once(tmp_path):
    weights = softmax_rows(3, 3)
    answers = ask(plot.html(weights, list("abc"), tmp_path / "page.html"), r"""
querySpans[1].onmouseenter();
const first = querySpans.map(span => span.title);
querySpans[2].onclick();                                  // kept: others under the pointer are keys now
querySpans[0].onmouseenter();
console.log(JSON.stringify({first, row, status: elements.status.textContent, hidden: elements.apart.style.display}));
""")
    np.testing.assert_allclose(list(map(float, answers["first"])), weights[1].astype(np.float16), rtol=5.1e-3)
    assert answers["row"] == 2 and answers["hidden"] == "none"
    assert answers["status"].startswith("layer 0, head 0: query 2 “c”, key 0 “a”: ")


@needs_node
def test_the_script_shows_what_it_was_given(tmp_path):
    weights = softmax_rows(2, 2, 3, 4)
    weights[0, 0, 0] = 0, 1e-7, 5e-5, 1 - 5e-5      # zero, and numbers below float16's normal ones
    answers = ask(plot.html(weights, list("abc"), tmp_path / "page.html", list("wxyz")), QUESTIONS)
    half = weights.astype(np.float16)
    np.testing.assert_array_equal(np.array(answers["weights"], np.float32), half.reshape(2, -1).astype(np.float32))
    assert answers["thumbnails"] == [["layer 0, head 0", "layer 0, head 1"], ["layer 1, head 0", "layer 1, head 1"]]
    # The first head's picture: darkest (8, 48, 107) where the weight is largest, white where it is 0.
    image = np.reshape(answers["image"], (3, 4, 4))
    assert tuple(image[0, 0]) == (255, 255, 255, 255)
    assert tuple(image[np.unravel_index(half[0, 0].argmax(), (3, 4))]) == (8, 48, 107, 255)
    # A pointer over query 2 and key 1 of another head.
    assert answers["chosen"] == [False, False, True] and answers["marked"] == [[1, 0]]
    assert answers["status"].startswith("layer 1, head 0: query 2 “c”, key 1 “x”: ")
    shown = [float(answers["status"].split()[-1]), *map(float, answers["titles"])]
    exact = half[1, 0, 2].astype(float)
    np.testing.assert_allclose(shown, [exact[1], *exact], rtol=5.1e-3)      # 3 digits


# --- in a browser ---

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
LISTEN = r"""<script>
const problems = [];
addEventListener("error", event => problems.push(event.message));
addEventListener("securitypolicyviolation", event => problems.push(event.blockedURI));
for (const kind of ["warn", "error"]) console[kind] = (...all) => problems.push(all.join(" "));
</script>"""
USE = r"""<pre id="answers"></pre><script>
function point(canvas, i, j) {
  const box = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new MouseEvent("mousemove",
    {clientX: box.left + left + (j + .5) * cell, clientY: box.top + top_ + (i + .5) * cell, bubbles: true}));
  return document.getElementById("status").textContent;
}
function pixel(canvas, i, j) {
  return Array.from(canvas.getContext("2d").getImageData(left + (j + .5) * cell, top_ + (i + .5) * cell, 1, 1).data);
}
const answers = {thumbnails: document.querySelectorAll("#grid canvas").length, heads: []};
document.querySelectorAll("#grid canvas").forEach((thumbnail, n) => {
  thumbnail.click();
  answers.heads.push({marked: document.querySelectorAll("#grid .chosen").length,
                      chosen: thumbnail.classList.contains("chosen"), status: point(matrix, 2, 1),
                      darkest: pixel(matrix, 0, 3), lightest: pixel(matrix, 0, 0)});
});
const span = document.querySelectorAll("#queries span")[1];
span.dispatchEvent(new MouseEvent("mouseenter"));
const keys = Array.from(document.querySelectorAll("#keys span"));
answers.row = keys.map(key => Number(key.title));
answers.colours = keys.map(key => getComputedStyle(key).backgroundColor);
answers.visible = keys.every(key => key.getBoundingClientRect().height > 5);
answers.requests = performance.getEntriesByType("resource").map(entry => entry.name);
answers.problems = problems;
document.getElementById("answers").textContent = JSON.stringify(answers);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_in_chromium(tmp_path):
    weights = softmax_rows(2, 2, 3, 4)
    weights[:, :, 0] = 0, 0.1, 0.2, 0.7
    path = plot.html(weights, list("abc"), tmp_path / "page.html", list("wxyz"))
    text = path.read_text("utf-8")
    path.write_text(text.replace("<style>", LISTEN + "<style>", 1).replace("</body>", USE + "</body>"), "utf-8")
    # Without the sandbox, which root and most containers cannot have: the page is ours.
    run = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                          f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
                         capture_output=True, text=True, timeout=120, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    answers = json.loads(re.search(r'<pre id="answers">(.*?)</pre>', run.stdout).group(1))
    half = weights.astype(np.float16).astype(float)
    assert answers["problems"] == [] and answers["requests"] == []
    assert answers["thumbnails"] == 4
    for n, found in enumerate(answers["heads"]):
        layer, head = divmod(n, 2)
        assert found["chosen"] and found["marked"] == 1
        assert found["status"].startswith(f"layer {layer}, head {head}: query 2 “c”, key 1 “x”: ")
        np.testing.assert_allclose(float(found["status"].split()[-1]), half[layer, head, 2, 1], rtol=5.1e-3)
        # Shades between white, 0, and dark blue, the head's largest weight.
        share = half[layer, head, 0, 3] / half[layer, head].max()
        shade = np.array([255, 255, 255]) - share * np.array([247, 207, 148])
        assert abs(np.array(found["darkest"][:3]) - shade).max() <= 1       # rounding
        assert found["lightest"] == [255, 255, 255, 255]
    np.testing.assert_allclose(answers["row"], half[1, 1, 1], rtol=5.1e-3)      # 3 digits
    assert answers["visible"] and len(set(answers["colours"])) > 1
