"""A client whose clock is a year off: a process of its own, in which every library sees that clock."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from mlplatform import features
from mlplatform.errors import DataError
from mlplatform.settings import STATE_VARIABLE, Settings
from mlplatform_ops.embedded.platform import EmbeddedPlatform

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parents[1] / "support" / "clock.c"
# Where there is no compiler, only what asks Python's own library for the time gets the wrong one; boto3 does.
PYTHONS_CLOCK = """
import botocore.auth, botocore.compat, datetime, os
real = botocore.compat.get_current_datetime
moved = lambda *args, **named: real(*args, **named) + datetime.timedelta(seconds=int(os.environ["CLOCK_MOVED"]))
botocore.compat.get_current_datetime = botocore.auth.get_current_datetime = moved
"""
YEAR = timedelta(days=366)  # another year, in a leap year too
Run = Callable[[str, timedelta], str]


@pytest.fixture
def run(embedded: EmbeddedPlatform, tmp_path: Path) -> Run:
    """Run a few lines of Python with a clock that is moved, and give what they print."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), STATE_VARIABLE: str(embedded.state)}
    prelude = PYTHONS_CLOCK
    if compiler := shutil.which("cc"):
        library = tmp_path / "clock.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
        environ["LD_PRELOAD"], prelude = str(library), ""

    def run(code: str, moved: timedelta) -> str:
        done = subprocess.run(
            [sys.executable, "-c", f"{prelude}\n{code}"],
            env={**environ, "CLOCK_MOVED": str(int(moved.total_seconds()))},
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        return f"{done.stdout}\n{done.stderr}".strip()

    return run


@pytest.mark.parametrize("moved", [YEAR, -YEAR], ids=["a year ahead", "a year behind"])
@pytest.mark.parametrize(
    "call",
    [
        "from mlplatform import connect; connect()",
        "from mlplatform.settings import find_settings; from mlplatform.connection import s3_client\n"
        "from mlplatform import objectstore; store = s3_client(find_settings(os.environ))\n"
        "objectstore.read_bytes('s3://mlflow-datasets/x', client=store)",
        "from mlplatform.settings import find_settings; os.environ.update(find_settings(os.environ).to_env())\n"
        "from mlplatform import features; features.open_store()",
    ],
    ids=["connect", "an object", "the feature store"],
)
def test_the_refusal_of_a_signature_with_a_wrong_time_names_both_clocks(
    platform: Settings, run: Run, call: str, moved: timedelta
) -> None:
    began = _weekday(moved)
    said = run(f"import os\n{call}", moved).splitlines()[-1]
    here, there = (f"{datetime.now(UTC) + by:%Y}" for by in (moved, timedelta()))
    assert "CredentialsError: the object store refuses " in said
    assert said.partition("for the time in the signature: here it is ")[2][:3] in {began, _weekday(moved)}
    assert here != there
    assert f"{there} " in said.partition(" and there ")[2]
    assert said.endswith("set the clock that is wrong, then do this again")


def _weekday(moved: timedelta) -> str:
    return f"{datetime.now(UTC) + moved:%a}"


def test_history_does_not_depend_on_todays_date(platform: Settings, run: Run) -> None:
    """What was known at a moment is asked of the data; a clock that is minutes off signs well, and changes nothing."""
    code = (
        "from mlplatform import connect, features; connect()\nimport pandas as pd\n"
        "asked = pd.DataFrame({'user_id': ['9f2ac416-06e1-44a0-87bd-d4787c85bf66'],"
        "'event_timestamp': [pd.Timestamp('2023-01-30 10:59:42', tz='UTC')]})\n"
        "features.build(notify=lambda _: None)\n"
        "print(features.point_in_time(features.open_store(), asked).to_json())"
    )
    answers = {run(code, timedelta(minutes=minutes)).splitlines()[-1] for minutes in (0, 10, -10)}
    assert len(answers) == 1
    assert '"Sex":{"0":"Male"}' in answers.pop()


def test_an_incremental_load_after_a_clock_that_was_a_year_ahead_is_no_silent_success(
    platform: Settings, tmp_path: Path
) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(ROOT / "feature_repo", repo, ignore=shutil.ignore_patterns("__pycache__"))
    config = repo / "feature_store.yaml"
    config.write_text(config.read_text().replace("registry.db", f"clock-{uuid4().hex}.db"))
    features.build(repo=repo, notify=lambda _: None)
    store = features.open_store(repo)
    ahead = datetime.now(UTC) + YEAR
    store.materialize_incremental(ahead, feature_views=["demographic"])
    with pytest.raises(DataError, match=r"demographic was loaded up to .* is this machine's clock right\?"):
        store.materialize_incremental(datetime.now(UTC), feature_views=["demographic"])
    assert store.get_feature_view("demographic").most_recent_end_time == ahead
