//! What the hot paths may allocate: budgets that fail the build. Counted and not timed, so the same on every machine.
//!
//! The daemon runs in a process of its own under an allocator that counts, with its embedded store; its callers are
//! here. With `LEASED_HEAP_PROFILE=FOLDER` that process also writes profiles for DHAT's viewer, which show who allocates.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
#![expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]

use std::process::ExitCode;

/// The daemon's side.
mod counted;
/// The callers' side.
mod load;

use counted::{Counted, Heap};
use load::Load;

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

/// What one operation may cost the daemon, transport and store included; a little above what it costs.
struct Budget {
    what: &'static str,
    /// Does it so many times.
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
        what: "the same, coalesced",
        run: Load::messages,
        coalesces: true,
        allocations: 9.0,
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
        what: "the same, coalesced",
        run: Load::crowds,
        coalesces: true,
        allocations: 3.5,
        bytes: 500.0,
    },
];

/// What one may keep allocated, in bytes.
struct Size {
    what: &'static str,
    prepare: fn(&mut Load) -> u32,
    run: fn(&mut Load) -> u32,
    bytes: f64,
}

const KEPT: [Size; 2] = [
    Size {
        what: "a lease carried on a stream with others",
        prepare: Load::acquire_many,
        run: Load::carry,
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
    if std::env::args().any(|argument| argument == counted::ROLE) {
        counted::serve();
        return ExitCode::SUCCESS;
    }
    let mut all_kept = true;
    let mut check = |what: &str, unit: &str, spent: f64, budget: f64| {
        let kept = spent <= budget;
        println!("{what:<45} {spent:>8.1} of {budget:>6} {unit}{}", if kept { "" } else { ", TOO MANY" });
        all_kept &= kept;
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
    if all_kept { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The heap of a new daemon before and after `run`, and how many operations that was. What is set up once is for
/// `prepare` to do.
fn measure(coalesces: bool, prepare: fn(&mut Load) -> u32, run: fn(&mut Load) -> u32) -> (Heap, Heap, f64) {
    let mut daemon = Counted::start(coalesces);
    let mut load = Load::at(daemon.address());
    prepare(&mut load);
    let before = daemon.heap();
    let times = run(&mut load);
    (before, daemon.heap(), times.into())
}
