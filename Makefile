# Two commands do everything: `make figures` and `make test`. Both build .venv first.
PYTHON  ?= python3
PROFILE ?= embedded
CELEBA  ?=
FS2K    ?=
TARGET  ?=
OUT     ?= runs/assets
JUDGE   ?=
OTHER   ?= $(patsubst %/card.json,%,$(wildcard runs/guide/clip/card.json))
# Figure 29 compares two guides; with the data at hand and no second one, it is trained first
GUIDE   := $(if $(OTHER),,$(if $(and $(CELEBA),$(FS2K)),guide))
VENV    ?= .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
# what builds the book is small and needs no PyTorch, so it has an environment of its own
BOOK    := runs/book/venv
# papermill -p takes KEY VALUE: e.g. make figures ARGS="-p n_inv 40"
ARGS    ?=
# for the time left: $(call WHOLE,NUMBERS) names the records of the figures that are still to come
WHOLE    = DIFFCLIP_WHOLE="$$(printf '$(CURDIR)/figures/$(PROFILE)/figure%s.json:' $(1))"

.PHONY: help install figures results guide test check lab assets verify wheel bench bench-data tidy clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): setup.py settings.ini constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP) ## create .venv and install the tested versions

figures: $(STAMP) ## Figures 2-4 into figures/$(PROFILE)/ (PROFILE=celeba64 CELEBA=folder for real photos)
	@mkdir -p runs/$(PROFILE)
	@for n in 2 3 4; do nb=2$$((n - 2))_figure$$n; $(call WHOLE,$$(seq $$n 4)) \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/papermill nbs/$$nb.ipynb runs/$(PROFILE)/$$nb.ipynb -k python3 --log-output --no-progress-bar \
	    -p profile $(PROFILE) $(if $(CELEBA),-p celeba "$(CELEBA)") $(ARGS) || exit 1; \
	done
	@ls figures/$(PROFILE)/*.png

results: $(STAMP) $(GUIDE) ## Figures 23-29, 35 and their page (PROFILE=celeba64 CELEBA=folder FS2K=folder, TARGET=folder of your own labelled target pictures, JUDGE=file, OTHER=folder of a second guide, which is trained if there is none)
	@mkdir -p runs/$(PROFILE)
	@for n in 35 23 24 25 26 27 28 29; do \
	  case $$n in \
	    26|27) set -- $(if $(JUDGE),-p judge "$(JUDGE)");; \
	    29) $(if $(OTHER)$(GUIDE),:,continue); set -- -p other "$(or $(OTHER),runs/guide/clip)";; \
	    35) set -- $(if $(OTHER)$(GUIDE),-p other "$(or $(OTHER),runs/guide/clip)");; \
	    *) set --;; \
	  esac; $(call WHOLE,$$(if [ $$n = 35 ]; then echo 35; seq 23 29; else seq $$n 29; fi)) \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/papermill nbs/$${n}_figure$$n.ipynb runs/$(PROFILE)/$${n}_figure$$n.ipynb -k python3 --log-output --no-progress-bar \
	    -p profile $(PROFILE) $(if $(CELEBA),-p celeba "$(CELEBA)") $(if $(FS2K),-p fs2k "$(FS2K)") $(if $(TARGET),-p own "$(TARGET)") "$$@" $(ARGS) || exit 1; \
	done
	$(BIN)/python -m diffclip_da.study.page $(PROFILE) $(if $(TARGET),--own "$(TARGET)")

.PHONY: related
related: $(STAMP) ## Figures 30-34, the other systems of the paper (PROFILE, CELEBA, FS2K, JUDGE as above; runs/gan holds the GAN, runs/noisy the noise-aware classifier); killed, the same command goes on
	@mkdir -p runs/$(PROFILE)
	@for nb in 30_classifier_guidance 31_hspace 32_mixing 33_gan 34_shift; do \
	  case $$nb in \
	    30_*) set -- $(if $(CELEBA),$(if $(wildcard runs/noisy/noisy.pt),-p noisy runs/noisy/noisy.pt));; \
	    31_hspace) set -- $(if $(FS2K),-p fs2k "$(FS2K)");; \
	    33_gan) set -- $(if $(CELEBA),$(if $(wildcard runs/gan/checkpoint.pt),-p gan runs/gan));; \
	    *) set --;; \
	  esac; \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/papermill nbs/$$nb.ipynb runs/$(PROFILE)/$$nb.ipynb -k python3 --log-output --no-progress-bar \
	    -p profile $(PROFILE) $(if $(CELEBA),-p celeba "$(CELEBA)") $(if $(JUDGE),-p judge "$(JUDGE)") "$$@" $(ARGS) || exit 1; \
	done
	@ls figures/$(PROFILE)/figure3[0-4].png

guide: $(STAMP) ## a second guide that never saw a hand-drawn sketch, for Figure 29: CELEBA=folder FS2K=folder, into runs/guide
	@test -n "$(CELEBA)" -a -n "$(FS2K)" || { echo "give CELEBA=folder FS2K=folder (FS2K only measures the result)"; exit 2; }
	$(BIN)/python -m diffclip_da.workshop.train_clip --celeba "$(CELEBA)" --fs2k "$(FS2K)" --out runs/guide/clip --work runs/guide/train --n-sketches 0 --n-photos 0 --steps 4000 --rounds 4 --bf16

test: $(STAMP) ## every notebook (nbdev_test), then the test suite
	PATH="$(abspath $(BIN)):$$PATH" DIFFCLIP_QUIET=1 OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	DIFFCLIP_QUIET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile

check: $(STAMP) ## notebooks clean, package in sync with them, rules of the house kept
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/check_sync.py
	$(BIN)/python tests/check_house.py

verify: $(STAMP) ## compare figures/$(PROFILE)/*.json with the committed ones, within their tolerances
	@mkdir -p runs
	@for n in 2 3 4; do \
	  git show HEAD:figures/$(PROFILE)/figure$$n.json > runs/committed.json && \
	  $(BIN)/python -m diffclip_da.study.experiment compare figures/$(PROFILE)/figure$$n.json runs/committed.json || exit 1; \
	done

lab: $(STAMP) ## JupyterLab on the notebooks
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/jupyter lab --notebook-dir=nbs

$(BOOK)/.installed: settings.ini constraints.txt
	$(PYTHON) -m venv $(BOOK)
	$(BOOK)/bin/pip install -q -c constraints.txt $$(sed -n 's/^book_requirements = //p' settings.ini)
	@touch $@

.PHONY: book
book: $(BOOK)/.installed ## the notebooks, the results and the API as a site to read offline, runs/book/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BOOK)/bin/python tests/book.py

assets: $(STAMP) ## remake what ships: CELEBA=folder FS2K=folder TEACHER=file, into $(OUT)
	@test -n "$(CELEBA)" -a -n "$(FS2K)" -a -n "$(TEACHER)" || { echo "give CELEBA=folder FS2K=folder TEACHER=mobilefacenet.pt"; exit 2; }
	$(BIN)/python -m diffclip_da.models.train --celeba "$(CELEBA)" --out $(OUT)/train_unet --v --calm
	$(BIN)/python -m diffclip_da.workshop.train_clip --celeba "$(CELEBA)" --fs2k "$(FS2K)" --out $(OUT)/clip --work $(OUT)/train_clip
	$(BIN)/python -m diffclip_da.workshop.train_embedder --celeba "$(CELEBA)" --teacher "$(TEACHER)" --out $(OUT)/embedder
	$(BIN)/python -m diffclip_da.workshop.assets --celeba "$(CELEBA)" --unet $(OUT)/train_unet/model --images-seen 80000 --out $(OUT) $(ARGS)

wheel: $(STAMP) ## build dist/*.whl
	$(BIN)/python -m build --wheel

tidy: $(STAMP) ## after work on the notebooks: export, clean, alt texts
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_export
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_clean
	$(BIN)/python tests/alt_text.py

bench: $(STAMP) ## the benchmarks that need no data, into benchmarks/
	$(BIN)/python benchmarks/speed.py --compile

bench-data: $(STAMP) ## packing and reading 1,000 to 162,770 synthetic photos (an hour)
	$(BIN)/python benchmarks/data.py

clean: ## remove builds and caches, keep runs/ and .venv
	rm -rf build dist *.egg-info .pytest_cache
