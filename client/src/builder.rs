//! Configures a client: its daemons and its settings.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use crate::client::Client;
use crate::endpoints::{Endpoints, Reach, Source};
use crate::error::Error;

/// How long it may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that has been silent for this long is pinged, and given up if it stays silent for
/// as long again. Both together are shorter than the 15 s for which a waiter's entry in the queue
/// lasts without its daemon.
const PING: Duration = Duration::from_secs(3);
/// How long a call may take by default.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The settings of a client.
///
/// ```no_run
/// # async fn example() -> Result<(), leased_client::Error> {
/// use std::time::Duration;
///
/// let client = leased_client::Client::builder()
///     .endpoint("http://10.0.0.1:5327")?
///     .endpoint("http://10.0.0.2:5327")?
///     .owner("billing@10.0.0.9")
///     .timeout(Duration::from_secs(3))
///     .connect()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct Builder {
    sources: Vec<Source>,
    owner: Option<String>,
    timeout: Duration,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self { sources: Vec::new(), owner: None, timeout: TIMEOUT }
    }

    /// Adds the daemon at this URL, as in `http://127.0.0.1:5327`. All endpoints of a client must
    /// be daemons over the same store.
    ///
    /// A host name with several addresses counts as several daemons. The client looks the name up
    /// at the start, every five minutes, and when a daemon fails.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the URL is malformed.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), leased_client::Error> {
    /// let builder = leased_client::Client::builder().endpoint("http://127.0.0.1:5327")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn endpoint(mut self, url: &str) -> Result<Self, Error> {
        let endpoint = parse(url)?;
        let host = endpoint.uri().host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        if host.parse::<IpAddr>().is_ok() {
            let endpoint = Self::tuned(endpoint);
            return Ok(self.endpoint_with(url, move || endpoint.connect_lazy()));
        }
        let (name, port) = (url.to_owned(), endpoint.uri().port_u16().unwrap_or(80));
        let reach = Reach::Name { url: endpoint.uri().clone(), host, port };
        self.sources.push(Source { name, reach });
        Ok(self)
    }

    /// Adds a daemon that is reached over the caller's own channels: over TLS or a Unix socket,
    /// with credentials, or through a proxy. Errors and logs call the daemon `name`.
    ///
    /// A client has several connections to a daemon and replaces connections that fail. So it calls
    /// `connect` more than once, and each call must return a new channel that connects lazily.
    /// [`tuned`](Self::tuned) applies the settings of the client's own channels.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use leased_client::{Builder, Client};
    /// use tonic::transport::Endpoint;
    ///
    /// let endpoint = Builder::tuned(Endpoint::from_static("http://127.0.0.1:5327"));
    /// let client = Client::builder().endpoint_with("mine", move || endpoint.connect_lazy()).connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn endpoint_with(
        mut self,
        name: impl Into<String>,
        connect: impl Fn() -> Channel + Send + Sync + 'static,
    ) -> Self {
        self.sources.push(Source { name: name.into(), reach: Reach::Dial(Arc::new(connect)) });
        self
    }

    /// Sets up `endpoint` to notice dead connections. Without pings a half-open connection looks
    /// alive for minutes.
    ///
    /// ```
    /// use tonic::transport::Endpoint;
    ///
    /// let endpoint = leased_client::Builder::tuned(Endpoint::from_static("http://127.0.0.1:5327"));
    /// ```
    #[must_use]
    pub fn tuned(endpoint: Endpoint) -> Endpoint {
        endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .keep_alive_while_idle(true)
    }

    /// Sets the default owner label of this client's leases. The default is `host:pid`.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), leased_client::Error> {
    /// let builder = leased_client::Client::builder().owner("billing@10.0.0.9");
    /// # Ok(())
    /// # }
    /// ```
    pub fn owner(mut self, owner: impl Into<String>) -> Self {
        self.owner = Some(owner.into());
        self
    }

    /// Sets how long a call may take, including retries but not the wait in a queue. It must be
    /// more than zero; the default is 5 s.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), leased_client::Error> {
    /// let builder = leased_client::Client::builder().timeout(std::time::Duration::from_secs(3));
    /// # Ok(())
    /// # }
    /// ```
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Returns the client once a daemon has answered.
    ///
    /// # Errors
    /// [`Error::Invalid`] without an endpoint or with a timeout of zero, [`Error::NotLeased`] if
    /// the servers at all endpoints are not leased daemons, [`Error::DifferentStores`] if the
    /// daemons do not serve the same store, and [`Error::Unavailable`] if no daemon answers in
    /// time.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), leased_client::Error> {
    /// let client = leased_client::Client::builder().endpoint(leased_client::DEFAULT_ENDPOINT)?.connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(self) -> Result<Client, Error> {
        let client = self.connect_lazily()?;
        client.shared().endpoints.check().await?;
        Ok(client)
    }

    /// Returns a client that connects with its first call. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Invalid`] without an endpoint or with a timeout of zero.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), leased_client::Error> {
    /// let builder = leased_client::Client::builder().endpoint(leased_client::DEFAULT_ENDPOINT)?;
    /// let client = builder.connect_lazily()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn connect_lazily(self) -> Result<Client, Error> {
        if self.sources.is_empty() {
            return Err(Error::Invalid("a client needs an endpoint".to_owned()));
        }
        if self.timeout.is_zero() {
            let wrong = "a timeout of zero leaves no time for an answer";
            return Err(Error::Invalid(wrong.to_owned()));
        }
        let owner = self.owner.unwrap_or_else(default_owner);
        Ok(Client::start(Endpoints::new(self.sources, self.timeout), owner))
    }
}

/// Parses a URL, and refuses one with a part that would be ignored.
fn parse(url: &str) -> Result<Endpoint, Error> {
    let wrong = |why: &str| {
        Error::Invalid(format!("{url:?} {why}; an endpoint looks like {}", crate::DEFAULT_ENDPOINT))
    };
    if url.contains('@') {
        // The message does not show the URL, which may hold a password.
        return Err(Error::Invalid(format!(
            "an endpoint must have no user and no password; it looks like {}",
            crate::DEFAULT_ENDPOINT
        )));
    }
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|_| wrong("is not a URL"))?;
    let uri = endpoint.uri();
    let (Some("http"), Some(host), Some(authority)) = (uri.scheme_str(), uri.host(), uri.authority()) else {
        return Err(wrong("is not an http:// URL"));
    };
    let has_port = authority.as_str().len() > host.len();
    if has_port && uri.port_u16().is_none_or(|port| port == 0) {
        return Err(wrong("has no port from 1 to 65535"));
    }
    // The parser drops a fragment, so this looks for it in the text.
    if uri.path() != "/" || uri.query().is_some() || url.contains('#') {
        return Err(wrong("has more than a host and a port"));
    }
    Ok(endpoint)
}

fn default_owner() -> String {
    let name = rustix::system::uname();
    format!("{}:{}", name.nodename().to_string_lossy(), std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(url: &str) -> Option<String> {
        Builder::new().endpoint(url).err().map(|error| error.to_string())
    }

    #[test]
    fn a_url_with_a_part_that_would_be_ignored_is_refused() {
        for (url, said) in [
            ("nonsense", "is not an http:// URL"),
            ("https://127.0.0.1:5327", "is not an http:// URL"),
            ("http://127.0.0.1:99999", "port"),
            ("http://localhost:0", "port"),
            ("http://[::1]:65536", "port"),
            ("http://127.0.0.1:5327/path", "more than a host and a port"),
            ("http://127.0.0.1:5327/?a=b", "more than a host and a port"),
            ("http://127.0.0.1:5327/#a", "more than a host and a port"),
            ("http://app:S3cret@127.0.0.1:5327", "no user and no password"),
            ("http://app:S3cret@:bad", "no user and no password"),
        ] {
            let refusal = refusal(url).expect(url);
            assert!(refusal.contains(said) && !refusal.contains("S3cret"), "{url}: {refusal}");
        }
        for url in ["http://localhost", "http://127.0.0.1:5327/", "http://[::1]:5327", "http://[::1]"] {
            assert_eq!(refusal(url), None, "{url}");
        }
    }
}
