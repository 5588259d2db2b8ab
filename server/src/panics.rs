//! Which part of the daemon a panic ends: one call, one connection, one batch, or the whole
//! process.
//!
//! Work for one caller or one batch runs as [`Contained`]. Any other panic ends the process. Leases
//! survive a restart. But a daemon without its purge, its change feed or the driver's monitors
//! would look healthy for ever.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, Location, catch_unwind, set_hook};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};

use pin_project_lite::pin_project;

use crate::telemetry;

thread_local! {
    /// Whether this thread is running work whose panics are caught.
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Whether the daemon has ended. Its runtime ends next.
static ENDED: AtomicBool = AtomicBool::new(false);

/// How many panics were contained in this process.
static CAUGHT: AtomicU64 = AtomicU64::new(0);

/// Installs a hook that logs every panic, and ends the process with exit code 1 after one that is
/// not contained. See also [`note_daemon_ended`].
pub fn install_hook() {
    set_hook(Box::new(|panic| {
        let message = message(panic.payload());
        let place = panic.location().map_or_else(|| "somewhere".to_owned(), ToString::to_string);
        if CONTAINED.get() {
            tracing::error!(message, place, "a panic ended a call, a connection or a batch");
            return;
        }
        if ENDED.load(Ordering::Relaxed) && !panic.location().is_some_and(is_ours) {
            tracing::error!(
                message,
                place,
                "a panic in a library, at the end of the process; it changes nothing"
            );
            telemetry::flush();
            return;
        }
        tracing::error!(message, place, "a panic ends the daemon");
        telemetry::say(&format!("ended by a panic at {place}: {message}"));
        // A thread writes the log, and `exit` does not wait for it.
        telemetry::flush();
        std::process::exit(1);
    }));
}

/// Notes that the daemon has ended, so that its exit code is final. From now on a panic in another
/// crate is logged but does not change the exit code.
///
/// The end of the runtime drops all tasks in no particular order. A task of the MongoDB driver
/// panics if a task that it relies on was dropped first. Tasks of the driver remain if it could not
/// be shut down in time.
pub fn note_daemon_ended() {
    ENDED.store(true, Ordering::Relaxed);
}

/// Returns true if the location is in the source of this crate.
fn is_ours(location: &Location<'_>) -> bool {
    // `file!()` is `<crate>/src/panics.rs`.
    let ours = Path::new(file!()).ancestors().nth(2);
    ours.is_some_and(|ours| Path::new(location.file()).starts_with(ours))
}

fn message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
}

/// Returns how many panics were contained in this process.
pub(crate) fn caught() -> u64 {
    CAUGHT.load(Ordering::Relaxed)
}

/// The error of work that panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Panicked;

pin_project! {
    /// A future that completes with [`Panicked`] if its work panics.
    #[derive(Debug)]
    pub(crate) struct Contained<F> {
        #[pin]
        work: F,
    }
}

/// Contains the panic of a future.
pub(crate) fn contain<F>(work: F) -> Contained<F> {
    Contained { work }
}

/// Runs `work` on this thread and contains its panic.
pub(crate) fn contained<T>(work: impl FnOnce() -> T) -> Result<T, Panicked> {
    let before = CONTAINED.replace(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    // Restored rather than cleared, because contained work may contain further work.
    CONTAINED.set(before);
    done.map_err(|_| {
        CAUGHT.fetch_add(1, Ordering::Relaxed);
        Panicked
    })
}

impl<F: Future> Future for Contained<F> {
    type Output = Result<F::Output, Panicked>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let work = self.project().work;
        // Unwind safe, because the future is not polled again after a panic.
        match contained(|| work.poll(context)) {
            Ok(polled) => polled.map(Ok),
            Err(panicked) => Poll::Ready(Err(panicked)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_contained_panic_is_an_error_and_is_counted() {
        let before = caught();
        assert_eq!(contain(async { 1 }).await, Ok(1));
        let work = async {
            tokio::task::yield_now().await;
            assert!(CONTAINED.get());
            panic!("in a test");
        };
        assert_eq!(contain(work).await, Err::<(), _>(Panicked));
        assert!(!CONTAINED.get(), "later work on this thread is not contained");
        assert!(caught() > before);
        assert_eq!(contained(|| -> () { panic!("in a test") }), Err(Panicked));
        assert!(!CONTAINED.get());
    }
}
