//! Threads that read. They are made at the start and take what is asked in its order.

use std::sync::{Arc, Mutex, PoisonError};
use std::{fmt, io, thread};

use tokio::sync::{mpsc, oneshot};

use crate::panics::contained;
use crate::store::failure::Failure;

/// Reads that may await a thread; whoever comes later waits until there is room.
const WAITING: usize = 64;

type Job = Box<dyn FnOnce() + Send>;

/// Some threads that share a queue. They end with the last clone.
#[derive(Clone)]
pub(super) struct Readers(mpsc::Sender<Job>);

impl fmt::Debug for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readers").finish_non_exhaustive()
    }
}

impl Readers {
    pub(super) fn start(name: &str, threads: usize) -> io::Result<Self> {
        let (sender, jobs) = mpsc::channel(WAITING);
        let jobs = Arc::new(Mutex::new(jobs));
        for number in 1..=threads {
            let jobs = Arc::clone(&jobs);
            thread::Builder::new().name(format!("{name}-{number}")).spawn(move || work(&jobs))?;
        }
        Ok(Self(sender))
    }

    /// Does `work` on one of the threads, unless its caller has gone before its turn. A panic, of which redb has some
    /// for damage that it meets on the way, is a failure of this work alone.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        let job = move || {
            if !reply.is_closed() {
                let done = contained(work);
                let panicked = |_| Err(Failure::not_applied("the store panicked while it read"));
                // Whoever has gone hears nothing.
                let _ = reply.send(done.unwrap_or_else(panicked));
            }
        };
        let ended = "the threads that read have ended";
        self.0.send(Box::new(job)).await.map_err(|_| Failure::not_applied(ended))?;
        answer.await.map_err(|_| Failure::not_applied(ended))?
    }
}

fn work(jobs: &Mutex<mpsc::Receiver<Job>>) {
    // The lock is free again before the job begins, for the next thread to wait in its turn.
    let next = || jobs.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
    while let Some(job) = next() {
        job();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_a_failure_of_one_read() {
        let readers = Readers::start("test", 1).expect("a thread");
        let failed = readers.run(|| -> Result<(), Failure> { panic!("damage") }).await;
        assert!(matches!(failed, Err(Failure::NotApplied(_))), "{failed:?}");
        assert_eq!(readers.run(|| Ok(7)).await.expect("the thread goes on"), 7);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_not_read() {
        let readers = Readers::start("test", 1).expect("a thread");
        let (begun, begins) = oneshot::channel();
        let (go, gate) = channel::<()>();
        let busy = readers.clone();
        let busy = tokio::spawn(async move {
            let work = move || {
                begun.send(()).expect("the test waits for it");
                Ok(gate.recv())
            };
            busy.run(work).await
        });
        begins.await.expect("the thread begins");
        let (told, hears) = channel();
        let abandoned = readers.run(move || Ok(told.send(())));
        // Long enough to be queued, and then dropped.
        tokio::select! {
            biased;
            _ = abandoned => unreachable!("the only thread is busy"),
            () = tokio::task::yield_now() => {}
        }
        go.send(()).expect("the thread waits for it");
        busy.await.expect("no panic").expect("a read").expect("told to go on");
        readers.run(|| Ok(())).await.expect("a read");
        assert!(hears.try_recv().is_err());
    }

    #[tokio::test]
    async fn more_reads_than_may_wait_come_to_their_turn() {
        let readers = Readers::start("test", 2).expect("threads");
        let reads = (0..WAITING * 4).map(|number| {
            let readers = readers.clone();
            tokio::spawn(async move { readers.run(move || Ok(number)).await })
        });
        for (number, read) in reads.collect::<Vec<_>>().into_iter().enumerate() {
            assert_eq!(read.await.expect("no panic").expect("a read"), number);
        }
    }
}
