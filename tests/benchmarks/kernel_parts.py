"""Note what a kernel spends on imports and on fits; `runs.py` has IPython run this when a kernel starts.

Imports and fits within one another count once, and those of other threads not at all. What was found is written after
each cell, beside the cells' sources, by which `runs.py` knows the notebook.
"""

import functools
import importlib
import json
import os
import threading
import time
from pathlib import Path

SPENT = {"imports": 0.0, "fits": 0.0}
FITS = {
    "sklearn.ensemble._forest": ("BaseForest.fit",),
    "sklearn.linear_model._logistic": ("LogisticRegression.fit",),
    "sklearn.model_selection._validation": ("cross_validate", "cross_val_score"),
    "sklearn.pipeline": ("Pipeline.fit",),
    "sklearn.tree._classes": ("DecisionTreeClassifier.fit",),
    "xgboost.sklearn": ("XGBClassifier.fit",),
}
state = threading.local()


def counted(kind, call):
    """Add a call's seconds to a kind, unless it is part of another such call."""

    @functools.wraps(call)
    def wrapper(*args, **options):
        if threading.current_thread() is not threading.main_thread() or getattr(state, "busy", False):
            return call(*args, **options)
        state.busy, started = True, time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            SPENT[kind] += time.perf_counter() - started
            state.busy = False

    return wrapper


def find_and_load(name, import_):
    """Import a module, and have its fits counted."""
    module = load(name, import_)
    for path in FITS.get(name, ()):
        *parents, last = path.split(".")
        owner = functools.reduce(getattr, parents, module)
        setattr(owner, last, counted("fits", getattr(owner, last)))
    return module


def write(*_):
    """Keep what was found so far."""
    found = {**SPENT, "cells": get_ipython().user_ns["In"]}  # noqa: F821
    Path(os.environ["KERNEL_PARTS"], f"{os.getpid()}.json").write_text(json.dumps(found))


load = counted("imports", importlib._bootstrap._find_and_load)
importlib._bootstrap._find_and_load = find_and_load
get_ipython().events.register("post_run_cell", write)  # noqa: F821
