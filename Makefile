# Every target is a line or two; what it does lives in src. `make` alone prints the list.
SHELL := /bin/sh
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PLATFORM ?= embedded
OVERLAY ?= local
CLUSTER = --overlay $(OVERLAY) $(if $(CONTEXT),--context '$(CONTEXT)') $(if $(YES),--yes)
# Two processes: what needs the executed notebooks runs in one, the rest beside it (tests/conftest.py).
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(if $(DURATIONS),--durations $(DURATIONS))
# What checks and tests need, what notebooks 8 to 10 and the loop need, and both with what only some tests need.
DEV = $(VENV)/.dev
GROUPS = $(VENV)/.pipelines $(VENV)/.serving $(VENV)/.drift
TESTED = $(DEV) $(GROUPS) $(VENV)/.scale $(VENV)/.audit
# A cluster's platform may have a Dask scheduler.
SCALE = $(if $(ENGINE)$(filter k8s,$(PLATFORM)),$(VENV)/.scale)
DASK = $(if $(ENGINE),--engine $(ENGINE))
CLI = $(BIN)/python -m mlplatform_ops
PIPELINE = $(BIN)/python -W ignore -m mlplatform_pipeline
# Keep compiled modules, whatever the shell says: else each server, kernel and step compiles MLflow again (14 s, not 5).
unexport PYTHONDONTWRITEBYTECODE

##@ Start here
.PHONY: help run run-all site test
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {gsub(/\$$\$$/, "$$", $$2); printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(READY) $(SCALE) ## Start the platform, run every notebook that has changed (FRESH=1: every one), make the site, say where to look
	@$(CLI) run --platform $(PLATFORM) $(CLUSTER) $(DASK) $(if $(FRESH),--fresh)

run-all: $(GROUPS) $(SCALE) ## The same with notebooks 8 to 10, which need packages of their own
	@$(CLI) run --every --platform $(PLATFORM) $(CLUSTER) $(DASK) $(if $(FRESH),--fresh)

site: $(READY) ## Make build/site again, from the notebooks of the last run
	@$(CLI) site

test: $(TESTED) ## Pass every test, on a platform of its own (DURATIONS=25 lists the slowest)
	@$(PYTEST)

##@ The platform on this machine
.PHONY: up down reset status env password lab serve serve-model ui attack clean
up: $(READY) ## Start object store, online store and MLflow; wait until each answers
	@$(CLI) up

down: $(READY) ## Stop them; nothing is lost
	@$(CLI) down

reset: $(READY) ## Bring the platform back to the state after the last complete make run; what came later is deleted
	@$(CLI) reset

status: $(READY) ## Show each service, its state, URL and how long it runs
	@$(CLI) status

env: $(READY) ## Print the connection settings as shell exports: eval "$$(make -s env)"
	@$(CLI) env

password: $(READY) ## Print the password that MLflow asks for
	@$(CLI) password

lab: $(READY) ## Open JupyterLab at notebook 1, with what notebooks need; saved notebooks keep no outputs
	@$(CLI) lab

serve: $(READY) ## Start the Feast feature server
	@$(CLI) serve

serve-model: $(VENV)/.serving ## Start the endpoint that serves the champion; adds the packages that it needs
	@$(CLI) $@

ui: $(READY) ## Start the Feast UI, and the object store's pages beside it
	@$(CLI) ui

attack: $(READY) ## Try the running platform's doors as a stranger would, and show which ones hold
	@$(CLI) attack

clean: $(READY) ## Stop the platform and delete all of its state, and what was built
	@$(CLI) clean

##@ A workshop on this machine (USERS=12)
.PHONY: workshop workshop-reset workshop-down workshop-clean
workshop: $(VENV)/.workshop ## Start one platform for USERS=12, each with a Lab of their own; say where, and what each takes
	@$(CLI) workshop up --users $(or $(USERS),12)

workshop-reset: $(VENV)/.workshop ## Give USER=user03 a fresh start; nobody else notices
	@$(CLI) workshop reset $(USER)

workshop-down: $(READY) ## Stop it; nothing is lost
	@$(CLI) workshop down

workshop-clean: $(READY) ## Stop it and delete all of its state
	@$(CLI) workshop clean

##@ Data and features
.PHONY: data features
data: $(READY) ## Derive data/income_data.csv again from its source and check both checksums
	@$(CLI) data

features: $(READY) $(SCALE) ## Register the features and materialise them to the online store (ENGINE=dask: on several processes)
	@$(CLI) features --platform $(PLATFORM) $(CLUSTER) $(DASK)

##@ Batches and drift
.PHONY: drift rollback pipeline pipeline-yaml loop reproduce
pipeline: $(VENV)/.pipelines $(SCALE) ## Score everybody with the batch pipeline, on this machine (PEOPLE=s3://..., ENGINE=dask: on several processes)
	@$(if $(filter dask,$(ENGINE)),$(CLI) with-dask,$(CLI) up &&) $(PIPELINE) batch $(DASK) $(if $(PEOPLE),--people $(PEOPLE))

pipeline-yaml: $(VENV)/.pipelines ## Compile the pipelines to the YAML that a cluster runs
	@$(PIPELINE) compile

rollback: $(READY) ## Make the version before the champion the champion again; REASON= is recorded
	@$(CLI) release roll-back $(if $(REASON),'$(subst ','\'',$(REASON))') $(if $(MODEL),--model $(MODEL))

drift: $(VENV)/.drift ## Compare BATCH=s3://..., or what the endpoint saw, with the champion's training data
	@$(CLI) drift --platform $(PLATFORM) $(CLUSTER) $(if $(BATCH),--batch $(BATCH)) $(if $(DAYS),--days $(DAYS))

loop: $(GROUPS) ## Drift, retraining, gate, shadow, canary, promotion and roll-back under load, with evidence (SEED=1)
	@$(CLI) loop $(if $(SEED),--seed $(SEED))

reproduce: $(READY) ## Train RUN=id again from nothing but its id, and compare what came out
	@$(CLI) reproduce $(RUN)

##@ On a cluster (OVERLAY=local, CONTEXT=the current one, YES=1 to go on in production)
.PHONY: k8s-pipeline k8s-secrets k8s-up k8s-forward k8s-status k8s-down
k8s-secrets: $(READY) ## Generate the cluster's secrets into git-ignored files; existing ones are kept (ROTATE=, RETIRE=)
	@$(CLI) $@ $(CLUSTER) $(if $(ROTATE),--rotate $(ROTATE)) $(if $(RETIRE),--retire $(RETIRE))

k8s-up: $(READY) ## Apply the manifests and wait for every rollout
	@$(CLI) $@ $(CLUSTER)

k8s-forward: $(READY) ## Forward the cluster's services to this machine
	@$(CLI) $@ $(CLUSTER)

k8s-status: $(READY) ## Show what runs on the cluster
	@$(CLI) $@ $(CLUSTER)

k8s-down: $(READY) ## Remove the platform from the cluster; asks before it deletes data (DATA=keep or delete)
	@$(CLI) $@ $(CLUSTER) $(if $(DATA),--$(DATA)-data)

k8s-pipeline: $(VENV)/.pipelines ## Submit a pipeline to Kubeflow at KFP_HOST (NAME=batch, ARGS='-p people_uri=s3://...', CRON='0 0 3 * * *')
	@$(PIPELINE) submit $(or $(NAME),batch) $(ARGS) $(if $(CRON),--cron '$(CRON)')

##@ Working on the repository
.PHONY: bench check lint test-unit test-services test-notebooks test-browser test-cluster test-workshop format secrets sbom audit lock install
check: lint test-unit ## Check style, types and contracts, and pass the unit tests: seconds

lint: $(DEV) ## Check style, types, the contracts between packages, and the workflows
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . && $(BIN)/mypy && $(BIN)/lint-imports --no-logo
	@$(BIN)/zizmor --offline --quiet .github

test-unit: $(DEV) ## Pass the tests that need no server
	@$(PYTEST) tests/unit

test-services: $(TESTED) ## Pass the tests of one service each, against real servers
	@$(PYTEST) tests/services

test-notebooks: $(DEV) $(GROUPS) ## Run every notebook and check what it made
	@$(PYTEST) tests/notebooks

test-browser: $(DEV) $(VENV)/.browser run ## After make run: walk the site, MLflow, the Feast UI, the object store and Lab in the system's Chromium
	@$(PYTEST) tests/browser

test-workshop: $(DEV) $(VENV)/.workshop ## Take three users through the notebooks at once, and let each try to cross: minutes, alone on the machine
	@$(BIN)/python -m pytest tests/workshop

test-cluster: $(DEV) ## Pass the tests of the manifests and of the k8s- commands
	@$(PYTEST) tests/cluster

bench: $(READY) ## Time what users wait for beside the tools' own ways and the least that the work takes; write docs/speed.md (SCALES='1 10 100')
	@$(CLI) up && $(BIN)/python -W ignore tests/benchmarks/features.py --scales $(or $(SCALES),1 10)
	@for part in waits runs environment page; do $(BIN)/python -W ignore tests/benchmarks/$$part.py || exit; done

format: $(DEV) ## Format code and notebooks, strip the notebooks' outputs
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix . && $(BIN)/nbstripout --keep-id notebooks/*.ipynb

secrets: $(DEV) ## Look for secrets in every file of the repository (FILES= names some)
	@$(if $(FILES),printf '%s\0' $(FILES),git ls-files -z) | grep -zvE '\.lock$$|^data/|\.png$$|/compiled/' | xargs -0 $(BIN)/detect-secrets-hook --no-verify --disable-plugin HexHighEntropyString --exclude-lines 'secretName:|defaultMode:|`make (env|password)`|"(wrong|hush-[0-9])"'

sbom: $(VENV)/.audit ## List what the environment and the notebooks' image consist of, in build/*.cdx.json (CycloneDX)
	@mkdir -p build
	@$(BIN)/cyclonedx-py environment $(VENV) --pyproject pyproject.toml --output-reproducible -o build/environment.cdx.json
	@$(BIN)/cyclonedx-py requirements deploy/components/notebooks/requirements.lock --pyproject pyproject.toml --output-reproducible -o build/image.cdx.json

audit: $(VENV)/.audit ## Ask the Python Packaging Advisory Database for known holes in what is locked; needs the internet
	@for lock in requirements*.lock; do $(BIN)/pip-audit --require-hashes --disable-pip -r "$$lock" || exit 1; done

install: $(DEV) ## Create the environment, with what checks and tests need (every other target adds what it needs)

# The image's file and the groups' are locked with the machine's versions. Each group follows the one before it, so that
# all of them fit into one environment. kfp's own bounds on four packages are older than what it runs with: a test holds it.
# A release is taken when it has been out for a week: one that somebody has planted is most often found by then.
COOLDOWN = 7 days
LOCK = $(BIN)/uv pip compile --quiet --exclude-newer '$(COOLDOWN)' --universal --python-version 3.11 --generate-hashes --no-annotate --no-header
GROUP = $(LOCK) -c requirements.lock -c requirements-dev.lock
lock: $(BIN)/uv ## Resolve the dependencies again and write the hash-locked requirements (COOLDOWN='7 days')
	@echo 'uv' | $(LOCK) --upgrade - -o requirements-uv.lock
	@$(LOCK) --upgrade --group build --group embedded --group ops pyproject.toml -o requirements.lock
	@$(LOCK) -c requirements.lock --upgrade --group dev -o requirements-dev.lock
	@$(GROUP) --group build --group ops pyproject.toml -o deploy/components/notebooks/requirements.lock
	@printf '%s\n' kubernetes protobuf requests urllib3 | $(GROUP) --override /dev/stdin --group pipelines -o requirements-pipelines.lock
	@$(GROUP) -c requirements-pipelines.lock --group serving -o requirements-serving.lock
	@$(GROUP) -c requirements-pipelines.lock -c requirements-serving.lock --group drift -o requirements-drift.lock
	@$(GROUP) --group browser -o requirements-browser.lock
	@$(GROUP) --group workshop -o requirements-workshop.lock
	@$(GROUP) -c requirements-pipelines.lock -c requirements-serving.lock -c requirements-drift.lock --group audit -o requirements-audit.lock
	@$(GROUP) -c requirements-pipelines.lock -c requirements-serving.lock -c requirements-drift.lock -c requirements-audit.lock --group scale -o requirements-scale.lock

# Run an installer, and if it fails say in one line why. Of an index's address nothing but the host is shown and kept: the
# rest may hold a password.
define install
@said=$$($(2) 2>&1) || { printf '%s\n' "$$said" | sed -E 's#(https?://)([^/ )]*@)?([^/ )]*)[^ )]*#\1\3#g' > $(VENV)/install.log; \
	echo "error: $(1) cannot be installed ($$(sed -nE '$$ {s/^ *[a-zA-Z]+: +//; p;}' $(VENV)/install.log)); check the package index, see $(VENV)/install.log, and run this again" >&2; exit 1; }
endef

# A group of packages that only some targets need: `$(VENV)/.pipelines` stands for it. Adding one removes nothing.
$(VENV)/.%: requirements-%.lock $(READY)
	@echo 'Adding the packages of $*' >&2
	$(call install,the packages of $*,$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r $<)
	@touch $@

# uv installs the 260 packages in a tenth of pip's time; pip itself fetches it, checked by its hash.
$(BIN)/uv: requirements-uv.lock
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit("Python 3.11 to 3.14 is needed, and this is %s; name one: make PYTHON=python3.12" % sys.version.split()[0])'
	@echo 'Creating the environment in $(VENV) (about a minute)' >&2
	@$(PYTHON) -m venv $(VENV)
	$(call install,uv,$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-uv.lock)
	@touch $@

$(READY): requirements.lock pyproject.toml | $(BIN)/uv
	$(call install,the packages of requirements.lock,$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --allow-empty-requirements requirements.lock requirements-uv.lock)
	$(call install,this package,$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .)
	@touch $@
