//! The whole client against whole daemons, over a simulated network and in simulated time. Each
//! test makes many runs, one for each seed.
//!
//! `LEASED_SIMULATION_SEEDS=5000` makes 5,000 runs instead of the usual number.
//! `LEASED_SIMULATION_SEED=17` runs only seed 17, several times.

/// Faults, and when each of them begins and ends.
mod faults;
/// What holders believed, and the checks of it.
mod history;
/// Programs that use the client.
mod holder;
/// Programs that use only the generated stubs.
mod naive;
/// The seeds of a test, and the report of a failed one.
mod seeds;
/// Programs with a single aim, such as keeping one lease.
mod steady;
/// The store that the daemons share.
mod store;
/// The hosts and the network.
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fastrand::Rng;

use super::support::{ms, secs};
use faults::{Fault, Faults, crash_and_restart};
use holder::Holder;
use naive::{Counting, Naive};
use store::StoreFault;
use world::{DAEMONS, GRACE, KEYS, WAITER_TTL, World, client};

/// How long faults occur in a run.
const FAULT_PERIOD: Duration = secs(15);
/// The longest TTL of a lease in a run.
const TTL: Duration = secs(3);
/// The time allowed for everything except TTLs, the grace, and the lapse of waiter entries.
const SLACK: Duration = secs(2);

fn holders() -> Vec<String> {
    (0..4).map(|number| format!("holder-{number}")).collect()
}

/// Runs programs that acquire and release leases through the client while `faults` occur. If
/// `is_faultless` is set, no lease may be lost.
fn crowd(seed: u64, faults: Faults, is_faultless: bool) -> World {
    let mut world = World::new(seed);
    for name in holders() {
        let (history, over) = (world.history.clone(), world.over.clone());
        world.host(&name.clone(), move || {
            let (name, history, over) = (name.clone(), history.clone(), over.clone());
            Holder { client: client(&name), name, history, over, is_faultless }.live()
        });
    }
    world.run(FAULT_PERIOD, faults, |_| false);
    world
}

#[test]
fn beliefs_of_two_holders_never_overlap_and_every_key_recovers() {
    let refused = AtomicUsize::new(0);
    seeds::each("beliefs_of_two_holders", 50, |seed| {
        let mut world =
            crowd(seed, Faults::random(&mut Rng::with_seed(seed), &holders(), FAULT_PERIOD), false);
        world.over.cancel();
        // All programs end, and messages that are still in flight arrive.
        world.run(FAULT_PERIOD + secs(1), Faults::default(), |_| false);
        world.check()?;
        for key in KEYS {
            // No call waits for the entries that are still queued: their callers or daemons have
            // crashed. Until an entry lapses, it may still be granted the lease.
            let turns = 1 + world.store.queue_length(key);
            let within = ((TTL + GRACE) * turns).min(WAITER_TTL + TTL + GRACE) + SLACK;
            let history = world.history.clone();
            world.host(key, move || steady::probe(client(key), history.clone(), key, within));
        }
        let (history, store) = (world.history.clone(), world.store.clone());
        let is_left = |at| history.count_done() == KEYS.len() && store.leftovers(at).is_empty();
        if !world.run(FAULT_PERIOD + secs(1) + WAITER_TTL + TTL + GRACE + SLACK, Faults::default(), is_left) {
            let left = world.store.leftovers(world.elapsed());
            world.history.fail(world.elapsed(), format_args!("records are still in use: {left:?}"));
        }
        refused.fetch_add(world.history.refused(), Ordering::Relaxed);
        world.check()
    });
    assert!(refused.into_inner() > 0, "no write was stale in any run, so fencing was not tested");
}

#[test]
fn no_lease_is_lost_while_nothing_fails() {
    seeds::each("no_lease_is_lost", 5, |seed| crowd(seed, Faults::default(), true).check());
}

/// Runs programs without the client under random faults. Returns two beliefs that overlapped, if
/// there are any.
fn naive_crowd(seed: u64, counting: Counting) -> Option<String> {
    let mut world = World::new(seed);
    for name in holders() {
        let history = world.history.clone();
        world.host(&name.clone(), move || {
            Naive { name: name.clone(), history: history.clone(), counting }.live()
        });
    }
    world.run(FAULT_PERIOD, Faults::random(&mut Rng::with_seed(seed), &holders(), FAULT_PERIOD), |_| false);
    world.history.overlap(&world.store)
}

/// Checks the simulation itself: faults too weak to break this program would prove nothing about
/// the client.
#[test]
fn a_program_that_counts_from_the_answer_believes_too_long() {
    let shown = (0..60).find_map(|seed| naive_crowd(seed, Counting::FromAnswer));
    println!("{}", shown.expect("no program believed too long"));
}

#[test]
fn a_program_that_counts_from_the_request_does_not_believe_too_long() {
    seeds::each("a_program_that_counts_from_the_request", 10, |seed| {
        naive_crowd(seed, Counting::FromRequest).map_or(Ok(()), Err)
    });
}

/// Runs one program that must keep its lease in spite of `faults`.
fn steady(seed: u64, ttl: Duration, faults: Faults) -> Result<(), String> {
    let mut world = World::new(seed);
    let history = world.history.clone();
    world.host("holder", move || steady::keep(client("holder"), history.clone(), ttl));
    world.run(secs(8) + ttl * 2, faults, |_| false);
    world.check()
}

/// Returns a random time at which the keepalive stream is already open.
fn some_time(rng: &mut Rng) -> Duration {
    ms(rng.u64(4000..8000))
}

#[test]
fn an_outage_of_half_the_ttl_loses_no_lease() {
    seeds::each("an_outage", 20, |seed| {
        let rng = &mut Rng::with_seed(seed);
        let at = some_time(rng);
        let one = |fault| Faults::one(at, TTL / 2, fault);
        let faults = match seed % 3 {
            0 => one((Fault::Store(StoreFault::Unavailable), Fault::Store(StoreFault::None))),
            1 => one(crash_and_restart(DAEMONS[0])).and(one(crash_and_restart(DAEMONS[1]))),
            _ => Faults::on_both_links(at, TTL / 2, Fault::Hold),
        };
        steady(seed, TTL, faults)
    });
}

#[test]
fn connections_that_die_silently_lose_no_lease_with_a_ttl_of_thirty_seconds() {
    seeds::each("connections_that_die", 3, |seed| {
        let at = some_time(&mut Rng::with_seed(seed));
        steady(seed, secs(30), Faults::on_both_links(at, secs(15), Fault::Partition))
    });
}

#[test]
fn a_stream_moves_to_the_other_daemon_before_its_leases_are_in_jeopardy() {
    seeds::each("a_stream_moves", 16, |seed| {
        let rng = &mut Rng::with_seed(seed);
        let (at, daemon) = (some_time(rng), DAEMONS[rng.usize(..2)].to_owned());
        let (from, to) = ("holder".to_owned(), daemon);
        let repaired = Fault::Repaired(from.clone(), to.clone());
        let begin = match seed % 4 {
            0 => Fault::Hold(from, to),
            1 => Fault::Partition(from, to),
            2 => Fault::OneWay(from, to),
            _ => Fault::OneWay(to, from),
        };
        steady(seed, secs(1), Faults::one(at, secs(60), (begin, repaired)))
    });
}

#[test]
fn a_revocation_is_reported_in_time() {
    seeds::each("a_revocation_is_reported", 8, |seed| {
        let mut world = World::new(seed);
        let history = world.history.clone();
        // Without a change feed, the holder learns of the revocation from its next touch.
        let within = if world.store.has_feed() { ms(600) } else { secs(11) };
        // The first seed revokes a lease that is only 5 ms old.
        let at = ms(5 + 700 * seed);
        world.host("holder", move || {
            let (holder, operator) = (client("holder"), client("operator"));
            steady::be_revoked(holder, operator, history.clone(), at, within)
        });
        let history = world.history.clone();
        if !world.run(secs(30), Faults::default(), |_| history.count_done() == 1) {
            world.history.fail(world.elapsed(), format_args!("the revocation was not reported"));
        }
        world.check()
    });
}
