"""Which atom of the product was which atom before the reaction? One head of a transformer knows.

RXNMapper (Schwaller et al., "Extraction of organic chemistry grammar from unsupervised learning of chemical reactions",
2021) reads reactions as text, learnt to fill in hidden tokens, and was never told what an atom is. In its eleventh
layer the sixth head still joins each atom of the product to its origin. Here its weights run in NumPy around fastattn,
and the head is drawn as a heat map; a page to be opened in a browser shows all heads of all layers.

    pip install --no-deps rxnmapper             the weights, 3 MB; torch is needed to read their file
    python examples/atom_mapping.py "CC(=O)O.OCC>>CC(=O)OCC"
"""

import argparse
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import fastattn as fa
from fastattn import plot

LAYERS, HEADS = 12, 8                   # layers all have the same weights (ALBERT)
LAYER, HEAD = 10, 5                     # the one that knows
NEIGHBOURS = 90.0                       # how much likelier neighbours of a mapped pair are to be a pair
TOKEN = re.compile(r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%\d\d|\d)")
ATOM = re.compile(r"\[?\d*([A-Z][a-z]?|se|as|[bcnosp])")
REACTIONS = ("CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F", "CC(=O)O.OCC>>CC(=O)OCC")


class Mapper:
    """RXNMapper's model: `attention` gives the weights of all heads, `map` what one of them says of atoms."""

    def __init__(self):
        package = find_spec("rxnmapper")
        if package is None:
            sys.exit("the weights are missing: pip install --no-deps rxnmapper")
        import torch

        (folder,) = (Path(package.origin).parent / "models" / "transformers").iterdir()
        w = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        w = {name.removeprefix("albert."): x.numpy() for name, x in w.items()}
        self.vocabulary = {token: n for n, token in enumerate((folder / "vocab.txt").read_text().split("\n"))}
        self.w = {name.rsplit(".albert_layers.0.")[-1].removeprefix("embeddings."): x for name, x in w.items()}
        layers = ("attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output")
        self.packed = {name: fa.pack_weight(self.w[name + ".weight"])
                       for name in (*layers, "encoder.embedding_hidden_mapping_in")}

    def linear(self, x, name, activation=None):
        return fa.linear(x, self.packed[name], self.w[name + ".bias"], activation)

    def norm(self, x, name):
        x = x - x.mean(axis=1, keepdims=True)
        x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True) + np.float32(1e-12))
        return x * self.w[name + ".weight"] + self.w[name + ".bias"]

    def attention(self, tokens):
        """Weights (LAYERS, HEADS, L, L), [CLS] and [SEP] around the tokens included."""
        ids = [self.vocabulary.get(t, self.vocabulary["[UNK]"]) for t in ("[CLS]", *tokens, "[SEP]")]
        x = self.w["word_embeddings.weight"][ids] + self.w["position_embeddings.weight"][: len(ids)]
        x = self.norm(x + self.w["token_type_embeddings.weight"][0], "LayerNorm")
        x = self.linear(x, "encoder.embedding_hidden_mapping_in")
        weights = []
        for _ in range(LAYERS):
            query, key, value = self.heads(x, "query"), self.heads(x, "key"), self.heads(x, "value")
            weights.append(fa.attention_weights(query, key))
            mixed = fa.attention(query, key, value).swapaxes(0, 1).reshape(x.shape)
            x = self.norm(x + self.linear(mixed, "attention.dense"), "attention.LayerNorm")
            inner = self.linear(x, "ffn", "gelu")
            x = self.norm(x + self.linear(inner, "ffn_output"), "full_layer_layer_norm")
        return np.stack(weights)

    def heads(self, x, name):
        """(HEADS, L, D)"""
        return self.linear(x, "attention." + name).reshape(len(x), HEADS, -1).swapaxes(0, 1)

    def map(self, reaction):
        """(origins, chances, weights): for each atom of the products the atom of the reactants it was, -1 for none,
        how sure that is, and the weights (product atoms, reactant atoms) between atoms of an element.

        The surest pair is taken first; then its neighbours are likelier to be pairs too, and itself is done with.
        """
        tokens = tokenize(reaction)
        both = self.attention(tokens)[LAYER, HEAD, 1:-1, 1:-1]
        before, after = (np.array(side) for side in sides(tokens))
        elements = np.array([element(t) for t in tokens])
        weights = both[np.ix_(after, before)] + both[np.ix_(before, after)].T
        weights = weights * (elements[after][:, None] == elements[before])
        bonds = bonded(tokens)
        near_after, near_before = bonds[np.ix_(after, after)], bonds[np.ix_(before, before)]
        factor = np.ones(weights.shape)
        origins, chances = np.full(len(after), -1), np.ones(len(after))
        for _ in after:
            pairs = weights * factor
            total = pairs.sum(axis=1, keepdims=True)
            pairs = np.divide(pairs, total, out=np.zeros_like(pairs), where=total > 0)
            to, was = np.unravel_index(pairs.argmax(), pairs.shape)
            if pairs[to, was] == 0:
                break
            origins[to], chances[to] = was, pairs[to, was]
            factor[np.ix_(near_after[to], near_before[was])] *= NEIGHBOURS
            factor[to], factor[:, was] = 0, 0
        return origins, chances, weights


def tokenize(reaction):
    tokens = TOKEN.findall(reaction)
    if "".join(tokens) != reaction or ">>" not in tokens:
        raise ValueError(f"reaction must be reactants>>products in SMILES, got {reaction!r}")
    return tokens


def element(token):
    """"C" for C, c and [CH3+]; None for what is no atom."""
    found = ATOM.match(token)
    return found and found[1].capitalize()


def sides(tokens):
    """Places of the atoms of the reactants and of the products."""
    arrow = tokens.index(">>")
    atoms = [n for n, token in enumerate(tokens) if element(token)]
    return [n for n in atoms if n < arrow], [n for n in atoms if n > arrow]


def bonded(tokens):
    """bool (tokens, tokens): the bonds that SMILES writes, along chains, from branches and around rings."""
    bonds = np.zeros((len(tokens), len(tokens)), bool)
    last, branches, rings = None, [], {}
    for n, token in enumerate(tokens):
        other = None
        if element(token):
            other, last = last, n
        elif token == "(":
            branches.append(last)
        elif token == ")":
            last = branches.pop()
        elif token in (".", "~", ">>"):
            last = None
        elif token.strip("%").isdigit():
            n, other = last, rings.pop(token, None)
            if other is None:
                rings[token] = last
        if other is not None:
            bonds[n, other] = bonds[other, n] = True
    return bonds


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reactions", nargs="*", help="reactants>>products in SMILES, up to 510 tokens")
    parser.add_argument("--small", action="store_true", help="one reaction")
    parser.add_argument("--picture", default="atoms.png", help="where the first reaction's head is drawn")
    parser.add_argument("--page", default="atoms.html", help="where all heads are written for a browser")
    args = parser.parse_args(argv)
    mapper = Mapper()
    for n, reaction in enumerate((args.reactions or REACTIONS)[: 1 if args.small else None]):
        tokens = tokenize(reaction)
        before, after = sides(tokens)
        origins, chances, weights = mapper.map(reaction)
        print(reaction)
        print(f"  sure to {chances.prod():.3f}: atoms of the product, their places in the text, their origins:")
        print("  " + ", ".join(f"{tokens[a]}{a} <- " + (f"{tokens[before[o]]}{before[o]}" if o >= 0 else "?")
                               for a, o in zip(after, origins)))
        if n:
            continue
        plot.html(mapper.attention(tokens), ["[CLS]", *tokens, "[SEP]"], args.page, title=reaction)
        print("wrote", args.page)
        try:
            names = [[f"{tokens[i]} {i}" for i in side] for side in (after, before)]
            ax = plot.heatmap(weights, *names, title="the head's weights between atoms, both ways")
            ax.set(xlabel="reactant atom", ylabel="product atom")
        except ImportError as error:
            print(error)
        else:
            ax.figure.savefig(args.picture)
            print("drew", args.picture)


if __name__ == "__main__":
    main()
