# What contributors run; each line is plain cargo. `just --list` shows all.

# The daemon with a throwaway MongoDB.
run *OPTIONS:
    cargo run -p throwaway-mongodb -- cargo run --bin leased -- {{OPTIONS}}

# All tests; fetches a mongod if there is none.
test:
    cargo test --workspace

# What must pass before a change lands.
ci:
    bash .ci/run

# The specification against the database, for longer.
differential CASES="20000":
    LEASED_DIFFERENTIAL_CASES={{CASES}} cargo test -p leased --lib differential

# Acquire and release pairs, beside plain findOneAndUpdate.
bench *OPTIONS:
    cargo build --release -p leased -p leased-bench
    cargo run --release -p leased-bench -- {{OPTIONS}}

# Licences, sources, and the walls between the crates. Needs cargo-deny.
deny:
    cargo deny check
