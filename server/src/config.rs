//! What was typed ([`Args`]) and what it means ([`Config`]). Relations between settings are checked here.

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

/// A day: the longest TTL and `min_hold`.
pub const DAY: Duration = Duration::from_secs(24 * 3600);
/// A key is remembered at least this long after its last lease, so that no late message finds it new.
const MIN_PURGE_AFTER: Duration = Duration::from_secs(3600);
/// Messages that have not come in whole may have so many bytes, in the whole daemon.
const RECEIVING_BYTES: usize = 64 * 1024 * 1024;

/// leased grants leases over gRPC: the right to act on a key until a time that keeps moving forward for as long as
/// its holder touches it.
#[derive(Debug, Parser)]
#[command(name = "leased", version, max_term_width = 110, args_override_self = true)]
pub struct Args {
    /// Where to serve gRPC; port 0 picks a free one.
    #[arg(long, env = "LEASED_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:5327")]
    listen: SocketAddr,

    /// Where to serve /livez, /readyz and /metrics; `off` for nowhere.
    #[arg(long, env = "LEASED_HTTP_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:5328", value_parser = http_listen)]
    http_listen: HttpListen,

    /// Serve beyond this host without encryption.
    #[arg(long, env = "LEASED_INSECURE", value_parser = BoolishValueParser::new())]
    insecure: bool,

    /// Where the leases are kept on this host; made if it is missing, for one daemon at a time.
    #[arg(long, env = "LEASED_DATA_DIR", value_name = "DIR", default_value = "./leased-data")]
    data_dir: PathBuf,

    /// Keep the leases in this MongoDB (a replica set or a sharded cluster) instead, for any number of daemons. Options of
    /// the URI apply, except those that would make leases unsafe: these are refused.
    #[arg(long, env = "LEASED_MONGODB_URI", value_name = "URI", hide_env_values = true)]
    mongodb_uri: Option<Secret>,

    /// The database in it.
    #[arg(long, env = "LEASED_MONGODB_DATABASE", value_name = "NAME", default_value = "leased")]
    mongodb_database: String,

    /// The collection in that.
    #[arg(long, env = "LEASED_MONGODB_COLLECTION", value_name = "NAME", default_value = "leases")]
    mongodb_collection: String,

    /// Give up when MongoDB, or the disk, cannot be reached at start for this long; without it, keep trying.
    #[arg(long, env = "LEASED_STORE_TIMEOUT", value_name = "DURATION", value_parser = parse_duration)]
    store_timeout: Option<Duration>,

    /// The TTL of leases whose request names none.
    #[arg(long, env = "LEASED_DEFAULT_TTL", value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    default_ttl: Duration,

    /// The shortest TTL granted.
    #[arg(long, env = "LEASED_MIN_TTL", value_name = "DURATION", default_value = "100ms", value_parser = parse_duration)]
    min_ttl: Duration,

    /// The longest TTL granted.
    #[arg(long, env = "LEASED_MAX_TTL", value_name = "DURATION", default_value = "24h", value_parser = parse_duration)]
    max_ttl: Duration,

    /// How long after it ran out a lease may be taken by another. Covers the difference between the clocks of
    /// MongoDB's nodes after a failover; the same for all daemons of a database [default: 1s on MongoDB, else 0s].
    #[arg(long, env = "LEASED_GRACE", value_name = "DURATION", value_parser = parse_duration)]
    grace: Option<Duration>,

    /// Forget keys that have been free, or whose leases have lapsed, for this long; at least 1h.
    #[arg(long, env = "LEASED_PURGE_AFTER", value_name = "DURATION", default_value = "7d", value_parser = parse_duration)]
    purge_after: Duration,

    /// Answer a keepalive stream from memory, with the true remaining time, for leases touched less than a tenth of
    /// their TTL ago; `false` writes every touch.
    #[arg(long, env = "LEASED_COALESCE_TOUCHES", value_name = "BOOL", default_value_t = true, action = ArgAction::Set, value_parser = BoolishValueParser::new())]
    coalesce_touches: bool,

    /// How long open calls may take to end after SIGTERM before they are cut.
    #[arg(long, env = "LEASED_DRAIN_TIMEOUT", value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    drain_timeout: Duration,

    /// How log lines look [default: text on a terminal, else json].
    #[arg(long, env = "LEASED_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<LogFormat>,

    /// What is logged: a level, or a filter such as `info,leased=debug`.
    #[arg(long, env = "LEASED_LOG_LEVEL", value_name = "FILTER", default_value = "info", value_parser = NonEmptyStringValueParser::new())]
    log_level: String,

    #[command(flatten)]
    limits: LimitArgs,
}

#[derive(Debug, Group)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Connections at once; more are closed as they come.
    #[arg(long, env = "LEASED_MAX_CONNECTIONS", value_name = "N", default_value_t = 10_000, value_parser = positive)]
    max_connections: usize,

    /// Calls and streams at once on one connection.
    #[arg(long, env = "LEASED_MAX_STREAMS", value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_streams: u32,

    /// Calls that may wait in line at once.
    #[arg(long, env = "LEASED_MAX_WAITING_CALLS", value_name = "N", default_value_t = 100_000)]
    max_waiting_calls: usize,

    /// The longest `wait` of an acquire.
    #[arg(long, env = "LEASED_MAX_WAIT", value_name = "DURATION", default_value = "1h", value_parser = parse_duration)]
    max_wait: Duration,

    /// Watches at once.
    #[arg(long, env = "LEASED_MAX_WATCHES", value_name = "N", default_value_t = 256)]
    max_watches: usize,

    /// Leases that one keepalive stream may carry.
    #[arg(long, env = "LEASED_MAX_STREAM_LEASES", value_name = "N", default_value_t = 10_000, value_parser = positive)]
    max_stream_leases: usize,

    /// Leases that all keepalive streams together carry. A lease past that is touched by each message that names it, and
    /// not carried; a tenth as many may be touched so at once.
    #[arg(long, env = "LEASED_MAX_LEASES", value_name = "N", default_value_t = 1_000_000)]
    max_leases: usize,

    /// Messages a second that a keepalive stream may send before they wait and share a commit; bursts of four seconds'
    /// worth are let through.
    #[arg(long, env = "LEASED_MAX_STREAM_RATE", value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    max_stream_rate: u32,
}

/// What must not be printed.
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

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HttpListen {
    Off,
    At(SocketAddr),
}

/// What the daemon is to do.
#[derive(Debug, Clone)]
pub struct Config {
    /// gRPC's address.
    pub listen: SocketAddr,
    /// The side port's address, if it is on.
    pub http_listen: Option<SocketAddr>,
    /// Where the leases are.
    pub place: Place,
    /// How long to try to reach the store at start; `None` for ever.
    pub store_timeout: Option<Duration>,
    /// What the rules are given.
    pub rules: Rules,
    /// When free keys are forgotten.
    pub purge_after: Duration,
    /// When a drain becomes a cut.
    pub drain_timeout: Duration,
    /// How log lines look; `None`: as fits the terminal.
    pub log_format: Option<LogFormat>,
    /// What is logged.
    pub log_level: String,
    /// What requests may ask.
    pub limits: Limits,
}

/// Where the leases are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In a folder of this host.
    Folder(PathBuf),
    /// In a MongoDB collection.
    MongoDb(Location),
}

impl Place {
    /// The grace that fits: a single clock needs none.
    fn grace(&self) -> Duration {
        match self {
            Self::Folder(_) => Duration::ZERO,
            Self::MongoDb(_) => Duration::from_secs(1),
        }
    }
}

/// The bounds of what callers may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The TTL for requests that name none.
    pub default_ttl: Ttl,
    /// The shortest.
    pub min_ttl: Ttl,
    /// The longest.
    pub max_ttl: Ttl,
    /// The longest time in line.
    pub max_wait: Duration,
    /// Connections at once.
    pub connections: usize,
    /// HTTP/2 streams at once on a connection.
    pub streams: u32,
    /// Leases that a keepalive stream carries.
    pub stream_leases: usize,
    /// Messages a second of a stream that get a commit of their own.
    pub stream_rate: u32,
    /// Bytes of messages that have not come in whole, in the whole daemon.
    pub receiving_bytes: usize,
    /// Whether streams are answered from memory for leases touched a moment ago.
    pub coalesce_touches: bool,
    /// What the engine keeps.
    pub bounds: Bounds,
}

/// Settings that do not go together. The message says which and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Contradiction(String);

impl Args {
    /// Reads the command line, and the environment for what it leaves open. Ends the process if it cannot be read, or
    /// after the help that was asked for.
    #[must_use]
    pub fn read() -> Self {
        let mut command = without_empty_variables(Self::command());
        let matches = command.get_matches_mut();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut command).exit())
    }
}

/// A variable that is set and empty counts as unset: that is how compose files and unit files leave one open.
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
            reachable_only_here("--listen", args.listen)?;
            http_listen.map_or(Ok(()), |address| reachable_only_here("--http-listen", address))?;
        }
        at_least("--purge-after", args.purge_after, MIN_PURGE_AFTER)?;
        let place = match &args.mongodb_uri {
            None => Place::Folder(args.data_dir.clone()),
            Some(uri) => Place::MongoDb(Location {
                uri: uri.0.clone(),
                database: args.mongodb_database.clone(),
                collection: args.mongodb_collection.clone(),
            }),
        };
        let grace = args.grace.unwrap_or_else(|| place.grace());
        at_most("--grace", grace, Duration::from_secs(60))?;
        Ok(Self {
            listen: args.listen,
            http_listen,
            place,
            store_timeout: args.store_timeout,
            rules: Rules { grace, place: Duration::from_secs(15) },
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

fn reachable_only_here(option: &str, address: SocketAddr) -> Result<(), Contradiction> {
    if address.ip().is_loopback() {
        return Ok(());
    }
    Err(Contradiction(format!(
        "{option} {address} can be reached from other hosts, in plain text: use a loopback address, or say --insecure \
         if the network is yours"
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
    fn the_defaults_go_together() {
        let config = config(&[]).expect("the defaults");
        assert_eq!(config.listen.port(), 5327);
        assert_eq!(config.limits.default_ttl.get(), Duration::from_secs(30));
        assert_eq!(config.place, Place::Folder("./leased-data".into()));
        assert_eq!(config.rules.grace, Duration::ZERO);
        assert!(config.limits.coalesce_touches);
    }

    #[test]
    fn an_empty_filter_is_refused_for_it_would_log_nothing() {
        assert!(Args::try_parse_from(["leased", "--log-level", ""]).is_err());
        assert_eq!(config(&["--log-level=off"]).expect("a filter").log_level, "off");
    }

    #[test]
    fn every_touch_can_be_made_a_write() {
        assert!(!config(&["--coalesce-touches=false"]).expect("a switch").limits.coalesce_touches);
    }

    #[test]
    fn with_a_uri_the_leases_are_in_mongodb_and_there_is_a_grace() {
        let uri = ["--mongodb-uri", "mongodb://127.0.0.1"];
        let shared = config(&uri).expect("the defaults");
        assert!(matches!(shared.place, Place::MongoDb(location) if location.collection == "leases"));
        assert_eq!(shared.rules.grace, Duration::from_secs(1));
        let chosen = config(&[uri[0], uri[1], "--grace", "3s"]).expect("a grace");
        assert_eq!(chosen.rules.grace, Duration::from_secs(3));
    }

    #[test]
    fn no_password_is_in_what_is_shown_for_debugging() {
        let options = ["leased", "--mongodb-uri", "mongodb://app:S3cret@127.0.0.1"];
        let args = Args::try_parse_from(options).expect("options that parse");
        let shown = format!("{args:?}");
        let config = Config::try_from(args).expect("the defaults");
        assert!(!shown.contains("S3cret") && !format!("{config:?}").contains("S3cret"), "{shown}");
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused_by_name() {
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
