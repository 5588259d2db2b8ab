//! Threads that read the database. All of them start with the store, because the system may refuse
//! a thread later. They serve requests in the order of arrival.

use std::sync::{Arc, Mutex, PoisonError};
use std::{fmt, io, thread};

use tokio::sync::{mpsc, oneshot};

use crate::panics::contained;
use crate::store::failure::Failure;

/// How many reads may be queued. Later callers wait until there is room.
const QUEUE: usize = 64;

type Job = Box<dyn FnOnce() + Send>;

/// A pool of threads that share one queue. They end when the last clone is dropped.
#[derive(Clone)]
pub(super) struct Readers(mpsc::Sender<Job>);

impl fmt::Debug for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readers").finish_non_exhaustive()
    }
}

impl Readers {
    pub(super) fn start(name: &str, threads: usize) -> io::Result<Self> {
        let (sender, jobs) = mpsc::channel(QUEUE);
        let jobs = Arc::new(Mutex::new(jobs));
        for number in 1..=threads {
            let jobs = Arc::clone(&jobs);
            thread::Builder::new().name(format!("{name}-{number}")).spawn(move || work(&jobs))?;
        }
        Ok(Self(sender))
    }

    /// Runs `work` on one of the threads. Skips the work if the caller has given up before it
    /// starts.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        let job = move || {
            if !reply.is_closed() {
                // redb panics on some kinds of damage. A panic fails this read alone.
                let done = contained(work);
                let panicked = |_| Err(Failure::not_applied("the store panicked while it read"));
                // The caller may have given up meanwhile.
                let _ = reply.send(done.unwrap_or_else(panicked));
            }
        };
        let ended = "the threads that read have ended";
        self.0.send(Box::new(job)).await.map_err(|_| Failure::not_applied(ended))?;
        answer.await.map_err(|_| Failure::not_applied(ended))?
    }
}

fn work(jobs: &Mutex<mpsc::Receiver<Job>>) {
    // `next` releases the lock before the job begins, so that another thread can wait for the next
    // job.
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
    async fn a_panic_fails_only_the_read_that_panicked() {
        let readers = Readers::start("test", 1).expect("a thread");
        let failed = readers.run(|| -> Result<(), Failure> { panic!("damage") }).await;
        assert!(matches!(failed, Err(Failure::NotApplied(_))), "{failed:?}");
        assert_eq!(readers.run(|| Ok(7)).await.expect("the thread goes on"), 7);
    }

    #[tokio::test]
    async fn a_read_whose_caller_has_given_up_is_skipped() {
        let readers = Readers::start("test", 1).expect("a thread");
        let (begun, begins) = oneshot::channel();
        let (go, gate) = channel::<()>();
        let busy = readers.clone();
        let busy = tokio::spawn(async move {
            let work = move || {
                begun.send(()).expect("a test that waits");
                Ok(gate.recv())
            };
            busy.run(work).await
        });
        begins.await.expect("the thread begins");
        let (ran, runs) = channel();
        let abandoned = readers.run(move || Ok(ran.send(())));
        // The read is polled once, so that it is queued, and then dropped.
        tokio::select! {
            biased;
            _ = abandoned => unreachable!("the only thread is busy"),
            () = tokio::task::yield_now() => {}
        }
        go.send(()).expect("a thread that waits");
        busy.await.expect("no panic").expect("a read").expect("told to go on");
        readers.run(|| Ok(())).await.expect("a read");
        assert!(runs.try_recv().is_err());
    }

    #[tokio::test]
    async fn reads_beyond_the_size_of_the_queue_are_answered() {
        let readers = Readers::start("test", 2).expect("threads");
        let reads = (0..QUEUE * 4).map(|number| {
            let readers = readers.clone();
            tokio::spawn(async move { readers.run(move || Ok(number)).await })
        });
        for (number, read) in reads.collect::<Vec<_>>().into_iter().enumerate() {
            assert_eq!(read.await.expect("no panic").expect("a read"), number);
        }
    }
}
