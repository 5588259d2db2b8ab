//! Command-line options ([`Args`]), and the configuration made from them ([`Config`]). The
//! conversion checks that the options fit together.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{BoolishValueParser, NonEmptyStringValueParser, Resettable};
use clap::{ArgAction, Args as Group, Command, CommandFactory, FromArgMatches, Parser, ValueEnum};
use humantime::{format_duration, parse_duration};

use crate::engine::Bounds;
use crate::lease::{Rules, Ttl};
use crate::store::mongo::Location;

/// The longest TTL, `min_hold` and wait.
pub const DAY: Duration = Duration::from_secs(24 * 3600);
/// The shortest `--purge-after`. The record of a key must outlive every late command for the key,
/// because the record remembers which ids have ended.
const MIN_PURGE_AFTER: Duration = Duration::from_secs(3600);
/// How many bytes partly received messages may have, in the whole daemon.
const RECEIVING_BYTES: usize = 64 * 1024 * 1024;

/// leased grants leases over gRPC. A lease is the right to act on a key for a limited time, which
/// its holder extends by touching it.
#[derive(Debug, Parser)]
#[command(name = "leased", version, max_term_width = 110, args_override_self = true)]
pub struct Args {
    /// The address to serve gRPC on; port 0 picks a free port.
    #[arg(long, env = "LEASED_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:5327")]
    listen: SocketAddr,

    /// The address to serve /livez, /readyz and /metrics on, or `off`.
    #[arg(long, env = "LEASED_HTTP_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:5328", value_parser = http_listen)]
    http_listen: HttpListen,

    /// Allow addresses that other hosts can reach. The daemon serves them in plain text.
    #[arg(long, env = "LEASED_INSECURE", value_parser = BoolishValueParser::new())]
    insecure: bool,

    /// The folder for the leases on this host. The daemon creates it if it is missing. One daemon
    /// at a time can use it.
    #[arg(long, env = "LEASED_DATA_DIR", value_name = "DIR", default_value = "./leased-data")]
    data_dir: PathBuf,

    /// Keep the leases in this MongoDB (a replica set or a sharded cluster) instead of in a folder.
    /// Any number of daemons can use it. Options in the URI apply. Options that would make leases
    /// unsafe are refused.
    #[arg(long, env = "LEASED_MONGODB_URI", value_name = "URI", hide_env_values = true)]
    mongodb_uri: Option<Secret>,

    /// The database in MongoDB.
    #[arg(long, env = "LEASED_MONGODB_DATABASE", value_name = "NAME", default_value = "leased")]
    mongodb_database: String,

    /// The collection in the database.
    #[arg(long, env = "LEASED_MONGODB_COLLECTION", value_name = "NAME", default_value = "leases")]
    mongodb_collection: String,

    /// How long to try to reach MongoDB, or the disk, at start before the daemon gives up [default:
    /// for ever].
    #[arg(long, env = "LEASED_STORE_TIMEOUT", value_name = "DURATION", value_parser = parse_duration)]
    store_timeout: Option<Duration>,

    /// The TTL of a lease whose request has none.
    #[arg(long, env = "LEASED_DEFAULT_TTL", value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    default_ttl: Duration,

    /// The shortest TTL that a request may ask for.
    #[arg(long, env = "LEASED_MIN_TTL", value_name = "DURATION", default_value = "100ms", value_parser = parse_duration)]
    min_ttl: Duration,

    /// The longest TTL that a request may ask for.
    #[arg(long, env = "LEASED_MAX_TTL", value_name = "DURATION", default_value = "24h", value_parser = parse_duration)]
    max_ttl: Duration,

    /// How long a key cannot be granted to another holder after its lease has lapsed. Covers the
    /// difference between the clocks of MongoDB's nodes after a failover. All daemons of a
    /// database must have the same value [default: 1s on MongoDB, else 0s].
    #[arg(long, env = "LEASED_GRACE", value_name = "DURATION", value_parser = parse_duration)]
    grace: Option<Duration>,

    /// Purge keys that have been free, or whose leases have lapsed, for this long; at least 1h.
    #[arg(long, env = "LEASED_PURGE_AFTER", value_name = "DURATION", default_value = "7d", value_parser = parse_duration)]
    purge_after: Duration,

    /// Coalesce touches: answer a touch on a keepalive stream without a write if the last written
    /// touch is younger than a tenth of the TTL. The answer has the true remaining time. `false`
    /// writes every touch.
    #[arg(long, env = "LEASED_COALESCE_TOUCHES", value_name = "BOOL", default_value_t = true, action = ArgAction::Set, value_parser = BoolishValueParser::new())]
    coalesce_touches: bool,

    /// How long open calls may take to end after SIGTERM before they are cut.
    #[arg(long, env = "LEASED_DRAIN_TIMEOUT", value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    drain_timeout: Duration,

    /// The format of log lines [default: text on a terminal, else json].
    #[arg(long, env = "LEASED_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<LogFormat>,

    /// The level of log lines, or a filter such as `info,leased=debug`.
    #[arg(long, env = "LEASED_LOG_LEVEL", value_name = "FILTER", default_value = "info", value_parser = NonEmptyStringValueParser::new())]
    log_level: String,

    #[command(flatten)]
    limits: LimitArgs,
}

#[derive(Debug, Group)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// The most gRPC connections at a time. Further ones are closed immediately.
    #[arg(long, env = "LEASED_MAX_CONNECTIONS", value_name = "N", default_value_t = 10_000, value_parser = positive)]
    max_connections: usize,

    /// The most calls, streams included, at a time on one connection.
    #[arg(long, env = "LEASED_MAX_STREAMS", value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_streams: u32,

    /// The most calls that may wait in queues at a time.
    #[arg(long, env = "LEASED_MAX_WAITING_CALLS", value_name = "N", default_value_t = 100_000)]
    max_waiting_calls: usize,

    /// The longest `wait` of an acquire.
    #[arg(long, env = "LEASED_MAX_WAIT", value_name = "DURATION", default_value = "1h", value_parser = parse_duration)]
    max_wait: Duration,

    /// The most watches at a time.
    #[arg(long, env = "LEASED_MAX_WATCHES", value_name = "N", default_value_t = 256)]
    max_watches: usize,

    /// The most leases that one keepalive stream tracks: leases that were named on it and are not
    /// lost.
    #[arg(long, env = "LEASED_MAX_STREAM_LEASES", value_name = "N", default_value_t = 10_000, value_parser = positive)]
    max_stream_leases: usize,

    /// The most leases that all keepalive streams together track. Further leases are touched by
    /// each message that names them, but not tracked. A tenth as many, or 10,000 if that is more,
    /// may be touched like that at a time.
    #[arg(long, env = "LEASED_MAX_LEASES", value_name = "N", default_value_t = 1_000_000)]
    max_leases: usize,

    /// How many messages of a keepalive stream get a commit each in a second. Further messages wait
    /// and share a commit. A burst may have as many messages as four seconds allow.
    #[arg(long, env = "LEASED_MAX_STREAM_RATE", value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    max_stream_rate: u32,
}

/// A text that must not be printed, because a MongoDB URI may have a password.
#[derive(Clone)]
struct Secret(String);

impl FromStr for Secret {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text for people.
    Text,
    /// One JSON object for each line.
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HttpListen {
    Off,
    At(SocketAddr),
}

/// The configuration of the daemon.
#[derive(Debug, Clone)]
pub struct Config {
    /// The address to serve gRPC on.
    pub listen: SocketAddr,
    /// The address of the side port. `None` if it is off.
    pub http_listen: Option<SocketAddr>,
    /// Where the leases are kept.
    pub location: StoreLocation,
    /// How long to try to reach the store at start. `None` for ever.
    pub store_timeout: Option<Duration>,
    /// The durations of the lease rules.
    pub rules: Rules,
    /// How long a key must have been unused before it is purged.
    pub purge_after: Duration,
    /// How long a drain may take before open calls are cut.
    pub drain_timeout: Duration,
    /// The format of log lines. `None`: text on a terminal, else JSON.
    pub log_format: Option<LogFormat>,
    /// The log level, or a log filter.
    pub log_level: String,
    /// The limits on callers.
    pub limits: Limits,
}

/// Where the leases are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreLocation {
    /// In a folder on this host.
    Folder(PathBuf),
    /// In a MongoDB collection.
    MongoDb(Location),
}

impl StoreLocation {
    /// Returns the default grace.
    fn grace(&self) -> Duration {
        match self {
            // The embedded store has a single clock, so the grace has nothing to cover.
            Self::Folder(_) => Duration::ZERO,
            Self::MongoDb(_) => Duration::from_secs(1),
        }
    }
}

/// The limits on callers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The TTL of requests that have none.
    pub default_ttl: Ttl,
    /// The shortest TTL.
    pub min_ttl: Ttl,
    /// The longest TTL.
    pub max_ttl: Ttl,
    /// The longest wait in a queue.
    pub max_wait: Duration,
    /// The most gRPC connections at a time.
    pub connections: usize,
    /// The most HTTP/2 streams at a time on a connection.
    pub streams: u32,
    /// The most leases that a keepalive stream tracks.
    pub stream_leases: usize,
    /// How many messages of a keepalive stream get a commit each in a second.
    pub stream_rate: u32,
    /// How many bytes partly received messages may have, in the whole daemon.
    pub receiving_bytes: usize,
    /// Whether touches on keepalive streams are coalesced.
    pub coalesce_touches: bool,
    /// The limits of the engine.
    pub bounds: Bounds,
}

/// Options that cannot be used, because one is out of range or two contradict each other. The
/// message names them and says what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Contradiction(String);

impl Args {
    /// Reads the command line, and environment variables for options that are not on it. Ends the
    /// process if they are invalid, and after it has printed the help or the version.
    #[must_use]
    pub fn read() -> Self {
        let mut command = without_empty_variables(Self::command());
        let matches = command.get_matches_mut();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut command).exit())
    }
}

/// Makes an empty environment variable count as unset, because Compose files and unit files often
/// set variables without a value to the empty text.
fn without_empty_variables(command: Command) -> Command {
    let is_empty = |name: &std::ffi::OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    command.mut_args(|arg| match arg.get_env().is_some_and(is_empty) {
        true => arg.env(Resettable::Reset),
        false => arg,
    })
}

impl TryFrom<Args> for Config {
    type Error = Contradiction;

    fn try_from(args: Args) -> Result<Self, Contradiction> {
        let http_listen = match args.http_listen {
            HttpListen::Off => None,
            HttpListen::At(address) => Some(address),
        };
        if !args.insecure {
            check_loopback("--listen", args.listen)?;
            http_listen.map_or(Ok(()), |address| check_loopback("--http-listen", address))?;
        }
        at_least("--purge-after", args.purge_after, MIN_PURGE_AFTER)?;
        let location = match &args.mongodb_uri {
            None => StoreLocation::Folder(args.data_dir.clone()),
            Some(uri) => StoreLocation::MongoDb(Location {
                uri: uri.0.clone(),
                database: args.mongodb_database.clone(),
                collection: args.mongodb_collection.clone(),
            }),
        };
        let grace = args.grace.unwrap_or_else(|| location.grace());
        at_most("--grace", grace, Duration::from_secs(60))?;
        Ok(Self {
            listen: args.listen,
            http_listen,
            location,
            store_timeout: args.store_timeout,
            // A waiter's entry outlasts two refreshes that fail. The pause between refreshes is at
            // most 4.5 s.
            rules: Rules { grace, waiter_ttl: Duration::from_secs(15) },
            purge_after: args.purge_after,
            drain_timeout: args.drain_timeout,
            log_format: args.log_format,
            log_level: args.log_level.clone(),
            limits: limits(&args)?,
        })
    }
}

fn limits(args: &Args) -> Result<Limits, Contradiction> {
    at_most("--max-ttl", args.max_ttl, DAY)?;
    at_most("--min-ttl", args.min_ttl, args.default_ttl)?;
    at_most("--default-ttl", args.default_ttl, args.max_ttl)?;
    at_most("--max-wait", args.limits.max_wait, DAY)?;
    let ttl = |option: &str, value| {
        Ttl::new(value).ok_or_else(|| Contradiction(format!("{option} must be at least 1ms")))
    };
    Ok(Limits {
        default_ttl: ttl("--default-ttl", args.default_ttl)?,
        min_ttl: ttl("--min-ttl", args.min_ttl)?,
        max_ttl: ttl("--max-ttl", args.max_ttl)?,
        max_wait: args.limits.max_wait,
        connections: args.limits.max_connections,
        streams: args.limits.max_streams,
        stream_leases: args.limits.max_stream_leases,
        stream_rate: args.limits.max_stream_rate,
        receiving_bytes: RECEIVING_BYTES,
        coalesce_touches: args.coalesce_touches,
        bounds: Bounds {
            waiting_calls: args.limits.max_waiting_calls,
            watches: args.limits.max_watches,
            leases: args.limits.max_leases,
            ..Bounds::default()
        },
    })
}

fn check_loopback(option: &str, address: SocketAddr) -> Result<(), Contradiction> {
    if address.ip().is_loopback() {
        return Ok(());
    }
    Err(Contradiction(format!(
        "{option} {address} can be reached from other hosts, in plain text: use a loopback address, or add --insecure \
         if you trust the network"
    )))
}

fn at_least(option: &str, value: Duration, least: Duration) -> Result<(), Contradiction> {
    if value >= least {
        return Ok(());
    }
    let (value, least) = (format_duration(value), format_duration(least));
    Err(Contradiction(format!("{option} is {value} and must be at least {least}")))
}

fn at_most(option: &str, value: Duration, most: Duration) -> Result<(), Contradiction> {
    if value <= most {
        return Ok(());
    }
    let (value, most) = (format_duration(value), format_duration(most));
    Err(Contradiction(format!("{option} is {value} and must be at most {most}")))
}

fn http_listen(text: &str) -> Result<HttpListen, String> {
    if text == "off" {
        return Ok(HttpListen::Off);
    }
    text.parse()
        .map(HttpListen::At)
        .map_err(|_| "neither an address such as 127.0.0.1:5328 nor `off`".to_owned())
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| "not a whole number above 0".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(options: &[&str]) -> Result<Config, Contradiction> {
        let args = Args::try_parse_from(["leased"].iter().chain(options)).expect("options that parse");
        Config::try_from(args)
    }

    #[test]
    fn the_defaults_do_not_contradict_each_other() {
        let config = config(&[]).expect("the defaults");
        assert_eq!(config.listen.port(), 5327);
        assert_eq!(config.limits.default_ttl.get(), Duration::from_secs(30));
        assert_eq!(config.location, StoreLocation::Folder("./leased-data".into()));
        assert_eq!(config.rules.grace, Duration::ZERO);
        assert!(config.limits.coalesce_touches);
    }

    #[test]
    fn an_empty_log_filter_is_refused_because_it_would_log_nothing() {
        assert!(Args::try_parse_from(["leased", "--log-level", ""]).is_err());
        assert_eq!(config(&["--log-level=off"]).expect("a filter").log_level, "off");
    }

    #[test]
    fn coalescing_can_be_turned_off() {
        assert!(!config(&["--coalesce-touches=false"]).expect("a switch").limits.coalesce_touches);
    }

    #[test]
    fn with_a_uri_the_leases_are_in_mongodb_with_a_grace() {
        let uri = ["--mongodb-uri", "mongodb://127.0.0.1"];
        let shared = config(&uri).expect("the defaults");
        assert!(
            matches!(shared.location, StoreLocation::MongoDb(location) if location.collection == "leases")
        );
        assert_eq!(shared.rules.grace, Duration::from_secs(1));
        let chosen = config(&[uri[0], uri[1], "--grace", "3s"]).expect("a grace");
        assert_eq!(chosen.rules.grace, Duration::from_secs(3));
    }

    #[test]
    fn a_debug_print_has_no_password() {
        let options = ["leased", "--mongodb-uri", "mongodb://app:S3cret@127.0.0.1"];
        let args = Args::try_parse_from(options).expect("options that parse");
        let shown = format!("{args:?}");
        let config = Config::try_from(args).expect("the defaults");
        assert!(!shown.contains("S3cret") && !format!("{config:?}").contains("S3cret"), "{shown}");
    }

    #[test]
    fn options_that_contradict_each_other_are_refused_by_name() {
        for (options, named) in [
            (&["--min-ttl", "1m"][..], "--min-ttl"),
            (&["--max-ttl", "10s"], "--default-ttl"),
            (&["--max-ttl", "25h"], "--max-ttl"),
            (&["--purge-after", "59m"], "--purge-after"),
            (&["--listen", "0.0.0.0:5327"], "--listen"),
            (&["--http-listen", "[::]:5328"], "--http-listen"),
            (&["--grace", "2m"], "--grace"),
        ] {
            let error = config(options).expect_err("a contradiction").to_string();
            assert!(error.contains(named), "{options:?}: {error}");
        }
        assert!(config(&["--listen", "0.0.0.0:5327", "--insecure"]).is_ok());
        assert_eq!(config(&["--http-listen", "off"]).expect("no side port").http_listen, None);
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
