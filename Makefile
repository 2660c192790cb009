.PHONY: build test lint format bench gpu docs fuzz sanitize

CPP = $(wildcard csrc/*.* csrc/*/*.* tests/native/*.*)

build:  ## the native op, in place
	ONESHOT_NATIVE=1 python setup.py -q build_ext --inplace

test: build
	ONESHOT_NATIVE=1 OMP_NUM_THREADS=1 pytest -q -n auto --dist loadfile --no-loadscope-reorder

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CPP)

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP)

bench: build
	python benchmarks/bench_triplet.py

gpu:  ## on a machine with a GPU: tests of the CUDA kernels, also under compute-sanitizer, and their times
	ONESHOT_CUDA=1 python setup.py -q build_ext --inplace
	pytest -q -m gpu
	for tool in memcheck racecheck; do compute-sanitizer --tool $$tool --kernel-name kns=triplet --error-exitcode 9 \
	python benchmarks/sanitize_cuda.py || exit; done
	python benchmarks/bench_triplet_cuda.py --json results/bench_cuda.json

docs:  ## the pictures of README and docs/results.md, from a trained network: make docs CKPT=runs/classic/best.pt
	python evaluate.py $(or $(CKPT),runs/classic/best.pt) $(if $(DATA),--data $(DATA)) --report build/report
	for name in similarity map; do for theme in "" -dark; do \
	cp build/report/$$name$$theme.png docs/report-$$name$$theme.png; done; done
	python tests/browser.py build/report/index.html .board docs/report-episodes
	python tests/browser.py build/report/index.html "table:has(.bar)" docs/report-classes

fuzz: build  ## random calls of the loss and damaged files, a minute: make fuzz SECONDS=600 SEED=1
	ONESHOT_NATIVE=1 python tests/fuzz.py $(or $(SECONDS),60) $(or $(SEED),0)

sanitize:  ## the native op's tests under AddressSanitizer and UndefinedBehaviorSanitizer; the usual build is restored
	ONESHOT_NATIVE=1 ONESHOT_SANITIZE=1 ONESHOT_CUDA=0 python setup.py -q build_ext --inplace --build-temp build/sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 ONESHOT_NATIVE=1 \
	pytest -q tests/test_triplet.py tests/test_native.py -k "native and not compiles and not narrower and not square_matrix"; \
	status=$$?; python setup.py -q build_ext --inplace; exit $$status
