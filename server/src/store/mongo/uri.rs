//! The connection string: reads it, refuses unsafe options by name, and keeps the password out of
//! messages.

use std::time::Duration;

use mongodb::error::{Error, ErrorKind};
use mongodb::options::{Acknowledgment, ClientOptions, ReadConcern, ReadPreference, Tls, WriteConcern};
use percent_encoding::percent_decode_str;

use super::ConnectError;
use super::check::Unusable;
use super::command::brief;

/// The options that decide from which node reads come and what they see, each with its only safe
/// value and advice for any other value.
///
/// Callers are answered from records that are read after a commit. A read from a node that lags, or
/// of a write that a failover may undo, could let two callers hold the same key.
const READS: [(&str, Option<&str>, &str); 4] = [
    ("readPreference", Some("primary"), "say readPreference=primary or leave it out"),
    ("readConcernLevel", Some("majority"), "say readConcernLevel=majority or leave it out"),
    ("readPreferenceTags", None, "leave it out"),
    ("maxStalenessSeconds", None, "leave it out"),
];

/// The smallest pool that is accepted: one connection for the change stream, which keeps it while
/// it waits for changes, two for batches of commits, and one for background work, such as the build
/// of an index. With fewer, commits would wait for the other work.
const CONNECTIONS: u32 = 4;

/// Options for compression, which is not built in. The driver would report them as misspelled.
const COMPRESSION: [&str; 2] = ["compressors", "zlibCompressionLevel"];

/// Reads the URI. Sets defaults with which the loss of a primary is noticed within seconds.
pub(super) async fn client_options(uri: &str) -> Result<ClientOptions, ConnectError> {
    refuse_other_reads(uri)?;
    refuse_compression(uri)?;
    let mut options = ClientOptions::parse(uri).await.map_err(|error| match error.kind.as_ref() {
        ErrorKind::DnsResolve { .. } => ConnectError::Unreachable(brief(&error)),
        _ => unusable(&error).into(),
    })?;
    refuse_weak_writes(options.write_concern.as_ref())?;
    if let Some(size) = options.max_pool_size.filter(|&size| size < CONNECTIONS) {
        return Err(Unusable::Pool(size, CONNECTIONS).into());
    }
    options.selection_criteria = Some(ReadPreference::Primary.into());
    options.read_concern = Some(ReadConcern::majority());
    options.write_concern = Some(write_concern());
    options.app_name.get_or_insert_with(|| "leased".to_owned());
    // A runner runs up to 64 commands at once, and the driver's default is 10.
    options.max_pool_size.get_or_insert(64);
    options.max_connecting.get_or_insert(8);
    options.connect_timeout.get_or_insert(Duration::from_secs(2));
    // Shorter than an attempt at a command, which takes up to 2 s. So "no primary" is reported
    // before the attempt times out, and is known to mean "not applied".
    options.server_selection_timeout.get_or_insert(Duration::from_millis(1800));
    options.heartbeat_freq.get_or_insert(Duration::from_secs(1));
    // The daemon repeats batches itself. With retryable writes the server would store an image of
    // each document for the driver.
    options.retry_writes = Some(false);
    Ok(options)
}

pub(super) fn unusable(error: &Error) -> Unusable {
    Unusable::Uri(brief(error))
}

/// The only safe write concern. `w=N` may be less than a majority, because a set can have arbiters
/// and members that are hidden or do not vote.
pub(super) fn write_concern() -> WriteConcern {
    let mut concern = WriteConcern::majority();
    concern.journal = Some(true);
    concern
}

fn refuse_weak_writes(asked: Option<&WriteConcern>) -> Result<(), Unusable> {
    let Some(asked) = asked else { return Ok(()) };
    if asked.journal == Some(false) {
        return Err(Unusable::WeakWrites("journal=false".to_owned(), "say journal=true"));
    }
    let weak = match &asked.w {
        None | Some(Acknowledgment::Majority) => return Ok(()),
        Some(Acknowledgment::Nodes(nodes)) => format!("w={nodes}"),
        // The message omits the name of the concern: in a malformed URI it may be a part of the
        // password.
        Some(_) => "a custom w".to_owned(),
    };
    Err(Unusable::WeakWrites(weak, "say w=majority"))
}

/// Refuses unsafe options for reads. Looks at the URI itself, because the driver accepts some of
/// these options only together with others.
fn refuse_other_reads(uri: &str) -> Result<(), Unusable> {
    for (name, value) in pairs(uri) {
        let of_reads = READS.iter().find(|(option, ..)| option.eq_ignore_ascii_case(name));
        if let Some((option, safe, advice)) = of_reads
            && safe.is_none_or(|safe| !safe.eq_ignore_ascii_case(value))
        {
            return Err(Unusable::WeakReads(option, advice));
        }
    }
    Ok(())
}

fn refuse_compression(uri: &str) -> Result<(), Unusable> {
    let asked = |option: &&str| pairs(uri).any(|(name, _)| option.eq_ignore_ascii_case(name));
    COMPRESSION.into_iter().find(asked).map_or(Ok(()), |option| Err(Unusable::Compression(option)))
}

/// The options in a URI, as written.
fn pairs(uri: &str) -> impl Iterator<Item = (&str, &str)> {
    let options = uri.split_once('?').map_or("", |(_, options)| options);
    options.split('&').filter_map(|option| option.split_once('='))
}

/// Removes secrets from errors, and adds hints.
#[derive(Debug)]
pub(super) struct Printer {
    secrets: Secrets,
    /// Whether the daemon uses TLS. `None` until the URI has been read.
    pub(super) tls: Option<bool>,
}

impl Printer {
    pub(super) fn new(uri: &str) -> Self {
        Self { secrets: Secrets::of(uri), tls: None }
    }

    pub(super) fn with_options(&mut self, options: &ClientOptions) {
        self.tls = Some(matches!(options.tls, Some(Tls::Enabled(_))));
    }

    /// Returns the error without secrets. Hides the whole cause if a word of the password may be in
    /// it: with a `?` that is not encoded the driver takes a part of the password for a port or an
    /// option and repeats it.
    pub(super) fn printable(&self, mut error: ConnectError) -> ConnectError {
        let is_uri = matches!(error, ConnectError::Unusable(Unusable::Uri(_)));
        if let Some(cause) = error.cause_mut() {
            let hint = self.hint(cause).map(|hint| format!(" ({hint})")).unwrap_or_default();
            if self.secrets.occur_in(cause) {
                *cause = if is_uri { format!("{HIDDEN}; {ENCODE}") } else { HIDDEN.to_owned() };
            }
            cause.push_str(&hint);
        }
        error
    }

    /// The likely reason for a failed connection. The driver reports errors of nodes as text only,
    /// so the text is searched.
    fn hint(&self, cause: &str) -> Option<&'static str> {
        let says = |text: &str| cause.contains(text);
        match self.tls? {
            true if says("tls handshake eof") || says("received corrupt message") => Some(
                "MongoDB may not speak TLS there: the URI asks for it with tls=true, another tls option or \
                 mongodb+srv",
            ),
            true if says("invalid peer certificate") => Some(
                "MongoDB's certificate is not valid for this host and CA: see the host's name and tlsCAFile in the URI",
            ),
            false if says("unexpected end of file") || says("onnection reset") => Some(
                "MongoDB may speak only TLS: say tls=true in the URI, and tlsCAFile=FILE for a CA of your own",
            ),
            // Every host that answered belongs to another set.
            _ if says("Topology:") && !says("Servers:") => {
                Some("no host in the URI belongs to the set that its replicaSet names")
            }
            _ => None,
        }
    }
}

/// Replaces a cause that may contain the password.
const HIDDEN: &str = "the reason is not shown, because it may contain a part of the password";
const ENCODE: &str = "in a user or a password write : / ? # [ ] @ % as %3A %2F %3F %23 %5B %5D %40 %25";

/// The words of a URI that may belong to the password, in lower case.
#[derive(Debug)]
struct Secrets(Vec<String>);

impl Secrets {
    fn of(uri: &str) -> Self {
        let rest = ["mongodb://", "mongodb+srv://"].iter().find_map(|scheme| uri.strip_prefix(scheme));
        let Some((credentials, _)) = rest.unwrap_or(uri).rsplit_once('@') else { return Self(Vec::new()) };
        // The user's name is not secret. But without a scheme, or with a `?` that is not encoded,
        // its end is unknown.
        let secret = match credentials.split_once(':') {
            Some((_, password)) if rest.is_some() && !credentials.contains('?') => password,
            _ => credentials,
        };
        // The driver decodes text that it takes for options, so decoded words count as well.
        let decoded = percent_decode_str(secret).decode_utf8_lossy();
        let words =
            [secret, &decoded].into_iter().flat_map(|text| text.split(|c: char| !c.is_alphanumeric()));
        Self(words.filter(|word| !word.is_empty()).map(str::to_lowercase).collect())
    }

    fn occur_in(&self, text: &str) -> bool {
        let text = text.to_lowercase();
        self.0.iter().any(|word| text.contains(word))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a daemon prints about a URI that it cannot use. Contacts no name server and no MongoDB.
    fn printed(uri: &str) -> Option<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let error = runtime.block_on(client_options(uri)).err()?;
        Some(Printer::new(uri).printable(error).to_string())
    }

    #[test]
    fn the_drivers_message_is_shown_unless_it_may_contain_a_part_of_the_password() {
        for (uri, said, hidden) in [
            ("mongodb://app:S3cret?x@127.0.0.1/", "%3F", "s3cret"),
            ("mongodb://app:S3cret?w=x@127.0.0.1/", "%3F", "s3cret"),
            ("mongodb://app:27017?S3cret@127.0.0.1/", "%3F", "s3cret"),
            ("mongodb://app:27017?S3%63ret=%41bc@127.0.0.1/", "%3F", "abc"),
            ("app:S3cret@127.0.0.1/?appName=a://b", "%3F", "s3cret"),
            ("mongodb://app:S3cret/x@127.0.0.1/", "password must be URL encoded", "s3cret"),
            ("mongodb://app:S3cret@127.0.0.1/?colour=red", "colour is an invalid option", "s3cret"),
            ("mongodb://app:S3cret@127.0.0.1/?w=nearby@x", "w=majority", "nearby"),
        ] {
            let text = printed(uri).expect("a URI that cannot be used");
            assert!(text.contains(said) && !text.to_lowercase().contains(hidden), "{uri}: {text}");
        }
    }

    #[test]
    fn options_for_reads_not_from_the_primary_with_a_majority_are_refused_by_name() {
        for option in [
            "readPreference=secondary",
            "readpreference=secondaryPreferred",
            "readPreference=primaryPreferred",
            "readPreference=nearest",
            "readPreference=secondary&readPreferenceTags=dc:east",
            "readPreferenceTags=dc:east",
            "maxStalenessSeconds=90",
            "READCONCERNLEVEL=local",
            "readConcernLevel=linearizable",
        ] {
            let text = printed(&format!("mongodb://127.0.0.1/?appName=a&{option}")).expect(option);
            let name = option.split_once('=').expect("a pair").0;
            assert!(text.to_lowercase().contains(&name.to_lowercase()), "{option}: {text}");
            assert!(text.contains("leave it out"), "{option}: {text}");
        }
        assert_eq!(printed("mongodb://127.0.0.1/?readPreference=primary&readConcernLevel=majority"), None);
    }

    #[test]
    fn a_pool_so_small_that_commits_would_wait_for_other_work_is_refused() {
        for size in 1..CONNECTIONS {
            let text = printed(&format!("mongodb://127.0.0.1/?maxPoolSize={size}")).expect("a small pool");
            assert!(text.contains(&format!("maxPoolSize={size}")) && text.contains("4 or more"), "{text}");
        }
        assert_eq!(printed("mongodb://127.0.0.1/?maxPoolSize=4"), None);
    }

    #[test]
    fn options_for_compression_are_refused_as_not_built_in() {
        for option in ["compressors=snappy", "Compressors=zstd,zlib", "zlibCompressionLevel=6"] {
            let text = printed(&format!("mongodb://127.0.0.1/?appName=a&{option}")).expect(option);
            assert!(text.contains("compression is not built in"), "{option}: {text}");
        }
    }

    #[tokio::test]
    async fn reads_and_writes_default_to_the_primary_and_a_majority() {
        let options = client_options("mongodb://127.0.0.1/").await.expect("a URI");
        assert_eq!(options.selection_criteria, Some(ReadPreference::Primary.into()));
        assert_eq!(options.read_concern, Some(ReadConcern::majority()));
        assert_eq!(options.write_concern, Some(write_concern()));
    }

    #[test]
    fn every_write_concern_other_than_a_majority_is_refused() {
        for option in
            ["w=0", "w=1", "w=2", "w=3", "w=50", "w=nearby", "journal=false", "w=majority&journal=false"]
        {
            let text = printed(&format!("mongodb://127.0.0.1/?{option}")).expect(option);
            assert!(text.contains("say "), "{option}: {text}");
        }
        for option in ["", "w=majority", "journal=true", "w=majority&wtimeoutMS=1&journal=true"] {
            assert_eq!(printed(&format!("mongodb://127.0.0.1/?{option}")), None, "{option}");
        }
    }

    /// Parts of passwords, long enough not to occur in the driver's own words.
    fn words() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[A-Za-z0-9]{5,9}[0-9]{3}", 1..4)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn no_part_of_a_password_is_printed(
            words in words(),
            between in "[-?/:@=&%#,\\[\\] ]{1,2}",
            before in "(mongodb|mongodb|mongodb:|mongo)?(://|:/|//)?(app|app:27017|27017|)",
            colon in "[:?]",
            after in "(127\\.0\\.0\\.1|127\\.0\\.0\\.1:0|\\[::1|)(/|)(\\?w=1|\\?a=b|\\?x|)(://)?",
        ) {
            let password = words.join(&between);
            let uri = format!("{before}{colon}{password}@{after}");
            if let Some(text) = printed(&uri) {
                let text = text.to_lowercase();
                for word in &words {
                    prop_assert!(!text.contains(&word.to_lowercase()), "{uri}: {text}");
                }
            }
        }
    }
}
