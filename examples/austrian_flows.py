"""Migration between Austrian regions as an attention matrix: destination effects and distance.

Rows of the flow matrix are softmaxes over destinations. Each origin has one query (a constant), each
destination a key of its own (a dummy), so X holds one effect a destination; distance is a feature of the
pair; nobody moves to where they are, so the diagonal is masked. The doubly constrained gravity model of spint
gives -0.00791533.
"""

import numpy as np

from attnfit import datasets, minimize, problems

data = datasets.load_austrian_flows(dummies=True)
names = list(data.feature_names)
origin = data.groups
# The first destination is the one without a dummy.
dummies = data.A[:, 2:]
destination = np.where(dummies.any(axis=1), dummies.argmax(axis=1) + 1, 0)
n = 9
shares, distance, outflow = np.zeros((n, n)), np.zeros((n, n)), np.zeros(n)
shares[origin, destination] = data.b
distance[origin, destination] = data.A[:, names.index("distance")]
outflow[origin] = data.weights
seen = np.zeros((n, n), dtype=bool)
seen[origin, destination] = True

problem = problems.Attention(
    np.ones((n, 1)),
    np.eye(n),
    shares,
    loss="cross_entropy",
    mask=seen,
    weights=outflow,
    pair_features=[distance],
)
result = minimize(problem)
effects, (by_distance,) = problem.split(result.x)
reference = data.references["cross_entropy"].coefficients[names.index("distance")]

print(result.message)
print(f"distance coefficient {by_distance:.8f}, spint {reference:.8f}")
print("destination effects", np.round(effects - effects.mean(), 3))
assert abs(by_distance - reference) < 5e-9
