//! Whose turn it is: callers share the store command by command, whatever each of them queues.
//!
//! Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). Each command gets a number when it is queued, the
//! *round*: one more than the latest round of its caller, or than the round that is being committed, whichever is
//! greater. Commands are committed in the order of their rounds. So a caller that queues 10,000 commands has them in
//! 10,000 rounds, and the single command of another caller is in the next one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Semaphore;

/// The rounds between two commands of a caller.
const STEP: u64 = 256;
/// Turns that a caller has at once, for pages to be read and for large answers. The store reads all pages in the order in which
/// they were asked for, so this is how many of a caller's are in front of another's.
const TURNS: usize = 4;

/// Someone who takes turns with others: a keepalive stream, or all other calls of one connection. Clones are the same
/// caller.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    turns: Arc<Turns>,
    step: u64,
}

#[derive(Debug)]
struct Turns {
    /// The latest round of its commands.
    latest: AtomicU64,
    /// The turns that it may take beside those that it has.
    free: Semaphore,
}

/// A caller's turn to have a page read, or to be sent a large answer. Dropping it ends the turn.
#[derive(Debug)]
pub(crate) struct Turn(Arc<Turns>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.free.add_permits(1);
    }
}

impl Caller {
    /// A caller that has queued nothing yet.
    pub(crate) fn new() -> Self {
        Self::stepping(STEP)
    }

    /// The daemon itself, which looks after the calls in line of all callers, a lot of keys at a time. Its commands cost it
    /// almost no turns: places in line must be refreshed in time.
    pub(super) fn daemon() -> Self {
        Self::stepping(1)
    }

    fn stepping(step: u64) -> Self {
        let turns = Turns { latest: AtomicU64::default(), free: Semaphore::new(TURNS) };
        Self { turns: Arc::new(turns), step }
    }

    /// The round that its next command would get while `current` is being committed.
    pub(super) fn next_round(&self, current: u64) -> u64 {
        self.turns.latest.load(Ordering::Relaxed).max(current) + self.step
    }

    /// Takes that round. To be called under the committer's lock.
    pub(super) fn take_round(&self, current: u64) -> u64 {
        let round = self.next_round(current);
        self.turns.latest.store(round, Ordering::Relaxed);
        round
    }

    /// Waits until it has few enough turns to take another one.
    pub(crate) async fn turn(&self) -> Turn {
        // Nobody closes the semaphore. The turn gives back what is forgotten here, without a reference of its own to it.
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
    fn one_command_goes_before_the_rest_of_many() {
        let (greedy, modest) = (Caller::new(), Caller::new());
        let mut rounds: Vec<(u64, &str)> = (0..1000).map(|_| (greedy.take_round(0), "greedy")).collect();
        // Ten of the greedy caller's commands have been committed when the other one comes.
        let current = rounds[9].0;
        rounds.push((modest.take_round(current), "modest"));
        rounds.sort_unstable();
        let place = rounds.iter().position(|(_, who)| *who == "modest").expect("a place");
        assert!((10..=11).contains(&place), "{place}");
    }

    #[test]
    fn a_caller_that_was_quiet_has_saved_up_nothing() {
        let (quiet, busy) = (Caller::new(), Caller::new());
        quiet.take_round(0);
        let current = (0..500).map(|_| busy.take_round(0)).max().expect("rounds");
        assert_eq!(quiet.take_round(current), busy.take_round(current));
    }
}
