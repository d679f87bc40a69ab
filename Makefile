# make train: set up and train the demo through its three phases.  make test: set up and test.
# Everything runs from .venv; nothing else is installed.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PARITY := .venv-parity
OFFICIAL ?=
WORKDIR ?= runs/demo
IMAGENET ?=
AE ?= dc-ae-f64c128-in-1.0
RESOLUTION ?= 512
N ?=
NETS ?=
CONSTRAINTS := constraints-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt

# XLA on CPU allocates its buffers anew at each step; with these glibc keeps the pages instead of
# giving them back (a DC-AE step is 10 % faster).  They must be set before Python starts.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368:glibc.malloc.top_pad=536870912:glibc.malloc.arena_max=1
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)
# A folder of compiled programs: the second run starts at once.
export JAX_COMPILATION_CACHE_DIR ?= $(HOME)/.cache/dcae_jax/xla
# `make test` leaves out half of the compiler's work (tests/conftest.py); these switch it on again.
AS_IN_TRAINING := --xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true

.PHONY: help setup train demo-diffusion report reproduce-dcae reproduce-dcae-demo test test-all test-slurm \
  parity lint ablation masking-study bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

setup: $(READY)  ## make .venv with the pinned requirements

$(READY): requirements.txt requirements-dev.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check \
	  -r requirements.txt -r requirements-dev.txt -c $(CONSTRAINTS)
	touch $@

train: $(READY)  ## phases 1 -> 2 -> 3 of a small DC-AE on the built-in photographs
	PYTHON=$(BIN)/python launch/three_phases.sh configs/demo.py $(WORKDIR)

demo-diffusion: $(READY)  ## diffusion on latents of the demo's autoencoder (trained first)
	test -e $(WORKDIR)/phase3/summary.json || $(MAKE) train
	PYTHON=$(BIN)/python launch/demo_diffusion.sh \
	  $(WORKDIR)/phase3 $(WORKDIR)_latents $(WORKDIR)_diffusion

report: $(READY)  ## rebuild runs/demo/report.html
	$(BIN)/python -m dcae_jax report --workdir $(WORKDIR)

reproduce-dcae: $(if $(IMAGENET),$(READY))  ## published scores of an autoencoder (IMAGENET=FOLDER AE=NAME)
	@PYTHON=$(BIN)/python $(if $(NETS),DCAE_JAX_NETS="$(NETS)") launch/reproduce_dcae.sh \
	  "$(IMAGENET)" "$(AE)" runs/reproduced/$(notdir $(AE))-$(RESOLUTION) \
	  --resolution $(RESOLUTION) $(if $(N),--n $(N))

reproduce-dcae-demo: $(READY)  ## the same on the built-in photographs; its scores mean nothing
	PYTHON=$(BIN)/python launch/reproduce_demo.sh runs/reproduced/demo

test: $(READY)  ## the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(READY)  ## with the long versions of the promises, compiled as in training
	XLA_FLAGS="$(AS_IN_TRAINING)" $(BIN)/python -m pytest -n 2 --dist loadfile

test-slurm: $(READY)  ## the Slurm launcher on a real Slurm (Debian's packages, started here, stopped again)
	@for p in munged slurmctld slurmd sbatch; do command -v $$p > /dev/null || missing=1; done; \
	  test -z "$$missing" || { $(SUDO) apt-get update -qq && RUNLEVEL=1 $(SUDO) apt-get install -y \
	  -qq --no-install-recommends slurmctld slurmd slurm-client munge; }
	$(BIN)/python -m pytest tests/slurm

parity: $(PARITY)/.ready  ## compare with PyTorch, live (OFFICIAL=FOLDER of DC-Gen: with it too)
	XLA_FLAGS="$(AS_IN_TRAINING)" PYTHONPATH=$(OFFICIAL) $(PARITY)/bin/python -m pytest tests/parity/live

$(PARITY)/.ready: requirements.txt requirements-dev.txt requirements-parity.txt \
		requirements-metrics.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt \
	  -r requirements-dev.txt -r requirements-parity.txt -c $(CONSTRAINTS)
	$(PARITY)/bin/pip install --quiet --disable-pip-version-check --upgrade --no-deps \
	  --target $(PARITY)/metrics -r requirements-metrics.txt
	touch $@

lint: $(READY)  ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

masking-study: $(READY)  ## what masking brings, measured here
	$(BIN)/python -m dcae_jax masking-study --out runs/masking

ablation: $(READY)  ## what residual autoencoding and phase 2 bring, measured here
	$(BIN)/python -m dcae_jax ablation --out runs/ablation

bench: $(READY)  ## speed on this machine
	$(BIN)/python -m dcae_jax bench autoencoder

clean:  ## remove .venv and .venv-parity (runs/ stays)
	rm -rf $(VENV) $(PARITY)
