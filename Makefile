# make demo      install, a small data set, then a training on this computer, followed to its end
# make test      what the tests need, then the tests (at most 20 minutes on 2 cores)
# make campaign  the long rest (at most 60 minutes on 2 cores), with what it measured; ONLY=name runs one part again
# make bench     the costs of the launcher beside their goals; ONLY=name runs one part
# make testbed   a SLURM cluster of five nodes on this computer, to try the launcher on; make testbed-down removes it

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export OMP_NUM_THREADS ?= 1
# Tests at a time: more than the two cores they are made for, because many of them wait.
WORKERS ?= 3

LONG := $(BIN)/python -m pytest --timeout 3600 -raP $(if $(ONLY),-k '$(ONLY)')

.PHONY: install demo test campaign bench testbed testbed-down clean
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	.ci/packages base
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "the training stages need Python 3.11 or newer, $(PYTHON) is older; say which to take: make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the tested versions into .venv (the first time: minutes)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train,test]'
	touch $@

data/demo/data_train.txt: | install
	$(BIN)/python -m jobs.data toy data/demo

demo: install data/demo/data_train.txt
	$(BIN)/launch submit phase3 --node local --config demo --follow

test: install
	.ci/packages testbed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

campaign: install
	.ci/packages testbed
	.ci/packages browser
	@$(LONG) -m 'campaign and alone'; alone=$$?; \
	$(LONG) -n $(WORKERS) --dist worksteal -m 'campaign and not alone'; rest=$$?; \
	case $$alone$$rest in 00|05|50) ;; 55) echo "no test is called $(ONLY)" >&2; exit 2;; *) exit 1;; esac

bench: install
	$(BIN)/python -m tests.bench $(ONLY)

testbed: install
	.ci/packages testbed
	@$(BIN)/python -m tests.testbed up

testbed-down:
	@$(BIN)/python -m tests.testbed down

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache data/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
