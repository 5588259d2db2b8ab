//! The command line. Parses it, and does nothing else.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::time::Duration;

use clap::builder::{BoolishValueParser, Resettable, StringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Args as Group, Command as Clap, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use leased_client::{Client, DEFAULT_ENDPOINT, LeaseId};

use crate::failure::Failure;

/// Exit codes, as `--help` shows them.
const CODES: &str = "Exit codes: 0 done; 1 failed; 2 wrong usage; 69 no daemon can be reached; 71 the system lacks \
                     something; 73 the lease is lost; 75 another holds the key. `run` otherwise ends with the code of its \
                     command: 128+N if signal N ended it, 126 if it cannot be run, 127 if it is not found.";

/// The heading of the options that every command takes.
const COMMON: &str = "Common options";

/// leasectl acquires, shows and revokes leases. A lease is the right to act on a key until its time
/// runs out, and lasts longer each time its holder touches it.
#[derive(Debug, Parser)]
#[command(name = "leasectl", version, max_term_width = 110, after_help = CODES, args_override_self = true)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) connection: Connection,

    /// The format of answers: for people, or for scripts.
    #[arg(short, long, global = true, help_heading = COMMON, env = "LEASED_OUTPUT", value_name = "FORMAT", default_value = "table")]
    pub(crate) output: Format,

    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Args {
    /// Reads the command line, and environment variables for options that it does not name.
    pub(crate) fn read() -> Result<Self, clap::Error> {
        let mut command = without_empty_variables(Self::command());
        if let Some(number) = lone_limit(std::env::args_os().skip(1)) {
            let sentence = format!(
                "is {number} the limit or the key? Write --shared={number} KEY for the limit, or the key before --shared"
            );
            return Err(command.error(ErrorKind::ValueValidation, sentence));
        }
        Self::from_arg_matches(&command.try_get_matches()?)
    }
}

/// Returns a number that follows `--shared` and a blank. clap would read it as the key, because a
/// limit follows `=`.
fn lone_limit(words: impl Iterator<Item = OsString>) -> Option<String> {
    let mut words = words.take_while(|word| word != "--").skip_while(|word| word != "--shared").skip(1);
    words.next()?.into_string().ok().filter(|word| word.parse::<u32>().is_ok())
}

/// Has clap ignore variables that are set and empty, as compose files and unit files often leave
/// them.
fn without_empty_variables(command: Clap) -> Clap {
    let is_empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    command
        .mut_args(|arg| match arg.get_env().is_some_and(is_empty) {
            true => arg.env(Resettable::Reset),
            false => arg,
        })
        .mut_subcommands(without_empty_variables)
}

/// The format of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned text, for people.
    Table,
    /// JSON, for scripts.
    Json,
}

/// Which daemons to use.
#[derive(Debug, Group)]
pub(crate) struct Connection {
    /// Where a daemon serves gRPC. Repeat it for more daemons over the same store: leasectl uses
    /// any of them. In the environment, separate URLs by commas.
    #[arg(short, long, global = true, help_heading = COMMON, env = "LEASED_ENDPOINT", value_name = "URL", default_value = DEFAULT_ENDPOINT)]
    #[arg(value_delimiter = ',')]
    pub(crate) endpoint: Vec<String>,

    /// How long a call may take with all its repetitions, beyond the time that it waits in a queue;
    /// more than 0. If no daemon answers, leasectl takes up to a second more to find out what is
    /// there instead.
    #[arg(long, global = true, help_heading = COMMON, env = "LEASED_TIMEOUT", value_name = "DURATION", default_value = "5s", value_parser = parse_timeout)]
    pub(crate) timeout: Duration,
}

impl Connection {
    /// The URLs, without the blanks around commas.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &str> {
        self.endpoint.iter().map(|url| url.trim()).filter(|url| !url.is_empty())
    }

    /// Returns a client, which connects with its first call.
    pub(crate) fn client(&self) -> Result<Client, Failure> {
        let mut builder = Client::builder().timeout(self.timeout);
        for url in self.endpoints() {
            builder = builder.endpoint(url)?;
        }
        Ok(builder.connect_lazily()?)
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Wait for a lease, and run a command while it is held.
    ///
    /// The command runs in a process group of its own and sees LEASED_KEY and LEASED_TOKEN. Signals
    /// are passed on to it. When no daemon has confirmed the lease for too long, the group gets
    /// SIGTERM, and then SIGKILL before another holder can take the key. When the lease is lost,
    /// the group gets SIGKILL at once. In both cases the exit code is 73.
    #[command(after_help = CODES)]
    Run {
        #[command(flatten)]
        args: AcquireArgs,

        /// The command and its arguments.
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Acquire a lease and print its id and token; touch and release it with the commands of those
    /// names.
    ///
    /// Nothing keeps the lease alive: it lapses at the end of its TTL unless it is touched. The id
    /// is a secret.
    Acquire {
        #[command(flatten)]
        args: AcquireArgs,
    },
    /// Touch a lease: it lasts a whole TTL from now.
    Touch(LeaseArgs),
    /// Release a lease: the next waiter holds the key.
    Release(LeaseArgs),
    /// Show the holders of a key, how long their leases last, and the waiters.
    Get {
        /// The key.
        key: String,
    },
    /// List the keys that are held or blocked, or that have waiters.
    Ls {
        /// Only keys that begin with this.
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,

        /// Also list keys that nobody holds and the daemon has not forgotten.
        #[arg(short, long, env = "LEASED_ALL", value_parser = BoolishValueParser::new())]
        all: bool,
    },
    /// Print a line for each key, and then a line per change, until interrupted.
    Watch {
        /// Only keys that begin with this.
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
    },
    /// Revoke leases, and end the block of a --min-hold.
    Revoke {
        /// The key.
        key: String,

        /// Revoke only the lease with this token, or end the block that the lease left, if it was
        /// the last one granted. Without this, revoke every holder's lease and end the block. Not
        /// read from the environment, where a command that runs under a lease finds its own token.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
        token: Option<i64>,

        /// The reason for the daemon's log; up to 1024 bytes.
        #[arg(long, env = "LEASED_REASON", value_name = "TEXT")]
        reason: String,
    },
    /// Print completions for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page of leasectl or of one of its commands, as roff.
    #[command(hide = true)]
    Man {
        /// The command.
        command: Option<String>,
    },
}

/// The lease to acquire.
#[derive(Debug, Group)]
pub(crate) struct AcquireArgs {
    /// The key: 1 to 512 bytes without control characters.
    pub(crate) key: String,

    /// How long the lease lasts without a touch; 100ms to 24h unless the daemon's limits differ.
    #[arg(long, env = "LEASED_TTL", value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub(crate) ttl: Duration,

    /// How long to wait in the queue at most, up to 1h unless the daemon's limit differs; 0 to try
    /// once, `forever` to wait as long as it takes.
    #[arg(long, env = "LEASED_WAIT", value_name = "DURATION", default_value = "1h", value_parser = parse_wait)]
    pub(crate) wait: Wait,

    /// A label for people, up to 256 bytes [default: USER@HOST:PID].
    #[arg(long, env = "LEASED_OWNER", value_name = "TEXT")]
    pub(crate) owner: Option<String>,

    /// Another label. Repeat it for more, up to 32. In the environment, write one label a line.
    #[arg(long, env = "LEASED_METADATA", value_name = "NAME=VALUE", value_parser = LabelParser)]
    pub(crate) metadata: Vec<Labels>,

    /// Hold the key together with other shared holders, no more than N in all for as long as this
    /// lease is held (--shared=3, with `=`). Without N, any number.
    #[arg(long, env = "LEASED_SHARED", value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub(crate) shared: Option<u32>,

    /// Keep the key taken for this long after the grant, even if the lease is released before; up
    /// to 24h.
    #[arg(long, env = "LEASED_MIN_HOLD", value_name = "DURATION", default_value = "0s", value_parser = parse_duration)]
    pub(crate) min_hold: Duration,
}

/// A lease that was acquired before.
#[derive(Debug, Group)]
pub(crate) struct LeaseArgs {
    /// The key.
    pub(crate) key: String,

    /// The lease id. It is a secret, and arguments are not: set it in the environment, or write `-`
    /// to have it read from standard input.
    #[arg(env = "LEASED_ID", hide_env_values = true)]
    id: String,
}

impl LeaseArgs {
    /// Returns the id, and reads it from standard input if it is `-`.
    pub(crate) fn id(&self) -> Result<LeaseId, Failure> {
        let mut text = self.id.clone();
        if text == "-" {
            text.clear();
            // Bounded, because an id has only 36 characters.
            std::io::stdin().take(1024).read_to_string(&mut text)?;
        }
        text.trim().parse().map_err(|error| Failure::Usage(format!("{error}")))
    }
}

/// Parses a duration of at most a year. No option needs more, and clocks overflow before the
/// largest number that can be written.
fn parse_duration(text: &str) -> Result<Duration, String> {
    const YEAR: Duration = Duration::from_secs(366 * 24 * 3600);
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= YEAR => Ok(duration),
        Ok(_) => Err("that is longer than a year".to_owned()),
        Err(error) => Err(format!("{error}; a duration looks like 30s, 1m30s or 250ms")),
    }
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    match parse_duration(text) {
        Ok(timeout) if timeout.is_zero() => {
            Err("it must be more than 0, or no daemon can answer in time".to_owned())
        }
        parsed => parsed,
    }
}

/// How long to wait in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    UpTo(Duration),
    Forever,
}

fn parse_wait(text: &str) -> Result<Wait, String> {
    match text {
        "forever" => Ok(Wait::Forever),
        text => parse_duration(text).map(Wait::UpTo),
    }
}

/// The labels of one argument, or of the whole environment variable.
pub(crate) type Labels = Vec<Label>;

/// A name and a value.
type Label = (String, String);

/// Parses an argument as one label, and the environment variable as one label a line.
#[derive(Debug, Clone)]
struct LabelParser;

impl TypedValueParser for LabelParser {
    type Value = Labels;

    fn parse_ref(
        &self,
        command: &Clap,
        argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<Labels, clap::Error> {
        parse_label.parse_ref(command, argument, value).map(|label| vec![label])
    }

    fn parse_ref_(
        &self,
        command: &Clap,
        argument: Option<&clap::Arg>,
        value: &OsStr,
        source: ValueSource,
    ) -> Result<Labels, clap::Error> {
        if source != ValueSource::EnvVariable {
            return self.parse_ref(command, argument, value);
        }
        let text = StringValueParser::new().parse_ref(command, argument, value)?;
        // A variable with several lines may be indented, and may begin and end with blank lines.
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        lines.map(|line| parse_label.parse_ref(command, argument, line.as_ref())).collect()
    }
}

fn parse_label(text: &str) -> Result<Label, String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("a label looks like NAME=VALUE".to_owned()),
    }
}
