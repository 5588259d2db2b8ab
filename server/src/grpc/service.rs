//! The methods of both services: each reads its request, calls the engine and writes the response.

use leased_proto::v1::admin_service_server::AdminService;
use leased_proto::v1::lease_service_server::LeaseService;
use leased_proto::v1::{
    AcquireRequest, AcquireResponse, GetRequest, GetResponse, KeepAliveRequest, ListRequest, ListResponse,
    ReleaseRequest, ReleaseResponse, RevokeRequest, RevokeResponse, TouchRequest, TouchResponse,
    WatchRequest,
};
use prost::Message;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::keepalive;
use super::request;
use super::response::{self, PART_BYTES};
use super::unread::{Responses, UnreadAnswers};
use super::watch::{self, Events};
use crate::config::Limits;
use crate::engine::{Caller, Lessor, Released, Touched};
use crate::lease::{FencingToken, MAX_KEY_BYTES, SETTLED_DEPARTURES};
use crate::store::{ListQuery, Store};
use crate::transport::sending::{ResponsePermit, ResponsePermits, encoded};

/// A response larger than this, in bytes, needs one of the daemon's [`ResponsePermits`].
const LARGE: usize = 64 * 1024;
/// How many bytes of leases a page may have so that its response is not large. The page token needs
/// the rest.
const SHORT_PAGE: usize = LARGE - 2 * MAX_KEY_BYTES;
/// How many keys are read for a page that must not be large: a few more than usually fit.
const SHORT_PAGE_KEYS: usize = 250;

/// Both services, over one engine.
#[derive(Debug)]
pub(crate) struct Service<S> {
    lessor: Lessor<S>,
    limits: Limits,
    /// Shared by all calls of the daemon.
    permits: ResponsePermits,
    draining: CancellationToken,
}

impl<S> Clone for Service<S> {
    fn clone(&self) -> Self {
        Self {
            lessor: self.lessor.clone(),
            limits: self.limits,
            permits: self.permits.clone(),
            draining: self.draining.clone(),
        }
    }
}

impl<S> Service<S> {
    /// Returns services that end their streams when `draining` is cancelled.
    #[must_use]
    pub(crate) fn new(lessor: Lessor<S>, limits: Limits, draining: CancellationToken) -> Self {
        Self { lessor, limits, permits: ResponsePermits::default(), draining }
    }
}

impl<S: Store> Service<S> {
    /// Returns the engine for a unary call. All unary calls of a connection take turns as one
    /// caller.
    fn lessor_for<T>(&self, request: &Request<T>) -> Lessor<S> {
        let connection = request.extensions().get::<Caller>();
        self.lessor.on_behalf_of(connection.cloned().unwrap_or_else(Caller::new))
    }

    /// Returns an encoded page: a short one unless `permit` allows a large response.
    async fn page(
        &self,
        lessor: &Lessor<S>,
        query: &ListQuery,
        permit: &ResponsePermit,
    ) -> Result<Vec<u8>, Status> {
        let (most, keys) =
            if permit.allows_large() { (PART_BYTES, query.limit) } else { (SHORT_PAGE, SHORT_PAGE_KEYS) };
        let query = ListQuery { limit: query.limit.min(keys), ..query.clone() };
        let page = lessor.page(query).await.map_err(response::failed)?;
        Ok(response::list_response(page, most).await)
    }
}

#[tonic::async_trait]
impl<S: Store> LeaseService for Service<S> {
    async fn acquire(&self, request: Request<AcquireRequest>) -> Result<Response<AcquireResponse>, Status> {
        let lessor = self.lessor_for(&request);
        let (headers, _, request) = request.into_parts();
        let call = request::acquire(request, &headers, &self.limits)?;
        let key = call.key.clone();
        let acquired = lessor.acquire(call).await.map_err(response::failed)?;
        Ok(Response::new(response::acquired(&key, acquired)?))
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        let lessor = self.lessor_for(&request);
        let (headers, _, request) = request.into_parts();
        request::check_size(&request)?;
        let name = request::one_lease(request.lease.as_ref())?;
        let released = match request::is_repeated(&headers) {
            // The caller did not get the answer to the first release, and possibly not to the
            // acquire before it. So a command that would grant this id a lease may still be under way.
            true => lessor.release_given_up(name).await,
            false => lessor.release(name).await,
        };
        match released.map_err(response::failed)? {
            Released::Done => Ok(Response::new(ReleaseResponse {})),
            Released::Lost(reason) => Err(response::lost(reason)),
            Released::NoRoom => Err(response::limit_exceeded("settled_ids", SETTLED_DEPARTURES)),
        }
    }

    async fn touch(&self, request: Request<TouchRequest>) -> Result<Response<TouchResponse>, Status> {
        let lessor = self.lessor_for(&request);
        let request = request.into_inner();
        request::check_size(&request)?;
        let name = request::one_lease(request.lease.as_ref())?;
        match lessor.touch(name).await.map_err(response::failed)? {
            Touched::Kept(remaining) => {
                Ok(Response::new(TouchResponse { remaining: Some(response::to_duration(remaining)) }))
            }
            Touched::Lost(reason) => Err(response::lost(reason)),
            Touched::Unreadable => Err(response::unreadable()),
        }
    }

    type KeepAliveStream = Responses;

    async fn keep_alive(
        &self,
        request: Request<Streaming<KeepAliveRequest>>,
    ) -> Result<Response<Responses>, Status> {
        let unread = request.extensions().get::<UnreadAnswers>().cloned().unwrap_or_default();
        let messages = request.into_inner();
        let answers = keepalive::serve(
            messages,
            self.lessor.on_behalf_of(Caller::new()),
            &self.limits,
            unread,
            self.draining.clone(),
        );
        Ok(Response::new(answers))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let lessor = self.lessor_for(&request);
        let request = request.into_inner();
        request::check_size(&request)?;
        let key = request::key("key", &request.key)?;
        let get = async || {
            lessor.get(key.clone()).await.map_err(response::failed)?.ok_or_else(response::key_unknown)
        };
        let snapshot = get().await?;
        if snapshot.record.size() <= LARGE {
            return Ok(Response::new(GetResponse { lease: Some(response::to_lease(&snapshot)) }));
        }
        // Read again once the call has a permit, because calls that wait for one must keep nothing
        // large in memory.
        drop(snapshot);
        let mut permit = self.permits.try_acquire(lessor.turn().await);
        self.permits.acquire(&mut permit).await;
        let lease = response::to_lease(&get().await?);
        Ok(encoded(GetResponse { lease: Some(lease) }.encode_to_vec(), permit))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let lessor = self.lessor_for(&request);
        let request = request.into_inner();
        let (after, limit) = request::page(&request)?;
        let query = ListQuery { prefix: request.prefix, after, limit, include_free: request.include_free };
        // A listing without a permit gets a short page and does not wait, unless the page is a
        // single large record. Eight connections that read nothing can hold all permits, and every
        // listing would wait for ten seconds.
        let mut permit = self.permits.try_acquire(lessor.turn().await);
        let mut message = self.page(&lessor, &query, &permit).await?;
        if message.len() <= LARGE {
            permit.give_up_large();
        } else if !permit.allows_large() {
            // The page is a single large record. As in `get`, the call waits for a permit and then
            // reads again.
            drop(message);
            self.permits.acquire(&mut permit).await;
            message = self.page(&lessor, &query, &permit).await?;
        }
        Ok(encoded(message, permit))
    }

    type WatchStream = Events;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Events>, Status> {
        let lessor = self.lessor_for(&request);
        let request = request.into_inner();
        let begin = request::watch(&request)?;
        let watch = lessor.watch(request.prefix, begin).await.map_err(response::failed)?;
        Ok(Response::new(watch::serve(watch, self.draining.clone())))
    }
}

#[tonic::async_trait]
impl<S: Store> AdminService for Service<S> {
    async fn revoke(&self, request: Request<RevokeRequest>) -> Result<Response<RevokeResponse>, Status> {
        let lessor = self.lessor_for(&request);
        let request = request.into_inner();
        let key = request::revoke(&request)?;
        let token = (request.fencing_token > 0).then_some(FencingToken(request.fencing_token));
        let revoked = lessor.revoke(key, token).await.map_err(response::failed)?;
        let RevokeRequest { key, fencing_token, reason } = request;
        // As strings, which both log formats quote. Otherwise text from a caller could look like
        // another log field.
        tracing::info!(key = &*key, fencing_token, reason = &*reason, revoked, "revoked");
        Ok(Response::new(RevokeResponse { revoked: i32::try_from(revoked).unwrap_or(i32::MAX) }))
    }
}
