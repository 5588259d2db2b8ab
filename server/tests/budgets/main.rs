//! Budgets for the allocations of the hot paths. An exceeded budget fails the test run. Allocations
//! are counted and not timed, so the result is the same on every machine.
//!
//! The daemon runs with its embedded store in a separate process, under an allocator that counts.
//! Its callers run in this process. With `LEASED_HEAP_PROFILE=FOLDER` the daemon also writes
//! profiles for DHAT's viewer, which show what code allocates.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
#![expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]

use std::process::ExitCode;

/// The daemon, in a child process.
mod counting_daemon;
/// The callers.
mod load;

use counting_daemon::{CountingDaemon, Heap};
use load::Load;

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

/// What one operation may allocate in the daemon, including transport and store. A budget is a
/// little above the actual figure.
struct Budget {
    what: &'static str,
    /// Repeats the operation, and returns how many times.
    run: fn(&mut Load) -> u32,
    coalesces: bool,
    allocations: f64,
    bytes: f64,
}

const SPENT: [Budget; 5] = [
    Budget {
        what: "an acquire and its release",
        run: Load::pairs,
        coalesces: true,
        allocations: 660.0,
        bytes: 135_000.0,
    },
    Budget {
        what: "a keepalive message for one lease",
        run: Load::messages,
        coalesces: false,
        allocations: 315.0,
        bytes: 60_000.0,
    },
    Budget {
        what: "a coalesced message for one lease",
        run: Load::messages,
        coalesces: true,
        allocations: 7.0,
        bytes: 450.0,
    },
    Budget {
        what: "a lease among 1,000 in one message",
        run: Load::crowds,
        coalesces: false,
        allocations: 16.5,
        bytes: 3_000.0,
    },
    Budget {
        what: "a coalesced lease among 1,000",
        run: Load::crowds,
        coalesces: true,
        allocations: 3.5,
        bytes: 500.0,
    },
];

/// How many bytes one lease or stream may keep allocated in the daemon.
struct Size {
    what: &'static str,
    prepare: fn(&mut Load) -> u32,
    run: fn(&mut Load) -> u32,
    bytes: f64,
}

const KEPT: [Size; 2] = [
    Size {
        what: "a lease tracked by a stream with others",
        prepare: Load::acquire_many,
        run: Load::track,
        bytes: 512.0,
    },
    Size {
        what: "an idle stream, a hundred on a connection",
        prepare: Load::pairs,
        run: Load::open,
        bytes: 7_000.0,
    },
];

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == counting_daemon::ROLE) {
        counting_daemon::serve();
        return ExitCode::SUCCESS;
    }
    let mut all_met = true;
    let mut check = |what: &str, unit: &str, spent: f64, budget: f64| {
        let is_met = spent <= budget;
        println!("{what:<45} {spent:>8.1} of {budget:>6} {unit}{}", if is_met { "" } else { ", TOO MANY" });
        all_met &= is_met;
    };
    for Budget { what, run, coalesces, allocations, bytes } in SPENT {
        let (before, after, times) = measure(coalesces, run, run);
        check(what, "allocations", (after.blocks - before.blocks) as f64 / times, allocations);
        check(what, "bytes", (after.bytes - before.bytes) as f64 / times, bytes);
    }
    for Size { what, prepare, run, bytes } in KEPT {
        let (before, after, times) = measure(true, prepare, run);
        check(what, "bytes kept", after.kept.saturating_sub(before.kept) as f64 / times, bytes);
    }
    if all_met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Returns the heap of a new daemon before and after `run`, and the number of operations. `prepare`
/// runs first, so that what is set up only once is not counted.
fn measure(coalesces: bool, prepare: fn(&mut Load) -> u32, run: fn(&mut Load) -> u32) -> (Heap, Heap, f64) {
    let mut daemon = CountingDaemon::start(coalesces);
    let mut load = Load::at(daemon.address());
    prepare(&mut load);
    let before = daemon.heap();
    let times = run(&mut load);
    (before, daemon.heap(), times.into())
}
