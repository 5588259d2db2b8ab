//! The whole client against whole daemons, over a simulated network, in simulated time: many runs, each from a seed.
//!
//! `LEASED_SIMULATION_SEEDS=5000` makes more of them, and `LEASED_SIMULATION_SEED=17` that one alone, some times over.

/// What goes wrong, and when.
mod faults;
/// What holders believed, and what must be true of it.
mod history;
/// Programs that use the client.
mod holder;
/// Programs that do without it.
mod naive;
/// Which runs are made.
mod seeds;
/// Programs with one aim.
mod steady;
/// The store that the daemons share.
mod store;
/// Hosts and the network.
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fastrand::Rng;

use super::support::{ms, secs};
use faults::{Faults, Happening, on_and_off};
use holder::Holder;
use naive::{Counting, Naive};
use store::Weather;
use world::{DAEMONS, GRACE, KEYS, PLACE, World, client};

/// How long faults happen.
const STORM: Duration = secs(15);
/// The longest TTL in one.
const TTL: Duration = secs(3);
/// What everything else may take together.
const SLACK: Duration = secs(2);

fn holders() -> Vec<String> {
    (0..4).map(|number| format!("holder-{number}")).collect()
}

/// Programs of the client that take and leave leases for as long as faults happen, or none.
fn crowd(seed: u64, faults: Faults, is_calm: bool) -> World {
    let mut world = World::new(seed);
    for name in holders() {
        let (history, over) = (world.history.clone(), world.over.clone());
        world.host(&name.clone(), move || {
            let (name, history, over) = (name.clone(), history.clone(), over.clone());
            Holder { client: client(&name), name, history, over, is_calm }.live()
        });
    }
    world.run(STORM, faults, |_| false);
    world
}

#[test]
fn holders_never_believe_at_once_and_everything_recovers() {
    let refused = AtomicUsize::new(0);
    seeds::each("holders_never", 50, |seed| {
        let mut world = crowd(seed, Faults::random(&mut Rng::with_seed(seed), &holders(), STORM), false);
        world.over.cancel();
        // Everybody leaves, and what was under way arrives.
        world.run(STORM + secs(1), Faults::default(), |_| false);
        world.check()?;
        for key in KEYS {
            // Those in line now are dead: their processes crashed, or those of the daemons that had their calls. Each may be
            // granted the lease yet, until its place has lapsed.
            let turns = 1 + world.store.line(key);
            let within = ((TTL + GRACE) * turns).min(PLACE + TTL + GRACE) + SLACK;
            let history = world.history.clone();
            world.host(key, move || steady::probe(client(key), history.clone(), key, within));
        }
        let (history, store) = (world.history.clone(), world.store.clone());
        let is_left = |at| history.count_done() == KEYS.len() && store.leftovers(at).is_empty();
        if !world.run(STORM + secs(1) + PLACE + TTL + GRACE + SLACK, Faults::default(), is_left) {
            let left = world.store.leftovers(world.elapsed());
            world.history.fail(world.elapsed(), format_args!("something is left behind: {left:?}"));
        }
        refused.fetch_add(world.history.refused(), Ordering::Relaxed);
        world.check()
    });
    assert!(refused.into_inner() > 0, "no write was late, so none had to be refused");
}

#[test]
fn nothing_is_lost_while_nothing_fails() {
    seeds::each("nothing_is_lost", 5, |seed| crowd(seed, Faults::default(), true).check());
}

/// Programs without the client in the same world; who believed at once, if anyone did.
fn naive_crowd(seed: u64, counting: Counting) -> Option<String> {
    let mut world = World::new(seed);
    for name in holders() {
        let history = world.history.clone();
        world.host(&name.clone(), move || {
            Naive { name: name.clone(), history: history.clone(), counting }.live()
        });
    }
    world.run(STORM, Faults::random(&mut Rng::with_seed(seed), &holders(), STORM), |_| false);
    world.history.overlap(&world.store)
}

/// The twin: were the faults too weak for this, they would show nothing of the client either.
#[test]
fn whoever_counts_from_the_answer_believes_too_long() {
    let shown = (0..60).find_map(|seed| naive_crowd(seed, Counting::FromAnswer));
    println!("{}", shown.expect("nobody believed too long"));
}

#[test]
fn whoever_counts_from_the_request_does_not() {
    seeds::each("whoever_counts_from_the_request", 10, |seed| {
        naive_crowd(seed, Counting::FromRequest).map_or(Ok(()), Err)
    });
}

/// One program that means to keep its lease, and what happens meanwhile.
fn steady(seed: u64, ttl: Duration, faults: Faults) -> Result<(), String> {
    let mut world = World::new(seed);
    let history = world.history.clone();
    world.host("holder", move || steady::keep(client("holder"), history.clone(), ttl));
    world.run(secs(8) + ttl * 2, faults, |_| false);
    world.check()
}

/// When the keepalive stream is open.
fn some_time(rng: &mut Rng) -> Duration {
    ms(rng.u64(4000..8000))
}

#[test]
fn an_outage_of_half_the_ttl_loses_nothing() {
    seeds::each("an_outage", 20, |seed| {
        let rng = &mut Rng::with_seed(seed);
        let at = some_time(rng);
        let one = |fault| Faults::one(at, TTL / 2, fault);
        let faults = match seed % 3 {
            0 => one((Happening::Weather(Weather::Away), Happening::Weather(Weather::Fair))),
            1 => one(on_and_off(DAEMONS[0])).and(one(on_and_off(DAEMONS[1]))),
            _ => Faults::both(at, TTL / 2, Happening::Hold),
        };
        steady(seed, TTL, faults)
    });
}

#[test]
fn connections_that_die_unheard_lose_nothing_that_lasts_half_a_minute() {
    seeds::each("connections_that_die", 3, |seed| {
        let at = some_time(&mut Rng::with_seed(seed));
        steady(seed, secs(30), Faults::both(at, secs(15), Happening::Partition))
    });
}

#[test]
fn a_stream_moves_before_its_leases_are_in_jeopardy() {
    seeds::each("a_stream_moves", 16, |seed| {
        let rng = &mut Rng::with_seed(seed);
        let (at, daemon) = (some_time(rng), DAEMONS[rng.usize(..2)].to_owned());
        let (from, to) = ("holder".to_owned(), daemon);
        let mended = Happening::Mended(from.clone(), to.clone());
        let begin = match seed % 4 {
            0 => Happening::Hold(from, to),
            1 => Happening::Partition(from, to),
            2 => Happening::OneWay(from, to),
            _ => Happening::OneWay(to, from),
        };
        steady(seed, secs(1), Faults::one(at, secs(60), (begin, mended)))
    });
}

#[test]
fn a_revocation_is_told() {
    seeds::each("a_revocation_is_told", 8, |seed| {
        let mut world = World::new(seed);
        let history = world.history.clone();
        // Without a feed the touch brings it out.
        let within = if world.store.has_feed() { ms(600) } else { secs(11) };
        // A lease that is a moment old hears of it like any other.
        let at = ms(5 + 700 * seed);
        world.host("holder", move || {
            let (holder, operator) = (client("holder"), client("operator"));
            steady::be_revoked(holder, operator, history.clone(), at, within)
        });
        let history = world.history.clone();
        if !world.run(secs(30), Faults::default(), |_| history.count_done() == 1) {
            world.history.fail(world.elapsed(), format_args!("the revocation was not told"));
        }
        world.check()
    });
}
