//! Which runs are made, and what is said of one that went wrong.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// So often one seed is run when it is asked for: the ids of leases, the order of hash maps and of what is ready at the same
/// time do not follow from it.
const REPETITIONS: usize = 20;

/// Runs `simulate` with `usual` seeds, or those that the environment asks for, on all cores.
///
/// # Panics
/// If one went wrong, with its seed and what happened.
pub(crate) fn each(name: &str, usual: u64, simulate: impl Fn(u64) -> Result<(), String> + Sync) {
    let number = |name: &str| std::env::var(name).ok().map(|number| number.parse().expect(name));
    let seeds: Vec<u64> = match number("LEASED_SIMULATION_SEED") {
        Some(seed) => vec![seed; REPETITIONS],
        None => (0..number("LEASED_SIMULATION_SEEDS").unwrap_or(usual)).collect(),
    };
    let next = AtomicU64::new(0);
    let wrong = Mutex::new(None);
    let work = || {
        while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            if let Err(what) = simulate(*seed) {
                wrong.lock().unwrap().get_or_insert((*seed, what));
            }
            if wrong.lock().unwrap().is_some() {
                return;
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    if let Some((seed, what)) = wrong.into_inner().unwrap() {
        panic!(
            "{what}\nthis one alone: LEASED_SIMULATION_SEED={seed} cargo test --test integration simulation::{name}"
        );
    }
}
