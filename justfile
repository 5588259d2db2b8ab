# The commands of contributors. `just --list` shows all.

# The daemon with its embedded store.
run *OPTIONS:
    cargo run --bin leased -- {{OPTIONS}}

# The daemon over a throwaway MongoDB.
run-mongodb *OPTIONS:
    cargo run -p throwaway-mongodb -- cargo run --bin leased -- {{OPTIONS}}

# All tests; fetches a mongod if there is none.
test:
    cargo test --workspace

# What must pass before a change lands.
ci:
    bash .ci/run

# Compares the specification with both stores, with more cases than the tests.
differential CASES="20000":
    LEASED_DIFFERENTIAL_CASES={{CASES}} cargo test -p leased --lib differential

# The benchmark: `compare`, `pairs` or `holder`, and its options.
bench *OPTIONS:
    cargo build --release -p leased -p leased-bench
    cargo run --release -p leased-bench -- {{OPTIONS}}

# Licences, sources, and which crate may use which. Needs cargo-deny.
deny:
    cargo deny check
