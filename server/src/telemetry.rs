//! Where log lines go and how they look.
//!
//! Lines are handed to a thread that writes them to standard error. A reader that stalls or goes away, a full disk or a
//! closed descriptor costs lines, which are counted, and never the daemon's time. An event is one line, which nothing that
//! it quotes can end, hide or reorder.

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
    let has_colours = stderr().is_terminal();
    let format = format.unwrap_or(if has_colours { LogFormat::Text } else { LogFormat::Json });
    let lines = LOG.get_or_init(Log::start).lines.clone();
    let events = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .log_internal_errors(false)
        .with_writer(move || Events { lines: lines.clone(), format, has_colours });
    match format {
        LogFormat::Text => events.with_ansi(has_colours).init(),
        LogFormat::Json => events.json().flatten_event(true).init(),
    }
    Ok(())
}

/// Takes events, one with each `write_all`, and hands them on as lines.
struct Events {
    lines: NonBlocking,
    format: LogFormat,
    has_colours: bool,
}

impl Write for Events {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.write_all(event)?;
        Ok(event.len())
    }

    fn write_all(&mut self, event: &[u8]) -> io::Result<()> {
        let event = String::from_utf8_lossy(event);
        self.lines.write_all(line(&event, self.format, self.has_colours).as_bytes())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.lines.flush()
    }
}

/// An event as a line, in which what deceives is escaped as its format has it.
///
/// Not left to the formats: JSON strings may have all but the first 32 characters as they are, and text has whatever is
/// logged as it displays itself, such as what a database says of an error.
fn line(event: &str, format: LogFormat, has_colours: bool) -> String {
    let event = event.strip_suffix('\n').unwrap_or(event);
    let mut line = String::with_capacity(event.len() + 1);
    for (position, char) in event.char_indices() {
        let is_fine = !is_deceptive(char) || (has_colours && is_colour(&event[position..]));
        match format {
            _ if is_fine => line.push(char),
            LogFormat::Text => line.extend(char.escape_default()),
            LogFormat::Json => line += &format!("\\u{:04x}", u32::from(char)),
        }
    }
    line.push('\n');
    line
}

/// Whether a character makes a line look like something else: control characters, separators of lines and paragraphs, and
/// the controls of Unicode's bidirectional algorithm (UAX #9, 2).
fn is_deceptive(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Whether a text begins with a change of the colour, as those of tracing do.
fn is_colour(text: &str) -> bool {
    let is_parameter = |char: char| char.is_ascii_digit() || char == ';';
    let parameters = text.strip_prefix("\u{1b}[");
    parameters.is_some_and(|parameters| parameters.trim_start_matches(is_parameter).starts_with('m'))
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
    let line = line(&format!("leased: {sentence}"), LogFormat::Text, false);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_end_hide_or_reorder_a_line_is_escaped() {
        let deceptive = "a\nb\r\u{1b}[2K\u{9b}\u{2028}\u{202e}\u{2066}\u{200f}é\n";
        assert_eq!(
            line(deceptive, LogFormat::Text, false),
            "a\\nb\\r\\u{1b}[2K\\u{9b}\\u{2028}\\u{202e}\\u{2066}\\u{200f}é\n"
        );
        assert_eq!(
            line(deceptive, LogFormat::Json, false),
            "a\\u000ab\\u000d\\u001b[2K\\u009b\\u2028\\u202e\\u2066\\u200fé\n"
        );
        // Of what terminals are told, only colours pass.
        let coloured = "\u{1b}[1;32m INFO\u{1b}[0m \u{1b}[2K\u{1b}";
        assert_eq!(line(coloured, LogFormat::Text, true), "\u{1b}[1;32m INFO\u{1b}[0m \\u{1b}[2K\\u{1b}\n");
        assert_eq!(line("plain", LogFormat::Json, false), "plain\n");
    }
}
