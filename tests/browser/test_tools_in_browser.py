"""What notebooks tell readers to click in MLflow, the Feast UI, the object store and JupyterLab, after `make run`."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import requests
from playwright.sync_api import Browser, BrowserContext, Page, expect
from web_pages import PATIENCE_MS, SHOTS, shown_problems

from mlplatform import table
from mlplatform.connection import s3_client
from mlplatform.settings import ARTIFACTS_BUCKET, DATASETS_BUCKET, find_root
from mlplatform_ops.embedded.platform import EmbeddedPlatform

expect.set_options(timeout=PATIENCE_MS)


def keep(page: Page, name: str) -> None:
    page.screenshot(path=SHOTS / f"{name}.png")


@pytest.fixture
def mlflow(browser: Browser, platform: EmbeddedPlatform) -> Iterator[Page]:
    """MLflow under *Model training*, as somebody signed in."""
    settings = platform.settings
    login = {"username": settings.tracking_username, "password": settings.tracking_password}
    context = browser.new_context(viewport={"width": 1500, "height": 1000}, http_credentials=login)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto(settings.tracking_uri)
    page.get_by_text("Model training", exact=True).click()
    yield page
    context.close()


def open_experiment(page: Page, name: str) -> None:
    page.get_by_role("link", name="Experiments", exact=True).click()
    page.get_by_role("link", name=name, exact=True).click()


def test_a_run_of_the_experiment_shows_its_metrics_data_sets_and_artifacts(mlflow: Page) -> None:
    open_experiment(mlflow, "income-classifier")
    for name in ("xgboost", "random-forest", "decision-tree", "logistic-regression", "xgboost-search"):
        expect(mlflow.get_by_role("link", name=name, exact=True).first).to_be_visible()
    keep(mlflow, "mlflow-experiment")
    mlflow.get_by_role("link", name="xgboost", exact=True).last.click()
    expect(mlflow.get_by_text("roc_auc_score_test")).to_be_visible()
    mlflow.get_by_text(re.compile(r"income-training \(")).first.click()
    expect(mlflow.get_by_text(re.compile("s3://mlflow-datasets/")).first).to_be_visible()
    keep(mlflow, "mlflow-data-sets")
    mlflow.keyboard.press("Escape")
    mlflow.get_by_role("tab", name="Artifacts").click()
    for name in ("encoder.json", "evaluation_roc_curve_plot.png", "model_card.md"):
        expect(mlflow.get_by_text(name)).to_be_visible()
    mlflow.get_by_text("evaluation_roc_curve_plot.png").click()
    expect(mlflow.get_by_role("img", name=re.compile("roc_curve")).first).to_be_visible()
    keep(mlflow, "mlflow-artifacts")


def test_the_chart_view_draws_the_metrics(mlflow: Page) -> None:
    open_experiment(mlflow, "income-classifier")
    mlflow.locator("label", has=mlflow.locator("input[value=CHART]")).click()
    mlflow.get_by_placeholder("Search metric charts").fill("roc_auc_score_test")
    expect(mlflow.get_by_text("roc_auc_score_test").first).to_be_visible()
    expect(mlflow.locator(".js-plotly-plot").first).to_contain_text("0.88")
    keep(mlflow, "mlflow-chart")


def test_the_registry_shows_the_champion_with_its_decision_and_signature(mlflow: Page) -> None:
    mlflow.get_by_role("link", name="Model registry").click()
    mlflow.get_by_role("dialog").get_by_role("button", name="Close").click()
    mlflow.get_by_role("link", name=table.current().model, exact=True).click()
    expect(mlflow.get_by_text("champion").first).to_be_visible()
    keep(mlflow, "mlflow-registry")
    mlflow.get_by_role("link", name="Version 1", exact=True).first.click()
    for text in ("Source Run", "Schema"):
        expect(mlflow.get_by_text(text).first).to_be_visible()
    keep(mlflow, "mlflow-version")


# What each link that a notebook prints promises to show, by the words before it.
PROMISED = {
    "The plots": ("Education.png", "Workclass.png"),
    "All runs, best first": ("Sort: roc_auc_score_test", "xgboost", "logistic-regression"),
    "XGBoost's run": ("roc_auc_score_test", "Parameters"),
    "Its columns": ("Path: mlflow-artifacts:", "feature_importance_weight.png"),
    "The best run's ROC curve": ("Path: mlflow-artifacts:", "evaluation_roc_curve_plot.png"),
    "The card": ("Path: mlflow-artifacts:", "model_card.md"),
    "The table": ("Sort: roc_auc_score_test", "metrics.roc_auc_score_test > 0.8", "xgboost"),
    "The chart": ("Model metrics", "roc_auc_score_test"),
    "The champion": ("@ champion", "Source Run", "Schema", "signature"),
    "The scoring run": ("mean_probability", "Tags"),
    "The model's version": ("Source Run", "Schema"),
    "All batches": ("drift-",),
    "Evidently's page": ("Path: mlflow-artifacts:", "report.html"),
}


def shown_links() -> dict[str, str]:
    """Read the links to MLflow that the executed notebooks show, by the words before each."""
    links = {}
    for path in sorted((find_root() / "build" / "notebooks").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", ()):
                links |= re.findall(r"^(\w[^:\n]*): (http\S+/#/\S+)$", "".join(output.get("text", "")), re.MULTILINE)
    return links


def test_each_link_that_a_notebook_shows_leads_to_what_it_promises(mlflow: Page) -> None:
    links = shown_links()
    optional = {"All batches", "Evidently's page"}  # of notebook 10, which `make run` leaves out
    assert PROMISED.keys() - optional <= links.keys() <= PROMISED.keys()
    for words, url in links.items():
        mlflow.goto("about:blank")
        mlflow.goto(url)
        for text in PROMISED[words]:
            if text.startswith("metrics."):
                expect(mlflow.get_by_test_id("search-box")).to_have_value(text)
            else:
                expect(mlflow.get_by_text(text).first, f"{words}: {url}").to_be_visible()
        keep(mlflow, f"link-{words.lower().replace(' ', '-')}")


@pytest.fixture
def signed_in(browser: Browser, platform: EmbeddedPlatform) -> Iterator[BrowserContext]:
    """A browser whose user types the password wherever it is asked for."""
    settings = platform.settings
    login = {"username": settings.tracking_username, "password": settings.tracking_password}
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, http_credentials=login)
    context.set_default_timeout(PATIENCE_MS)
    yield context
    context.close()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=10).ok
    except requests.ConnectionError:
        return False


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address that `make lab` prints, once it answers there."""
    said = tmp_path_factory.mktemp("lab") / "said"
    with said.open("w") as output:
        process = subprocess.Popen(["make", "-s", "lab"], cwd=find_root(), stderr=output, start_new_session=True)  # noqa: S607
    try:
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not (found := re.search(r"^JupyterLab: (\S+)$", said.read_text(), re.MULTILINE)) or not answers(found[1]):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.2)
        yield found[1]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


# What each tile must show, by its title.
OPENED = {
    "MLflow": "income-classifier",
    "Feast UI": "Feature Views",
    "Object store": DATASETS_BUCKET,
    "Feature server": '{"detail":"serving"}',
}


def test_each_tile_of_the_launcher_opens_what_it_names(
    signed_in: BrowserContext, platform: EmbeddedPlatform, lab: str
) -> None:
    platform.stop("feast-ui")  # which its tile starts; the tests after this one use it
    page = signed_in.new_page()
    page.goto(lab)
    expect(page.get_by_role("heading", name="1. Explore the data").first).to_be_visible()
    cards = page.locator(".jp-LauncherCard:visible", has=page.locator("img[src*='server-proxy/icon']"))
    for title, text in OPENED.items():
        page.bring_to_front()
        page.get_by_role("menuitem", name="File", exact=True).click()
        page.get_by_text("New Launcher", exact=True).click()
        expect(cards).to_have_count(len(OPENED))
        keep(page, "lab-launcher")
        with signed_in.expect_page() as opened:
            cards.filter(has_text=title).click()
        expect(opened.value.get_by_text(text).first, title).to_be_visible()
        origin = urlsplit(opened.value.url).netloc
        assert (origin == urlsplit(page.url).netloc) == (title == "Feature server"), "shown below Jupyter's address"
        keep(opened.value, f"tile-{title.lower().replace(' ', '-')}")


def test_lab_shows_no_port_of_this_machine_below_its_address_and_no_tile_to_strangers(
    platform: EmbeddedPlatform, lab: str
) -> None:
    start, login = lab.partition("/lab/")[0], {"token": lab.partition("token=")[2]}
    port = urlsplit(platform.settings.tracking_uri).port
    for path in (f"proxy/{port}/health", f"proxy/127.0.0.1:{port}/health", "mlflow/health"):
        assert requests.get(f"{start}/{path}", params=login, timeout=20).status_code in {403, 404}, path
    led = requests.get(f"{start}/platform/mlflow", params=login, timeout=60, allow_redirects=False)
    assert (led.status_code, led.headers["Location"].partition("/#/")[0]) == (302, platform.settings.tracking_uri)
    led = requests.get(f"{start}/platform/mlflow", timeout=20, allow_redirects=False)
    assert urlsplit(led.headers["Location"]).path == "/login"


def test_lab_opens_at_notebook_1_runs_it_to_its_end_and_git_stays_clean(browser: Browser, lab: str) -> None:
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto(lab)
    expect(page.get_by_role("heading", name="1. Explore the data").first).to_be_visible()
    keep(page, "lab")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    expect(page.locator(".jp-Notebook")).to_contain_text("ceiling_accuracy: 0.86")
    keep(page, "lab-run")
    expect(page.get_by_text("official Jupyter news")).to_have_count(0)
    page.keyboard.press("Control+s")
    expect(page.locator(".jp-mod-dirty")).to_have_count(0)
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    context.close()
    command = ["git", "diff", "--stat", "notebooks/01_explore_data.ipynb"]
    assert subprocess.check_output(command, cwd=find_root(), text=True) == ""


def test_the_feast_ui_shows_the_views_and_the_service(browser: Browser, platform: EmbeddedPlatform) -> None:
    platform.up(also=["feast-ui"])
    url = next(service.url for service in platform.status() if service.name == "feast-ui")
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto(url)
    page.get_by_role("link", name="Feature Views").first.click()
    for name in ("demographic", "occupation", "relationship"):
        expect(page.get_by_role("link", name=name, exact=True).first).to_be_visible()
    page.get_by_role("link", name="demographic", exact=True).first.click()
    for name in ("Sex", "Race", "Native_country"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    keep(page, "feast-view")
    page.get_by_role("link", name="Feature Services").first.click()
    page.get_by_role("link", name="income_v1", exact=True).first.click()
    expect(page.get_by_text("Education", exact=True).first).to_be_visible()
    keep(page, "feast-service")
    context.close()


def test_the_object_store_is_shown_at_two_widths_in_two_schemes_and_axe_finds_nothing(
    signed_in: BrowserContext, platform: EmbeddedPlatform
) -> None:
    platform.up(also=["feast-ui"])
    store = s3_client(platform.settings)
    keys = {
        f"{bucket}/{entry['Key']}"
        for bucket in (DATASETS_BUCKET, ARTIFACTS_BUCKET)
        for entry in store.list_objects_v2(Bucket=bucket)["Contents"]
    }
    parquet = max(key for key in keys if key.startswith(DATASETS_BUCKET) and key.endswith(".parquet"))
    folder, _, name = parquet.rpartition("/")
    looked_at = {
        "buckets": ("", DATASETS_BUCKET),
        "folder": (f"{folder}/", name),
        "parquet": (parquet, "First 20 rows"),
        "image": (min(key for key in keys if key.endswith(".png")), "The image"),
        "text": (min(key for key in keys if key.endswith("MLmodel")), "What it holds"),
        "gone": (f"{DATASETS_BUCKET}/gone.txt", "is not there"),
    }
    page, problems = signed_in.new_page(), []
    page.on("console", lambda message: problems.extend(re.findall(".*Content Security Policy.*", message.text)))
    for name, (path, text) in looked_at.items():
        page.goto(f"{platform.url('feast-ui')}/objects/{path}")
        expect(page.get_by_text(text).first).to_be_visible()
        if name == "image":
            assert page.evaluate("document.images[0].naturalWidth") > 100
        for width, scheme in itertools.product((390, 1280), ("light", "dark")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            keep(page, f"objects-{name}-{width}-{scheme}")
            problems += shown_problems(page, f"{name}, {width}, {scheme}", width)
    assert problems == []
