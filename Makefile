# make demo [ROWS=1000000]   the whole job on a real cohort, with a local object store, Prefect and Ray
# make serve                 a Prefect server and worker with the demo's cohort deployed, to try out
# make test | test-fast | test-all   the tests | without Ray and Prefect | with the slow ones
# make test-nightly          faults at 20 random moments each
# make docs                  the documentation site, into site/
# make features-env         Feast's own environment, .venv-features; the tests make it where it is not there
# make lock                  after a change of constraints.txt: the archives of the images with their hashes
# make sbom [DEVICE=cuda]    what an image holds, as CycloneDX: sbom.json
# make audit                 known vulnerabilities of the pinned set, asked of PyPI
# make fuzz                  20,000 damaged inputs on each way in
# make lint | clean | bench-accuracy [BENCH=../shared/bench]

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BENCH ?= ../shared/bench
READY := .venv/.ready
FEAST := .venv-features/.ready

.PHONY: demo serve test test-fast test-all test-nightly docs features-env lock sbom audit fuzz lint clean bench-accuracy
.DEFAULT_GOAL := demo

demo: $(READY)
	.venv/bin/mmimpute demo $(if $(ROWS),--rows $(ROWS))

serve: $(READY)
	.venv/bin/mmimpute serve

# Three modules side by side: with four, Ray's starts on two cores can outlast the 30 s that Ray grants a node.
test: $(READY)
	.venv/bin/pytest -n 3 --dist loadscope --no-loadscope-reorder

test-fast: $(READY)
	.venv/bin/pytest -m "not slow and not services"

test-all: $(READY)
	.venv/bin/pytest -m "slow or not slow"

test-nightly: $(READY)
	MMIMPUTE_FAULTS=20 .venv/bin/pytest tests/faults

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

features-env: $(FEAST)

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

lock: $(READY)
	.venv/bin/python infra/lock.py

sbom:
	@test -x .venv-sbom/bin/cyclonedx-py || { $(PYTHON) -m venv .venv-sbom && .venv-sbom/bin/pip install --quiet --disable-pip-version-check "cyclonedx-bom==7.5.0"; }
	cat infra/requirements.lock infra/requirements-$(or $(DEVICE),cpu).lock | .venv-sbom/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o sbom.json -

audit:
	@test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install --quiet --disable-pip-version-check "pip-audit==2.10.1"; }
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

fuzz: $(READY)
	MMIMPUTE_FUZZ=20000 .venv/bin/pytest tests/fuzz --timeout 0 --hypothesis-show-statistics

bench-accuracy: $(READY)
	.venv/bin/python tests/benchmarks/accuracy.py $(BENCH)

clean:
	rm -rf .venv .venv-features .venv-sbom .venv-audit sbom.json build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@echo "Installing the pinned set into .venv: some minutes, once."
	@test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

# Feast needs an older pandas. The set is complete, so pip has nothing to resolve.
$(FEAST): constraints-features.txt
	@echo "Installing Feast into .venv-features: half a minute, once."
	@test -x .venv-features/bin/pip || $(PYTHON) -m venv .venv-features
	.venv-features/bin/pip install --quiet --disable-pip-version-check --no-deps -r constraints-features.txt
	@touch $@
