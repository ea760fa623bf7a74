"""Elasticities, effects, ratios, log sums and scenarios of softmax models: thin methods over `inference`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import narwhals as nw
import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from attnfit.data.inputs import library_and_index, parse_groups
from attnfit.estimators import reading
from attnfit.estimators.outside import add_zero_rows
from attnfit.estimators.variables import covariance_for, variable_of
from attnfit.inference import Fitted
from attnfit.inference.effects import Effects, ScenarioComparison, effects_of, ratio_of
from attnfit.inference.scenario import MAX_PAIRS, LogSums, Scenario
from attnfit.objectives.models import Softmax

Array = NDArray[np.float64]


class ChoiceEffectsMixin:
    """What a softmax model says of responses, with delta-method errors.

    In all methods ``X, groups, offset`` are the choice sets to look at, those of the training by default;
    ``weights`` are market sizes, one a row or group; ``kind, clusters, correction, df`` choose the covariance
    as in `conf_int`; ``level`` is the cover of intervals.
    """

    coef_: Array
    outside_good: bool
    _fitted: Fitted
    _point: Array

    def elasticities(
        self,
        variable: Any,
        alternatives: Any = None,
        *,
        rows: bool = False,
        pairs: Literal["all", "own"] | None = None,
        derivative: Any = None,
        **options: Any,
    ) -> Effects:
        """Return by how many per cent shares change for one per cent more of a variable.

        Parameters
        ----------
        variable : str or int
            A column by name or number.
        alternatives : array_like, shape (n,), optional
            The alternative of each row; known from a formula.
        rows : bool
            One value a row, of its share to its own variable: ``(1 - f) v D``.
        pairs : {"all", "own"}, optional
            All pairs of alternatives, or each to itself: the default with more than 50.
        derivative : array_like, shape (n, d), optional
            The derivative of the rows of X in the variable, where it enters other columns than its own;
            ``variable`` is then its values, shape (n,).
        **options
            ``X, groups, offset, weights, kind, clusters, correction, df, level``.

        Returns
        -------
        Effects
            Shape (J, J): the change of the total share ``S_j`` in ``per cent`` (row) by v of alternative k
            everywhere (column), ``E_jk = N_jk / S_j``.

        Notes
        -----
        Errors by the delta method: ``sqrt(q^T V q)`` with q the gradient in the coefficients.
        """
        return self._responses("elasticity", variable, alternatives, rows, pairs, derivative, options)

    def semi_elasticities(
        self,
        variable: Any,
        alternatives: Any = None,
        *,
        rows: bool = False,
        pairs: Literal["all", "own"] | None = None,
        derivative: Any = None,
        **options: Any,
    ) -> Effects:
        """Return by which factor, less one, shares change for one more of a variable: `elasticities` with v
        replaced by 1.
        """
        return self._responses("semi-elasticity", variable, alternatives, rows, pairs, derivative, options)

    def marginal_effects(
        self,
        variable: Any,
        alternatives: Any = None,
        *,
        rows: bool = False,
        pairs: Literal["all", "own"] | None = None,
        derivative: Any = None,
        levels: tuple[Any, Any] | None = None,
        **options: Any,
    ) -> Effects:
        """Return by how much mean shares change for one more of a variable: ``N_jk / sum W``; parameters as
        in `elasticities`. For a category of a formula: by how much they change from one of two ``levels``,
        given to all rows, to the other.
        """
        if levels is not None:
            return self._contrast(variable, levels, alternatives, options)
        return self._responses("marginal", variable, alternatives, rows, pairs, derivative, options)

    def diversion(self, variable: Any = None, alternatives: Any = None, **options: Any) -> Effects:
        """Return where those go who leave an alternative: ``-N_jk / N_kk``, the share of what k loses that j
        (row) gains; NaN on the diagonal, columns sum to one.

        Parameters
        ----------
        variable : str or int, optional
            What makes k worse, where it does not by the same amount on all its rows.
        alternatives, **options
            As in `elasticities`.
        """
        scenario, options = self._look(options)
        codes, labels = self._codes(scenario, alternatives)
        moved = (
            None if variable is None else variable_of(self, variable, None, scenario.n_rows, scenario.data)
        )
        found = scenario.responses(codes, len(labels), moved, own=False)
        own, d_own = np.diagonal(found.changes), np.einsum("kkd->kd", found.d_changes)
        value = -found.changes / own
        gradients = -(found.d_changes + value[..., None] * d_own) / own[:, None]
        np.fill_diagonal(value, np.nan)
        return self._effects(value, gradients, options, scenario, ("to", "from"), (labels, labels))

    def ratio(
        self,
        a: Any,
        b: Any,
        *,
        method: Literal["delta", "fieller", "simulation"] = "fieller",
        n_draws: int = 10_000,
        random_state: Any = None,
        name: str | None = None,
        **options: Any,
    ) -> Effects:
        """Return the ratio of the coefficients of two variables: of time and cost the value of time.

        Parameters
        ----------
        a, b : str or int
            Columns.
        method : {"fieller", "delta", "simulation"}
            Of the interval: Fieller's set, symmetric, or percentiles of draws of the coefficients
            (Krinsky and Robb). The standard error is that of the delta method in all.
        n_draws, random_state
            Of the simulation.
        **options
            ``kind, clusters, correction, df, level``, and data where the ratio depends on them.
        """
        scenario, options = self._look(options)
        one, other = (variable_of(self, v, None, scenario.n_rows, scenario.data) for v in (a, b))
        covariance, level = covariance_for(self, options)
        label = name or f"{a}/{b}"
        d = len(self._point)
        if one.column is not None and other.column is not None:
            gradients = np.eye(d)[one.column], np.eye(d)[other.column]
            values = float(self._point[one.column]), float(self._point[other.column])
            return ratio_of(
                values,
                gradients,
                self._point,
                covariance,
                level,
                method,
                n_draws,
                random_state,
                label,
                str(b),
            )
        D_a, h_a, D_b, h_b = scenario.ratio_slopes(one, other)
        ratio = D_a / D_b
        q = ((h_a - ratio[:, None] * h_b) / D_b[:, None]).mean(axis=0)
        found = effects_of([ratio.mean()], q[None, :], covariance, level, names=([label],))
        return replace(found, notes=("mean over rows, on which the ratio depends; delta method",))

    def log_sums(self, X: Any = None, groups: Any = None, **options: Any) -> Effects:
        """Return ``log sum exp(X coef + offset)`` of each group: the expected utility of the best choice, up
        to a constant; its ``mean`` is that over groups.
        """
        scenario, options = self._look({"X": X, "groups": groups, **options})
        found = scenario.log_sums()
        mean = self._effects(
            [float(np.average(found.values, weights=found.weights))],
            np.average(found.gradients, axis=0, weights=found.weights)[None, :],
            options,
            scenario,
            ("name",),
            (["mean"],),
        )
        each = self._effects(found.values, found.gradients, options, scenario, ("group",), (found.labels,))
        return replace(each, mean=mean)

    def surplus(self, before: Any = None, after: Any = None, *, cost: Any, **options: Any) -> Effects:
        """Return the change of consumer surplus between two scenarios, in units of the cost, of each group;
        its ``mean`` is that over groups.

        Parameters
        ----------
        before, after : array_like or data frame
            X of the scenarios, with the same groups; ``before`` is the training data by default.
        cost : str or int
            The column of the cost, whose coefficient is minus the marginal utility of income, alpha.

        Notes
        -----
        ``(LS_1 - LS_0) / alpha`` with the log sums of the scenarios. Source: Small and Rosen (1981)
        doi:10.2307/1911129.

        Raises
        ------
        ValueError
            If alpha is not positive, or the scenarios have other groups.
        """
        first, second, options = self._two(before, after, options)
        variable = variable_of(self, cost, None, first.n_rows, first.data)
        if variable.column is None:
            raise ValueError(f"cost={cost!r} must enter the model by one column of its own")
        alpha = -float(self._point[variable.column])
        if alpha <= 0.0:
            raise ValueError(
                f"the coefficient of {cost!r} is {-alpha:.4g}: higher costs attract, and surplus has no unit"
            )
        one, other = first.log_sums(), second.log_sums()
        places = _same_groups(one, other)
        gain = other.values[places] - one.values
        value = gain / alpha
        gradients = (other.gradients[places] - one.gradients) / alpha
        gradients[:, variable.column] += gain / alpha**2
        mean = self._effects(
            [float(np.average(value, weights=one.weights))],
            np.average(gradients, axis=0, weights=one.weights)[None, :],
            options,
            first,
            ("name",),
            (["mean"],),
        )
        each = self._effects(value, gradients, options, first, ("group",), (one.labels,))
        return replace(each, mean=mean)

    def shares(self, X: Any = None, groups: Any = None, alternatives: Any = None, **options: Any) -> Effects:
        """Return the mean share of each alternative, ``S_j / sum W``, with intervals on the logit scale."""
        scenario, options = self._look({"X": X, "groups": groups, **options})
        codes, labels = self._codes(scenario, alternatives)
        found = scenario.responses(codes, len(labels), None, own=True)
        value, gradients = found.shares / found.weight, found.d_shares / found.weight
        return self._effects(value, gradients, options, scenario, ("alternative",), (labels,), "logit")

    def compare_scenarios(
        self, before: Any = None, after: Any = None, alternatives: Any = None, **options: Any
    ) -> ScenarioComparison:
        """Return shares of alternatives before and after, and their changes with errors.

        Parameters
        ----------
        before, after : array_like or data frame
            X of the scenarios; ``before`` is the training data by default.
        alternatives : array_like, shape (n,), optional
            Of the rows of both.
        """
        first, second, options = self._two(before, after, options)
        sides = []
        for scenario in (first, second):
            codes, labels = self._codes(scenario, alternatives)
            found = scenario.responses(codes, len(labels), None, own=True)
            sides.append((found.shares / found.weight, found.d_shares / found.weight, labels))
        (s0, q0, labels), (s1, q1, others) = sides
        if labels != others:
            raise ValueError("the scenarios have other alternatives, or another order of them")
        about = (options, first, ("alternative",), (labels,))
        return ScenarioComparison(
            self._effects(s0, q0, *about, "logit"),
            self._effects(s1, q1, *about, "logit"),
            self._effects(s1 - s0, q1 - q0, *about),
        )

    def predict_interval(self, X: Any = None, groups: Any = None, **options: Any) -> Effects:
        """Return the share of each row with an interval on the logit scale, for the uncertainty of the
        coefficients.
        """
        scenario, options = self._look({"X": X, "groups": groups, **options})
        return self._of_rows(scenario.row_shares(), options, scenario, "logit")

    # ---- how a call is read

    def _responses(
        self,
        kind: str,
        variable: Any,
        alternatives: Any,
        rows: bool,
        pairs: str | None,
        derivative: Any,
        options: dict[str, Any],
    ) -> Effects:
        scenario, options = self._look(options)
        moved = variable_of(self, variable, derivative, scenario.n_rows, scenario.data)._replace(
            relative=kind == "elasticity"
        )
        if rows:
            return self._of_rows(scenario.own_effects(moved, kind), options, scenario)
        codes, labels = self._codes(scenario, alternatives)
        fixed = scenario.is_fixed(moved)
        own = not fixed and (pairs or ("own" if len(labels) > MAX_PAIRS else "all")) == "own"
        sums = scenario.responses(codes, len(labels), moved, own=own)
        N, dN, S, dS = sums.changes, sums.d_changes, sums.shares, sums.d_shares
        if fixed:
            # A variable of groups moves all alternatives together.
            own, N, dN = True, N.sum(axis=1), dN.sum(axis=1)
        if kind == "marginal":
            value, gradients = N / sums.weight, dN / sums.weight
        else:
            S, dS = (S, dS) if own else (S[:, None], dS[:, None, :])
            value = N / S
            gradients = (dN - value[..., None] * dS) / S[..., None]
        if own:
            return self._effects(value, gradients, options, scenario, ("alternative",), (labels,))
        return self._effects(value, gradients, options, scenario, ("share_of", "changed"), (labels, labels))

    def _contrast(
        self, variable: Any, levels: tuple[Any, Any], alternatives: Any, options: dict[str, Any]
    ) -> Effects:
        """Return what changes where all rows have the second level in place of the first."""
        scenario, rest = self._look(options)
        data = scenario.data
        if data is None or variable not in list(data.columns):
            raise ValueError(f"levels belong to a column of a formula's data; {variable!r} is none")
        one, other = (
            nw.from_native(data).with_columns(nw.lit(level).alias(variable)).to_native() for level in levels
        )
        groups = scenario.group_labels() if options.get("groups") is None else options["groups"]
        alternatives = self._known_alternatives(scenario) if alternatives is None else alternatives
        return self.compare_scenarios(one, other, alternatives, groups=groups, **rest).change

    def _look(self, options: dict[str, Any]) -> tuple[Scenario, dict[str, Any]]:
        """Return the choice sets asked for, and the options that are left."""
        check_is_fitted(self)
        self._require_no_effects("this effect")  # type: ignore[attr-defined]
        options = dict(options)
        data = {name: options.pop(name, None) for name in ("X", "groups", "offset", "weights")}
        unknown = set(options) - {"kind", "clusters", "correction", "df", "level"}
        if unknown:
            raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
        return self._scenario(**data), options

    def _two(
        self, before: Any, after: Any, options: dict[str, Any]
    ) -> tuple[Scenario, Scenario, dict[str, Any]]:
        if after is None:
            raise ValueError("after is missing: pass X of the scenario to compare with")
        given = dict(options)
        groups = given.pop("groups", None)
        if before is None:
            first, _ = self._look(given)
            if groups is None and first.kept is None:
                groups = first.group_labels()
        else:
            first, _ = self._look({"X": before, "groups": groups, **given})
        second, rest = self._look({"X": after, "groups": groups, **given})
        return first, second, rest

    def _scenario(self, X: Any, groups: Any, offset: Any, weights: Any) -> Scenario:
        if X is None:
            if groups is not None or offset is not None:
                raise ValueError("groups and offset belong to an X; pass it, or leave all out")
            self._training_problem("effects of the training data")  # type: ignore[attr-defined]
            fitted = self._fitted
            n = fitted.given.n_rows - fitted.n_outside if fitted.kept is None else len(fitted.kept)
            found = Scenario(fitted.given, self._point, n, fitted.kept, n_outside=fitted.n_outside)
            found.library, found.index = getattr(self, "_library", None), getattr(self, "_index", None)
            found.data = self.__dict__.get("_data")
        else:
            library, index = library_and_index(X)
            data = X
            X, groups = self._rows_of(X, groups)  # type: ignore[attr-defined]
            design = reading.read_features(self, X, reset=False)
            n = int(design.shape[0])
            self._require_groups(groups)  # type: ignore[attr-defined]
            sets = parse_groups(groups, n)
            shift = reading.read_offset(offset, n)
            ids = reading.group_numbers(sets, n)
            n_outside = len(sets) if self.outside_good else 0
            if n_outside:
                design = add_zero_rows(design, n_outside)
                ids = np.concatenate([ids, np.arange(n_outside)])
                shift = None if shift is None else np.concatenate([shift, np.zeros(n_outside)])
            problem = Softmax(design, np.zeros(len(ids)), ids, loss="entropy", offset=shift)
            found = Scenario(problem, self._point, n, n_outside=n_outside, labels=sets.labels)
            found.library, found.index, found.data = library, index, data
        if weights is not None:
            found.set_weights(weights)
        return found

    def _codes(self, scenario: Scenario, alternatives: Any) -> tuple[Any, list[Any]]:
        if alternatives is None:
            alternatives = self._known_alternatives(scenario)
        return scenario.codes(alternatives)

    def _known_alternatives(self, scenario: Scenario) -> Any:
        known = self._column_named("alternatives", scenario.data)  # type: ignore[attr-defined]
        known = getattr(self, "_alternatives", None) if known is None else known
        if known is None or len(known) != scenario.n_rows:
            raise ValueError("alternatives is missing: pass the label of the alternative of each row")
        return known

    def _of_rows(
        self, found: tuple[Array, Array], options: dict[str, Any], scenario: Scenario, scale: str = ""
    ) -> Effects:
        """Return one effect a row, from values and gradients."""
        about = ("row",), (range(len(found[0])),)
        return replace(self._effects(*found, options, scenario, *about, scale), index=scenario.index)

    def _effects(
        self,
        value: Any,
        gradients: Array,
        options: dict[str, Any],
        scenario: Scenario,
        dimensions: tuple[str, ...],
        names: tuple[Any, ...],
        scale: str = "",
    ) -> Effects:
        covariance, level = covariance_for(self, options)
        return effects_of(
            value, gradients, covariance, level, scale,
            names=names, dimensions=dimensions, library=scenario.library,
        )  # fmt: skip


def _same_groups(one: LogSums, other: LogSums) -> list[int]:
    """Return where the groups of the first scenario are in the second."""
    places = {label: k for k, label in enumerate(other.labels)}
    missing = [label for label in one.labels if label not in places]
    if missing or len(one.labels) != len(other.labels):
        raise ValueError(
            f"the scenarios have {len(one.labels)} and {len(other.labels)} groups"
            + (f"; group {missing[0]!r} is missing after" if missing else "; they must be the same")
        )
    return [places[label] for label in one.labels]
