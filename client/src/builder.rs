//! Making a client: its daemons and its settings.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use crate::client::Client;
use crate::endpoints::Endpoints;
use crate::error::Error;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that has heard nothing for this long is tried, and given up after as long again: together shorter than the 15 s
/// for which a waiter keeps its place without its daemon.
const PING: Duration = Duration::from_secs(3);
const TIMEOUT: Duration = Duration::from_secs(5);

/// Settings of a client.
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
    channels: Vec<(String, Channel)>,
    owner: Option<String>,
    timeout: Duration,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self { channels: Vec::new(), owner: None, timeout: TIMEOUT }
    }

    /// Adds the daemon at this URL, as in `http://127.0.0.1:5327`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is none.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), leased_client::Error> {
    /// let builder = leased_client::Client::builder().endpoint("http://127.0.0.1:5327")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn endpoint(self, url: &str) -> Result<Self, Error> {
        let wrong =
            || Error::Invalid(format!("{url:?} is no endpoint; one looks like {}", crate::DEFAULT_ENDPOINT));
        let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|_| wrong())?;
        if endpoint.uri().scheme_str() != Some("http") || endpoint.uri().host().is_none() {
            return Err(wrong());
        }
        let channel = Self::tuned(endpoint).connect_lazy();
        Ok(self.channel(url, channel))
    }

    /// Adds a daemon that is reached by a channel of the caller's making: over TLS, a Unix socket, with credentials, through
    /// a proxy. `name` is for messages. [`tuned`](Self::tuned) has the settings that other channels are made with.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use leased_client::Builder;
    /// use tonic::transport::Endpoint;
    ///
    /// let channel = Builder::tuned(Endpoint::from_static("http://127.0.0.1:5327")).connect_lazy();
    /// let client = leased_client::Client::builder().channel("mine", channel).connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn channel(mut self, name: impl Into<String>, channel: Channel) -> Self {
        self.channels.push((name.into(), channel));
        self
    }

    /// An endpoint that notices a dead connection: without pings a half-open one looks alive for minutes.
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

    /// The label of this client's leases unless one says otherwise; `host:pid` if not given.
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

    /// How long a call may take, with all its repetitions, beyond the time it waits in line; 5 s if not given.
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

    /// The client, once a daemon has answered.
    ///
    /// # Errors
    /// [`Error::Invalid`] without an endpoint, [`Error::NotLeased`] if something else answers there, and
    /// [`Error::Unavailable`] if nobody does in time.
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

    /// The client at once: its first call connects. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Invalid`] without an endpoint.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), leased_client::Error> {
    /// let builder = leased_client::Client::builder().endpoint(leased_client::DEFAULT_ENDPOINT)?;
    /// let client = builder.connect_lazily()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn connect_lazily(self) -> Result<Client, Error> {
        if self.channels.is_empty() {
            return Err(Error::Invalid("a client needs an endpoint".to_owned()));
        }
        let owner = self.owner.unwrap_or_else(default_owner);
        Ok(Client::start(Endpoints::new(self.channels, self.timeout), owner))
    }
}

fn default_owner() -> String {
    let name = rustix::system::uname();
    format!("{}:{}", name.nodename().to_string_lossy(), std::process::id())
}
