# Each target does all of its own set-up in .venv; Python >= 3.11 is all that must be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-cuda soak lint

# Generate the shapes, train on them without a GPU or a download, evaluate, draw predictions.
quickstart: .venv/installed
	$(BIN)/python tools/make_shapes.py --output data/shapes
	$(BIN)/python tools/train.py --config configs/quickstart.yaml --output-dir runs/quickstart --resume
	$(BIN)/python tools/predict.py --config configs/quickstart.yaml --checkpoint runs/quickstart/final.pth \
		--input data/shapes/val --output runs/quickstart/pictures
	@echo
	@echo "metrics:    runs/quickstart/metrics.json"
	@echo "pictures:   runs/quickstart/pictures/*.png"
	@echo "checkpoint: runs/quickstart/final.pth"
	@echo "curves:     $(BIN)/tensorboard --logdir runs"
	@echo
	@echo "Your own data in COCO format (ImageNet weights are downloaded; README.md has the steps):"
	@echo "  $(BIN)/python tools/train.py --config configs/r18_fpn.yaml --output-dir runs/mine \\"
	@echo "    train.epochs=12 train.batch_size=4 \\"
	@echo "    data.train.images=DIR data.train.annotations=TRAIN.json \\"
	@echo "    data.val.images=DIR data.val.annotations=VAL.json"

test: .venv/installed-dev
	$(BIN)/python -m pytest

# What needs a GPU; `make test` uses none.
test-cuda: .venv/installed-dev
	$(BIN)/python -m pytest -m cuda

# What takes minutes: runs that are killed, jobs that lose a process, full disks, long runs, thousands of bad files.
soak: .venv/installed-dev
	$(BIN)/python -m pytest -m "soak and not cuda"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Both stamps are newer than what they were made from, or pip runs again.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@
