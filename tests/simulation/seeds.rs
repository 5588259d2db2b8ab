//! Runs a simulation with many seeds, and reports the first seed that fails.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// How often a single seed is run. One run is not enough, since lease ids, the order of hash maps,
/// and the order of tasks that are ready at the same time do not follow from the seed.
const REPETITIONS: usize = 20;

/// Runs `simulate` on all cores, with the first `usual` seeds or with those that the environment
/// names. `name` is the beginning of the test's name, which the report of a failure shows.
///
/// # Panics
/// If a run fails, with its seed and its history.
pub(crate) fn each(name: &str, usual: u64, simulate: impl Fn(u64) -> Result<(), String> + Sync) {
    let number = |name: &str| std::env::var(name).ok().map(|number| number.parse().expect(name));
    let seeds: Vec<u64> = match number("LEASED_SIMULATION_SEED") {
        Some(seed) => vec![seed; REPETITIONS],
        None => (0..number("LEASED_SIMULATION_SEEDS").unwrap_or(usual)).collect(),
    };
    let next = AtomicU64::new(0);
    let failed = Mutex::new(None);
    let work = || {
        while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            if let Err(what) = simulate(*seed) {
                failed.lock().unwrap().get_or_insert((*seed, what));
            }
            if failed.lock().unwrap().is_some() {
                return;
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    if let Some((seed, what)) = failed.into_inner().unwrap() {
        panic!(
            "{what}\nto run this seed alone: LEASED_SIMULATION_SEED={seed} cargo test --test integration simulation::{name}"
        );
    }
}
