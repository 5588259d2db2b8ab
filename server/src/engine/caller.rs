//! Fairness between callers: they share the store operation by operation, however many operations
//! each of them queues.
//!
//! The algorithm is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). Each operation
//! gets a number when it is queued, its *round*. The round is one step more than the latest round
//! of its caller, or than the round that is being committed, whichever is greater. Operations are
//! committed in the order of their rounds. So 10,000 operations of one caller are in 10,000 rounds,
//! and a single operation of another caller is in the next one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Semaphore;

/// How far apart the rounds of a caller's operations are. The daemon's own operations are 1 apart.
const STEP: u64 = 256;
/// How many turns a caller has at a time, to have pages read or to be sent large answers. The store
/// reads pages in the order of the requests, so this many pages of one caller may delay the page of
/// another caller.
const TURNS: usize = 4;

/// A source of operations that takes turns with other callers: a keepalive stream, or all other
/// calls of one connection. Clones are the same caller.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    turns: Arc<Turns>,
    step: u64,
}

#[derive(Debug)]
struct Turns {
    /// The latest round of the caller's operations.
    latest: AtomicU64,
    /// How many more turns the caller may take.
    free: Semaphore,
}

/// A caller's turn to have a page read or to be sent a large answer. Dropping it ends the turn.
#[derive(Debug)]
pub(crate) struct Turn(Arc<Turns>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.free.add_permits(1);
    }
}

impl Caller {
    /// Creates a caller that has queued nothing yet.
    pub(crate) fn new() -> Self {
        Self::stepping(STEP)
    }

    /// Creates the caller for the daemon's own operations.
    pub(super) fn daemon() -> Self {
        // A small step puts them before most others: the waiters' entries of all callers must be
        // refreshed before they lapse.
        Self::stepping(1)
    }

    fn stepping(step: u64) -> Self {
        let turns = Turns { latest: AtomicU64::default(), free: Semaphore::new(TURNS) };
        Self { turns: Arc::new(turns), step }
    }

    /// Returns the round of the caller's next operation while `current` is being committed.
    pub(super) fn next_round(&self, current: u64) -> u64 {
        self.turns.latest.load(Ordering::Relaxed).max(current) + self.step
    }

    /// Takes the round of the caller's next operation. To be called under the committer's lock.
    pub(super) fn take_round(&self, current: u64) -> u64 {
        let round = self.next_round(current);
        self.turns.latest.store(round, Ordering::Relaxed);
        round
    }

    /// Waits for one of the caller's turns.
    pub(crate) async fn turn(&self) -> Turn {
        // The semaphore is never closed. `Turn` returns the permit when it is dropped. An owned
        // permit would need another reference to the semaphore.
        if let Ok(permit) = self.turns.free.acquire().await {
            permit.forget();
        }
        Turn(Arc::clone(&self.turns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_operation_goes_before_the_rest_of_many() {
        let (greedy, modest) = (Caller::new(), Caller::new());
        let mut rounds: Vec<(u64, &str)> = (0..1000).map(|_| (greedy.take_round(0), "greedy")).collect();
        // Ten of the greedy caller's operations have been committed when the modest caller queues
        // its operation.
        let current = rounds[9].0;
        rounds.push((modest.take_round(current), "modest"));
        rounds.sort_unstable();
        let position = rounds.iter().position(|(_, who)| *who == "modest").expect("a position");
        assert!((10..=11).contains(&position), "{position}");
    }

    #[test]
    fn a_quiet_caller_saves_up_no_turns() {
        let (quiet, busy) = (Caller::new(), Caller::new());
        quiet.take_round(0);
        let current = (0..500).map(|_| busy.take_round(0)).max().expect("rounds");
        assert_eq!(quiet.take_round(current), busy.take_round(current));
    }
}
