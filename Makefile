# Every target sets up what it needs: a virtual environment in .venv, and on Debian or Ubuntu the servers' packages.
.DEFAULT_GOAL := help
SHELL := /bin/bash
WORKERS ?= 2
PYTEST = .venv/bin/pytest

.PHONY: help
help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: python
python:
	@.ci/setup-python.sh

.PHONY: servers
servers: python
	@.ci/setup-servers.sh

.PHONY: demo
demo: servers ## The main job on real data, from nothing, in a few minutes
	@.venv/bin/shardkit demo

.PHONY: test
test: servers ## All tests, on MariaDB and ZooKeeper (WORKERS=2 processes)
	$(PYTEST) -n $(WORKERS) --dist loadfile

.PHONY: test-mysql
test-mysql: servers ## The tests that talk to database servers, on MySQL
	@if .ci/setup-mysql.sh; then \
		echo 'SHARDKIT_TEST_FLAVOUR=mysql $(PYTEST) -n $(WORKERS) --dist loadfile -m "mysql and not soak"'; \
		SHARDKIT_TEST_FLAVOUR=mysql $(PYTEST) -n $(WORKERS) --dist loadfile -m "mysql and not soak"; \
	elif [[ $$? == 3 ]]; then .ci/not-run.sh 'the tests on MySQL' 'MySQL cannot be had on this machine today'; \
	else exit 1; fi

# Ryuk, testcontainers' own cleaner, is an image of its own; shardkit.testing cleans up itself.
.PHONY: test-docker
test-docker: python ## The tests that run servers in containers (needs a running Docker engine)
	@docker info >/dev/null 2>&1 || { echo 'error: no Docker engine answers'; \
		echo 'fix: install Docker (Debian: apt-get install docker.io), start it, and be allowed to use it'; exit 1; } >&2
	TESTCONTAINERS_RYUK_DISABLED=true $(PYTEST) -m docker

.PHONY: lint
lint: python ## ruff, mypy --strict, import-linter
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

.PHONY: bench
bench: servers ## The benchmarks, into bench.json (ONLY=relay for a part)
	@.ci/setup-rivals.sh
	@.venv/bin/python -m tests.benchmarks $(if $(ONLY),--only $(ONLY))

# The suite is fetched: where it cannot be had, that is said.
.PHONY: transparency
transparency: python ## SQLAlchemy's own ORM suite, with its Session and with ours
	@.venv/bin/python -m tests.transparency; code=$$?; \
	if [[ $$code == 3 ]]; then .ci/not-run.sh "SQLAlchemy's own suite" 'its source cannot be fetched on this machine today'; \
	else exit $$code; fi

# Statements that nobody here wrote; other directories of .sql and .test files do as well (CORPUS=directory).
.PHONY: corpus
corpus: servers ## Others' statements through the relay, on FLAVOUR=mariadb or mysql (CORPUS=directory)
	@directory='$(CORPUS)'; directory=$${directory:-$$(.ci/fetch-corpus.sh)} && \
	.venv/bin/python -m tests.corpus --flavour $(or $(FLAVOUR),mariadb) --least 1000 "$$directory"

.PHONY: soak
soak: servers ## The long runs that the usual suite leaves out
	$(PYTEST) -m soak --timeout 7200

.PHONY: clean
clean: ## Remove .venv and what tools left behind; servers' prepared data stay in the cache directory
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .benchmarks build dist *.egg-info
	find shardkit cdc migrations tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
