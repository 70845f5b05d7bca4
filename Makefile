# SPDX-License-Identifier: Apache-2.0

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# sudo's PATH often lacks the directory of Go, and the tools below call go themselves.
GO          := $(or $(shell command -v go),/usr/local/go/bin/go)
export PATH := $(patsubst %/,%,$(dir $(GO))):$(PATH)

# One version, because the compiled object is committed and another clang writes another one.
CLANG        ?= clang-19
CLANG_FORMAT ?= clang-format-19

# Where Debian keeps asm/types.h, which the kernel's headers include.
MULTIARCH = $(shell gcc -print-multiarch 2>/dev/null)

# Out of the tree, so that `make clean` and a fresh clone cost no new build of them.
TOOLS            ?= $(HOME)/.cache/snilb-tools
GOLANGCI_VERSION := v2.12.2
GOLANGCI         := $(TOOLS)/golangci-lint-$(GOLANGCI_VERSION)

# The linter remembers files by their path. A cache that outlives a tree tells of files that are gone, so it lives in the tree.
export GOLANGCI_LINT_CACHE := $(CURDIR)/.cache/golangci-lint

# Downloaded kernels, and which to boot: package names, or all that Debian offers.
KERNEL_CACHE ?= $(HOME)/.cache/snilb-kernels
KERNELS      ?=

# What the end-to-end tests attach as (tc, xdp, xdp-generic), one run each.
MODES    ?= tc
FUZZTIME ?= 30s

# How long `make soak` takes in each mode; in CI the same test takes less.
SNILB_SOAK   ?= 1h
SOAK_TIMEOUT ?= 2h

BPF_SOURCES = $(wildcard bpf/*.c bpf/*.h)
GO_FOLDERS  = $(wildcard cmd loader maps scripts userspace)
GENERATED   = $(addprefix maps/,snilb_bpfel.o snilb_bpfel.go snilb_xdp_bpfel.o snilb_xdp_bpfel.go)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help build deb image test test-tools test-kernels lint unit e2e e2e-xdp survive soak bpffs generate generate-check fmt fuzz bench bench-flood bench-memory bench-programs bench-packets bench-short demo clean

help: ## show what there is
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## compile ./snilb
	$(GO) build -trimpath -o snilb ./cmd/snilb

deb: ## build a Debian package of the tree, for this machine's architecture
	@scripts/deb/build.sh

image: ## build a container image that is the static binary alone, with docker
	docker build -f scripts/docker/Dockerfile --build-arg VERSION="$$(scripts/version.sh)" -t snilb .

test: test-tools lint generate-check unit e2e e2e-xdp bench-short ## everything that must hold: sudo make test
	@echo "make test: all passed"

test-tools: ## install what the tests need (Debian packages, golangci-lint)
	@scripts/install-test-tools.sh
	@$(MAKE) --no-print-directory $(GOLANGCI)

test-kernels: ## a part of the tests on Debian's kernels, each booted under qemu; minutes a kernel (MODES="tc xdp", KERNELS=...)
	@scripts/install-test-tools.sh qemu-system-x86 xz-utils
	$(GO) run ./scripts/kernels -cache "$(KERNEL_CACHE)" -modes "$(MODES)" -kernels "$(KERNELS)"

lint: $(GOLANGCI) ## gofmt, go vet, golangci-lint, clang-format
	@unformatted=$$(gofmt -l $(GO_FOLDERS)); \
	if [ -n "$$unformatted" ]; then echo "not formatted, run make fmt:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(GOLANGCI) run --allow-parallel-runners ./...
	$(if $(BPF_SOURCES),$(CLANG_FORMAT) --dry-run -Werror $(BPF_SOURCES))

unit: bpffs ## unit tests, with the race detector
	$(GO) test -race $$($(GO) list ./... | grep -v /scripts/e2e$$)

e2e: bpffs ## end-to-end tests of the built binary (MODES="tc xdp")
	@for mode in $(MODES); do scripts/e2e.sh $$mode; done

# In the modes that MODES leaves out, what differs most between them; all of the suite is: make e2e MODES="xdp xdp-generic".
XDP_TESTS = ^Test(Names|Flows|Kill|SurviveKill|SurviveUpgrade|SurviveOwned|DeadProxy|Privileges|ReloadInHello|HelloInPieces|PostQuantum|Uplinks|OneArmed|LiveProxy|Neighbours|HalfClose|ResetEither|LossSACK|PathMTU|ShrinkingLink|SourceClient|StacksSYN|StacksClient|Bulk|MTU|UnknownFlow|SynAck|ProxyIn)$$
e2e-xdp: bpffs ## a part of the end-to-end tests by XDP, native and generic
	@for mode in $(filter-out $(MODES),xdp xdp-generic); do \
		SNILB_UPGRADES=4 SNILB_KILLS=3 scripts/e2e.sh $$mode '$(XDP_TESTS)'; \
	done

# Those of make test do less of each.
survive: bpffs ## a hundred upgrades and fifty kills under load, and some with a million flows, in ten minutes a mode (MODES="tc xdp")
	@for mode in $(MODES); do \
		SNILB_UPGRADES=100 SNILB_KILLS=50 SNILB_FLOWS=990000 $(GO) test -count=1 -v -timeout 30m ./scripts/e2e -mode $$mode -run '^TestSurvive(Kill|Upgrade|Many)$$' 2>&1 | \
			grep --line-buffered -E '^(--- |ok|PASS|FAIL|panic:| .*(kills|upgrades|_test.go:))'; \
	done

soak: bpffs ## an hour of mixed load with kills, upgrades, reloads, failures and flaps (MODES="tc xdp", SNILB_SOAK=5m, SNILB_SEED=...)
	@for mode in $(MODES); do \
		echo "SNILB_SOAK=$(SNILB_SOAK) $(GO) test -count=1 -v -timeout $(SOAK_TIMEOUT) ./scripts/e2e -mode $$mode -run '^TestSoak$$'"; \
		SNILB_SOAK=$(SNILB_SOAK) $(GO) test -count=1 -v -timeout $(SOAK_TIMEOUT) ./scripts/e2e -mode $$mode -run '^TestSoak$$'; \
	done

bench: bpffs build ## snilb beside HAProxy, nginx, sniproxy and netfilter, in half an hour; into the README too (MODES="tc xdp")
	@scripts/install-test-tools.sh
	$(GO) run ./scripts/bench -modes "$(MODES)" -readme
	$(GO) run ./scripts/bench -modes "$(MODES)" -flood -readme

bench-flood: bpffs build ## of these the floods alone: real clients while packets of no connection come, in eight minutes
	@scripts/install-test-tools.sh
	$(GO) run ./scripts/bench -modes "$(MODES)" -flood -readme

bench-programs: bpffs ## ns a packet takes in the TC and XDP programs, with one flow and with a million
	$(GO) test ./maps -run '^$$' -bench '^Benchmark(Programs|Flows)$$' -benchtime 500x -timeout 30m

# One package after the other: what one allocates, the other would count.
bench-memory: ## bytes that an established connection takes of kernel and daemon, with a million of each family (root)
	$(GO) test -p 1 ./maps ./userspace/engine -run '^$$' -bench '^BenchmarkMemory$$' -benchtime 1x

# Timings decide nothing here: that all connections succeed and all bytes come does.
bench-packets: bpffs ## connections and packets a second of the load tool's packet generator, by itself
	$(GO) test ./scripts/e2e -run '^$$' -bench '^Benchmark(Packets|Flood)$$' -benchtime 1x -timeout 20m

bench-short: bpffs build ## the same in two minutes, to see that it works and that snilb holds nothing for a flood
	$(GO) run ./scripts/bench -modes "$(MODES)" -short
	$(GO) run ./scripts/bench -modes "$(MODES)" -short -flood -only "haproxy $(addprefix snilb-,$(MODES))"

bpffs:
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf

generate: ## compile bpf/ into maps/, with the pinned clang
	BPF_CLANG=$(CLANG) BPF_CFLAGS="$(if $(MULTIARCH),-I/usr/include/$(MULTIARCH))" $(GO) generate ./maps
	@chown --reference=go.mod $(GENERATED)

# Compared with what was there and not with git, so that it also holds before a commit and in a tarball.
generate-check: ## prove that the committed object is what bpf/ compiles to
	@sums=$$(sha256sum $(GENERATED)); \
	$(MAKE) --no-print-directory generate; \
	sha256sum --quiet -c <<<"$$sums" || { echo "maps/ was not what bpf/ compiles to: commit what make generate wrote"; exit 1; }

fmt: ## format Go and C in place
	gofmt -w $(GO_FOLDERS)
	$(if $(BPF_SOURCES),$(CLANG_FORMAT) -i $(BPF_SOURCES))

fuzz: ## run every fuzz target for FUZZTIME
	@grep -rHoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' userspace maps loader | while IFS=: read -r file func; do \
		echo "$(GO) test ./$$(dirname "$$file") -fuzz $${func#func }"; \
		$(GO) test "./$$(dirname "$$file")" -run '^$$' -fuzz "^$${func#func }\$$" -fuzztime $(FUZZTIME); \
	done

demo: build ## build and show a balancer at work, in network namespaces of its own (root)
	./snilb demo

clean: ## remove what the targets above made in the tree
	rm -rf snilb snilb_*.deb .cache
	$(GO) clean -testcache

$(GOLANGCI):
	@mkdir -p $(TOOLS)
	GOBIN=$(TOOLS) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)
	@mv $(TOOLS)/golangci-lint $@
