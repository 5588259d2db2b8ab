//! Where log lines go and how they look.
//!
//! Lines are handed to a thread that writes them to standard error. A reader that stalls or goes away, a full disk or a
//! closed descriptor costs lines, which are counted, and never the daemon's time.

use std::io::{self, IsTerminal, Write, stderr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Lines that may wait to be written.
const WAITING_LINES: usize = 8192;
/// How long the last lines may take at the end of the process.
const FLUSH: Duration = Duration::from_secs(1);

static LOG: OnceLock<Log> = OnceLock::new();
/// Lines that could not be written.
static FAILED: AtomicU64 = AtomicU64::new(0);

struct Log {
    lines: NonBlocking,
    /// Told each time that an empty line was reached.
    reached: Mutex<Receiver<()>>,
    /// Its `drop` prints to standard output when lines are waiting, so it stays.
    _writer: WorkerGuard,
}

/// Standard error, where a failed write is counted and forgotten.
struct Stderr {
    reached: SyncSender<()>,
}

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn write_all(&mut self, line: &[u8]) -> io::Result<()> {
        if line.is_empty() {
            // When one is untaken already, whoever flushes is about to be told.
            let _ = self.reached.try_send(());
        } else if stderr().write_all(line).is_err() {
            FAILED.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends log lines to standard error. `format`: `None` for text on a terminal and JSON elsewhere.
///
/// # Errors
/// A sentence about `filter` if it cannot be read.
pub fn init(format: Option<LogFormat>, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("--log-level {filter:?}: {error}"))?;
    let default = if stderr().is_terminal() { LogFormat::Text } else { LogFormat::Json };
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .log_internal_errors(false)
        .with_writer(LOG.get_or_init(Log::start).lines.clone());
    match format.unwrap_or(default) {
        LogFormat::Text => lines.with_ansi(stderr().is_terminal()).init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
    Ok(())
}

impl Log {
    fn start() -> Self {
        let (sender, reached) = sync_channel(1);
        let (lines, writer) = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(WAITING_LINES)
            .thread_name("log")
            .finish(Stderr { reached: sender });
        Self { lines, reached: Mutex::new(reached), _writer: writer }
    }
}

/// Says a sentence to whoever started the daemon, behind all log lines.
pub fn say(sentence: &str) {
    let line = format!("leased: {sentence}\n");
    // A line that cannot be written has nowhere else to go.
    let _ = match LOG.get() {
        Some(log) => log.lines.clone().write_all(line.as_bytes()),
        None => stderr().write_all(line.as_bytes()),
    };
}

/// Waits until all lines so far are written, but not for long.
pub fn flush() {
    let Some(log) = LOG.get() else { return };
    let reached = log.reached.lock().unwrap_or_else(PoisonError::into_inner);
    let tries = 20;
    for _ in 0..tries {
        // Lost when too many lines are waiting, hence more than one.
        let _ = log.lines.clone().write_all(&[]);
        if reached.recv_timeout(FLUSH / tries).is_ok() {
            return;
        }
    }
}

/// Lines that were dropped: too many waited, or they could not be written.
pub(crate) fn lines_dropped() -> u64 {
    let dropped = LOG.get().map_or(0, |log| log.lines.error_counter().dropped_lines());
    u64::try_from(dropped).unwrap_or(u64::MAX).saturating_add(FAILED.load(Ordering::Relaxed))
}
