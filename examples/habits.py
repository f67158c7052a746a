"""What will they want next? Recommendation from a history, by attention that learns how long ago matters.

Drawn shoppers buy one of 20 things a day: six times in ten what they bought a week ago, twice yesterday's, else
anything. The next thing is predicted as attention over the history, its values the things themselves and its scores a
learnt bias for each lag, `fastattn.RelativeBias`. `fastattn.attention_backward` has the gradient of its table, so that
plain gradient descent finds the habits, and the weights of the lags are their frequencies.

    python examples/habits.py
"""

import argparse

import numpy as np

import fastattn as fa

THINGS, LAGS = 20, 15
HABITS = {7: 0.6, 1: 0.2}
ANY = 1 - sum(HABITS.values())


def histories(people, days, seed=0):
    """(people, days): what each bought."""
    rng = np.random.default_rng(seed)
    bought = rng.integers(THINGS, size=(people, days))
    why = rng.choice([*HABITS, 0], p=[*HABITS.values(), ANY], size=bought.shape)
    for day in range(max(HABITS), days):
        copied = why[:, day] > 0
        bought[copied, day] = bought[copied, day - why[copied, day]]
    return bought


def heads(bought):
    """Zero queries and keys, and things as unit vectors: (people, 1, days, 1), ..., (people, 1, days, THINGS)."""
    value = np.eye(THINGS)[bought][:, None]
    nothing = np.zeros((*value.shape[:3], 1))
    return nothing, nothing, value


def predict(table, bought, return_all=False):
    """(people, days, THINGS): the chances of the day after each day. Entry n of the table is for n days before it."""
    # The distance of a key from its query is between 1 - LAGS and 0; window hides what lies further back.
    options = {"bias": fa.RelativeBias(table[None, ::-1], first=1 - LAGS), "window": (LAGS - 1, 0)}
    saved = fa.attention(*heads(bought), **options, return_lse=True)
    chances = (1 - ANY) * saved[0][:, 0] + ANY / THINGS
    return (chances, saved, options) if return_all else chances


def loss_and_gradient(table, bought):
    """(mean -log of the chance of what was bought next, its gradient by the table)."""
    chances, (out, lse), options = predict(table, bought, return_all=True)
    rows, days = np.indices(bought[:, LAGS:].shape)
    days += LAGS - 1                # from the first day that has all lags
    at = rows, days, bought[:, LAGS:]
    grad = np.zeros_like(out)
    grad[at[0], 0, at[1], at[2]] = -(1 - ANY) / chances[at] / rows.size
    g = fa.attention_backward(grad, *heads(bought), out, lse, **options)
    return -np.log(chances[at]).mean(), g.bias[0, ::-1]


def train(bought, steps, rate=4.0):
    """(table (LAGS,), losses)."""
    table, losses = np.zeros(LAGS), []
    for _ in range(steps):
        loss, gradient = loss_and_gradient(table, bought)
        table = table - rate * gradient
        losses.append(loss)
    return table, losses


def shares(table):
    """What each lag, 1 to LAGS, has of the attention."""
    weights = np.exp(table - table.max())
    return weights / weights.sum()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer people, fewer steps")
    args = parser.parse_args(argv)
    people, steps = (50, 40) if args.small else (500, 150)
    table, losses = train(histories(people, 60), steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for lag, share in enumerate(shares(table), 1):
        print(f"{lag:3} days ago {share:6.1%} {'#' * round(60 * share)}")
    print("drawn with", ", ".join(f"{share / (1 - ANY):.0%} for {lag}" for lag, share in HABITS.items()))
    new = histories(1000, 40, seed=1)
    hits = predict(table, new)[:, LAGS - 1 : -1].argmax(-1) == new[:, LAGS:]
    popular = np.apply_along_axis(np.bincount, 1, new[:, :LAGS], minlength=THINGS).argmax(1)
    print(f"right for new people: {hits.mean():.1%}; their favourite so far: {(popular == new[:, LAGS]).mean():.1%}")


if __name__ == "__main__":
    main()
