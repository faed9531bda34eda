"""Does a batch still look like the data the model was trained on? An alarm that is rare without a reason.

Each column is compared with the reference by counts of its categories. A missing value and a category that the
reference never had are categories of their own, since these two are what breaks in practice. Two tests look at each
column: a two-sample chi-squared test, in which rare categories are pooled, notices many small moves; a test of each
single category notices one that grew. Both together may raise a false alarm for `ALPHA` of all equal batches, over
all columns; and a difference below `LEAST_EFFECT` is no alarm, however certain it is. Hard rules come first: they
hold for the smallest batch too. Of a number, the tenth of the reference's values that it falls into is its category.

Nothing here talks to a server, and nothing is needed beyond numpy, pandas and SciPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import is_numeric_dtype
from scipy import special, stats

from mlplatform import table
from mlplatform.errors import DataError

MISSING = "(missing)"
UNSEEN = "(never seen)"
BLANKS = ("", "?")  # what the census file writes for a value that is not known

ALPHA = 0.005  # share of equal batches that may raise an alarm, over all columns
LEAST_EFFECT = 0.01  # share of the rows that would have to change their category
LEAST_EXPECTED = 5  # rows; a category that expects fewer is pooled in the chi-squared test
FEWEST_ROWS = 100  # below this nothing is tested
MOST_MISSING = 0.05  # hard rule: share of rows without a value, above the reference's own share
MOST_UNSEEN = 0.01  # hard rule: share of rows with a category that the reference never had
RULE_ROWS = 3  # a hard rule asks for this many rows at least
LEAST_FALL = 0.02  # fall of the area under the ROC curve that matters

Counts = NDArray[np.int64]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """How often each category occurs in the data that later data is compared with.

    Attributes:
        rows: How many rows were counted.
        categories: The known categories of each column, in the order of `counts`; the last two are `MISSING`
            and `UNSEEN`.
        counts: Rows per category, by column; the last one is 0.
        numbers: The reference's values of each column of numbers.
    """

    rows: int
    categories: Mapping[str, pd.Index]
    counts: Mapping[str, Counts]
    numbers: Mapping[str, Numbers] = field(default_factory=dict)

    @classmethod
    def of(cls, frame: pd.DataFrame, columns: Sequence[str] | None = None) -> Reference:
        """Count a frame.

        Args:
            frame: Columns of text or numbers; others than `columns` are ignored.
            columns: The columns to watch, by default all that are described.

        Raises:
            DataError: A column is missing, or there is no row.
        """
        columns = table.current().columns if columns is None else columns
        checked = check_columns(frame, columns, name="the reference")
        numbers = {name: frame[name].to_numpy(np.float64) for name in columns if is_numeric_dtype(frame[name])}
        checked = in_parts(checked, numbers)
        categories = {}
        for column in columns:
            known = pd.Index(checked[column].unique())
            categories[column] = known.drop(MISSING, errors="ignore").sort_values().append(pd.Index([MISSING, UNSEEN]))
        codes = encode(checked, categories)
        counts = {
            column: np.bincount(codes[column], minlength=len(known)).astype(np.int64)
            for column, known in categories.items()
        }
        return cls(len(checked), categories, counts, numbers)


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Attributes:
        rows: Rows of the batch.
        reference_rows: Rows of the reference.
        columns: One row per column, the most suspicious first: `p` (corrected for all columns), `effect` (share of
            rows that would have to change their category), `alarm` and `why`.
        tested: Whether there were rows enough to test; the hard rules hold in any case.
    """

    rows: int
    reference_rows: int
    columns: pd.DataFrame
    tested: bool

    @property
    def alarm(self) -> bool:
        """Whether any column raised an alarm."""
        return bool(self.columns["alarm"].any())

    @property
    def drifted(self) -> list[str]:
        """The columns that raised an alarm, the most suspicious first."""
        return self.columns.index[self.columns["alarm"]].astype(str).tolist()

    def __str__(self) -> str:
        against = f"{self.rows:,} rows against {self.reference_rows:,} of the reference"
        if self.alarm:
            why = self.columns["why"].astype(str)
            reasons = "; ".join(column + ": " + why[column] for column in self.drifted)
            return f"ALARM, {against}: {reasons}"
        if not self.tested:
            return f"too few rows to test, {against}: {FEWEST_ROWS} are needed; the hard rules hold"
        return f"no alarm, {against}"


def check_columns(
    frame: pd.DataFrame, columns: Sequence[str] | None = None, *, name: str = "the batch"
) -> pd.DataFrame:
    """Pick the watched columns out of a frame, each as text, with `MISSING` for what is null or blank.

    Args:
        frame: Any frame.
        columns: The columns to watch, by default all that are described.
        name: What to call the frame in the message.

    Raises:
        DataError: A column is missing or there twice, or there is no row.
    """
    columns = table.current().columns if columns is None else columns
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        found = ", ".join(map(str, frame.columns)) or "no columns"
        raise DataError(f"{name} lacks {', '.join(missing)}; it has {found}; give the columns {', '.join(columns)}")
    chosen = frame[list(columns)]
    if chosen.columns.has_duplicates:
        twice = ", ".join(dict.fromkeys(chosen.columns[chosen.columns.duplicated()]))
        raise DataError(f"{name} has {twice} more than once; drop one")
    if chosen.empty:
        raise DataError(f"{name} has no rows, so nothing can be said about it; see why nothing arrived")
    null = chosen.isna()
    text = pd.DataFrame({column: chosen[column].astype(str).str.strip() for column in columns})
    return text.mask(null | text.isin(BLANKS), MISSING)


def in_parts(checked: pd.DataFrame, numbers: Mapping[str, Numbers]) -> pd.DataFrame:
    """Put the name of its tenth in place of each number of a frame of `check_columns`; what is none is `MISSING`."""
    parts = {}
    for name, reference in numbers.items():
        values = pd.to_numeric(checked[name], errors="coerce").to_numpy()
        parts[name] = score_bins(reference[~np.isnan(reference)], values).fillna(MISSING).set_axis(checked.index)
    return checked.assign(**parts)


def encode(frame: pd.DataFrame, categories: Mapping[str, pd.Index]) -> dict[str, Counts]:
    """Turn the categories of a frame of `check_columns` into positions in `categories`, by column."""
    encoded = {}
    for column, known in categories.items():
        found = known.get_indexer(pd.Index(frame[column]))
        encoded[column] = np.where(found < 0, len(known) - 1, found).astype(np.int64)
    return encoded


def compare(reference: Reference, batch: pd.DataFrame) -> Verdict:
    """Compare a batch with the reference, column by column.

    Args:
        reference: What to compare with.
        batch: A frame that holds the reference's columns; others are ignored.

    Raises:
        DataError: A column is missing, or there is no row.
    """
    checked = in_parts(check_columns(batch, list(reference.categories)), reference.numbers)
    tested = len(checked) >= FEWEST_ROWS
    rows = []
    for column, codes in encode(checked, reference.categories).items():
        known, before = reference.categories[column], reference.counts[column]
        counts = np.bincount(codes, minlength=len(known)).astype(np.int64)
        p, moved = judge(before, counts[None, :], columns=len(reference.categories))
        rule = _broken_rule(before, counts)
        significant = tested and p[0] < ALPHA and moved[0] >= LEAST_EFFECT
        why = rule or (_largest_move(known, before, counts) if significant else "")
        rows.append((column, float(p[0]) if tested else np.nan, float(moved[0]), bool(rule) or significant, why))
    table = pd.DataFrame(rows, columns=["column", "p", "effect", "alarm", "why"]).set_index("column")
    table = table.sort_values(["alarm", "p", "effect"], ascending=[False, True, False], kind="stable")
    return Verdict(len(checked), reference.rows, table, tested)


def judge(before: Counts, counts: Counts, *, columns: int | None = None) -> tuple[Numbers, Numbers]:
    """Test one column of many batches at once.

    Args:
        before: The reference's rows per category, shape `(n_categories,)` or `(n_batches, n_categories)`.
        counts: Each batch's rows per category, shape `(n_batches, n_categories)`.
        columns: For how many columns the answer is corrected (Bonferroni), by default all that are described.

    Returns:
        The p-value, corrected for both tests and all columns, and the effect: the total variation distance, which
        is the share of rows that would have to change their category. Both of shape `(n_batches,)`.
    """
    columns = columns or len(table.current().columns)
    before = np.broadcast_to(before, counts.shape)
    present = ((before + counts) > 0).sum(axis=1)
    p = 2 * columns * np.minimum(_p_whole(before, counts), present * _p_grown(before, counts).min(axis=1))
    return np.minimum(p, 1.0), effect(before, counts)


def effect(before: Counts, counts: Counts) -> Numbers:
    """Give the total variation distance of two distributions by their counts, along the last axis."""
    difference = counts / counts.sum(axis=-1, keepdims=True) - before / before.sum(axis=-1, keepdims=True)
    return np.asarray(np.abs(difference).sum(axis=-1) / 2, dtype=np.float64)


def _p_whole(before: Counts, counts: Counts) -> Numbers:
    """Two-sample chi-squared test, in which the rarest categories are one, which expects enough rows itself."""
    order = np.argsort(before + counts, axis=1)
    tables = [np.take_along_axis(np.asarray(table), order, axis=1) for table in (before, counts)]
    total = tables[0] + tables[1]
    sizes = [table.sum(axis=1, keepdims=True) for table in tables]
    least = LEAST_EXPECTED * sum(sizes) / np.minimum(*sizes)
    rare = (total < least) | (np.cumsum(total, axis=1) - total < least)

    def pooled(table: Counts) -> Counts:
        return np.column_stack([np.where(rare, table, 0).sum(axis=1), np.where(rare, 0, table)])

    both = pooled(total)
    statistic = np.zeros(len(total))
    for part, size in zip(tables, sizes, strict=True):
        expected = both * size / sum(sizes)
        statistic += ((pooled(part) - expected) ** 2 / np.where(both > 0, expected, 1)).sum(axis=1)
    freedom = (both > 0).sum(axis=1) - 1
    return np.where(freedom > 0, special.chdtrc(np.maximum(freedom, 1), statistic), 1.0)


def _p_grown(before: Counts, counts: Counts) -> Numbers:
    """Probability that a category gets so many rows of the batch by chance, each category by itself.

    Given the rows of a category in both samples, those of the batch are hypergeometric. Two binomial distributions
    bound it, and the narrower one is close when the category or the batch is small against the other.
    """
    total, size = before + counts, counts.sum(axis=1, keepdims=True)
    both = size + before.sum(axis=1, keepdims=True)
    trials, share = np.minimum(total, size), np.maximum(total, size) / both
    return np.asarray(stats.binom.sf(counts - 1, trials, share), dtype=np.float64)


def _broken_rule(before: Counts, counts: Counts) -> str:
    """Say which hard rule a column breaks, if any."""
    rows = int(counts.sum())
    missing, unseen = int(counts[-2]), int(counts[-1])
    usual = before[-2] / before.sum()
    if missing >= RULE_ROWS and missing / rows - usual > MOST_MISSING:
        return f"{missing / rows:.1%} missing, {usual:.1%} in the reference"
    if unseen >= RULE_ROWS and unseen / rows > MOST_UNSEEN:
        return f"{unseen / rows:.1%} of the rows have a category that the reference never had"
    return ""


def _largest_move(known: pd.Index, before: Counts, counts: Counts) -> str:
    old, new = before / before.sum(), counts / counts.sum()
    place = int(np.argmax(np.abs(new - old)))
    return f"{known[place]} was {old[place]:.1%} of the rows and is {new[place]:.1%}"


# What may happen to a column, as its distribution afterwards. Written for shares, so that a power is computed
# without making a single row.


def moved_to_commonest(shares: Numbers, share: float) -> Numbers:
    """Let a share of all rows change to the commonest category, of all single moves the hardest to notice."""
    after = shares * (1 - share)
    after[np.argmax(shares)] += share
    return after


def moved_anywhere(shares: Numbers, share: float) -> Numbers:
    """Let a share of all rows change to any known category, each as likely as the others."""
    known = len(shares) - 2
    return shares * (1 - share) + np.where(np.arange(len(shares)) < known, share / known, 0)


def became_new(shares: Numbers, share: float) -> Numbers:
    """Let a share of all rows get a category that the reference never had."""
    after = shares * (1 - share)
    after[-1] += share
    return after


def became_missing(shares: Numbers, share: float) -> Numbers:
    """Let a share of all rows lose its value."""
    after = shares * (1 - share)
    after[-2] += share
    return after


SHIFTS = {
    "moved to the commonest category": moved_to_commonest,
    "moved to any category": moved_anywhere,
    "a new category": became_new,
    "missing": became_missing,
}


def power(
    reference: Reference, column: str, shift: str, share: float, *, rows: int, draws: int = 400, seed: int = 0
) -> float:
    """Estimate how often a shift of one column raises the alarm.

    Args:
        reference: What batches are compared with.
        column: The column that shifts.
        shift: A name of `SHIFTS`.
        share: Share of the rows that shift; 0 gives the share of false alarms of this column.
        rows: Rows of a batch.
        draws: How many batches are drawn.
        seed: Number that fixes the draws.
    """
    before = reference.counts[column]
    after = SHIFTS[shift](before / before.sum(), share)
    counts = np.random.default_rng(seed).multinomial(rows, after / after.sum(), size=draws)
    return float(alarms(before, counts, columns=len(reference.categories)).mean())


def alarms(before: Counts, counts: Counts, *, columns: int | None = None) -> NDArray[np.bool_]:
    """Say of many batches whether one column raises the alarm, by test or by hard rule; arguments as in `judge`."""
    p, moved = judge(before, counts, columns=columns)
    rows, usual = counts.sum(axis=1), np.broadcast_to(before, counts.shape)
    missing = counts[:, -2] / rows - usual[:, -2] / usual.sum(axis=1)
    rule = (counts[:, -2] >= RULE_ROWS) & (missing > MOST_MISSING)
    rule |= (counts[:, -1] >= RULE_ROWS) & (counts[:, -1] / rows > MOST_UNSEEN)
    return np.asarray(rule | ((rows >= FEWEST_ROWS) & (p < ALPHA) & (moved >= LEAST_EFFECT)), dtype=np.bool_)


def detectable(
    reference: Reference, column: str, sizes: Sequence[int], *, wanted: float = 0.95, draws: int = 400, seed: int = 0
) -> pd.DataFrame:
    """Compute how large a shift must be to raise the alarm nearly always: what is smaller may pass unnoticed.

    Args:
        reference: What batches are compared with.
        column: The column that shifts.
        sizes: Rows of a batch.
        wanted: Share of the shifted batches that must be found.
        draws: Batches per estimate.
        seed: Number that fixes the draws.

    Returns:
        One row per shift of `SHIFTS`, one column per size: the share of rows, to a tenth of a percent.
    """

    def smallest(shift: str, rows: int) -> float:
        low, high = 0, 1_000
        while high - low > 1:
            middle = (low + high) // 2
            found = power(reference, column, shift, middle / 1_000, rows=rows, draws=draws, seed=seed)
            low, high = (low, middle) if found >= wanted else (middle, high)
        return high / 1_000

    table = {size: {shift: smallest(shift, size) for shift in SHIFTS} for size in sizes}
    return pd.DataFrame(table).rename_axis(index="shift", columns="rows of a batch")


def score_bins(reference: Sequence[float] | Numbers, scores: Sequence[float] | Numbers, *, bins: int = 10) -> pd.Series:
    """Name the tenth of the reference's scores that each score falls into, so that scores compare as a column does.

    Args:
        reference: Probabilities that the model gave for the reference.
        scores: Probabilities to name; one that is not a number gives a null.
        bins: How many parts; scores that many rows share may leave fewer.

    Returns:
        A text column `score`.
    """
    edges = np.unique(np.quantile(np.asarray(reference, dtype=np.float64), np.linspace(0, 1, bins + 1)[1:-1]))
    values = np.asarray(scores, dtype=np.float64)
    names = np.array([f"part {place + 1}" for place in range(len(edges) + 1)], dtype=object)
    named = pd.Series(names[np.searchsorted(edges, values, side="right")], name="score", dtype=object)
    return named.mask(np.isnan(values))


def compare_scores(reference: Sequence[float] | Numbers, scores: Sequence[float] | Numbers) -> Verdict:
    """Compare what the model says now with what it said of the reference.

    Args:
        reference: Probabilities of the reference's rows.
        scores: Probabilities of the batch's rows.

    Raises:
        DataError: One of them has no rows.
    """
    before = Reference.of(score_bins(reference, reference).to_frame(), ["score"])
    return compare(before, score_bins(reference, scores).to_frame())


@dataclass(frozen=True)
class Performance:
    """How well a model did on rows whose labels arrived later, against the rows it was tested on.

    Attributes:
        auc: Area under the ROC curve now.
        auc_reference: The same on the rows held back in training.
        standard_error: Of their difference.
        mean_probability: What the model said on average.
        share_positive: What came true.
        alarm: Whether the fall is more than chance and more than `LEAST_FALL`.
    """

    auc: float
    auc_reference: float
    standard_error: float
    mean_probability: float
    share_positive: float
    alarm: bool

    def __str__(self) -> str:
        fall = self.auc - self.auc_reference
        said = f"{self.mean_probability:.3f} said, {self.share_positive:.3f} came true"
        known = f"AUC {self.auc:.4f} is {fall:+.4f} (standard error {self.standard_error:.4f}); {said}"
        return f"{'ALARM' if self.alarm else 'no alarm'}: {known}"


def compare_performance(
    reference_truth: NDArray[np.int64], reference_scores: Numbers, truth: NDArray[np.int64], scores: Numbers
) -> Performance:
    """Compare the area under the ROC curve of a labelled batch with that of the rows held back in training.

    Args:
        reference_truth: 0 or 1 for each row held back.
        reference_scores: The model's probability for each of them; rows without one (NaN) are left out.
        truth: 0 or 1 for each row of the batch.
        scores: The model's probability for each of them; rows without one (NaN) are left out.

    Raises:
        DataError: A side's rows with a score lack one of the two labels.
    """
    reference_truth, reference_scores = _with_score(reference_truth, reference_scores)
    truth, scores = _with_score(truth, scores)
    before, before_variance = _auc(reference_truth, reference_scores, name="the rows held back")
    now, now_variance = _auc(truth, scores, name="the batch")
    error = float(np.sqrt(before_variance + now_variance))
    fall = before - now
    alarm = fall >= LEAST_FALL and stats.norm.sf(fall / max(error, 1e-12)) < ALPHA
    return Performance(now, before, error, float(np.mean(scores)), float(np.mean(truth)), bool(alarm))


def _with_score(truth: NDArray[np.int64], scores: Numbers) -> tuple[NDArray[np.int64], Numbers]:
    # One NaN among them would make every rank NaN, and the alarm silent.
    known = ~np.isnan(scores)
    return truth[known], scores[known]


def _auc(truth: NDArray[np.int64], scores: Numbers, *, name: str) -> tuple[float, float]:
    """Give the area and its variance (DeLong et al. 1988, https://doi.org/10.2307/2531595)."""
    positive, negative = scores[truth == 1], scores[truth == 0]
    if len(positive) < 2 or len(negative) < 2:
        raise DataError(
            f"{name} has {len(positive)} positive and {len(negative)} negative labels of rows with a score; "
            "wait for two of each"
        )
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    above = (ranks[: len(positive)] - stats.rankdata(positive)) / len(negative)
    below = 1 - (ranks[len(positive) :] - stats.rankdata(negative)) / len(positive)
    variance = above.var(ddof=1) / len(positive) + below.var(ddof=1) / len(negative)
    return float(above.mean()), float(variance)


def freshness(moments: pd.Series, *, now: pd.Timestamp, ttl: pd.Timedelta) -> dict[str, float]:
    """Say how old the online features are.

    Args:
        moments: Event time of each user's values, UTC; null for a user who has none.
        now: The moment to measure from.
        ttl: From which age a value counts as stale.

    Returns:
        `users`, `unknown` (share without values), `stale` (share of the others), `median_age_days`, `oldest_age_days`.

    Raises:
        DataError: There is no user.
    """
    if moments.empty:
        raise DataError("no user was asked about; give at least one")
    ages = now - moments.dropna()
    days = ages.dt.total_seconds() / 86_400
    return {
        "users": float(len(moments)),
        "unknown": float(moments.isna().mean()),
        "stale": float((ages > ttl).mean()) if len(ages) else 0.0,
        "median_age_days": float(days.median()) if len(days) else float("nan"),
        "oldest_age_days": float(days.max()) if len(days) else float("nan"),
    }
