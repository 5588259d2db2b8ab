//! Lists keys as a stream over pages.

use std::collections::VecDeque;

use futures_util::stream::{BoxStream, StreamExt, TryStreamExt, iter, try_unfold};
use leased_proto::v1::ListRequest;
use leased_proto::v1::lease_service_client::LeaseServiceClient;

use crate::client::Client;
use crate::daemon::Purpose;
use crate::error::Error;
use crate::info::KeyInfo;

/// A list of keys, in the order of their bytes.
///
/// ```no_run
/// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
/// use tokio_stream::StreamExt;
///
/// let mut keys = client.list("reports/").include_free().stream();
/// while let Some(key) = keys.try_next().await? {
///     println!("{} {:?}", key.key, key.state);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use = "nothing is listed until it is streamed"]
pub struct List {
    client: Client,
    request: ListRequest,
}

impl List {
    pub(crate) fn new(client: Client, prefix: String) -> Self {
        Self { client, request: ListRequest { prefix, ..ListRequest::default() } }
    }

    /// Includes free keys: those with no holder, no waiter and no block by a `min_hold`.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// use tokio_stream::StreamExt;
    ///
    /// let first = client.list("reports/").include_free().stream().try_next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn include_free(mut self) -> Self {
        self.request.include_free = true;
        self
    }

    /// Sets how many keys are fetched at once: 1 to 1000, 100 by default.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// use tokio_stream::StreamExt;
    ///
    /// let first = client.list("reports/").page_size(1000).stream().try_next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn page_size(mut self, keys: u16) -> Self {
        self.request.page_size = keys.into();
        self
    }

    /// Returns the keys as a stream, which fetches the next page when it is needed. Each key is
    /// shown as it was when its page was fetched.
    ///
    /// The stream ends after its first error: [`Error::Invalid`], [`Error::Unavailable`].
    #[must_use]
    pub fn stream(self) -> BoxStream<'static, Result<KeyInfo, Error>> {
        let Self { client, request } = self;
        let pages = try_unfold(Some(request), move |request| {
            let client = client.clone();
            async move {
                let Some(request) = request else { return Ok(None) };
                let endpoints = &client.shared().endpoints;
                let call = endpoints.call(Purpose::Calls, request.clone(), |channel, request| async move {
                    LeaseServiceClient::new(channel).list(request).await
                });
                let page = call.await?.body;
                let next = (!page.next_page_token.is_empty())
                    .then_some(ListRequest { page_token: page.next_page_token, ..request });
                let keys: VecDeque<Result<KeyInfo, Error>> =
                    page.leases.into_iter().map(|lease| Ok(KeyInfo::from(lease))).collect();
                Ok(Some((iter(keys), next)))
            }
        });
        pages.try_flatten().boxed()
    }
}
