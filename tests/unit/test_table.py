"""One description of a table, and what reads it: with numbers, categories and both; no server needed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn.linear_model import LogisticRegression
from xgboost import XGBClassifier

from mlplatform import history, income, modeling, table
from mlplatform.description import entries
from mlplatform.errors import DataError, MissingObjectError
from mlplatform.monitoring.drift import Reference, compare
from mlplatform.promotion import evaluation, signing

ROOT = Path(__file__).parents[2]
FLATS = """
name = "flats"
file = "flats.csv"
model = "let-within-a-week"

[target]
column = "let"
positive = "yes"
negative = "no"

[columns]
"floor area" = "number"
district = "category"
rent = "number"

[entity]
name = "flat"
key = "flat_id"
time = "offered"
history = "invented"
start = 2025-01-01
end = 2025-07-01
"""


def flats(rows: int = 400) -> pd.DataFrame:
    """Draw flats, of which the cheap ones in the north are let within a week."""
    rng = np.random.default_rng(3)
    frame = pd.DataFrame(
        {
            "floor area": rng.normal(70, 20, rows),
            "district": rng.choice(["north", "south", "west"], rows),
            "rent": rng.normal(900, 250, rows),
        }
    )
    wanted = frame["floor area"] / 20 - frame["rent"] / 250 + (frame["district"] == "north") + rng.normal(0, 0.5, rows)
    return frame.assign(let=np.where(wanted > 0, "yes", "no"))


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A clone with another table, which this process works in."""
    for folder in ("data", "feature_repo", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "table.toml").write_text(FLATS)
    flats().to_csv(tmp_path / "data" / "flats.csv", index=False)
    monkeypatch.chdir(tmp_path)
    table.current.cache_clear()
    yield tmp_path
    table.current.cache_clear()


def describe(folder: Path, old: str = "", new: str = "") -> entries.Table:
    (folder / "table.toml").write_text(FLATS.replace(old, new) if old else FLATS)
    return entries.describe(folder / "table.toml")


def test_the_census_is_described_as_the_notebooks_name_it() -> None:
    said = table.current()
    assert (said.name, said.model, said.service, said.experiment) == (
        "income",
        "income-above-50k",
        "income_v1",
        "income-classifier",
    )
    assert income.COLUMNS == said.columns == said.categories
    assert said.features["Marital-Status"] == "Marital_Status"
    assert (income.TARGET, income.POSITIVE, income.NEGATIVE) == ("Target", ">50K", "<=50K")
    assert said.numbers == ()
    assert said.text("restore") == "run 'make data'"


def test_a_name_that_is_not_described_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"mlplatform\.income.*no attribute 'COLUMNES'"):
        _ = income.COLUMNES


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('rent = "number"', 'rent = "money"', "columns.rent: Input should be 'category' or 'number'"),
        ('column = "let"\n', "", "target.column: Field required"),
        ('negative = "no"', "negative = false", "target.negative: Input should be a valid string"),
        ('model = "let', 'modle = "let', "model: Field required"),
        ("[entity]", "colour = 3\n[entity]", "columns.colour"),
        ('negative = "no"', 'negative = "yes"', "the target's two values are one"),
        ('key = "flat_id"', 'key = "rent"', "the target, the key or the time is a column too"),
        ("end = 2025-07-01", "end = 2024-07-01", "start is not before end"),
        (
            'history = "invented"',
            'history = "guessed"',
            "entity.history: Input should be 'census', 'file' or 'invented'",
        ),
        ('rent = "number"', '"floor-area" = "number"', "two columns differ in blanks and signs only"),
        ('rent = "number"', '"2nd rent" = "number"', "a column's name does not begin with a letter"),
        ('model = "let', 'groups = ["rent"]\nmodel = "let', "a group is no category"),
        ("[entity]", '[views.a]\ncolumns = ["rent"]\n[entity]', "the views do not hold each column once"),
        ('name = "flats"', 'name = "our flats"', "name: String should match pattern"),
        ('model = "let', "model = \"let's", "model: String should match pattern"),
        ('rent = "number"', 'event_timestamp = "number"', "the target, the key or the time is a column too"),
        ('key = "flat_id"', 'key = "flat id"', "the key or a view is no single word"),
        ("[entity]", '[texts]\npurpos = "x"\n[entity]', "texts has an entry that nobody reads"),
        ('name = "flats"', "name = flats", "cannot be read as TOML"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused_in_one_line(
    old: str, new: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        describe(tmp_path, old, new)
    message = str(caught.value)
    assert reason in message
    assert "table.toml" in message
    assert "\n" not in message


def test_a_description_that_is_missing_says_where_one_is_shown(tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError, match="write it as docs/your-own-data"):
        entries.describe(tmp_path / "table.toml")


def test_without_views_one_view_holds_every_column(tmp_path: Path) -> None:
    said = describe(tmp_path)
    assert {name: view.columns for name, view in said.views.items()} == {"flats": said.columns}


def test_numbers_are_read_as_floats_to_the_last_bit(clone: Path) -> None:
    read, written = table.read(), flats()
    assert read.dtypes.astype(str).tolist() == ["float64", "object", "float64", "object"]
    pd.testing.assert_frame_equal(read, written, check_exact=True)
    pd.testing.assert_frame_equal(table.check(read), read)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("north", "", "missing values (district"),
        ("yes", "perhaps", "has targets other than no and yes: ['perhaps']"),
        ("floor area", "area", "columns missing: floor area, unexpected: area"),
    ],
)
def test_a_file_that_is_not_as_described_is_refused_in_one_line(clone: Path, old: str, new: str, reason: str) -> None:
    path = clone / "data" / "flats.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        table.read()
    assert reason in str(caught.value)
    assert "correct it, or data/table.toml" in str(caught.value)


def test_a_notebook_about_the_census_says_which_columns_it_misses(clone: Path) -> None:
    with pytest.raises(DataError, match=r"income_data\.csv has columns missing: floor area, district, rent"):
        income.read_income(ROOT / "data" / "income_data.csv")


@pytest.mark.parametrize("value", ["cheap", "1_000", "inf", "nan", "1e999"])
def test_a_number_that_is_none_is_named_with_its_row(clone: Path, value: str) -> None:
    frame = flats().astype(str)
    frame.loc[4, "rent"] = value
    with pytest.raises(DataError, match=f"'{value}' in rent, row 5, which is no number"):
        table.check(frame)


def test_a_mixed_model_takes_raw_rows_and_is_stored_with_the_types_that_we_trust(clone: Path) -> None:
    train, test = table.split(table.read(), seed=1)
    for estimator in (LogisticRegression(), XGBClassifier(n_estimators=20)):
        model = modeling.make_pipeline(estimator).fit(modeling.inputs(train), modeling.labels(train))
        assert modeling.scores(model, train, test)["roc_auc_score_test"] > 0.85
        skops.io.dump(model, clone / "model.skops")
        strange = skops.io.get_untrusted_types(file=clone / "model.skops")
        assert set(strange) <= set(signing.TRUSTED_TYPES)
    said = modeling.describe_encoder(model)
    assert said["columns"] == ["district_north", "district_south", "district_west", "floor area", "rent"]
    assert said["numbers"]["rent"] == pytest.approx([train["rent"].mean(), train["rent"].std(ddof=0)])


def test_whole_numbers_and_the_feature_stores_names_are_taken_and_text_is_not(clone: Path) -> None:
    rows = pd.DataFrame({"rent": [900], "district": ["west"], "floor_area": [70]})
    taken = modeling.inputs(rows)
    assert list(taken.columns) == ["floor area", "district", "rent"]
    assert taken["rent"].dtype == taken["floor area"].dtype == np.float64
    with pytest.raises(DataError, match="'dear' in rent, row 1, which is no number"):
        modeling.inputs(rows.assign(rent="dear"))


def test_folds_of_a_table_with_numbers_are_scaled_by_the_rows_they_know(clone: Path) -> None:
    frame = table.read()
    ours = evaluation.fold_scores({"model": LogisticRegression()}, frame, repeats=1, seed=5)["model"]
    theirs = modeling.cross_validate(LogisticRegression(), frame, seed=5)
    assert len(ours) == len(theirs) == 5
    parts = evaluation.RepeatedStratifiedKFold(n_splits=5, n_repeats=1, random_state=5)
    expected = []
    for known, held in parts.split(frame, modeling.labels(frame)):
        model = modeling.make_pipeline(LogisticRegression())
        model.fit(modeling.inputs(frame.iloc[known]), modeling.labels(frame.iloc[known]))
        answers = modeling.probabilities(model, frame.iloc[held])
        expected.append(evaluation.roc_auc_score(modeling.labels(frame.iloc[held]), answers))
    assert ours.tolist() == expected


def test_a_table_without_groups_is_judged_as_one_group(clone: Path) -> None:
    frame = table.read()
    rates = evaluation.group_rates(frame, np.ones(len(frame)))
    assert rates[["column", "group", "true_positive_rate"]].to_numpy().tolist() == [["rows", "all rows", 1.0]]


def test_an_invented_history_gives_each_row_an_id_and_a_time_and_the_same_ones_again(clone: Path) -> None:
    frame = table.read()
    versions = history.build_history(frame)
    pd.testing.assert_frame_equal(versions, history.build_history(frame))
    assert list(versions.columns) == ["flat_id", "event_timestamp", "floor_area", "district", "rent"]
    assert versions["flat_id"].is_unique
    start, end = pd.Timestamp("2025-01-01", tz="UTC"), pd.Timestamp("2025-07-01", tz="UTC")
    assert versions["event_timestamp"].between(start, end).all()
    pd.testing.assert_frame_equal(modeling.inputs(versions), modeling.inputs(frame), check_exact=True)
    assert {name: list(part.columns) for name, part in history.split_views(versions).items()} == {
        "flats": list(versions.columns)
    }


def test_the_census_rules_refuse_a_table_without_its_columns(clone: Path) -> None:
    (clone / "data" / "table.toml").write_text(FLATS.replace('"invented"', '"census"'))
    with pytest.raises(DataError, match=r"the census' history needs Sex, .*write history = \"invented\" or \"file\""):
        history.build_history(table.read())


def test_a_history_in_the_file_is_taken_as_it_stands(clone: Path) -> None:
    (clone / "data" / "table.toml").write_text(FLATS.replace('"invented"', '"file"'))
    frame = flats(4).assign(
        flat_id=["7", "8", "7", "9"], offered=["2025-01-02", "2025-01-02T10:00", "2025-03-01", "2025-05-01"]
    )
    frame.to_csv(clone / "data" / "flats.csv", index=False)
    versions = history.build_history(table.read())
    assert versions["flat_id"].tolist() == ["7", "8", "7", "9"]
    assert str(versions["event_timestamp"].dtype) == "datetime64[us, UTC]"
    assert versions["event_timestamp"].iloc[1] == pd.Timestamp("2025-01-02T10:00Z")
    with pytest.raises(DataError, match="flat_id and offered are those of an earlier row in 1 rows; keep one of each"):
        history.build_history(
            table.check(frame.assign(flat_id="7", offered=frame["offered"].iloc[[0, 1, 2, 0]].tolist()))
        )
    with pytest.raises(DataError, match="the table has no time in offered"):
        table.check(frame.assign(offered="soon"))


def test_drift_of_a_number_is_noticed_and_an_equal_batch_is_not(clone: Path) -> None:
    known = flats(4_000)
    reference = Reference.of(known, ["floor area", "district", "rent"])
    equal = known.sample(1_500, random_state=1)
    assert not compare(reference, equal).alarm
    dearer = compare(reference, equal.assign(rent=equal["rent"] * 1.2))
    assert dearer.drifted == ["rent"]
    lost = compare(reference, equal.assign(rent=equal["rent"].where(equal["rent"] > 600)))
    assert "missing" in lost.columns.loc["rent", "why"]
    as_text = compare(reference, equal.assign(rent=equal["rent"].astype(str)))
    assert not as_text.alarm


def test_the_compiled_form_of_a_mixed_model_answers_as_the_pipeline_does(clone: Path) -> None:
    from mlplatform.serving.served_model import compile_model

    frame = table.read()
    model = modeling.make_pipeline(XGBClassifier(n_estimators=30)).fit(modeling.inputs(frame), modeling.labels(frame))
    score, compiled, remark = compile_model(model, frame)
    assert compiled, remark
    rows: list[Any] = [[70.5, "north", 800.25], [70.5, "nowhere", 1]]
    asked = pd.DataFrame(rows, columns=list(table.current().columns))
    assert score(rows) == modeling.probabilities(model, asked).tolist()


def test_what_is_told_about_the_census_refuses_another_table_in_one_line(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlplatform_ops.cli import main
    from mlplatform_pipeline import steps

    with pytest.raises(DataError, match="the pipeline is for the census and not for 'flats'"):
        steps.ready()
    assert main(["data"]) == 1
    assert "make data is for the census and not for 'flats'" in capsys.readouterr().err
    assert sorted(path.name for path in (clone / "data").iterdir()) == ["flats.csv", "table.toml"]


def test_the_shipped_description_says_what_every_entry_means() -> None:
    said = tomllib.loads((ROOT / "data" / "table.toml").read_text())
    assert set(said) == {entry.alias or name for name, entry in entries.Table.model_fields.items()} - {"folder"}
    assert set(said["entity"]) == set(entries.Entity.model_fields)
    assert set(said["target"]) == set(entries.Target.model_fields)
