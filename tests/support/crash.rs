//! Daemons that crash: each in a runtime of its own, which ends without a farewell and with all that runs in it.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use leased::config::Config;
use tokio::runtime::Runtime;

use super::{Daemon, Leases};

/// A daemon over MongoDB that can be killed.
pub(crate) struct Doomed {
    runtime: Option<Runtime>,
    daemon: Daemon,
}

impl Doomed {
    /// Starts; blocks the thread, so not one of a runtime's own.
    fn start_blocking(config: Config) -> Self {
        let runtime = Runtime::new().unwrap();
        let daemon = runtime.block_on(Daemon::with(config, None));
        Self { runtime: Some(runtime), daemon }
    }

    /// Another daemon over the database of `daemon`.
    pub(crate) async fn beside(daemon: &Daemon) -> Self {
        let config = daemon.config.clone();
        tokio::task::spawn_blocking(|| Self::start_blocking(config)).await.unwrap()
    }

    /// A client, which lives on in the caller's runtime.
    pub(crate) async fn client(&self) -> Leases {
        self.daemon.own_client().await
    }

    /// Ends everything at once: no drain, no answer, no word to the database.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        self.end();
    }
}

/// A daemon that is killed and started again, over and over, until this is dropped.
pub(crate) struct Restless {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Restless {
    pub(crate) fn beside(daemon: &Daemon) -> Self {
        let (stop, stopped) = channel();
        let config = daemon.config.clone();
        let thread = thread::spawn(move || live_and_die(&config, &stopped));
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

fn live_and_die(config: &Config, stopped: &Receiver<()>) {
    loop {
        let daemon = Doomed::start_blocking(config.clone());
        let life = Duration::from_millis(fastrand::u64(50..500));
        let is_over = stopped.recv_timeout(life) == Err(RecvTimeoutError::Disconnected);
        daemon.kill();
        if is_over {
            return;
        }
    }
}

impl Drop for Restless {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
