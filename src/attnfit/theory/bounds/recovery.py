"""An attention layer as a function of its input: sizes, derivatives, curvature and Lipschitz constants.

O(.) constants are tested as 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attnfit.objectives.inverse_cases import Symbols, case_number
from attnfit.theory.bound import Bound, Condition, Sharp, Size
from attnfit.theory.instances.recovery import Recovery, Rows
from attnfit.theory.logs import Array, log, product
from attnfit.theory.spectra import Symmetric

MODELS = ("layer",)

Left = Callable[[Recovery], Array]
Right = Callable[[Recovery, float], Array]


def _spectral(matrix: Array) -> float:
    small = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return float(np.sqrt(max(np.linalg.eigvalsh(small)[-1], 0.0)))


def _one_sided(i: Recovery, R: float) -> str | None:
    top = float(i.B.max())
    return None if top <= R * R * (1 + 1e-9) else f"b_ij = {top:.6g} exceeds R^2 = {R * R:.6g}"


LAYER: tuple[Size[Recovery] | Condition[Recovery], ...] = (
    Size("|X|", lambda i: _spectral(i.X)),
    Size("|Y|", lambda i: _spectral(i.Y)),
    Size("|W|", lambda i: _spectral(i.W)),
    Size("|V|", lambda i: _spectral(i.V)),
)
OUTPUT: Size[Recovery] = Size("max |b_ij|^(1/2)", lambda i: float(np.sqrt(np.abs(i.B).max())))
# The papers ask for R > 1.
FLOOR = 1.0


def _row(
    number: str, statement: str, formula: str, lhs: Left, rhs: Right, worst: str,
    sharp: Sharp[Recovery] | None = None, remark: str = "",
) -> Bound[Recovery]:  # fmt: skip
    id = number if number.startswith("NEW") else f"UT-{number}"
    return Bound(
        id, statement, formula, Recovery, lhs, rhs, (*LAYER, OUTPUT), worst=worst, floor=FLOOR, sharp=sharp,
        remark=remark, models=MODELS,
    )  # fmt: skip


def _norm(values: Array) -> Array:
    return log(np.linalg.norm(values))


def _one_sided_counterexample() -> Recovery:
    """Return a target far below zero."""
    return Recovery(np.eye(2), np.eye(2), np.eye(2), np.full((2, 2), -1000.0), np.eye(2), R=2.0)


def _sizes() -> list[Bound[Recovery]]:
    def c(i: Recovery) -> Array:
        return log(abs(i.one.C[0, i.j0]))

    def squared(i: Recovery, R: float) -> Array:
        return product(R, R)

    return [
        _row("F.2.1", "attention f of query i0", "|f| <= 1", lambda i: _norm(i.one.P), lambda i, R: log(1.0),
             "1.00"),
        _row("F.2.2", "values h_j = X^T V_j", "|h_j| <= R^2",
             lambda i: log(np.linalg.norm(i.one.H, axis=0).max()), squared, "1.00"),
        Bound(
            "UT-F.2.3", "residual c = <f, h_j> - b", "|c| <= 2 R^2", Recovery, c,
            lambda i, R: product(2, R, R), (*LAYER, Condition("b_ij <= R^2", _one_sided)), status="fails",
            worst="1.00 with |b_ij| <= R^2", floor=FLOOR,
            sharp=Sharp(
                "|c| <= R^2 + max |b_ij|, 2 R^2 where |b_ij| <= R^2",
                lambda i, R: log(R * R + float(np.abs(i.B).max())),
            ),
            remark="the assumption b_ij <= R^2 is one-sided", counterexample=_one_sided_counterexample,
            models=MODELS,
        ),
        _row("F.2.4", "X^T W_j, a column", "|X^T W_j| <= R^2",
             lambda i: log(np.linalg.norm(i.X.T @ i.W, axis=0).max()), squared, "1.00"),
        _row("F.2.5", "entries of w = W x_i0", "|w| <= R^2", lambda i: log(np.abs(i.one.R).max()), squared,
             "1.00"),
        _row("F.2.6", "entries of z = W^T X f", "|z| <= R^2", lambda i: log(np.abs(i.one.Z).max()), squared,
             "1.00"),
        _row("F.2.7", "s = <f, h_j>", "|s| <= R^2", lambda i: log(abs((i.one.P @ i.one.H)[0, i.j0])), squared,
             "1.00"),
    ]  # fmt: skip


# ---- first derivatives of one entry


def _attention_columns(at: Rows) -> tuple[Array, Array]:
    """Return the norms of ``df/dx`` in entries of other tokens, shape (n,) times ``|w_j|``, and those in the
    query's own entries, shape (d,).
    """
    p = at.P[0]
    square = float(p @ p)
    others = p * np.sqrt((1.0 - p) ** 2 + np.maximum(square - p**2, 0.0))
    i0 = at.queries[0]
    own = at.T @ at.of.W.T
    own[i0] += at.R[0]
    own = p[:, None] * (own - p @ own)
    others[i0] = 0.0
    return others, np.linalg.norm(own, axis=0)


def _largest_attention_slope(i: Recovery) -> Array:
    others, own = _attention_columns(i.one)
    return log(max(float(others.max()) * float(np.abs(i.one.R).max()), float(own.max())))


def _attention_jacobian(i: Recovery) -> Array:
    others, own = _attention_columns(i.one)
    return 0.5 * log(float(others @ others) * float(np.sum(i.one.R**2)) + float(own @ own))


def _first() -> list[Bound[Recovery]]:
    def root(i: Recovery) -> float:
        return float(np.sqrt(i.n * i.d))

    return [
        _row("F.3.1", "derivative of f in one entry of X", "|df/dx| <= 4 R^2", _largest_attention_slope,
             lambda i, R: product(4, R**2), "0.19"),
        _row("F.3.2", "Jacobian of f", "|grad f|_F <= 4 sqrt(n d) R^2", _attention_jacobian,
             lambda i, R: product(4, root(i), R**2), "0.08"),
        _row("F.4.1", "derivative of c in one entry of X", "|dc/dx| <= 5 R^4",
             lambda i: log(np.abs(i.one.gradient(i.unit)).max()), lambda i, R: product(5, R**4), "0.23"),
        _row("F.4.2", "gradient of c", "|grad c| <= 5 sqrt(n d) R^4",
             lambda i: _norm(i.one.gradient(i.unit)), lambda i, R: product(5, root(i), R**4), "0.09"),
        _row("G.4", "change of f", "|f(X) - f(Y)| <= 4 sqrt(n d) R^2 |X - Y|_F",
             lambda i: _norm(i.one_moved.P - i.one.P), lambda i, R: product(4, root(i), R**2, i.distance),
             "0.08"),
        _row("G.5", "change of c", "|c(X) - c(Y)| <= 5 sqrt(n d) R^4 |X - Y|_F",
             lambda i: log(abs((i.one_moved.C - i.one.C)[0, i.j0])),
             lambda i, R: product(5, root(i), R**4, i.distance), "0.09"),
        _row("G.6", "change of the values h_j", "|h_j(X) - h_j(Y)| <= R |X - Y|_F",
             lambda i: log(np.linalg.norm((i.Y - i.X).T @ i.V, axis=0).max()), lambda i, R: product(R,
             i.distance), "1.00"),
        _row("G.7", "change of w = W x_i0", "|w(X) - w(Y)| <= R |X - Y|_F",
             lambda i: _norm((i.Y - i.X)[:, i.i0] @ i.W), lambda i, R: product(R, i.distance), "1.00"),
        _row("G.8", "change of z = W^T X f", "|z(X) - z(Y)| <= 5 sqrt(n d) R^4 |X - Y|_F",
             lambda i: _norm(i.one_moved.Z - i.one.Z), lambda i, R: product(5, root(i), R**4, i.distance),
             "0.08"),
    ]  # fmt: skip


# ---- second derivatives of one entry


def _symbols(at: Rows) -> Symbols:
    i = at.of
    f, h, y, v = at.P[0], at.H[:, i.j0], at.T @ i.W.T, i.V[:, i.j0]
    return Symbols(int(at.queries[0]), f, h, float(f @ h), at.R[0], f @ y, (f * h) @ y, v, y, i.W)


def _blocks(at: Rows) -> dict[str, list[Array]]:
    """Return blocks of the Hessian of c by the papers' case, between i0 and the tokens it attends to most."""
    symbols, i0 = _symbols(at), at.of.i0
    out: dict[str, list[Array]] = {k: [] for k in "12345"}
    tokens = [int(k) for k in at.of.tokens]
    for i1 in tokens:
        for i2 in tokens:
            out[str(case_number(i0, i1, i2))].append(symbols.block(i1, i2))
    return out


def _largest_block(i: Recovery, case: str) -> Array:
    return log(max((float(np.linalg.norm(block, 2)) for block in _blocks(i.one)[case]), default=0.0))


def _operator(at: Rows, apply: Callable[[Array], Array]) -> Symmetric:
    """Return an operator on inputs, whose leading vectors lie at the queries and the tokens they attend
    to.
    """
    hint = at.P.sum(axis=0)
    hint[at.queries] = hint.max()
    return Symmetric(apply, at.T.size, np.repeat(hint, at.T.shape[1]))


def _entry_curvature(i: Recovery) -> Array:
    """Return ``log |hess c|``."""
    return log(_operator(i.one, i.one.entry_hessian()).norm())


def _second() -> list[Bound[Recovery]]:
    constants: list[tuple[str, str, Callable[[float], float], str]] = [
        ("1", "23 R^6 + R^5 + 12 R^3", lambda R: 23 * R**6 + R**5 + 12 * R**3, "0.03"),
        ("2", "11 R^6 + 6 R^3", lambda R: 11 * R**6 + 6 * R**3, "0.03"),
        ("3", "11 R^6 + 6 R^3", lambda R: 11 * R**6 + 6 * R**3, "0.03"),
        ("4", "5 R^6 + 4 R^3", lambda R: 5 * R**6 + 4 * R**3, "0.05"),
        ("5", "4 R^6 + 2 R^3", lambda R: 4 * R**6 + 2 * R**3, "0.07"),
    ]
    which = ("i0 = i1 = i2", "i0 = i1 != i2", "i0 = i2 != i1", "i1 = i2 != i0", "all distinct")

    def block(k: str, formula: str, of: Callable[[float], float], worst: str, where: str) -> Bound[Recovery]:
        return _row(
            f"F.5.{k}", f"d x d block of the Hessian of c, {where} (tokens with the largest attention)",
            f"|H_{k}| <= {formula}", lambda i: _largest_block(i, k), lambda i, R: log(of(R)), worst,
            remark="derived from wrong terms; evaluated on the true block",
        )  # fmt: skip

    largest = Sharp[Recovery]("|hess c| <= 2 sqrt(2) R^6 + 3 R^3", lambda i, R: log(_curvature(R)))
    return [
        *(block(*constant, where) for constant, where in zip(constants, which, strict=True)),
        _row("G.9", "change of dc/dx, one entry", "|dc/dx(X) - dc/dx(Y)| <= sqrt(n d) R^6 |X - Y|_F",
             lambda i: log(np.abs(i.one_moved.gradient(i.unit) - i.one.gradient(i.unit)).max()),
             lambda i, R: product(np.sqrt(i.n * i.d), R**6, i.distance), "0.60",
             remark="the argument of the proof gives R^8"),
        _row("G.10", "change of d^2c/dx dx, one entry (tokens with the largest attention)",
             "|d^2c(X) - d^2c(Y)| <= sqrt(n d) R^8 |X - Y|_F", _block_change,
             lambda i, R: product(np.sqrt(i.n * i.d), R**8, i.distance), "0.73"),
        _row("H.1", "Hessian of c", "|hess c| <= 36 R^6", _entry_curvature, lambda i, R: product(36, R**6),
             "0.043", largest, "a step of the proof is false, see UT-H.1.step"),
        _row("NEW-UT-1", "Hessian of c", "|hess c| <= 2 sqrt(2) R^6 + 3 R^3", _entry_curvature,
             lambda i, R: log(_curvature(R)), "0.30"),
    ]  # fmt: skip


def _curvature(R: float) -> float:
    return float(2 * np.sqrt(2.0) * R**6 + 3 * R**3)


def _block_change(i: Recovery) -> Array:
    before, after = _blocks(i.one), _blocks(i.one_moved)
    return log(
        max(float(np.abs(b - a).max()) for k in before for a, b in zip(before[k], after[k], strict=True))
    )


# ---- the loss


def _smallest(i: Recovery) -> float:
    return _operator(i.start, i.start.loss_hessian()).lowest()


def _negative(i: Recovery) -> Array:
    return log(max(-_smallest(i), 0.0))


def _hessian_change(i: Recovery) -> Array:
    before, after = i.start.loss_hessian(), i.end.loss_hessian()
    return log(_operator(i.start, lambda v: after(v) - before(v)).norm())


def _gradient_change(i: Recovery) -> Array:
    return _norm(i.end.loss_gradient() - i.start.loss_gradient())


def _jacobian(i: Recovery) -> Array:
    def product_of(v: Array) -> Array:
        return i.start.gradient(i.start.push(v.reshape(i.start.T.shape))).reshape(-1)

    return 0.5 * log(max(_operator(i.start, product_of).highest(), 0.0))


def _residual_curvature(i: Recovery, R: float) -> Array:
    G = 2.0 * i.start.C
    rows = float(np.linalg.norm(G, axis=1).max())
    return log(2 * np.sqrt(2.0) * R**6 * rows + 3 * R**3 * float(np.linalg.norm(G)))


def _loss() -> list[Bound[Recovery]]:
    def power(of: float, R_power: float) -> Right:
        return lambda i, R: product((i.n * i.d) ** of, R**R_power, i.distance)

    residual = Sharp[Recovery](
        "-lambda_min(hess L) <= 2 sqrt(2) R^6 max_i |G_i| + 3 R^3 |G|_F, G = 2 C", _residual_curvature
    )
    smooth = "|grad L(X) - grad L(Y)| <= (n d)^1.5 R^10 |X - Y|_F"
    newton = "|hess L(X) - hess L(Y)| <= n^3 d^3 R^10 |X - Y|_F"
    destroys = "with the gamma of the theorem the minimiser is X = 0 in practice"
    return [
        _row("G.11", "change of the gradient of L", smooth, _gradient_change, power(1.5, 10), "0.46",
             remark="printed for the Hessian"),
        _row("G.12", "change of the Hessian of L", "|hess L(X) - hess L(Y)| <= (n d)^3.5 R^10 |X - Y|_F",
             _hessian_change, power(3.5, 10), "0.013", remark="the Frobenius step needs n d, not n^2 d^2"),
        _row("I.3", "Lipschitz constant of the Hessian in the Newton theorem", newton, _hessian_change,
             power(3.0, 10), "0.045", remark="disagrees with Lemma G.12"),
        _row("4.4", "Lipschitz constant of the Hessian in the Newton theorem", newton, _hessian_change,
             power(3.0, 10), "0.045", remark=destroys),
        _row("I.2", "smoothness in the gradient descent theorem", smooth, _gradient_change, power(1.5, 10),
        "0.46",
             remark="see also UT-I.1"),
        _row("4.3", "smoothness in the gradient descent theorem", smooth, _gradient_change, power(1.5, 10),
        "0.46",
             remark=destroys),
        _row("H.2", "negative curvature of L", "-lambda_min(hess L) <= 72 n d R^8", _negative,
             lambda i, R: product(72, i.n, i.d, R**8), "0.013", residual,
             "the derivation with the factor 2 of L gives 144"),
        _row("4.2", "convexity with gamma = 36 n d R^8 + 1/2", "1 <= lambda_min(hess L) + 2 gamma",
             lambda i: log(1.0), lambda i, R: log(max(_smallest(i) + 72 * i.n * i.d * R**8 + 1.0, 0.0)),
             "2e-3",
             remark=destroys),
        _row("NEW-UT-2", "negative curvature of L, G = 2 C",
             "-lambda_min(hess L) <= 2 sqrt(2) R^6 max_i |G_i| + 3 R^3 |G|_F", _negative, _residual_curvature,
             "0.32"),
        _row("NEW-UT-3", "Jacobian of the outputs", "|J| <= R^4 + sqrt(n) R", _jacobian,
             lambda i, R: log(R**4 + np.sqrt(i.n) * R), "0.70"),
    ]  # fmt: skip


BOUNDS: list[Bound[Recovery]] = [*_sizes(), *_first(), *_second(), *_loss()]
