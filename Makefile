# make demo   see what rpsel does, on this machine, in half a minute
# make test   everything that CI runs
# make help   the other targets

SHELL      := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

# The compiler is pinned: another one makes other objects.
CLANG        := clang-19
STRIP        := llvm-strip-19
CLANG_FORMAT := clang-format-19
# Beside -Wall -Wextra -Werror of the directives.
WARNINGS     := -Wunused-macros -Wconditional-uninitialized -Wimplicit-fallthrough

export PATH := $(CURDIR)/.go/bin:$(PATH):/usr/local/go/bin:/usr/sbin:/sbin
# A go that is too old fetches the one that go.mod asks for.
export GOTOOLCHAIN := auto
GO      := go
# A clone may be another user's than who runs make: git and go's use of it refuse that else.
TRUST   := GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='$(CURDIR)'
VERSION := $(shell $(TRUST) git describe --tags --match 'v[0-9]*' --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)

# What each kind of work needs: a command that must be there = the package it is in.
BUILD_NEEDS := go=golang-go git=git
RACE_NEEDS  := gcc=gcc /usr/include/stdlib.h=libc6-dev
C_NEEDS     := $(BUILD_NEEDS) $(CLANG)=$(CLANG) $(STRIP)=llvm-19 \
               /usr/include/bpf/bpf_helpers.h=libbpf-dev /usr/include/linux/bpf.h=linux-libc-dev
TEST_NEEDS  := $(C_NEEDS) $(RACE_NEEDS) openvpn=openvpn \
               haproxy=haproxy nginx=nginx systemd-analyze=systemd unshare=util-linux ip=iproute2 \
               promtool=prometheus prometheus-node-exporter=prometheus-node-exporter curl=curl \
               mandoc=mandoc dpkg=dpkg rpm=rpm zsh=zsh fish=fish \
               /usr/share/bash-completion/bash_completion=bash-completion \
               perl=perl-base
VM_NEEDS    := $(BUILD_NEEDS) depmod=kmod xz=xz-utils dpkg-deb=dpkg \
               /usr/share/keyrings/debian-archive-keyring.gpg=debian-archive-keyring
QEMU_amd64  := qemu-system-x86_64=qemu-system-x86
QEMU_arm64  := qemu-system-aarch64=qemu-system-arm
STYLE_NEEDS := $(BUILD_NEEDS) $(CLANG_FORMAT)=$(CLANG_FORMAT)
LINT_NEEDS  := $(C_NEEDS) $(STYLE_NEEDS) $(RACE_NEEDS)

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

.PHONY: build
build: ## compile ./rpsel, one static binary; needs no clang
	@$(call need,$(BUILD_NEEDS))
	$(TRUST) CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o rpsel ./cmd/rpsel

# All files of the packages have the time of the commit.
SOURCE_DATE_EPOCH ?= $(shell $(TRUST) git log -1 --format=%ct 2>/dev/null || echo 0)

.PHONY: package
package: ## .deb and .rpm, static binaries, what they are made of, and checksums: dist/
	@$(call need,$(BUILD_NEEDS))
	cd packaging && $(GO) run . -version '$(VERSION)' -time '$(SOURCE_DATE_EPOCH)' -out ../dist
	@ls dist

.PHONY: demo
demo: ## plain Linux and rpsel side by side, in a network namespace of its own
	@$(call root,demo)
	@$(MAKE) --no-print-directory build
	./rpsel demo

.PHONY: test
test: ## all tests on this kernel, with real OpenVPN, HAProxy, nginx and Prometheus, and some under two others
	@$(call need,$(TEST_NEEDS) $(VM_NEEDS) $(QEMU_$(ARCH_HERE)))
	@$(MAKE) --no-print-directory generated style
	@if $(GO) run ./test/vm -usable; then \
		set -x; $(GO) run ./test/vm -set ci -kernels "6.1 6.12" $(VM_FLAGS); \
		$(TESTS); \
	else \
		set -x; $(GO) run ./test/vm -kernels 6.12 $(VM_FLAGS); \
		$(GO) run ./test/vm -set ci -kernels 6.1 $(VM_FLAGS); \
		export RPSEL_TEST_ELSEWHERE=1; $(TESTS); \
	fi

# What rpsel itself is not to depend on is in modules of their own.
MODULES := . examples/quic packaging test/kubernetes
TESTS    = for m in $(MODULES); do $(GO) test -C $$m -count=1 -timeout=30m ./...; done; $(RACES)

# The race detector sees no BPF: it is for the packages with goroutines, and where the tests
# take minutes, for those that use a handle from several at once, or a command that has some.
WITH_GOROUTINES := ./agent ./internal/daemon ./internal/door ./internal/metrics ./internal/owner ./internal/watch ./sockets
CONCURRENT      := '^Test(AtTheSameTime|HandleFollowsUnderWay|Scripts)$$/^events$$'
RACE  := CGO_ENABLED=1 $(GO) test -race -count=1 -timeout=30m
RACES := $(RACE) $(WITH_GOROUTINES); $(RACE) -run $(CONCURRENT) ./loader ./cmd/rpsel; \
         $(RACE) -run '^TestWatch$$' ./internal/force

# A mirror of Debian, where this machine's package sources have none.
VM_FLAGS := $(if $(MIRROR),-mirror $(MIRROR))

ARCH_HERE := $(patsubst x86_64,amd64,$(patsubst aarch64,arm64,$(shell uname -m)))
# Which to test under other kernels. Another one than this machine's is emulated.
ARCH      ?= $(ARCH_HERE)

.PHONY: vm
vm: ## the tests under other kernels, in QEMU: all, or KERNEL=6.12, PACKAGE=loader; ARCH=arm64; SET=ci for a few minutes
	@$(call need,$(VM_NEEDS) $(QEMU_$(ARCH)))
	$(GO) run ./test/vm -arch "$(ARCH)" $(if $(KERNEL),-kernels "$(KERNEL)") $(if $(SET),-set "$(SET)") \
		$(if $(PACKAGE),-package "$(PACKAGE)") -docs "docs/kernels-$(ARCH).md" $(VM_FLAGS)

.PHONY: soak
soak: ## the stress tests and the chaos test for ten minutes each
	@$(call root,soak)
	@$(call need,$(TEST_NEEDS))
	RPSEL_SOAK=10m $(GO) test -count=1 -timeout=60m -p=1 -v ./test/stress ./test/chaos

# A run of all takes two to six minutes, QUICK=1 less: fewer rounds, no tables beyond a
# million flows, and attaches of 100 listeners alone.
ROUNDS := $(if $(QUICK),10x,30x)
SHORT  := $(if $(QUICK),-short,)
BENCH  := $(GO) test ./test/bench $(SHORT) -timeout=20m -run '^$$'

FUZZTIME ?= 1m

# The go command kills what fuzzes when the time is over: what that mounted goes with a namespace.
.PHONY: fuzz
fuzz: ## each fuzz test for a minute, or FUZZTIME=10m: packets, flow table, pins, arguments, configuration, requests
	@$(call root,fuzz)
	@$(call need,$(BUILD_NEEDS) unshare=util-linux)
	@export TMPDIR=$$(mktemp -d); trap 'rm -rf "$$TMPDIR"' EXIT; \
	for f in $$(grep -rEo '^func Fuzz\w+' --include='*_test.go' . | sed -E 's|/[^/]*:func |:|' | sort); do \
		(set -x; unshare --mount $(GO) test "$${f%:*}" -run '^$$' -fuzz "^$${f#*:}\$$" -fuzztime $(FUZZTIME)); \
	done

.PHONY: bench
bench: ## what everything costs, beside the alternatives: docs/bench, docs/performance.md
	@$(call root,bench)
	@$(call need,$(BUILD_NEEDS))
	@{ $(BENCH) -bench '^Benchmark(FlowCount|Listeners|Families|EndToEnd)$$' -benchtime $(ROUNDS); \
	$(BENCH) -bench '^Benchmark(Attach|Flows)$$/^(listeners=.*|list|count)$$' -benchtime 5x; \
	$(BENCH) -bench '^BenchmarkBindToFirstFlow$$/^processes=2000$$/^agent$$' -benchtime $(ROUNDS:x=0x); \
	$(GO) test ./cmd/rpsel -run '^$$' -bench '^BenchmarkAgentAtRest$$' -benchtime 1x; \
	} | $(GO) run ./test/bench/report docs/bench docs/performance.md

.PHONY: info
info: ## what the BPF programs take: instructions, stack, the verifier's work
	@$(call root,info)
	@$(call need,$(BUILD_NEEDS))
	@$(GO) test ./bpf -count=1 -v -run '^TestVerifier$$'

.PHONY: generate
generate: ## compile the C, after a change under bpf/; warnings are errors
	@$(call need,$(C_NEEDS))
	BPF2GO_CC=$(CLANG) BPF2GO_STRIP=$(STRIP) \
	BPF2GO_CFLAGS="$(WARNINGS) -O2 -g -mcpu=v3 -I/usr/include/$$(uname -m)-linux-gnu" \
	$(GO) generate ./...

.PHONY: generated
generated: # fail if the committed objects are not what the C compiles to
	@echo "make: compile the C and compare"
	@before=$$(cat {bpf,test/bench}/*_bpf*.{go,o} | sha256sum); \
	$(MAKE) --no-print-directory -s generate; \
	after=$$(cat {bpf,test/bench}/*_bpf*.{go,o} | sha256sum); \
	if [ "$$before" != "$$after" ]; then \
		echo "make: bpf/ or test/bench/ held other objects than their C compiles to: commit the new ones" >&2; \
		git status --short bpf test/bench >&2; exit 1; \
	fi

.PHONY: api
api: ## write api.txt: the Go API, which a test compares
	@$(call need,$(BUILD_NEEDS))
	$(GO) run ./internal/api api.txt

.PHONY: style
style: ## gofmt, clang-format, vet and staticcheck; part of test
	@$(call need,$(STYLE_NEEDS))
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	$(CLANG_FORMAT) --dry-run -Werror bpf/*.c bpf/*.h test/bench/*.c
	@staticcheck=$$($(GO) tool -n staticcheck); set -x; \
	for m in $(MODULES); do (cd $$m; $(GO) vet ./...; $$staticcheck ./...); done

.PHONY: lint
lint: ## style, the C compiled with warnings as errors, and the race detector on what has goroutines; part of test
	@$(call need,$(LINT_NEEDS))
	@$(MAKE) --no-print-directory generated style
	$(RACES)

.PHONY: clean
clean: ## remove what was built
	rm -rf rpsel dist test/vm/.cache

# root explains why a target wants to be root.
define root
	if [ "$$(id -u)" != 0 ]; then \
		echo "make: 'make $(1)' makes network namespaces and loads BPF programs: run it as root, as 'sudo make $(1)'" >&2; \
		exit 1; \
	fi
endef

# need installs, with Debian's or Ubuntu's apt-get, what is not there yet. Servers
# among that are not started: policy-rc.d says so to the packages' scripts.
define need
	missing=; \
	for n in $(1); do \
		what=$${n%%=*}; package=$${n#*=}; \
		case $$what in \
		/*) [ ! -e $$what ] || continue ;; \
		*) ! command -v $$what >/dev/null || continue ;; \
		esac; \
		[[ " $$missing " == *" $$package "* ]] || missing+=" $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
			echo "make: these packages are missing:$$missing: install them, or run make as root on Debian or Ubuntu" >&2; exit 1; \
		fi; \
		echo "make: install$$missing"; \
		policy=/usr/sbin/policy-rc.d; \
		if [ ! -e $$policy ]; then \
			trap "rm -f $$policy" EXIT; \
			printf '#!/bin/sh\nexit 101\n' >$$policy; chmod +x $$policy; \
		fi; \
		apt-get update -qq; \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi; \
	have=$$(GOTOOLCHAIN=local $(GO) version | cut -d' ' -f3); \
	if [[ $$have == go1.* && $$(printf '%s\n' go1.21 "$$have" | sort -V | head -n1) != go1.21 ]]; then \
		want=$$(sed -n 's/^go /go/p' go.mod); \
		echo "make: $$have cannot fetch $$want by itself: do that for it, into .go"; \
		cd $$(mktemp -d); \
		dir=$$($(GO) mod download -json golang.org/toolchain@v0.0.1-$$want.linux-$$($(GO) env GOARCH) | \
			sed -n 's/.*"Dir": "\(.*\)",/\1/p'); \
		chmod -R a+rx "$$dir/bin" "$$dir/pkg/tool"; \
		ln -sfn "$$dir" $(CURDIR)/.go; \
	fi
endef
