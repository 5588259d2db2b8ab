//! Where answers go: standard output, in the form that was asked for.

use std::io::{BufWriter, Stdout, Write, stderr, stdout};

use rustix::fs::{OFlags, fcntl_getfl, fstat, stat};
use serde::Serialize;

use crate::args::Format;
use crate::failure::Failure;

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

    /// Writes one answer, whole: `value` for scripts or `text` for people.
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

    /// Writes a line, at once.
    pub(crate) fn line(&mut self, line: &str) -> Result<(), Failure> {
        writeln!(self.stdout, "{line}")?;
        Ok(self.stdout.flush()?)
    }

    /// Writes a part of an answer, which [`line`](Self::line) ends.
    pub(crate) fn part(&mut self, part: &str) -> Result<(), Failure> {
        Ok(self.stdout.write_all(part.as_bytes())?)
    }
}

/// Whether this process was started with standard output closed.
///
/// By now Rust's runtime has put `/dev/null` there, open for reading and writing. Shells open it for writing only, for those who
/// want no output.
pub(crate) fn is_nowhere() -> bool {
    let (there, null) = (fstat(stdout()), stat("/dev/null"));
    let is_null = matches!((there, null), (Ok(there), Ok(null)) if there.st_rdev == null.st_rdev);
    is_null && fcntl_getfl(stdout()).is_ok_and(|flags| flags.contains(OFlags::RDWR))
}

/// Says on standard error what a person should know. That nobody can read it is no reason to stop.
pub(crate) fn complain(sentence: &str) {
    let _ = writeln!(stderr(), "leasectl: {sentence}");
}

/// A value on one line.
pub(crate) fn json(value: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string(value).map_err(|error| Failure::Other(error.to_string()))
}
