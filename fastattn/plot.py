"""Pictures of attention: heat maps of heads, patterns of masks, and a page that a browser opens.

    from fastattn import plot

    weights = fa.attention_weights(query, key)              # (heads, L, S)
    plot.heatmap(weights[0], tokens)
    plot.heads(weights, tokens)
    plot.html(weights, tokens, "attention.html")            # needs no matplotlib; opens without a network

All but `html` need matplotlib: ``pip install "fastattn[plot]"``.
"""

import math
import os

import numpy as np

MOST_LABELS = 64  # of an axis: with more tokens every n-th is written
MOST_SMALL_LABELS = 24  # in a grid
FLOAT16_MAX = 65504.0


def _pyplot():
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('this plot needs matplotlib, which is not installed: pip install "fastattn[plot]"') from error
    return pyplot


def _axes(ax):
    return _pyplot().figure(layout="constrained").subplots() if ax is None else ax


def _array(name, array, axes):
    array = np.asarray(array)
    if array.dtype.kind not in "fb" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must hold floats, got {array.dtype}")
    if array.ndim != len(axes):
        raise ValueError(f"{name} must have shape ({', '.join(axes)}), got {array.shape}")
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def _tokens(tokens, key_tokens, L, S):
    """The tokens of queries and keys as lists of strings; those of the keys are by default those of the queries."""
    if key_tokens is None and (tokens is None or len(tokens) == S):
        key_tokens = tokens
    result = []
    for name, given, n in (("tokens", tokens, L), ("key_tokens", key_tokens, S)):
        given = range(n) if given is None else given
        if len(given) != n:
            raise ValueError(f"{name} must have one for each of {n}, got {len(given)}")
        result.append([str(token) for token in given])
    return result


def _label(axis, tokens, most, size):
    step = max(1, math.ceil(len(tokens) / most))
    at = range(0, len(tokens), step)
    # A dollar sign would start a formula.
    axis.set_ticks(at, [tokens[i].replace("$", r"\$") for i in at], fontsize=size)


def heatmap(weights, tokens=None, key_tokens=None, *, ax=None, title=None, vmax=None, colorbar=True):
    """Draw one head: a row for each query, a column for each key.

    Parameters
    ----------
    weights : array (L, S)
        As of `attention_weights`, not negative.
    tokens, key_tokens : sequences of L and of S, optional
        What is written along the axes, of more than 64 every n-th. Those of the keys are by default those of the
        queries, where L = S; without any, positions.
    ax : matplotlib axes, optional
        Drawn into; by default those of a new figure.
    title : str, optional
    vmax : float, optional
        The weight of the darkest colour. Default: the largest one.
    colorbar : bool
        Draw the scale of colours.

    Returns
    -------
    matplotlib axes

    Raises
    ------
    ImportError
        matplotlib is not installed.
    TypeError, ValueError
        weights that are no array of floats (L, S); another number of tokens.
    """
    weights = _array("weights", weights, "LS")
    tokens, key_tokens = _tokens(tokens, key_tokens, *weights.shape)
    ax = _axes(ax)
    image = _draw(ax, weights, tokens, key_tokens, MOST_LABELS, vmax)
    if title is not None:
        ax.set_title(title)
    if colorbar:
        ax.figure.colorbar(image, ax=ax, shrink=min(1, weights.shape[0] / max(1, weights.shape[1])))
    return ax


def _draw(ax, weights, tokens, key_tokens, most, vmax=None):
    image = ax.imshow(weights, cmap="Blues", vmin=0, vmax=vmax, interpolation="nearest", aspect="equal")
    size = 8 if max(weights.shape) <= most / 2 else 6
    _label(ax.xaxis, key_tokens, most, size)
    _label(ax.yaxis, tokens, most, size)
    if max(map(len, key_tokens), default=0) > 2:
        ax.tick_params(axis="x", labelrotation=90)
    ax.set(xlabel="key", ylabel="query")
    return image


def heads(weights, tokens=None, key_tokens=None, *, columns=4, titles=None):
    """Draw all heads in a grid, each by the largest weight of its own.

    Parameters
    ----------
    weights : array (H, L, S)
    tokens, key_tokens : sequences of L and of S, optional
        As for `heatmap`, but of more than 24 every n-th.
    columns : int
        Heads a row of the grid.
    titles : sequence of H strings, optional
        Default "head 0", "head 1", ...

    Returns
    -------
    matplotlib figure

    Raises
    ------
    ImportError, TypeError, ValueError
        As `heatmap`; fewer than 1 column, another number of titles.
    """
    weights = _array("weights", weights, "HLS")
    titles = [f"head {h}" for h in range(len(weights))] if titles is None else titles
    if len(titles) != len(weights):
        raise ValueError(f"titles must have one for each of {len(weights)} heads, got {len(titles)}")
    tokens, key_tokens = _tokens(tokens, key_tokens, *weights.shape[1:])
    figure, grid = _grid(len(weights), columns)
    for ax, head, title in zip(grid, weights, titles):
        _draw(ax, head, tokens, key_tokens, MOST_SMALL_LABELS)
        ax.set_title(title)
    _label_outer(grid, len(weights), columns)
    return figure


def _grid(n, columns):
    """A figure with places for n pictures, and these in a row."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = max(1, min(columns, n))
    rows = max(1, -(-n // columns))
    figure = _pyplot().figure(figsize=(3 * columns, 3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in grid[n:]:
        ax.set_axis_off()
    return figure, grid


def _label_outer(grid, n, columns):
    """Leave the labels of the first column, and of each column's last picture."""
    columns = min(columns, n)
    for i, ax in enumerate(grid[:n]):
        if i % columns:
            ax.tick_params(axis="y", labelleft=False)
            ax.set_ylabel("")
        if i + columns < n:
            ax.tick_params(axis="x", labelbottom=False)
            ax.set_xlabel("")


def mask(expression, L, S, *, ax=None):
    """Draw who sees whom in a mask, the first list's where it differs between batches or heads.

    ``expression`` is one of `fastattn.masks`; queries go downwards. Returns matplotlib's axes. Also
    ``expression.plot(L, S)``. ImportError, ValueError: without matplotlib; for a mask that does not fit L and S.
    """
    dense = expression.to_dense(L, S)
    ax = _axes(ax)
    ax.imshow(dense[(0,) * len(expression.lead)], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xlabel="key", ylabel="query", title=f"{expression!r}: {dense.mean():.1%}")
    return ax


def masks(expressions, L, S, *, columns=4):
    """Draw several masks in a grid of ``columns``. Returns matplotlib's figure; raises as `mask`."""
    expressions = list(expressions)
    figure, grid = _grid(len(expressions), columns)
    for ax, expression in zip(grid, expressions):
        mask(expression, L, S, ax=ax)
        ax.set_title(ax.get_title(), fontsize=8)
    _label_outer(grid, len(expressions), columns)
    return figure


def html(weights, tokens, path, key_tokens=None, *, title="Attention"):
    """Write a page that shows heads and layers: all in small, one in large, and its weights over the text.

    A browser opens the file as it is: script and data are inside, and nothing is fetched. It shows one cell's query,
    key and weight under the pointer; a query that is pointed at in the text colours the keys that it attends to.

    Parameters
    ----------
    weights : array (L, S), (H, L, S) or (layers, H, L, S), or a sequence of layers (H, L, S)
        Layers may differ in heads. Weights are in [0, 65504].
    tokens : sequence of L, or None
        None: positions.
    path : str or path
    key_tokens : sequence of S, optional
        Default: tokens, where L = S.
    title : str

    Returns
    -------
    path

    Raises
    ------
    TypeError, ValueError
        weights of another kind or shape, negative, not finite or above 65504; another number of tokens.
    OSError
        The file cannot be written.

    Notes
    -----
    Weights are kept as float16, with a relative error of at most 2^-11 (2^-25 absolute below 6.1e-5), in 8 / 3 bytes
    each: 12 layers of 12 heads and 128 tokens make 6.3 MB.
    """
    import base64
    import json
    from html import escape

    layers = _layers(weights)
    tokens, key_tokens = _tokens(tokens, key_tokens, *layers[0].shape[1:])
    data = {
        "queries": tokens,
        "keys": key_tokens,
        "layers": [{"heads": len(layer), "weights": base64.b64encode(layer.astype("<f2").tobytes()).decode()}
                   for layer in layers],
    }
    # No "<": what closes a script would close this one.
    text = json.dumps(data, ensure_ascii=False).replace("<", r"\u003c")
    with open(os.path.join(os.path.dirname(__file__), "view.html"), encoding="utf-8") as file:
        before, after = file.read().split("{{data}}")
    page = before.replace("{{title}}", escape(title)) + text + after
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)
    return path


def _layers(weights):
    """Arrays (H, L, S) of equal L and S."""
    if not isinstance(weights, (list, tuple)):
        weights = np.asarray(weights)
        if weights.ndim not in (2, 3, 4):
            raise ValueError(f"weights must have shape (L, S), (H, L, S) or (layers, H, L, S), got {weights.shape}")
        weights = weights[None] if weights.ndim == 3 else weights[None, None] if weights.ndim == 2 else weights
    layers = [_array("weights", layer, "HLS") for layer in weights]
    if not layers:
        raise ValueError("weights must have at least one layer, got none")
    for layer in layers:
        if layer.shape[1:] != layers[0].shape[1:]:
            raise ValueError(f"weights must have the same L and S in all layers, got {layers[0].shape[1:]} and "
                             f"{layer.shape[1:]}")
        if not (layer.min(initial=0) >= 0 and layer.max(initial=0) <= FLOAT16_MAX):  # NaN is neither
            raise ValueError(f"weights must be in [0, {FLOAT16_MAX:.0f}], got {layer.min()} to {layer.max()}")
    return layers
