//! Failures of leasectl. Each has an exit code, and a sentence that says what to do.

use std::io::{ErrorKind, Write, stderr};
use std::process::ExitCode;
use std::time::Duration;

use futures_util::future::join_all;
use leased_client::{Error, HeldBy, Loss};
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tonic::transport::Uri;

use crate::args::Format;
use crate::json::{ErrorObject, HolderObject, milliseconds};
use crate::output::{complain, json};
use crate::signals::{Target, die_of};

const FAILED: u8 = 1;
const USAGE: u8 = 2;
/// `EX_UNAVAILABLE` of sysexits.h.
const UNAVAILABLE: u8 = 69;
/// `EX_OSERR` of sysexits.h.
const SYSTEM: u8 = 71;
/// `EX_CANTCREAT` of sysexits.h: the lease is lost.
pub(crate) const LOST: u8 = 73;
/// `EX_TEMPFAIL` of sysexits.h: the key is not available.
const HELD: u8 = 75;
pub(crate) const NOT_EXECUTABLE: u8 = 126;
pub(crate) const NOT_FOUND: u8 = 127;

/// How long [`explain`] may take to find out what answers at an endpoint.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why leasectl fails.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A call failed or was refused.
    Client(Error),
    /// The command line makes no sense.
    Usage(String),
    /// An endpoint accepts connections, but no server answers there.
    Unreachable(String),
    /// A server answers that is not a leased daemon.
    NotLeased(String),
    /// The command's lease was lost.
    Lost(String),
    /// The command cannot be started. Holds the exit code.
    Command(u8, String),
    /// A signal came while there was no command to pass it on to.
    Signal(Signal),
    /// The reader of the output is gone.
    NobodyReads,
    /// The system lacks, or forbids, what leasectl needs.
    System(String),
    /// Any other failure.
    Other(String),
}

impl Failure {
    /// Writes the failure to standard error, as a sentence for people or an object for scripts, and
    /// returns the exit code.
    pub(crate) fn report(self, format: Format) -> ExitCode {
        let (code, reason, sentence) = match &self {
            Self::NobodyReads => return ExitCode::SUCCESS,
            Self::Signal(signal) => {
                die_of(*signal, Target::Myself);
                // Reached only by a process with the id 1, which the signal cannot end.
                return ExitCode::from(of_signal(signal.as_raw()));
            }
            Self::Usage(sentence) => (USAGE, "USAGE", sentence.clone()),
            Self::Unreachable(sentence) => (UNAVAILABLE, "UNAVAILABLE", sentence.clone()),
            Self::NotLeased(sentence) => (UNAVAILABLE, "NOT_LEASED", sentence.clone()),
            Self::Lost(sentence) => (LOST, "LEASE_LOST", sentence.clone()),
            Self::Command(code, sentence) => (*code, "COMMAND_NOT_STARTED", sentence.clone()),
            Self::System(sentence) => (SYSTEM, "SYSTEM", sentence.clone()),
            Self::Other(sentence) => (FAILED, "FAILED", sentence.clone()),
            Self::Client(error) => (code_of(error), reason_of(error), sentence_of(error)),
        };
        let refusal = match &self {
            Self::Client(Error::Held(by)) => Some(by),
            _ => None,
        };
        // A daemon of an earlier version leaves this empty.
        let blocked_by = refusal.map(|by| by.blocked_by.as_str()).filter(|name| !name.is_empty());
        let holder = refusal.map(|by| HolderObject {
            owner: &by.owner,
            token: by.token.get(),
            remaining_ms: milliseconds(by.remaining),
        });
        match format {
            Format::Table => complain(&sentence),
            Format::Json => {
                let error = ErrorObject { reason, message: &sentence, exit_code: code, blocked_by, holder };
                let line = json(&serde_json::json!({ "error": error })).unwrap_or(sentence);
                let _ = writeln!(stderr(), "{line}");
            }
        }
        ExitCode::from(code)
    }
}

/// Reports in one sentence what is wrong with the command line, or prints the help or version that
/// was asked for.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind::{DisplayHelp, DisplayVersion};
    if matches!(error.kind(), DisplayHelp | DisplayVersion) {
        // Fails if the reader is gone.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Failure::Usage("no command is given; see `leasectl --help`".to_owned()).report(Format::Table);
    }
    let typed = || std::env::args_os().skip(1);
    if error.kind() == clap::error::ErrorKind::UnknownArgument
        && typed().any(|word| word == "run")
        && !typed().any(|word| word == "--")
    {
        let sentence = "the command of `run` must follow `--`: leasectl run KEY -- CMD ARG...";
        return Failure::Usage(sentence.to_owned()).report(Format::Table);
    }
    let text = error.to_string();
    // The first paragraph says what is wrong. The others are tips and the usage.
    let said = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = said.strip_prefix("error: ").unwrap_or(said).split_whitespace().collect();
    Failure::Usage(format!("{}; see --help", words.join(" "))).report(Format::Table)
}

/// The exit code that shells use for a command that a signal has ended.
pub(crate) fn of_signal(number: i32) -> u8 {
    u8::try_from(128 + number).unwrap_or(u8::MAX)
}

fn code_of(error: &Error) -> u8 {
    match error {
        Error::Held(_) | Error::QueueFull => HELD,
        Error::Lost(_) | Error::Jeopardy { .. } | Error::EndedLate { .. } => LOST,
        Error::Invalid(_) => USAGE,
        Error::Unavailable { .. } | Error::NotLeased { .. } => UNAVAILABLE,
        _ => FAILED,
    }
}

/// The reason for scripts: the API's own reason if there is one.
fn reason_of(error: &Error) -> &'static str {
    match error {
        Error::Held(_) => "LEASE_HELD",
        Error::QueueFull => "QUEUE_FULL",
        Error::Lost(_) | Error::Jeopardy { .. } | Error::EndedLate { .. } => "LEASE_LOST",
        Error::KeyUnknown => "KEY_UNKNOWN",
        Error::LimitExceeded(_) => "LIMIT_EXCEEDED",
        Error::Invalid(_) => "INVALID_REQUEST",
        Error::Unavailable { .. } => "UNAVAILABLE",
        Error::NotLeased { .. } => "NOT_LEASED",
        Error::DifferentStores { .. } => "DIFFERENT_STORES",
        _ => "FAILED",
    }
}

fn sentence_of(error: &Error) -> String {
    match error {
        Error::Held(by) => held(by),
        Error::Lost(Loss::Gone) => "the lease is no longer held, or never was; acquire it again".to_owned(),
        Error::Lost(loss) => format!("the lease is lost ({loss}); acquire it again"),
        Error::KeyUnknown => {
            "this key was never leased, or has been free for so long that its record was deleted; \
                              `leasectl ls --all` lists all keys"
                .to_owned()
        }
        Error::Unavailable { endpoints, cause, .. } => {
            format!(
                "no daemon answers at {endpoints} ({cause}); start one, or name another with --endpoint or LEASED_ENDPOINT"
            )
        }
        Error::NotLeased { endpoint, cause, .. } => not_leased(endpoint, cause),
        error => error.to_string(),
    }
}

fn held(by: &HeldBy) -> String {
    let left = crate::table::duration(by.remaining);
    match (by.blocked_by.as_str(), by.owner.as_str()) {
        ("min_hold", _) => {
            format!(
                "the key is blocked for {left} more by the --min-hold of an earlier lease; wait longer with --wait"
            )
        }
        ("waiter", _) => {
            let who = match by.waiter.as_str() {
                "" => "another waiter".to_owned(),
                waiter => crate::table::plain(waiter),
            };
            format!("{who} came before and is waiting for the key; wait longer with --wait")
        }
        (_, "") => format!(
            "the key is held for {left} more, or longer if touched; wait longer with --wait, or see `leasectl get`"
        ),
        (_, owner) => {
            let owner = crate::table::plain(owner);
            format!(
                "the key is held by {owner} for {left} more, or longer if touched; wait longer with --wait, \
                 or see `leasectl get`"
            )
        }
    }
}

fn not_leased(endpoint: &str, why: &str) -> String {
    format!(
        "the server at {endpoint} is not a leased daemon: {why}; set --endpoint to the address that the daemon prints \
         as grpc= when it is ready"
    )
}

/// Turns the failure to reach any daemon into one that says what answers at the endpoints instead,
/// if anything does. Takes up to [`PROBE_TIMEOUT`].
pub(crate) async fn explain(error: Error, endpoints: impl Iterator<Item = &str>) -> Failure {
    if !matches!(error, Error::Unavailable { .. }) {
        return Failure::Client(error);
    }
    let found = join_all(endpoints.map(probe)).await;
    found.into_iter().flatten().next().unwrap_or(Failure::Client(error))
}

/// Connects to an endpoint, and returns what is wrong with the server there. `None` if nothing
/// accepts the connection, or the server speaks HTTP/2.
///
/// A server that speaks HTTP/2 begins with a SETTINGS frame (RFC 9113, section 3.4).
async fn probe(endpoint: &str) -> Option<Failure> {
    /// The client's preface: a magic string, and an empty SETTINGS frame.
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    /// The bytes of a frame's header.
    const HEADER: usize = 9;
    /// The type of a SETTINGS frame, the fourth byte of its header.
    const SETTINGS: u8 = 4;
    let uri: Uri = endpoint.parse().ok()?;
    let address = (uri.host()?.trim_matches(['[', ']']), uri.port_u16().unwrap_or(80));
    let until = Instant::now() + PROBE_TIMEOUT;
    let mut stream = timeout_at(until, TcpStream::connect(address)).await.ok()?.ok()?;
    // Fails if the server has closed the connection. What it sent before can still be read.
    let _ = stream.write_all(PREFACE).await;
    let mut header = Vec::with_capacity(HEADER);
    let read = async {
        // Stops early if the connection ends or breaks.
        while header.len() < HEADER && matches!(stream.read_buf(&mut header).await, Ok(1..)) {}
    };
    let is_open = timeout_at(until, read).await.is_err();
    match header.get(3) {
        Some(&SETTINGS) => None,
        None if header.is_empty() => Some(Failure::Unreachable(silent(endpoint, is_open))),
        _ => Some(Failure::NotLeased(not_leased(endpoint, "it does not speak gRPC"))),
    }
}

/// Describes a server that accepts a connection and sends nothing. `is_open` says whether the
/// server left the connection open.
fn silent(endpoint: &str, is_open: bool) -> String {
    match is_open {
        // The system accepts connections even for a process that is stopped.
        true => format!(
            "{endpoint} accepts connections but does not answer; the process there may be stopped or overloaded, or may \
             not be a leased daemon"
        ),
        false => format!(
            "connections to {endpoint} are closed before any answer, as by a daemon at its --max-connections or a proxy \
             that reaches no daemon; try again later, or see their logs"
        ),
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Client(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe => Self::NobodyReads,
            _ => Self::Other(error.to_string()),
        }
    }
}

impl From<rustix::io::Errno> for Failure {
    fn from(error: rustix::io::Errno) -> Self {
        std::io::Error::from(error).into()
    }
}
