//! Daemons that crash. Each has its own tokio runtime. Shutting that runtime down ends all tasks of
//! the daemon at once: nothing is drained, answered or written.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use leased::config::Config;
use tokio::runtime::Runtime;

use super::{Daemon, Leases};

/// A daemon over MongoDB that can be made to crash.
pub(crate) struct CrashingDaemon {
    runtime: Option<Runtime>,
    daemon: Daemon,
}

impl CrashingDaemon {
    /// Starts a daemon. Blocks the calling thread, which must not be a worker thread of a runtime.
    fn start_blocking(config: Config) -> Self {
        let runtime = Runtime::new().unwrap();
        let daemon = runtime.block_on(Daemon::with(config, None));
        Self { runtime: Some(runtime), daemon }
    }

    /// Starts another daemon over the database of `daemon`.
    pub(crate) async fn beside(daemon: &Daemon) -> Self {
        let config = daemon.config.clone();
        tokio::task::spawn_blocking(|| Self::start_blocking(config)).await.unwrap()
    }

    /// Returns a client of this daemon. The client belongs to the caller's runtime and outlives a
    /// crash.
    pub(crate) async fn client(&self) -> Leases {
        self.daemon.own_client().await
    }

    /// Ends the daemon at once. It drains nothing, answers no call, and writes nothing more to the
    /// database.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for CrashingDaemon {
    fn drop(&mut self) {
        self.end();
    }
}

/// A daemon that crashes and starts again, over and over, until this value is dropped.
pub(crate) struct FlakyPeer {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FlakyPeer {
    /// Starts the crashing daemon over the database of `daemon`.
    pub(crate) fn beside(daemon: &Daemon) -> Self {
        let (stop, stopped) = channel();
        let config = daemon.config.clone();
        let thread = thread::spawn(move || start_and_crash(&config, &stopped));
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

fn start_and_crash(config: &Config, stopped: &Receiver<()>) {
    loop {
        let daemon = CrashingDaemon::start_blocking(config.clone());
        let life = Duration::from_millis(fastrand::u64(50..500));
        let is_over = stopped.recv_timeout(life) == Err(RecvTimeoutError::Disconnected);
        daemon.kill();
        if is_over {
            return;
        }
    }
}

impl Drop for FlakyPeer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
