# Each target does all its set-up: a virtual environment in .venv with the exact versions of constraints.txt, installed
# again only when these or pyproject.toml change.
PYTHON ?= python3
# Those that pyproject.toml names.
PYTHONS := python3.11 python3.12 python3.13
BIN := .venv/bin
INSTALLED := .venv/installed
UV := .venv-uv/bin/uv
# Of a registry that takes its time with a large file.
export UV_HTTP_TIMEOUT ?= 180

.PHONY: demo test lint ecosystem bench soak corpus lock newest lowest end

demo: $(INSTALLED)
	$(BIN)/keye-worker demo

# Two files at a time: most of it is processes that start. The chaos tests mostly wait: four at a time take no longer than
# the longest few.
test: $(INSTALLED)
	$(BIN)/pytest -q -n 2 --dist loadfile --ignore tests/chaos
	$(BIN)/pytest -q -n 4 --dist worksteal tests/chaos

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# With nothing skipped: needs Debian's docker-compose, runc and prometheus, and root for the container.
ecosystem: $(INSTALLED)
	REQUIRE_ECOSYSTEM=1 $(BIN)/pytest -q tests/ecosystem tests/contract/test_compose.py \
		tests/contract/test_deploy.py

# Half an hour of a fleet with a fault a minute; then faults, hostile messages, damaged files and orders of events in the
# numbers of tests/support/scale.py: a few hours. One after another, since they measure how soon something is over.
soak: $(INSTALLED)
	SOAK=1 $(BIN)/pytest -q -s --timeout 7200 tests/soak tests/chaos tests/integration/test_damage.py \
		tests/integration/test_states_machine.py tests/integration/batch/test_deaths.py \
		tests/integration/batch/test_outages.py

# The pictures of the source archive of that Pillow which is locked.
corpus: $(INSTALLED)
	rm -rf .corpus
	$(BIN)/pip download --quiet --no-deps --no-binary pillow --constraint constraints.txt --dest .corpus pillow
	tar -xf .corpus/pillow-*.tar.gz -C .corpus --strip-components 1
	CORPUS=.corpus/Tests/images $(BIN)/pytest -q -s tests/corpus

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# The newest versions that the ranges of pyproject.toml allow, for every Python and platform at once.
lock: $(UV)
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --no-annotate \
		--custom-compile-command 'make lock' pyproject.toml --output-file constraints.txt

# The two ends of those ranges, each in an environment of its own. uv links files from its cache, so that torch, a few
# gigabytes, is fetched and kept once for all environments that agree on its version.
# The newest are tried with each Python that is here (of pyenv's, with those that `pyenv local` names).
newest:
	set -e; for python in $(PYTHONS); do ! $$python -c '' || $(MAKE) end RESOLUTION=highest PYTHON=$$python; done
lowest:
	$(MAKE) end RESOLUTION=lowest-direct
end: ENV = .venv-$(RESOLUTION)
end: $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) $(ENV)
	echo '--editable .[dev]' | $(UV) pip compile --quiet --resolution $(RESOLUTION) --python $(ENV) --no-annotate \
		--output-file $(ENV)/versions.txt -
	$(UV) pip sync --quiet --compile-bytecode --python $(ENV) $(ENV)/versions.txt
	$(ENV)/bin/python --version
	$(ENV)/bin/pytest -q -n 2 --ignore tests/contract/test_lock.py tests/unit tests/contract

# Copies, not links: a file with several names is none that a worker reads media from, as a test has it do.
$(INSTALLED): pyproject.toml constraints.txt $(UV)
	$(PYTHON) -m venv .venv
	$(UV) pip install --quiet --compile-bytecode --link-mode copy --python .venv --constraints constraints.txt \
		--build-constraints constraints.txt --editable '.[dev]'
	@# Else gigabytes on their way to the disk hold up the append-only files of the first tests' servers.
	sync
	touch $@

$(UV):
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/pip install --quiet --constraint constraints.txt uv
