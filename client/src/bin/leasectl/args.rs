//! Parses the command line.

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
const CODES: &str = "Exit codes: 0 success; 1 any other failure; 2 usage error; 69 no leased daemon answers; 71 out of \
                     system resources, such as open files; 73 the lease is lost; 75 the key is held or blocked, or its \
                     queue is full. If none of these applies, `run` exits with the code of its command: 128+N if signal N \
                     ended the command, 126 if it cannot be run, 127 if it is not found.";

/// The heading of the options that every command takes.
const COMMON: &str = "Common options";

/// leasectl acquires, shows and revokes leases. A lease is the right to act on a key for a limited
/// time, its TTL. The holder touches the lease to renew it for another TTL.
#[derive(Debug, Parser)]
#[command(name = "leasectl", version, max_term_width = 110, after_help = CODES, args_override_self = true)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) connection: Connection,

    /// The format of the output: text for people, or JSON for scripts.
    #[arg(short, long, global = true, help_heading = COMMON, env = "LEASED_OUTPUT", value_name = "FORMAT", default_value = "table")]
    pub(crate) output: Format,

    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Args {
    /// Parses the command line. An option that it does not name may come from an environment
    /// variable.
    pub(crate) fn read() -> Result<Self, clap::Error> {
        let mut command = without_empty_variables(Self::command());
        if let Some(number) = lone_limit(std::env::args_os().skip(1)) {
            let sentence = format!(
                "`--shared {number}` is ambiguous: write --shared={number} KEY if {number} is the limit, or \
                 {number} --shared if it is the key"
            );
            return Err(command.error(ErrorKind::ValueValidation, sentence));
        }
        Self::from_arg_matches(&command.try_get_matches()?)
    }
}

/// Returns the number in `--shared NUMBER`. clap would read it as the key, because a limit must
/// follow `=`.
fn lone_limit(words: impl Iterator<Item = OsString>) -> Option<String> {
    let mut words = words.take_while(|word| word != "--").skip_while(|word| word != "--shared").skip(1);
    words.next()?.into_string().ok().filter(|word| word.parse::<u32>().is_ok())
}

/// Makes clap ignore environment variables that are set but empty. Compose files and unit files
/// often set empty ones.
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
    /// The URL at which a daemon serves gRPC. To name several daemons over the same store, repeat
    /// the option or separate URLs with commas. leasectl uses one that answers.
    #[arg(short, long, global = true, help_heading = COMMON, env = "LEASED_ENDPOINT", value_name = "URL", default_value = DEFAULT_ENDPOINT)]
    #[arg(value_delimiter = ',')]
    pub(crate) endpoint: Vec<String>,

    /// How long a call may take, including retries but not the wait in a queue; more than 0. If no
    /// daemon answers, leasectl takes up to 1s more to check what else answers at the endpoint.
    #[arg(long, global = true, help_heading = COMMON, env = "LEASED_TIMEOUT", value_name = "DURATION", default_value = "5s", value_parser = parse_timeout)]
    pub(crate) timeout: Duration,
}

impl Connection {
    /// The URLs, without blanks around commas.
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
    /// Wait for a lease, and run a command while the lease is held.
    ///
    /// The command runs in its own process group, with LEASED_KEY and LEASED_TOKEN (the fencing
    /// token) in its environment. leasectl passes signals on to the group, keeps the lease alive,
    /// and releases it when the command ends. If no daemon confirms the lease in time, the group
    /// gets SIGTERM, and then SIGKILL before another holder can take the key. If a daemon reports
    /// that the lease is lost, the group gets SIGKILL at once. In both cases the exit code is 73.
    #[command(after_help = CODES)]
    Run {
        #[command(flatten)]
        args: AcquireArgs,

        /// The command and its arguments.
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Acquire a lease, and print its id (for `touch` and `release`) and its fencing token.
    ///
    /// leasectl does not keep this lease alive: it lapses at the end of its TTL unless it is
    /// touched. The id is a secret: anyone who knows it can touch and release the lease.
    Acquire {
        #[command(flatten)]
        args: AcquireArgs,
    },
    /// Touch a lease, to renew it for a whole TTL from now.
    Touch(LeaseArgs),
    /// Release a lease before its TTL ends.
    Release(LeaseArgs),
    /// Show the holders of a key, how long their leases still last, and the waiters.
    Get {
        /// The key.
        key: String,
    },
    /// List the keys that have a holder or a waiter, or that a --min-hold blocks.
    Ls {
        /// List only the keys that begin with this.
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,

        /// Also list free keys, as long as the store keeps their records.
        #[arg(short, long, env = "LEASED_ALL", value_parser = BoolishValueParser::new())]
        all: bool,
    },
    /// Print a line for each key, and then a line for each change, until interrupted.
    Watch {
        /// Watch only the keys that begin with this.
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
    },
    /// Revoke the leases of a key, and end a block by --min-hold.
    Revoke {
        /// The key.
        key: String,

        /// Revoke only the lease with this fencing token. If that was the last lease granted and it
        /// has been released, end the block that its --min-hold left. Without this option, revoke
        /// the leases of all holders and end the block. No environment variable sets this option,
        /// because a command of `run` finds its own token in LEASED_TOKEN.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
        token: Option<i64>,

        /// The reason, which the daemon logs; up to 1024 bytes.
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

    /// How long to wait in the queue; up to 1h unless the daemon's limit differs. 0 tries once,
    /// `forever` waits as long as it takes.
    #[arg(long, env = "LEASED_WAIT", value_name = "DURATION", default_value = "1h", value_parser = parse_wait)]
    pub(crate) wait: Wait,

    /// Who asks for the lease: a label for people, up to 256 bytes [default: USER@HOST:PID].
    #[arg(long, env = "LEASED_OWNER", value_name = "TEXT")]
    pub(crate) owner: Option<String>,

    /// Another label; repeat the option for up to 32. The environment variable has one label per
    /// line.
    #[arg(long, env = "LEASED_METADATA", value_name = "NAME=VALUE", value_parser = LabelParser)]
    pub(crate) metadata: Vec<Labels>,

    /// Share the key with other shared leases. With N, as in --shared=3 (the `=` is required), the
    /// key has no more than N holders while this lease is held. Without N, any number.
    #[arg(long, env = "LEASED_SHARED", value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub(crate) shared: Option<u32>,

    /// Keep the key taken for at least this long after the grant, even if the lease is released
    /// earlier; up to 24h.
    #[arg(long, env = "LEASED_MIN_HOLD", value_name = "DURATION", default_value = "0s", value_parser = parse_duration)]
    pub(crate) min_hold: Duration,
}

/// A lease that was acquired before.
#[derive(Debug, Group)]
pub(crate) struct LeaseArgs {
    /// The key.
    pub(crate) key: String,

    /// The lease id. It is a secret, but the list of processes shows arguments. So set it in the
    /// environment, or write `-` to read it from standard input.
    #[arg(env = "LEASED_ID", hide_env_values = true)]
    id: String,
}

impl LeaseArgs {
    /// Returns the id. Reads it from standard input if the argument is `-`.
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

/// Parses a duration of at most a year. No option needs more, and the longest durations that can be
/// written would overflow a clock.
fn parse_duration(text: &str) -> Result<Duration, String> {
    const YEAR: Duration = Duration::from_secs(366 * 24 * 3600);
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= YEAR => Ok(duration),
        Ok(_) => Err("it is longer than a year".to_owned()),
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

/// Parses an argument as one label, and the environment variable as one label per line.
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
