//! How leasectl ends other than well: a sentence that says what to do, and an exit code.

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
use crate::json::{Fault, Standing, milliseconds};
use crate::output::{complain, json};
use crate::signals::{Target, die_of};

const FAILED: u8 = 1;
const USAGE: u8 = 2;
/// As `EX_UNAVAILABLE` of sysexits.h.
const UNAVAILABLE: u8 = 69;
/// As `EX_OSERR`.
const SYSTEM: u8 = 71;
/// As `EX_CANTCREAT`; the lease is lost.
pub(crate) const LOST: u8 = 73;
/// As `EX_TEMPFAIL`; another holds the key.
const HELD: u8 = 75;
pub(crate) const NOT_EXECUTABLE: u8 = 126;
pub(crate) const NOT_FOUND: u8 = 127;

/// How long to find out what answers at an endpoint.
const LOOK: Duration = Duration::from_secs(1);

/// Why leasectl does not end well.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A call failed, or its answer was no.
    Client(Error),
    /// Something was asked that makes no sense.
    Usage(String),
    /// Nobody that could answer was found.
    Unreachable(String),
    /// Something else than a daemon was found.
    NotLeased(String),
    /// The command's lease was lost.
    Lost(String),
    /// The command cannot be started; with the exit code for it.
    Command(u8, String),
    /// A signal came before there was a command to pass it on to.
    Signal(Signal),
    /// Whoever read the output has gone.
    NobodyReads,
    /// The system lacks, or forbids, what leasectl needs.
    System(String),
    /// Something else failed.
    Other(String),
}

impl Failure {
    /// Says what is wrong: a sentence for people, an object for scripts.
    pub(crate) fn report(self, format: Format) -> ExitCode {
        let (code, reason, sentence) = match &self {
            Self::NobodyReads => return ExitCode::SUCCESS,
            Self::Signal(signal) => {
                die_of(*signal, Target::Myself);
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
        // An older daemon does not say.
        let blocked_by = refusal.map(|by| by.blocked_by.as_str()).filter(|name| !name.is_empty());
        let holder = refusal.map(|by| Standing {
            owner: &by.owner,
            token: by.token.get(),
            remaining_ms: milliseconds(by.remaining),
        });
        match format {
            Format::Table => complain(&sentence),
            Format::Json => {
                let fault = Fault { reason, message: &sentence, exit_code: code, blocked_by, holder };
                let line = json(&serde_json::json!({ "error": fault })).unwrap_or(sentence);
                let _ = writeln!(stderr(), "{line}");
            }
        }
        ExitCode::from(code)
    }
}

/// What is wrong with what was typed, in a sentence; or the help that was asked for.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind::{DisplayHelp, DisplayVersion};
    if matches!(error.kind(), DisplayHelp | DisplayVersion) {
        // Whoever reads it may have gone.
        drop(error.print());
        return ExitCode::SUCCESS;
    }
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Failure::Usage("there is nothing to do; see `leasectl --help`".to_owned())
            .report(Format::Table);
    }
    let typed = || std::env::args_os().skip(1);
    if error.kind() == clap::error::ErrorKind::UnknownArgument
        && typed().any(|word| word == "run")
        && !typed().any(|word| word == "--")
    {
        let sentence = "the command of `run` stands after `--`: leasectl run KEY -- CMD ARG...";
        return Failure::Usage(sentence.to_owned()).report(Format::Table);
    }
    let text = error.to_string();
    // The first paragraph says it; the others repeat the usage.
    let said = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = said.strip_prefix("error: ").unwrap_or(said).split_whitespace().collect();
    Failure::Usage(format!("{}; see --help", words.join(" "))).report(Format::Table)
}

/// The exit code that shells give to what a signal has ended.
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

/// The reason for scripts: the API's own where there is one.
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
        Error::Lost(Loss::Gone) => {
            "the lease is not held any more, or never was; acquire it again".to_owned()
        }
        Error::Lost(loss) => format!("the lease is lost ({loss}); acquire it again"),
        Error::KeyUnknown => "this key was never leased, or has been free for so long that it is forgotten; \
                              `leasectl ls --all` shows the keys there are"
            .to_owned(),
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
        ("min_hold", _) => format!("the key is blocked for {left} yet (--min-hold); wait longer with --wait"),
        ("waiter", _) => {
            let who =
                if by.waiter.is_empty() { "another".to_owned() } else { crate::table::plain(&by.waiter) };
            format!("{who} came before, and waits for the key; wait as well with --wait")
        }
        (_, "") => format!(
            "the key is held, for {left} yet unless touched; wait longer with --wait, or see `leasectl get`"
        ),
        (_, owner) => {
            let owner = crate::table::plain(owner);
            format!(
                "the key is held by {owner}, for {left} yet unless touched; wait longer with --wait, or see `leasectl get`"
            )
        }
    }
}

fn not_leased(endpoint: &str, why: &str) -> String {
    format!(
        "what answers at {endpoint} is not leased: {why}; see --endpoint, and the port that the daemon's ready line names as grpc="
    )
}

/// Finds out more about daemons that do not answer: whether something else does. Takes up to [`LOOK`].
pub(crate) async fn explain(error: Error, endpoints: impl Iterator<Item = &str>) -> Failure {
    if !matches!(error, Error::Unavailable { .. }) {
        return Failure::Client(error);
    }
    let found = join_all(endpoints.map(stranger)).await;
    found.into_iter().flatten().next().unwrap_or(Failure::Client(error))
}

/// What is wrong with the server at the endpoint, if there is one.
///
/// Whoever speaks HTTP/2 begins with a SETTINGS frame (RFC 9113, section 3.4).
async fn stranger(endpoint: &str) -> Option<Failure> {
    const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    const HEAD: usize = 9;
    const SETTINGS: u8 = 4;
    let uri: Uri = endpoint.parse().ok()?;
    let address = (uri.host()?.trim_matches(['[', ']']), uri.port_u16().unwrap_or(80));
    let until = Instant::now() + LOOK;
    let mut stream = timeout_at(until, TcpStream::connect(address)).await.ok()?.ok()?;
    // Fails where the connection is closed at once, as reading will.
    let _ = stream.write_all(HELLO).await;
    let mut head = Vec::with_capacity(HEAD);
    let read = async {
        // Ends early with the end of the stream, or of the connection.
        while head.len() < HEAD && matches!(stream.read_buf(&mut head).await, Ok(1..)) {}
    };
    let is_open = timeout_at(until, read).await.is_err();
    match head.get(3) {
        Some(&SETTINGS) => None,
        None if head.is_empty() => Some(Failure::Unreachable(unheard(endpoint, is_open))),
        _ => Some(Failure::NotLeased(not_leased(endpoint, "it does not speak gRPC"))),
    }
}

/// What a server may be that accepts a connection and says nothing.
fn unheard(endpoint: &str, is_open: bool) -> String {
    match is_open {
        // The system accepts connections for a process that is stopped.
        true => format!(
            "the process at {endpoint} does not answer, though connections to it are accepted; it may be stopped or \
             overloaded, or not be leased"
        ),
        false => format!(
            "connections to {endpoint} are closed before any answer; a daemon does that when it has as many as it may \
             (--max-connections), and a proxy when it finds no daemon: try again later, or see their logs"
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
