"""The attention of a transformer block: grouped heads with norms, rotary positions, caps, masks and a cache
of earlier keys, with first derivatives; leading axes and complex arrays as in `block_parts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.block_parts import Bounds, Norm, spectral_norm
from attnfit.objectives.inverse_layer import Mask, softmax_rows
from attnfit.objectives.rotary import Turn

Array = NDArray[Any]


class Cache(NamedTuple):
    """Keys (turned) and values of earlier tokens, shapes (key heads, 1, p, h) and (key heads, 1, p, v)."""

    K: Array
    V: Array


class HeadsState(NamedTuple):
    """What a pass of the heads computed.

    Attributes
    ----------
    q, k : ndarray, shapes (..., key heads, group, n, h) and (..., key heads, 1, n, h)
        Queries and own keys, normed and turned; k of no rows where keys are given.
    K, V : ndarray, shapes (..., key heads, 1, p + n, h) and (..., key heads, 1, p + n, v)
        All keys and values.
    P : ndarray, shape (..., key heads, group, n, p + n)
    slope : ndarray or None
        Derivative of capped logits in the plain ones.
    normed : tuple
        What the norms of queries and keys keep.
    turn : Turn or None
    """

    q: Array
    k: Array
    K: Array
    V: Array
    P: Array
    slope: Array | None
    normed: tuple[Any, Any]
    turn: Turn | None


@dataclass(frozen=True, eq=False)
class Heads:
    """``sum_h softmax_rows(scale Q_h K_g^T) V_g W_O,h + b_O``; g is the group of head h.

    Parameters
    ----------
    W_Q : array_like, shape (H, d, h)
        Queries of head i are ``u W_Q[i] + b_Q[i]``.
    W_K, W_V : array_like, shapes (G, e, h) and (G, e, v)
        G divides H: head i uses keys and values of group ``i // (H / G)``. e is d, or the width of the
        states that cross attention reads.
    W_O : array_like, shape (H, v, d)
    b_Q, b_K, b_V, b_O : array_like, shapes (H, h), (G, h), (G, v) and (d,), optional
    scale : float, optional
        ``1 / sqrt(h)`` by default.
    softcap : float, optional
        Logits y become ``softcap tanh(y / softcap)``.
    q_norm, k_norm : Norm, optional
        Of queries and keys before they are turned: of width h, or of all heads together (H h and G h).

    Raises
    ------
    ValueError
        If shapes do not belong together.
    """

    W_Q: Any
    W_K: Any
    W_V: Any
    W_O: Any
    b_Q: Any = None
    b_K: Any = None
    b_V: Any = None
    b_O: Any = None
    scale: float | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def __post_init__(self) -> None:
        W = {name: _stack(getattr(self, name), name) for name in ("W_Q", "W_K", "W_V", "W_O")}
        H, d, h = W["W_Q"].shape
        G, e, _ = W["W_K"].shape
        v = W["W_V"].shape[2]
        if H % G:
            raise ValueError(f"W_Q has {H} heads and W_K {G}: the number of key heads divides that of heads")
        for name, shape in {"W_K": (G, e, h), "W_V": (G, e, v), "W_O": (H, v, d)}.items():
            if W[name].shape != shape:
                raise ValueError(f"{name} has shape {W[name].shape}; expected {shape} beside the others")
        for name, shape in {"b_Q": (H, h), "b_K": (G, h), "b_V": (G, v), "b_O": (d,)}.items():
            given = getattr(self, name)
            W[name] = np.zeros(shape) if given is None else np.asarray(given, dtype=np.float64)
            if W[name].shape != shape or not np.isfinite(W[name]).all():
                raise ValueError(f"{name} must hold finite numbers, shape {shape}, not {W[name].shape}")
        for name, value in W.items():
            object.__setattr__(self, name, value)
        scale = h**-0.5 if self.scale is None else float(self.scale)
        if not (np.isfinite(scale) and scale > 0.0):
            raise ValueError(f"scale must be positive, not {self.scale!r}")
        object.__setattr__(self, "scale", scale)
        if self.softcap is not None and not (np.isfinite(self.softcap) and self.softcap > 0.0):
            raise ValueError(f"softcap must be positive, not {self.softcap!r}")
        for name, norm, widths in (("q_norm", self.q_norm, (h, H * h)), ("k_norm", self.k_norm, (h, G * h))):
            if norm is not None and norm.width not in widths:
                raise ValueError(f"{name} has width {norm.width}; expected {widths[0]} or {widths[1]}")

    @property
    def _scale(self) -> float:
        assert self.scale is not None
        return self.scale

    @property
    def d(self) -> int:
        """Width of the stream."""
        return int(self.W_Q.shape[1])

    @cached_property
    def _flat(self) -> tuple[Array, Array, Array, Array]:
        """The maps with heads side by side: one product for all."""
        side = [np.moveaxis(W, 0, 1).reshape(W.shape[1], -1) for W in (self.W_Q, self.W_K, self.W_V)]
        return side[0], side[1], side[2], self.W_O.reshape(-1, self.d)

    def keys(self, states: Array, turn: Turn | None = None) -> Cache:
        """Return keys and values of known states, shape (n, e)."""
        k, _ = self._keys(states, turn)
        return Cache(k, self._values(states))

    def forward(
        self, u: Array, mask: Mask | None, turn: Turn | None, past: Cache | None = None, *, own: bool = True
    ) -> tuple[Array, HeadsState]:
        """Return the output, shape (..., n, d), and the state.

        Parameters
        ----------
        u : ndarray, shape (..., n, d)
        mask : ndarray of bool, shape (n, p + n), or None
            True where a query sees a key, earlier ones first.
        turn : Turn or None
            Of these n tokens.
        past : Cache, optional
            Keys and values of p earlier tokens, or of the states that cross attention reads.
        own : bool
            Whether the tokens are keys too.
        """
        q, q_normed = self._queries(u, turn)
        k, k_normed = self._keys(u, turn) if own else (q[..., :1, :0, :], None)
        K, V = (k, self._values(u)) if own else (k, k)
        if past is not None:
            # Every array has the leading axes of u: one input of several can be taken out.
            lead = q.shape[:-4]
            K, V = (np.broadcast_to(part, (*lead, *part.shape)) for part in past)
            if own:
                K, V = np.concatenate([K, k], axis=-2), np.concatenate([V, self._values(u)], axis=-2)
        z = self._scale * (q @ _t(K))
        slope = None
        if self.softcap is not None:
            bent = np.tanh(z / self.softcap)
            z, slope = self.softcap * bent, 1.0 - bent * bent
        P = softmax_rows(z, mask)
        return self._out(P @ V) + self.b_O, HeadsState(q, k, K, V, P, slope, (q_normed, k_normed), turn)

    def push(self, s: HeadsState, du: Array) -> Array:
        """Return ``J du``; du may have more leading axes than the state."""
        dq = self._moved(du, 0, s)
        dz = self._scale * (dq @ _t(s.K))
        n, own = s.k.shape[-2], s.k.shape[-2] > 0
        if own:
            dz[..., -n:] += self._scale * (s.q @ _t(self._moved(du, 1, s)))
        if s.slope is not None:
            dz *= s.slope
        dz -= np.sum(s.P * dz, axis=-1, keepdims=True)
        dz *= s.P
        out = dz @ s.V
        if own:
            out += s.P[..., -n:] @ _split(du @ self._flat[2], len(self.W_V))
        return self._out(out)

    def pull(self, s: HeadsState, v: Array) -> Array:
        """Return ``J^T v``."""
        W_Q, W_K, W_V, W_O = self._flat
        do = self._grouped(v @ W_O.T, len(self.W_Q))
        dz = do @ _t(s.V)
        dz -= np.sum(s.P * dz, axis=-1, keepdims=True)
        dz *= s.P
        if s.slope is not None:
            dz *= s.slope
        dz *= self._scale
        back = _together(self._unturned(dz @ s.K, s))
        total = self._unnormed(back, 0, s) @ W_Q.T
        n = s.k.shape[-2]
        if n:
            dk = np.sum(_t(dz[..., -n:]) @ s.q, axis=-3, keepdims=True)
            total += self._unnormed(_together(self._unturned(dk, s)), 1, s) @ W_K.T
            total += _together(np.sum(_t(s.P[..., -n:]) @ do, axis=-3, keepdims=True)) @ W_V.T
        return np.asarray(total)

    def bounds(self, s: HeadsState, largest: float) -> Bounds | None:
        """Return bounds for one token whose earlier keys stand: of its output, and of derivatives with
        respect to u where ``|u| <= largest``; None for logits with norms or a cap.

        With ``|dz_k| <= z1``, ``|d^2 z_k| <= z2`` and ``|v_k| <= v`` a head has
        ``|D| <= |W_O| (|W_V| + v z1)`` and ``|D^2| <= |W_O| (2 |W_V| z1 + v z2 + 4 v z1^2)``: a covariance
        and a third cumulant.
        """
        if self.softcap is not None or self.q_norm is not None or self.k_norm is not None:
            return None
        total, n_group = np.zeros(3), len(self.W_Q) // len(self.W_K)
        own = s.k.shape[-2]
        for i, (W_Q, b_Q, W_O) in enumerate(zip(self.W_Q, self.b_Q, self.W_O, strict=True)):
            g = i // n_group
            W_K, W_V, b_K, b_V = self.W_K[g], self.W_V[g], self.b_K[g], self.b_V[g]
            given = slice(0, s.K.shape[-2] - own)
            K = s.K.reshape(len(self.W_K), -1, s.K.shape[-1])[g, given]
            if s.turn is not None:
                # Against the query's own angle: keys are turned, queries are not.
                K = s.turn.rows(np.zeros(len(K), dtype=int)).back(K)
            V = s.V.reshape(len(self.W_K), -1, s.V.shape[-1])[g, given]
            z1 = max((float(np.linalg.norm(W_Q @ key)) for key in K), default=0.0)
            v = float(np.linalg.norm(V, axis=-1).max(initial=0.0))
            value = z2 = 0.0
            if own:
                both, value = spectral_norm(W_Q @ W_K.T), spectral_norm(W_V)
                linear = float(np.linalg.norm(W_Q @ b_K) + np.linalg.norm(W_K @ b_Q))
                z1, z2 = max(z1, 2.0 * both * largest + linear), 2.0 * self._scale * both
                v = max(v, value * largest + float(np.linalg.norm(b_V)))
            z1 *= self._scale
            out = spectral_norm(W_O)
            total += out * np.array([v, value + v * z1, 2.0 * value * z1 + v * z2 + 4.0 * v * z1**2])
        return Bounds(float(total[0] + np.linalg.norm(self.b_O)), float(total[1]), float(total[2]))

    def _queries(self, u: Array, turn: Turn | None) -> tuple[Array, Any]:
        q, normed = _normed(u @ self._flat[0] + self.b_Q.reshape(-1), self.q_norm, len(self.W_Q))
        q = self._grouped(q, len(self.W_Q))
        return (q if turn is None else turn(q)), normed

    def _keys(self, u: Array, turn: Turn | None) -> tuple[Array, Any]:
        k, normed = _normed(u @ self._flat[1] + self.b_K.reshape(-1), self.k_norm, len(self.W_K))
        k = self._grouped(k, len(self.W_K))
        return (k if turn is None else turn(k)), normed

    def _values(self, u: Array) -> Array:
        return _split(u @ self._flat[2] + self.b_V.reshape(-1), len(self.W_V))

    def _moved(self, du: Array, side: int, s: HeadsState) -> Array:
        """Return how queries (side 0) or own keys (side 1) move along du."""
        norm, n = ((self.q_norm, len(self.W_Q)), (self.k_norm, len(self.W_K)))[side]
        d = du @ self._flat[side]
        if norm is not None:
            shaped = d.reshape(*d.shape[:-1], -1, norm.width)
            d = norm.push(s.normed[side], shaped).reshape(d.shape)
        d = self._grouped(d, n)
        return d if s.turn is None else s.turn(d)

    def _unturned(self, d: Array, s: HeadsState) -> Array:
        return d if s.turn is None else s.turn.back(d)

    def _unnormed(self, d: Array, side: int, s: HeadsState) -> Array:
        norm = (self.q_norm, self.k_norm)[side]
        if norm is None:
            return d
        shaped = d.reshape(*d.shape[:-1], -1, norm.width)
        return norm.pull(s.normed[side], shaped).reshape(d.shape)

    def _grouped(self, flat: Array, n_heads: int) -> Array:
        """Return heads side by side, shape (..., n, heads w), as (..., key heads, group, n, w)."""
        G = len(self.W_K)
        shaped = flat.reshape(*flat.shape[:-1], G, n_heads // G, -1)
        return np.moveaxis(shaped, -4, -2)

    def _out(self, mixed: Array) -> Array:
        return np.asarray(_together(mixed) @ self._flat[3])


def _normed(flat: Array, norm: Norm | None, n_heads: int) -> tuple[Array, Any]:
    if norm is None:
        return flat, None
    shaped, state = norm.forward(flat.reshape(*flat.shape[:-1], -1, norm.width))
    return shaped.reshape(flat.shape), state


def _split(flat: Array, n_heads: int) -> Array:
    """Return (..., n, heads w) as (..., heads, 1, n, w)."""
    shaped = flat.reshape(*flat.shape[:-1], n_heads, 1, -1)
    return np.moveaxis(shaped, -4, -2)


def _together(grouped: Array) -> Array:
    """Return (..., key heads, group, n, w) as heads side by side, (..., n, heads w)."""
    back = np.moveaxis(grouped, -2, -4)
    return back.reshape(*back.shape[:-3], -1)


def _t(matrix: Array) -> Array:
    return np.swapaxes(matrix, -1, -2)


def _stack(values: Any, name: str) -> NDArray[np.float64]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as one matrix a head: {error}") from None
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; expected (heads, ., .), one matrix a head")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} is not finite in head {int(np.argwhere(~np.isfinite(array))[0][0])}")
    return array
