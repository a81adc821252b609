# make demo [DISK=image.raw] [SECONDS=15]   both sites on this machine, a disaster, and the proof
# make test                                 every test of the workspace
# make simulate [SEEDS=10000] [SEED=N]      both sites in one thread under faults; SEED replays one with its trace
# make torture [CYCLES=100]                 both sites killed again and again under load
# make bench                                measurements beside the peers
# make check                                what .ci/run does before the tests: format and lints
# make fuzz [TARGET=wire] [SECONDS=1800]    libFuzzer on one target, or on each in turn; needs a nightly compiler and cargo-fuzz
#
# Each target installs the Debian packages it is missing (as root), or prints the command that does.

CARGO ?= cargo
SECONDS ?= 15
SEEDS ?= 10000
CYCLES ?= 100

# Needed to build the cryptographic library.
BUILD_TOOLS := gcc:gcc
# Real clients and servers that the tests hold ours against: program:package.
TEST_TOOLS := fio:fio nbdkit:nbdkit nbdcopy:libnbd-bin nbdinfo:libnbd-bin nbdfuse:libnbd-bin qemu-img:qemu-utils qemu-io:qemu-utils \
	qemu-nbd:qemu-utils mkfs.xfs:xfsprogs mkfs.ext4:e2fsprogs mkfs.btrfs:btrfs-progs psql:postgresql ip:iproute2 losetup:mount mount:mount \
	openssl:openssl qemu-storage-daemon:qemu-utils

.PHONY: demo test simulate torture bench check build fuzz

demo:
	@./dist/packages.sh $(BUILD_TOOLS)
	$(CARGO) run --quiet --release -p twinsite -- demo --seconds $(SECONDS) $(if $(DISK),--disk "$(DISK)")

test:
	@./dist/packages.sh $(BUILD_TOOLS) $(TEST_TOOLS)
	$(CARGO) test --workspace --no-fail-fast

# As root, like the tests. TWINSITE_SEED=… repeats a run.
simulate:
	@./dist/packages.sh $(BUILD_TOOLS)
	$(CARGO) run --quiet --release -p twinsite-simulation -- $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

torture:
	@./dist/packages.sh $(BUILD_TOOLS) $(TEST_TOOLS)
	TWINSITE_TORTURE_CYCLES=$(CYCLES) $(CARGO) test -p twinsite --test torture -- --nocapture

bench:
	@./dist/packages.sh $(BUILD_TOOLS) $(TEST_TOOLS)
	$(CARGO) run --release -p twinsite-bench -- all

check:
	$(CARGO) fmt --all -- --check
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

build:
	@./dist/packages.sh $(BUILD_TOOLS)
	$(CARGO) build --release -p twinsite

# A target's time, unless it is given: long enough to see that it runs.
fuzz: SECONDS = 60
fuzz:
	@./dist/packages.sh $(BUILD_TOOLS) c++:g++
	@./fuzz/run.sh $(SECONDS) $(TARGET)
