//! Writes answers to standard output, in the format that was asked for.

use std::io::{BufWriter, Stdout, Write, stderr, stdout};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use tokio::time::sleep;

use crate::args::Format;
use crate::failure::Failure;
use crate::table::{is_deceptive, plain};

/// Standard output.
pub(crate) struct Output {
    format: Format,
    stdout: BufWriter<Stdout>,
}

impl Output {
    pub(crate) fn new(format: Format) -> Self {
        Self { format, stdout: BufWriter::new(stdout()) }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Writes a whole answer: `value` for scripts or `text` for people.
    pub(crate) fn answer(
        &mut self,
        value: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Json => self.line(&json(value)?),
            Format::Table => self.line(&text()),
        }
    }

    /// Writes a line, and flushes it.
    pub(crate) fn line(&mut self, line: &str) -> Result<(), Failure> {
        writeln!(self.stdout, "{line}")?;
        Ok(self.stdout.flush()?)
    }

    /// Waits until standard output has no reader: the other end of a pipe or a socket is closed, or
    /// the terminal is gone.
    pub(crate) async fn unread(&self) {
        const POLL_INTERVAL: Duration = Duration::from_secs(1);
        let gone = PollFlags::ERR | PollFlags::HUP;
        loop {
            // `poll` reports these two flags without being asked for them.
            let mut stdout = [PollFd::new(self.stdout.get_ref(), PollFlags::empty())];
            let polled = poll(&mut stdout, Some(&Timespec::default()));
            if polled.is_ok() && stdout[0].revents().intersects(gone) {
                return;
            }
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Writes a part of an answer, which [`line`](Self::line) ends.
    pub(crate) fn part(&mut self, part: &str) -> Result<(), Failure> {
        Ok(self.stdout.write_all(part.as_bytes())?)
    }
}

/// Writes a sentence for people to standard error. A failure to write is ignored, because it is no
/// reason to stop.
///
/// Sentences quote the command line and the answers of servers, so control characters are escaped.
pub(crate) fn complain(sentence: &str) {
    let _ = writeln!(stderr(), "leasectl: {}", plain(sentence));
}

/// Formats a value as JSON on one line, with control characters escaped.
pub(crate) fn json(value: &impl Serialize) -> Result<String, Failure> {
    let raw = serde_json::to_string(value).map_err(|error| Failure::Other(error.to_string()))?;
    let mut line = String::with_capacity(raw.len());
    // Characters that JSON leaves unescaped occur only within strings, where `\u` is allowed.
    for character in raw.chars() {
        if is_deceptive(character) {
            line += &format!("\\u{:04x}", u32::from(character));
        } else {
            line.push(character);
        }
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_cannot_steer_a_terminal_and_says_the_same() {
        let label = "a\u{1b}[2J\u{7f}\u{9b}31m\u{61c}\u{2028}\u{202e}b\u{2066}é漢\"\\n";
        let line = json(&label).ok();
        assert_eq!(line.as_deref(), Some(r#""a\u001b[2J\u007f\u009b31m\u061c\u2028\u202eb\u2066é漢\"\\n""#));
        let said = line.and_then(|line| serde_json::from_str::<String>(&line).ok());
        assert_eq!(said.as_deref(), Some(label));
    }
}
