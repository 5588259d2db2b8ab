//! Log lines: their format, and the thread that writes them to standard error.
//!
//! Logging never blocks the daemon. If the reader of standard error stalls or goes away, the disk
//! is full or the descriptor is closed, lines are dropped and counted.
//!
//! An event is exactly one line. No text that the event quotes can end, hide or reorder the line.

use std::io::{self, IsTerminal, Write, stderr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// How many lines may wait to be written.
const WAITING_LINES: usize = 8192;
/// How long the last lines may take at the end of the process.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

static LOG: OnceLock<Log> = OnceLock::new();
/// How many lines could not be written.
static FAILED: AtomicU64 = AtomicU64::new(0);

struct Log {
    lines: NonBlocking,
    /// Receives a message when the writer has reached an empty line. See [`flush`].
    reached: Mutex<Receiver<()>>,
    /// Never dropped, because its `drop` prints to standard output when lines are waiting.
    _writer: WorkerGuard,
}

/// Whether escape sequences that set a colour stay in a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Colours {
    /// They stay, for a terminal.
    Kept,
    /// They are escaped, like all other escape sequences.
    Escaped,
}

/// Writes lines to standard error. Counts a failed write and reports success.
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
            // A full channel already has a message, and one is enough.
            let _ = self.reached.try_send(());
        } else if stderr().write_all(line).is_err() {
            FAILED.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        // Standard error has no buffer.
        Ok(())
    }
}

/// Sends log lines to standard error. Without `format`: text on a terminal, else JSON.
///
/// # Errors
/// A sentence that says what is wrong with `filter`.
pub fn init(format: Option<LogFormat>, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("--log-level {filter:?}: {error}"))?;
    let is_terminal = stderr().is_terminal();
    let colours = if is_terminal { Colours::Kept } else { Colours::Escaped };
    let format = format.unwrap_or(if is_terminal { LogFormat::Text } else { LogFormat::Json });
    let lines = LOG.get_or_init(Log::start).lines.clone();
    let events = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Internal errors would be printed with `eprintln!`, which blocks and can panic.
        .log_internal_errors(false)
        .with_writer(move || Events { lines: lines.clone(), format, colours });
    match format {
        LogFormat::Text => events.with_ansi(is_terminal).init(),
        LogFormat::Json => events.json().flatten_event(true).init(),
    }
    Ok(())
}

/// Receives one event with each `write_all`, and hands it to the writer as a line.
struct Events {
    lines: NonBlocking,
    format: LogFormat,
    colours: Colours,
}

impl Write for Events {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.write_all(event)?;
        Ok(event.len())
    }

    fn write_all(&mut self, event: &[u8]) -> io::Result<()> {
        let event = String::from_utf8_lossy(event);
        self.lines.write_all(line(&event, self.format, self.colours).as_bytes())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.lines.flush()
    }
}

/// Returns an event as a line, with deceptive characters escaped in the format's own syntax.
///
/// The formats do not do this themselves. JSON escapes only the first 32 characters of Unicode.
/// Text has no escapes for values that are logged with `Display`, such as a database's description
/// of an error.
fn line(event: &str, format: LogFormat, colours: Colours) -> String {
    let event = event.strip_suffix('\n').unwrap_or(event);
    let mut line = String::with_capacity(event.len() + 1);
    for (position, char) in event.char_indices() {
        let is_harmless = !is_deceptive(char) || (colours == Colours::Kept && is_colour(&event[position..]));
        match format {
            _ if is_harmless => line.push(char),
            LogFormat::Text => line.extend(char.escape_default()),
            LogFormat::Json => line += &format!("\\u{:04x}", u32::from(char)),
        }
    }
    line.push('\n');
    line
}

/// Returns true for characters that can make a line look like something else: control characters,
/// separators of lines and paragraphs, and the controls of Unicode's bidirectional algorithm (UAX
/// #9, 2).
fn is_deceptive(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Returns true if a text begins with an escape sequence that sets the colour, in the form that
/// tracing writes.
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

/// Writes a sentence to standard error, after all log lines so far, in plain text whatever the log
/// format.
pub fn say(sentence: &str) {
    let line = line(&format!("leased: {sentence}"), LogFormat::Text, Colours::Escaped);
    // Ignored, because there is nowhere to report an error of the log.
    let _ = match LOG.get() {
        Some(log) => log.lines.clone().write_all(line.as_bytes()),
        None => stderr().write_all(line.as_bytes()),
    };
}

/// Waits until all lines so far are written, for at most a second.
pub fn flush() {
    let Some(log) = LOG.get() else { return };
    let reached = log.reached.lock().unwrap_or_else(PoisonError::into_inner);
    // An empty line marks the end of the lines so far. The mark is lost when too many lines are
    // waiting, so it is sent more than once.
    let tries = 20;
    for _ in 0..tries {
        let _ = log.lines.clone().write_all(&[]);
        if reached.recv_timeout(FLUSH_TIMEOUT / tries).is_ok() {
            return;
        }
    }
}

/// Returns how many lines were dropped, because too many were waiting or because they could not be
/// written.
pub(crate) fn lines_dropped() -> u64 {
    let dropped = LOG.get().map_or(0, |log| log.lines.error_counter().dropped_lines());
    u64::try_from(dropped).unwrap_or(u64::MAX).saturating_add(FAILED.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_could_end_hide_or_reorder_a_line_are_escaped() {
        let deceptive = "a\nb\r\u{1b}[2K\u{9b}\u{2028}\u{202e}\u{2066}\u{200f}é\n";
        assert_eq!(
            line(deceptive, LogFormat::Text, Colours::Escaped),
            "a\\nb\\r\\u{1b}[2K\\u{9b}\\u{2028}\\u{202e}\\u{2066}\\u{200f}é\n"
        );
        assert_eq!(
            line(deceptive, LogFormat::Json, Colours::Escaped),
            "a\\u000ab\\u000d\\u001b[2K\\u009b\\u2028\\u202e\\u2066\\u200fé\n"
        );
        // Of all escape sequences only colours pass.
        let coloured = "\u{1b}[1;32m INFO\u{1b}[0m \u{1b}[2K\u{1b}";
        assert_eq!(
            line(coloured, LogFormat::Text, Colours::Kept),
            "\u{1b}[1;32m INFO\u{1b}[0m \\u{1b}[2K\\u{1b}\n"
        );
        assert_eq!(line("plain", LogFormat::Json, Colours::Escaped), "plain\n");
    }
}
