# The commands of this project. `make help` lists them.
export ORT_DISABLE_TELEMETRY = 1
export ORT_TELEMETRY_DISABLED = 1
# Daemons and commands that tests start would compile every module anew each time: a third of the time they take to start.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
CACHE := .cache
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
SOURCES := agent runtimes fleet_server tests benchmarks examples docs packaging

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1mmake %-12s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.demo mosquitto ## the whole story on this machine (ARGS=--once ends by itself, ARGS=--stay keeps it running)
	@$(BIN)/python examples/demo $(ARGS)

.PHONY: test
test: $(VENV)/.dev test-packages $(CACHE)/onnx-node-tests/.done ## every test but the long ones (ARGS="-k name" for some)
	@$(BIN)/python -m tests.suite short $(ARGS)

.PHONY: test-long
test-long: $(VENV)/.dev test-packages perf-analyzer ## the tests that take their time: fuzzers, benchmarks, kills, devices that were away
	@$(BIN)/python -m tests.suite long $(ARGS)

.PHONY: test-survival
test-survival: $(VENV)/.dev test-packages ## what updates must outlive: crashes at every step, power cuts, a hostile broker (ARGS=-s shows the counts)
	@$(BIN)/python -m tests.suite survival $(ARGS)

.PHONY: test-postgresql
test-postgresql: $(VENV)/.dev test-packages ## the fleet server's tests once more, on PostgreSQL
	@EDGE_TEST_DATABASE=postgresql $(BIN)/python -m tests.suite server $(ARGS)

.PHONY: check
check: $(VENV)/.dev ## lint, formatting, strict types, floors, circles and sizes
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tests.structure

.PHONY: format
format: $(VENV)/.dev ## format the code and apply safe fixes
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

.PHONY: bench
bench: $(VENV)/.dev ## speed beside a raw socket and the engine alone, in one run (ARGS=--quick)
	$(BIN)/python -m benchmarks $(ARGS)

.PHONY: bench-peers
bench-peers: $(VENV)/.dev ## the same models behind other servers from PyPI, in one run (installs them; takes some minutes)
	$(BIN)/python -m benchmarks.peers $(ARGS)

.PHONY: bench-fleet
bench-fleet: $(VENV)/.dev mosquitto ## 1 000, 3 000 and 10 000 simulated devices on one fleet server (ARGS="--devices N" for one size)
	$(BIN)/python -m benchmarks.fleet $(ARGS)

.PHONY: soak
soak: $(VENV)/.dev ## an hour of mixed load with models coming and going (ARGS="--minutes 5")
	$(BIN)/python -m benchmarks.soak $(ARGS)

.PHONY: docs
docs: $(VENV)/.dev ## write the generated reference pages in docs/reference
	$(BIN)/python docs/generate.py

.PHONY: protos
protos: $(VENV)/.dev ## generate the messages of gRPC from agent/serving/grpc/*.proto
	$(BIN)/python -m agent.serving.grpc.compile

.PHONY: lock
lock: ## resolve the dependencies anew (needs uv)
	uv pip compile -q --universal --python-version 3.10 --generate-hashes --no-header --extra dev pyproject.toml -o requirements/dev.lock
	uv pip compile -q --universal --python-version 3.10 --generate-hashes --no-header --extra onnx --extra tflite --extra fleet -c requirements/dev.lock pyproject.toml -o requirements/demo.lock
	uv pip compile -q --universal --python-version 3.10 --generate-hashes --no-header --extra fleet --extra postgresql --extra object-store --extra backups --extra rabbitmq -c requirements/dev.lock pyproject.toml -o requirements/server.lock

.PHONY: release
release: $(VENV)/.dev test-packages ## check, build and tag VERSION (ARGS=--no-checks for a rehearsal)
	$(BIN)/python packaging/release.py $(VERSION) $(ARGS)

.PHONY: clean
clean: ## remove the environment and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info

# -- what the commands above need ---------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed; name one with: make PYTHON=python3.11 …"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

$(VENV)/.demo: requirements/demo.lock pyproject.toml | $(VENV)/bin/python
	@echo "installing the locked dependencies into $(VENV) …"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/demo.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.lock pyproject.toml | $(VENV)/bin/python
	@echo "installing the locked development dependencies into $(VENV) …"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@ $(VENV)/.demo

# The wheel is opened for its test data, never installed.
$(CACHE)/onnx-node-tests/.done: requirements/onnx-node-tests.txt | $(VENV)/bin/python
	@echo "fetching the ONNX operator tests …"
	@rm -rf $(@D) && mkdir -p $(@D)
	@$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --platform manylinux_2_17_x86_64 \
	  --python-version 3.11 --require-hashes -r $< -d $(@D)
	@$(BIN)/python -m zipfile -e $(@D)/onnx-1.16.2-*.whl $(@D)/wheel
	@mv $(@D)/wheel/onnx/backend/test/data/node $(@D)/node && rm -rf $(@D)/wheel $(@D)/*.whl
	@touch $@

# Triton's load generator, from the last wheel that holds it, with the two libraries it needs. There is none for other processors.
.PHONY: perf-analyzer
perf-analyzer: $(if $(filter x86_64,$(shell uname -m)),$(CACHE)/perf_analyzer/.done)

$(CACHE)/perf_analyzer/.done: requirements/perf-analyzer.txt | $(VENV)/bin/python
	@echo "fetching perf_analyzer …"
	@rm -rf $(@D) && mkdir -p $(@D)/lib
	@$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --platform manylinux1_x86_64 \
	  --platform manylinux2014_x86_64 --require-hashes -r $< -d $(@D)
	@for wheel in $(@D)/*.whl; do $(BIN)/python -m zipfile -e $$wheel $(@D)/wheels; done
	@mv $(@D)/wheels/tritonclient-*.data/data/bin/perf_analyzer $(@D)/ && chmod +x $(@D)/perf_analyzer
	@mv $(@D)/wheels/nvidia/cuda_runtime/lib/libcudart.so.12 $(@D)/lib/
	@cd $(@D) && $(SUDO) apt-get update -qq && apt-get download -qq libb64-0d && dpkg-deb -x libb64-0d_*.deb wheels
	@cp -P $(@D)/wheels/usr/lib/*/libb64.so.0d* $(@D)/lib/ && rm -rf $(@D)/wheels $(@D)/*.whl $(@D)/*.deb
	@touch $@

# A program from Debian's packages, installed only when it is missing. $(1): the program, $(2): the package.
define need
	@PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v $(1) >/dev/null || { \
	  command -v apt-get >/dev/null || { echo "$(1) is missing: install it with this system's package manager"; exit 1; }; \
	  echo "installing $(2) …"; \
	  $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $(2) >/dev/null; }
endef

.PHONY: mosquitto
mosquitto:
	$(call need,mosquitto,mosquitto)

# Debian's package makes a database and starts it, unless it is told not to; the tests make their own.
define only-postgresql-programs
	@ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || [ -e /etc/postgresql-common/createcluster.conf ] || { \
	  $(SUDO) mkdir -p /etc/postgresql-common && \
	  echo "create_main_cluster = false" | $(SUDO) tee /etc/postgresql-common/createcluster.conf >/dev/null; }
endef

# Debian's packages start what they bring, on all addresses; the tests start their own, on loopback.
define need-stopped
	@PATH="$$PATH:/usr/sbin:/usr/lib/rabbitmq/bin" command -v $(1) >/dev/null || { \
	  command -v apt-get >/dev/null || { echo "$(1) is missing: install it with this system's package manager"; exit 1; }; \
	  echo "installing $(2) …"; \
	  made=; [ -e /usr/sbin/policy-rc.d ] || { made=1; \
	    printf '#!/bin/sh\nexit 101\n' | $(SUDO) tee /usr/sbin/policy-rc.d >/dev/null && $(SUDO) chmod 755 /usr/sbin/policy-rc.d; }; \
	  $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $(2) >/dev/null; \
	  status=$$?; [ -z "$$made" ] || $(SUDO) rm -f /usr/sbin/policy-rc.d; \
	  ! command -v systemctl >/dev/null || $(SUDO) systemctl --quiet disable $(3) 2>/dev/null || true; \
	  exit $$status; }
endef

.PHONY: test-packages
test-packages: mosquitto
	$(call need,curl,curl)
	$(call need,systemd-nspawn,systemd-container)
	$(call need,chromium,chromium)
	$(call need,node,nodejs)
	$(call need,jq,jq)
	$(call need,faketime,faketime)
	$(call need,softhsm2-util,softhsm2)
	$(call need-stopped,haproxy,haproxy,haproxy)
	$(call need,cc,gcc libc6-dev)
	$(call only-postgresql-programs)
	$(call need,/usr/lib/postgresql/*/bin/postgres,postgresql)
	$(call need-stopped,rabbitmq-server,rabbitmq-server,rabbitmq-server epmd.service epmd.socket)
