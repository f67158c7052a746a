"""The examples at reduced sizes: what they compute against what it should be, and that each runs as a script."""

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastattn import _runtime

EXAMPLES = Path(__file__).parents[1] / "examples"
U32 = 2.0**-24


def skip_without(packages):
    # Looked for and not imported: of some only the data is used.
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def load(name, *needs):
    skip_without(needs)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


NEEDS = {
    "karate_club": ["scipy"],
    "date_translation": ["torch"],
    "character_gpt": ["torch"],
    "digits_vit": ["torch", "sklearn"],
    "object_queries": ["torch", "sklearn", "scipy", "PIL"],
    "atom_mapping": ["torch", "rxnmapper"],
    "audio_window": ["moonshine_onnx"],
    "convolution": [],
    "habits": [],
    "listops": ["torch"],
    "time_series": ["torch", "aeon"],
}
DRAWS = {"date_translation", "digits_vit", "object_queries", "atom_mapping", "audio_window", "convolution",
         "time_series"}


def test_every_example_is_listed():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == set(NEEDS)
    table = (EXAMPLES / "README.md").read_text("utf-8")
    assert all(f"[`{name}.py`]({name}.py)" in table for name in names)


@pytest.mark.compiled       # these and the trainings would take the reference minutes
@pytest.mark.parametrize("name", NEEDS)
def test_runs_as_a_script(name, tmp_path, monkeypatch, capsys):
    # In this process: most of a second one's time would go to importing torch.
    if _runtime.isa() != _runtime.available[0]:
        pytest.skip(f"scripts run on {_runtime.available[0]}, the best of this machine; their functions on each")
    skip_without(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / f"{name}.py"), "--small"])
    monkeypatch.setenv("MPLBACKEND", "Agg")
    runpy.run_path(sys.argv[0], run_name="__main__")
    written = capsys.readouterr().out
    assert written.strip()
    if name in DRAWS and importlib.util.find_spec("matplotlib"):
        from matplotlib import pyplot

        pyplot.close("all")
        assert list(tmp_path.glob("*.png")), written


@pytest.mark.compiled
def test_runs_from_the_command_line(tmp_path):
    run = subprocess.run([sys.executable, EXAMPLES / "habits.py", "--small"], cwd=tmp_path, capture_output=True,
                         text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert "days ago" in run.stdout


@pytest.mark.parametrize(("name", "package"), [
    ("atom_mapping", "rxnmapper"), ("audio_window", "moonshine_onnx"), ("time_series", "aeon")])
def test_says_which_data_is_missing(name, package, monkeypatch, tmp_path):
    skip_without(set(NEEDS[name]) - {package})
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == package else found(n, *rest))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"missing: pip install --no-deps"):
        load(name).main(["--small"])


# --- the karate club ---

def test_karate_club_gradients_are_those_of_the_loss():
    example = load("karate_club", "scipy")
    graph, labels, known = example.club()
    p = example.parameters(len(labels))
    _, gradients, _ = example.loss_and_gradients(p, graph, labels, known)
    rng, h = np.random.default_rng(0), 1e-6
    for name in p:
        direction = rng.standard_normal(p[name].shape)
        ends = [example.loss_and_gradients(p | {name: p[name] + s * h * direction}, graph, labels, known)[0]
                for s in (1, -1)]
        # Central differences: h^2 of the third derivative, and rounding of losses near 1 divided by 2 h.
        assert abs((ends[0] - ends[1]) / (2 * h) - (gradients[name] * direction).sum()) < 1e-8, name


def test_karate_club_is_split_by_two_known_members():
    example = load("karate_club", "scipy", "networkx")
    graph, labels, known = example.club()
    _, losses, logits = example.train(graph, labels, known, steps=60)
    assert losses[-1] < 0.7 * losses[0]
    assert (logits.argmax(axis=1) == labels).mean() >= 0.85     # by chance: one half


# --- dates ---

@pytest.fixture(scope="module")
def translator():
    example = load("date_translation", "torch")
    return example, example.train(100, width=64)


def test_dates_of_the_generator():
    example = load("date_translation", "torch")
    for words, iso in example.dates(200):
        assert len(iso) == example.LENGTH and set(words) <= set(example.LETTERS[1:])
        assert iso[:4] in words and str(int(iso[-2:])) in words


@pytest.mark.compiled
def test_dates_are_translated_and_the_year_is_read_where_it_stands(translator):
    example, model = translator
    pairs = example.dates(200, seed=10**6)
    words, lengths, digits = example.encode(pairs)
    found, weights = model.translate(words, lengths)
    assert (found == digits).float().mean() > 0.85      # a digit of the day or month, guessed: at most one half
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    # The year ends every form and begins every answer; its last two digits are not the same for all.
    year = [weights[n, 2:4, length - 4 : length].sum() / 2 for n, length in enumerate(lengths)]
    evenly = np.mean([4 / int(length) for length in lengths])
    assert np.mean(year) > 2 * evenly
    # Nothing is read past the end.
    assert all((weights[n, :, length:] == 0).all() for n, length in enumerate(lengths))


def test_additive_attention_in_torch_is_the_formula_with_its_gradients():
    example = load("date_translation", "torch")
    import torch

    torch.manual_seed(0)
    shapes = (2, 3, 4), (2, 5, 4), (2, 5, 6), (4,)
    query, key, value, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    lengths = torch.tensor([5, 3])
    inputs = query, key, value, weight

    def written_out(query, key, value, weight):
        scores = torch.tanh(query[:, :, None] + key[:, None]) @ weight
        return scores.masked_fill(torch.arange(5) >= lengths[:, None, None], -torch.inf).softmax(-1) @ value

    out, right = example.AdditiveAttention.apply(*inputs, lengths), written_out(*inputs)
    factor = torch.randn_like(right)
    for a, b in zip((out, *torch.autograd.grad((out * factor).sum(), inputs)),
                    (right, *torch.autograd.grad((right * factor).sum(), inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)        # float64 sums of a few dozen terms near 1


# --- characters ---

def test_written_logits_from_the_cache_are_those_of_the_whole_text(monkeypatch):
    example = load("character_gpt", "torch")
    import torch

    sample = example.text()[:5000]
    model = example.train(sample, 3, context=40, width=32, layers=2)
    ids = [model.letters.index(c) for c in sample[:40]]
    theirs = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(example.fastattn_torch, "scaled_dot_product_attention", theirs)
    with torch.no_grad():
        right = model.double()(torch.tensor([ids]))[0].numpy()
        model.float()
    writer = example.Writer(model)
    # A prompt at once, then one character after the other.
    found = np.concatenate([writer.logits(ids[:7]), *(writer.logits([i]) for i in ids[7:])])
    # Two layers of products over at most 128 numbers: some hundred roundings of numbers as large as the logits.
    bound = 400 * U32 * abs(right).max()
    assert abs(found - right).max() < bound
    # The comparison notices a model without its past.
    writer.cache.free([0, 1])
    assert abs(writer.logits(ids[20:21]) - right[20]).max() > 10 * bound


@pytest.mark.compiled
def test_the_gpt_learns_and_writes():
    example = load("character_gpt", "torch")
    sample = "aabb" * 200       # a letter alone does not say what comes next; it and the one before do
    model = example.train(sample, 100, context=16, width=32, layers=1)
    assert example.Writer(model).write("aab", temperature=0.1) == "aabb" * 4


# --- digits ---

@pytest.mark.compiled
def test_digits_are_learnt_better_than_by_chance():
    example = load("digits_vit", "torch", "sklearn")
    x_train, y_train, x_test, y_test = example.data()
    assert len(x_test) == 360
    model = example.train(x_train, y_train, 12, width=32, layers=2)
    assert example.accuracy(model, x_test, y_test) > 0.5        # by chance: 0.1

    import torch

    with torch.no_grad():
        theirs = model.double()(x_test.double())
        model.float()
        with example.fastattn_torch.patch():
            ours = model(x_test)
    # Two layers of products over at most 64 numbers: some hundred roundings of numbers as large as the logits.
    assert abs(ours - theirs).max() < 400 * U32 * abs(theirs).max()
    attended = model.class_attention(x_test[:5])
    assert attended.shape == (5, 4, 4) and (attended.sum(axis=(1, 2)) < 1 + 1e-5).all()     # the rest: itself


def test_digits_are_cut_into_patches():
    example = load("digits_vit", "torch")
    import torch

    picture = torch.arange(64.0).reshape(1, 8, 8)
    np.testing.assert_array_equal(example.patches(picture)[0, 5], [18, 19, 26, 27])     # row 1, column 1 of 4 x 4


# --- object queries ---

def test_scenes_hold_their_digits():
    example = load("object_queries", "torch", "sklearn", "scipy")
    _, new = example.digits()
    pictures, targets = example.scenes(new, 20, 0)
    for picture, (kinds, centres) in zip(pictures.numpy(), targets):
        assert 1 <= len(kinds) <= 3
        corners = np.rint(centres.numpy() * example.SIDE - 4).astype(int)
        for kind, (i, j) in zip(kinds.tolist(), corners):
            alike = np.flatnonzero((new[0] == picture[i : i + 8, j : j + 8]).all(axis=(1, 2)))
            assert kind in new[1][alike]
            picture[i : i + 8, j : j + 8] = 0
        assert not picture.any()


def test_scenes_lie_on_photographs():
    example = load("object_queries", "torch", "sklearn", "scipy", "PIL")
    _, new = example.digits()
    photographs = example.photographs("china.jpg")
    assert [picture.shape for picture in photographs] == [(213, 320), (106, 160), (53, 80), (42, 64)]
    assert all(abs(picture.mean() - photographs[0].mean()) < 0.02 for picture in photographs)
    black, targets = example.scenes(new, 5, 0)
    lit, same = example.scenes(new, 5, 0, behind=[np.full((example.SIDE, example.SIDE), 0.5, np.float32)])
    assert (black.amin((1, 2)) == 0).all()
    # Dimmed to 0.2 to 0.6 of itself where nothing is written, and digits over it.
    ground = lit.amin((1, 2))
    assert ((ground >= 0.1) & (ground <= 0.3)).all() and (lit.amax((1, 2)) > 0.9).all()
    kinds, centres = same[0]
    i, j = np.rint(centres[0].numpy() * example.SIDE - 4).astype(int)
    over = (lit[0, i : i + 8, j : j + 8] - ground[0]) / (1 - ground[0])
    alike = [abs(over.numpy() - digit).max() < 1e-5 for digit in new[0]]
    assert kinds[0] in new[1][alike]


def test_a_matching_costs_least():
    example = load("object_queries", "torch", "sklearn", "scipy")
    import torch

    chances = torch.full((6, 11), 1 / 11)
    centres = torch.tensor([[0.1, 0.1], [0.9, 0.9], [0.5, 0.5], [0.9, 0.1], [0.1, 0.9], [0.3, 0.3]])
    query, item = example.matched(chances, centres, torch.tensor([3, 4]), torch.tensor([[0.85, 0.9], [0.1, 0.12]]))
    assert dict(zip(query.tolist(), item.tolist())) == {1: 0, 0: 1}


@pytest.mark.compiled
def test_queries_come_to_look_at_the_digit():
    example = load("object_queries", "torch", "sklearn", "scipy")
    import torch

    known, new = example.digits()
    model = example.train(known, 100, batch=16, rate=3e-3, most=1, width=32)
    pictures, targets = example.scenes(new, 100, 10**6, most=1)
    with torch.no_grad():
        logits, centres = model(pictures)
    maps = model.maps(pictures)
    np.testing.assert_allclose(maps.sum(axis=(2, 3)), 1, rtol=1e-5)
    cut = example.GRID, example.PATCH
    ink = (pictures > 0).unflatten(2, cut).unflatten(1, cut).any(4).any(2).numpy()
    on_ink = []
    for n, (kinds, places) in enumerate(targets):
        query, _ = example.matched(logits[n].softmax(-1), centres[n], kinds, places)
        on_ink.append(maps[n, query[0]][ink[n]].sum())
    assert np.mean(on_ink) > 2 * ink.mean()     # looking everywhere alike: ink.mean()


# --- atoms ---

@pytest.fixture(scope="module")
def mapper():
    return load("atom_mapping", "torch", "rxnmapper").Mapper()


# From the tests of RXNMapper itself, those that it does not write in another order first.
@pytest.mark.parametrize(("reaction", "origins", "sure"), [
    ("C(C)O.BrC(C)>>CCOCC", [1, 0, 2, 4, 5], 0.9754605679009868),
    ("CCO.BrCFC>>CCOCFC", [0, 1, 2, 4, 5, 6], 0.9730222157275086),
])
def test_atoms_are_mapped_as_by_rxnmapper(mapper, reaction, origins, sure):
    found, chances, _ = mapper.map(reaction)
    assert found.tolist() == origins
    # Both are float32 through ten layers, which keep some hundred roundings' precision.
    assert abs(chances.prod() - sure) < 200 * U32


def test_smiles_are_read_as_chemists_do():
    example = load("atom_mapping")
    tokens = example.tokenize("C1CC1(Cl)[nH]>>[13CH4].Br")
    assert tokens == ["C", "1", "C", "C", "1", "(", "Cl", ")", "[nH]", ">>", "[13CH4]", ".", "Br"]
    assert [e for t in tokens if (e := example.element(t))] == ["C", "C", "C", "Cl", "N", "C", "Br"]
    assert sorted(map(tuple, np.argwhere(np.triu(example.bonded(tokens))))) == [(0, 2), (0, 3), (2, 3), (3, 6), (3, 8)]
    assert example.sides(tokens) == ([0, 2, 3, 6, 8], [10, 12])
    for wrong in "CCO", "CC!O>>C":
        with pytest.raises(ValueError, match="reaction must be"):
            example.tokenize(wrong)


# --- audio ---

def voice(T=4000):
    """What repeats itself, like a vowel."""
    t = np.arange(T) / 16_000
    return (sum(np.sin(2 * np.pi * 125 * k * t) / k for k in range(1, 8)) / 2).astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"window": 20}])
def test_denoising_is_the_mean_weighted_by_distances(options):
    example = load("audio_window")
    pieces = example.cut(example.noisy(voice(1500))).astype(np.float64)
    distance = ((pieces[:, None] - pieces) ** 2).sum(axis=-1)
    scores = -distance / (2 * example.H**2)
    if options:
        far = abs(np.subtract.outer(*[np.arange(len(pieces))] * 2)) > options["window"]
        scores[far] = -np.inf
    right = softmax(scores) @ pieces
    # float64: a score of size x . y / h^2 is off by some roundings of it.
    size = np.square(pieces).sum(axis=1).max() / example.H**2
    np.testing.assert_allclose(example.denoise(pieces, **options), right, rtol=0, atol=100 * 2.0**-53 * size)


def test_attention_to_all_and_to_near_pieces_takes_noise_out():
    example = load("audio_window")
    rows = example.compare(voice(), window=120, rounds=1)
    assert [row[0] for row in rows] == ["full", "window 120", "NumPy"]
    full, window, plain = (row[2] for row in rows)
    assert full > 3 and window > 3 and abs(full - plain) < 0.01     # decibels gained


@pytest.mark.compiled
def test_memory_is_that_of_the_arrays():
    example = load("audio_window")
    full, window, plain = (row[4] for row in example.compare(voice(), window=120, rounds=1))
    n = len(example.cut(voice())) * example.PIECE * 4 / 1e6         # MB of the pieces
    # Queries, keys and results, and no n x n weights, which NumPy has.
    assert max(full, window) < 4 * n and plain > len(example.cut(voice())) ** 2 * 4 / 1e6


def test_pieces_join_to_what_was_cut():
    example = load("audio_window")
    samples = voice(1000)
    pieces = example.cut(samples)
    used = (len(pieces) - 1) * example.STEP + example.PIECE
    # Means of at most 8 equal numbers.
    np.testing.assert_allclose(example.join(pieces, 1000)[:used], samples[:used], rtol=8 * U32, atol=0)


# --- convolution ---

@pytest.mark.parametrize("shape", [(7, 12, 3), (1, 5, 1)])
def test_attention_is_the_convolution(shape, seed):
    example = load("convolution")
    rng = np.random.default_rng([seed, *shape])
    picture, kernel = rng.standard_normal(shape), rng.standard_normal((3, 3, shape[2], 4))
    found, right = example.convolution_by_attention(picture, kernel), example.convolution(picture, kernel)
    # Each weight is 1 within 8 exp(-alpha) and a rounding; sums of 9 C products, both ways.
    size = example.convolution(abs(picture), abs(kernel))
    assert (abs(found - right) <= (2 * 9 * shape[2] + 8) * 2.0**-53 * size + 8 * np.exp(-40) * abs(kernel).sum()).all()
    # With the kernel turned round it is another convolution.
    assert abs(found - example.convolution(picture, kernel[::-1, ::-1])).max() > 0.1


# --- habits ---

def test_gradients_of_lags_are_those_of_the_loss():
    example = load("habits")
    bought, rng, h = example.histories(20, 30), np.random.default_rng(0), 1e-5
    table, direction = rng.standard_normal((2, example.LAGS))
    _, gradient = example.loss_and_gradient(table, bought)
    ends = [example.loss_and_gradient(table + s * h * direction, bought)[0] for s in (1, -1)]
    # Central differences: h^2 of the third derivative, and rounding of losses near 2 divided by 2 h.
    assert abs((ends[0] - ends[1]) / (2 * h) - gradient @ direction) < 1e-9


def test_lags_have_the_shares_that_histories_were_drawn_with():
    example = load("habits")
    table, _ = example.train(example.histories(200, 60), 100)
    shares = example.shares(table)
    for lag, share in example.HABITS.items():
        # 200 x 45 days: a standard deviation of 0.005; lags that nobody has keep some of what they began with.
        assert abs(shares[lag - 1] - share / (1 - example.ANY)) < 0.04
    assert np.sort(shares)[:-2].sum() < 0.04
    new = example.histories(100, 40, seed=1)
    hits = example.predict(table, new)[:, example.LAGS - 1 : -1].argmax(-1) == new[:, example.LAGS :]
    assert 0.55 < hits.mean() < 0.75        # a week ago: 0.6, and by chance


# --- ListOps ---

def value_of(tokens):
    """The value of an expression by a stack, and that nothing is left over."""
    stack = [[]]
    for token in tokens:
        if token.startswith("["):
            stack.append([token])
        elif token == "]":
            name, *values = stack.pop()
            values.sort()
            middle = len(values) // 2
            median = values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) // 2
            result = {"[MIN": values[0], "[MAX": values[-1], "[SM": sum(values) % 10, "[MED": median}[name]
            stack[-1].append(result)
        else:
            stack[-1].append(int(token))
    ((result,),) = stack
    return result


def test_listops_values():
    example = load("listops", "torch")
    ids, lengths, values = example.batch(100, 64, 4, 4, 0)
    for row, n, value in zip(ids.tolist(), lengths.tolist(), values.tolist()):
        assert row[0] == 1 and set(row[n:]) <= {0}
        assert value_of([example.TOKENS[i] for i in row[1:n]]) == value
    assert len(set(values.tolist())) == 10


@pytest.mark.parametrize("kind", ["full", "longformer", "bigbird", "hierarchical", "linformer", "linear"])
def test_listops_attention_and_gradients_are_torchs(kind):
    example = load("listops", "torch")
    import torch

    torch.manual_seed(0)
    length, lengths = 128, torch.tensor([128, 70])
    inputs = [torch.randn(2, example.HEADS, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    projection = torch.randn(example.RANK, length, dtype=torch.float64, requires_grad=True)
    there = (torch.arange(length) < lengths[:, None])[:, None, None]        # (B, 1, 1, S)

    def written_out(query, key, value):
        if kind == "linear":
            query, key = (torch.nn.functional.elu(x) + 1 for x in (query, key))
            weights = (query @ key.mT) * there
            return weights / weights.sum(-1, keepdim=True) @ value
        if kind == "linformer":
            key, value = (projection * there) @ key, (projection * there) @ value
            return (query @ key.mT / 8**0.5).softmax(-1) @ value
        if kind == "hierarchical":
            scores, values = [], []
            for mask, n in example.ladder(length):
                share = there.mT.unflatten(2, (-1, n)).sum(3)       # of the keys of a mean, those that are there
                means = [(x * there.mT).unflatten(2, (-1, n)).sum(3) / share.clamp(min=1) for x in (key, value)]
                seen = torch.from_numpy(mask.to_dense(length, length // n)) & (share > 0).mT
                scores.append((query @ means[0].mT / 8**0.5 + np.log(n)).masked_fill(~seen, -torch.inf))
                values.append(means[1])
            return torch.cat(scores, dim=-1).softmax(-1).nan_to_num(0) @ torch.cat(values, dim=2)
        mask = example.pattern(kind)
        seen = there if mask is None else there & torch.from_numpy(mask.to_dense(length, length))
        scores = (query @ key.mT / 8**0.5).masked_fill(~seen, -torch.inf)
        # rows that see nothing: padding of the shorter sequence
        return scores.softmax(-1).nan_to_num(0) @ value

    if kind == "linformer":
        inputs_all = [*inputs, projection]
    else:
        inputs_all = inputs
    found, right = example.attend(kind, *inputs, lengths, projection), written_out(*inputs)
    rows = there.mT.to(torch.float64)       # of the shorter sequence, those that are there
    factor = torch.randn_like(right) * rows
    of_found, of_right = (torch.autograd.grad((x * factor).sum(), inputs_all) for x in (found, right))
    for a, b in zip((found * rows, *of_found), (right * rows, *of_right), strict=True):
        # float64 sums of 128 terms, of numbers up to some hundred with Linformer's projection
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if kind in ("longformer", "bigbird"):
        assert not torch.allclose(found[0], example.attend("full", *inputs, lengths)[0], atol=1e-3)


@pytest.mark.parametrize("length", [16, 32, 64, 512])
def test_each_key_is_in_one_rung_of_the_ladder(length):
    example = load("listops", "torch")
    seen = sum(np.repeat(mask.to_dense(length, length // n).astype(int), n, axis=1)
               for mask, n in example.ladder(length))
    np.testing.assert_array_equal(seen, 1)


def test_means_of_equal_keys_are_exact():
    example = load("listops", "torch")
    import torch

    torch.manual_seed(0)
    length, lengths = 256, torch.tensor([256])
    query, value = (torch.randn(1, example.HEADS, length, 8, dtype=torch.float64) for _ in range(2))
    coarsest = example.ladder(length)[-1][1]
    key = torch.randn(1, example.HEADS, length // coarsest, 8, dtype=torch.float64).repeat_interleave(coarsest, 2)
    found, right = (example.attend(kind, query, key, value, lengths) for kind in ("hierarchical", "full"))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)        # float64 sums of 256 terms near 1
    # With keys of their own it is another result.
    key = torch.randn_like(key)
    found, right = (example.attend(kind, query, key, value, lengths) for kind in ("hierarchical", "full"))
    assert abs(found - right).max() > 0.01


@pytest.mark.compiled
def test_listops_is_learnt_better_than_by_chance():
    example = load("listops", "torch")
    task = 16, 1, 3
    model = example.train("full", 150, *task)
    _, _, values = example.batch(1000, *task, 10**6)
    commonest = values.bincount().max().item() / len(values)
    assert example.accuracy(model, *task) > 2 * commonest


# --- time series ---

def test_time_series_are_read():
    example = load("time_series", "torch", "aeon")
    for name, part, n, classes, channels, shortest, longest in (
            ("GunPoint", "TRAIN", 50, 2, 1, 150, 150), ("JapaneseVowels", "TRAIN", 270, 9, 12, 7, 26),
            ("JapaneseVowels", "TEST", 370, 9, 12, 7, 29)):
        series, labels = example.read(name, part)
        assert len(series) == len(labels) == n and set(labels) == set(range(classes))
        assert {one.shape[0] for one in series} == {channels}
        assert min(one.shape[1] for one in series) == shortest and max(one.shape[1] for one in series) == longest
    known, labels = example.read("GunPoint", "TRAIN")
    new, wanted = example.read("GunPoint", "TEST")
    # The archive's own figure for the nearest neighbour: an error of 0.0867.
    assert abs((example.nearest(known, labels, new) != wanted).mean() - 0.0867) < 1e-4


def test_padding_says_nothing():
    example = load("time_series", "torch")
    import torch

    torch.manual_seed(0)
    model = example.Classifier(2, 3, width=16).double()
    rng = np.random.default_rng(0)
    series = [rng.standard_normal((2, T)).astype(np.float32) for T in (9, 70)]
    x, lengths = example.pad(series)
    rough = x.double()
    rough[0, :, 9:] = 7.0
    alone, _ = example.pad(series[:1])
    with torch.no_grad(), example.fastattn_torch.patch():
        together, single = model(rough, lengths), model(alone.double(), lengths[:1])
        longer = model(rough, torch.tensor([70, 70]))
    torch.testing.assert_close(together[:1], single, rtol=1e-12, atol=1e-12)    # float64 sums of up to 144 terms near 1
    assert abs(longer[0] - single).max() > 1e-3


@pytest.mark.compiled
def test_speakers_are_told_better_than_by_chance():
    example = load("time_series", "torch", "aeon")
    (known, labels), (new, wanted) = (example.read("JapaneseVowels", part) for part in ("TRAIN", "TEST"))
    model = example.train(known, labels, 60)
    assert example.accuracy(model, new, wanted) > 0.7       # by chance: 1 / 9
    x, lengths = example.pad(new[:20])
    attended = model.attended(x, lengths)
    assert attended.shape == (20, 9, x.shape[2])
    np.testing.assert_allclose(attended.sum(axis=2), 1, rtol=1e-5)
    assert all((attended[n, :, length:] == 0).all() for n, length in enumerate(lengths))
