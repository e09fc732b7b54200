# A fresh machine needs Python >= 3.10 and make. Every target that needs the environment sets it up first, in .venv;
# PYTHON chooses the interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that a set-up that was cut short is taken up again; older than pyproject.toml means out of date.
STAMP := $(VENV)/.set-up
# One thread per worker: two workers with a thread pool each would fight over the same cores.
TESTED := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(TESTED) $(BIN)/pytest -n 2

# Environments of other versions: what machines with GPUs have today, and what a plain installation gives on the day
# that it is made.
PYTHON312 ?= python3.12
COMPAT := torch-2.11 newest
COMPAT_STAMPS := $(COMPAT:%=.compat/%/.set-up)
.compat/torch-2.11/.set-up: PINS := torch==2.11.0 torchvision==0.26.0 triton==3.6.0

# The variable that chooses an environment's interpreter.
CHOICE = PYTHON
$(COMPAT_STAMPS): CHOICE = PYTHON312

.PHONY: demo test test-all compat $(COMPAT:%=compat-%) compile-report coverage predictions figures training-evidence docs \
	dist bench gpu check format clean
.DELETE_ON_ERROR:

# OpenMP threads spin while they wait, which on a machine with other work makes the demo up to nine times slower.
demo: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/fusedres demo

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-all: $(STAMP)
	$(PYTEST)

# Gigabytes each. Ends with the first of them that fails; make -k compat runs the other, too.
compat: $(COMPAT:%=compat-%)

$(COMPAT:%=compat-%): compat-%: .compat/%/.set-up
	$(<D)/bin/python -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
	$(TESTED) $(<D)/bin/pytest -n 2 -m "not slow"

# Every kernel that the listed models launch, for every target: hours of one core at first, minutes from the cache
# after that. EVERY=1 takes the tiles that tuning would try, too.
compile-report: $(STAMP)
	$(BIN)/fusedres compile --report $(if $(EVERY),--every-tile) --csv compile-report.csv

# What of other libraries' models is fused: docs/coverage.md. A run that was cut short is taken up again.
coverage: $(STAMP)
	$(TESTED) $(BIN)/fusedres coverage --out docs/coverage.md

# What a ResNet-50 takes on several GPUs, as the model of time has it: docs/predictions.md.
predictions: $(STAMP)
	$(BIN)/fusedres predict --out docs/predictions.md

# Every figure of README.md and docs/ from docs/figures.json; COUNT=1 counts anew, MEASURE=cpu (host, digits) times anew.
figures: $(STAMP)
	$(BIN)/python docs/figures.py $(if $(COUNT),--count) $(MEASURE:%=--measure %)

# The site, from docs/*.md and the docstrings, in docs/_build/html.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

# sdist and wheel, in dist/. URL=https://host/owner/fusedres is the repository's address, for links and for PyPI.
dist: $(STAMP)
	FUSEDRES_URL=$(URL) $(BIN)/python -m build --outdir dist

# Networks trained fused and plain from the same weights: docs/training-evidence.md. An hour of one core; trainings that
# have ended are kept in runs/evidence.
training-evidence: $(STAMP)
	$(TESTED) $(BIN)/python -m fusedres.bench.training_evidence --out docs/training-evidence.md

# A first impression on whatever is here; make bench ARGS="--model resnet50 --train" asks for more.
ARGS ?= --quick
bench: $(STAMP)
	$(BIN)/fusedres bench $(ARGS)

# On a machine with a GPU, into bench/results/<gpu>: every kernel checked, ResNet-50 tuned, its launches timed beside
# their predictions (for fusedres calibrate), eager against torch.compile against tuned; then tests, parity, benchmarks.
# What has passed is not run again: ESSENTIAL=1 stops after the first four, PARTS=headline,kernels chooses, FRESH=1
# repeats.
# DRY=1 goes through every step with tiny shapes on an emulated GPU.
gpu: $(STAMP)
	$(BIN)/python -m fusedres.bench.gpu $(if $(DRY),--dry) $(if $(ESSENTIAL),--essential) \
		$(if $(PARTS),--parts $(PARTS)) $(if $(FRESH),--fresh)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .compat build dist docs/_build fusedres.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP) $(COMPAT_STAMPS): pyproject.toml
	@$($(CHOICE)) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'fusedres needs Python 3.10 or newer as $($(CHOICE)); choose another with: make $(CHOICE)=...' >&2; exit 1; }
	@# A half-made environment has no working pip, and one of an upgraded system no interpreter: both are made anew.
	@if ! $(@D)/bin/python -m pip --version >/dev/null 2>&1; then \
		$($(CHOICE)) -c 'import ensurepip, venv' 2>/dev/null || \
			{ echo '$($(CHOICE)) can not make virtual environments; on Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }; \
		rm -rf $(@D) && $($(CHOICE)) -m venv $(@D); \
	fi
	$(@D)/bin/python -m pip install --disable-pip-version-check -e '.[dev]' $(PINS)
	@# Files that an interrupted installation left behind can look installed without being whole.
	@$(@D)/bin/python -c 'import matplotlib, pytest, rich, sklearn, timm, torchvision' || \
		{ rm -rf $(@D); echo 'the environment was incomplete and has been removed: run make again' >&2; exit 1; }
	@touch $@
