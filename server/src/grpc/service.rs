//! The unary calls: each reads its request, asks the engine, and answers.

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
use super::untaken::{Answers, Untaken};
use super::watch::{self, Events};
use crate::config::Limits;
use crate::engine::{Caller, Lessor, Released, Touched};
use crate::lease::{FencingToken, MAX_KEY_BYTES, SETTLED_DEPARTURES};
use crate::store::{ListQuery, Store};
use crate::transport::sending::{Turn, Turns, encoded};

/// An answer with more than this, in bytes, is large: it needs a turn of the whole daemon.
const LARGE: usize = 64 * 1024;
/// What a page may have that is to be no large answer, in bytes, beside the name of the last key for the next page.
const SHORT_PAGE: usize = LARGE - 2 * MAX_KEY_BYTES;
/// What is read for a page that is to be no large answer: not much more than fits into it.
const SHORT_PAGE_KEYS: usize = 250;

/// Both services, over one engine.
#[derive(Debug)]
pub(crate) struct Service<S> {
    lessor: Lessor<S>,
    limits: Limits,
    /// Shared by all large answers.
    turns: Turns,
    draining: CancellationToken,
}

impl<S> Clone for Service<S> {
    fn clone(&self) -> Self {
        Self {
            lessor: self.lessor.clone(),
            limits: self.limits,
            turns: self.turns.clone(),
            draining: self.draining.clone(),
        }
    }
}

impl<S> Service<S> {
    /// Services that end their streams when `draining` is cancelled.
    #[must_use]
    pub(crate) fn new(lessor: Lessor<S>, limits: Limits, draining: CancellationToken) -> Self {
        Self { lessor, limits, turns: Turns::default(), draining }
    }
}

impl<S: Store> Service<S> {
    /// The engine for a unary call, which takes turns with the calls of other connections.
    fn lessor_for<T>(&self, request: &Request<T>) -> Lessor<S> {
        let connection = request.extensions().get::<Caller>();
        self.lessor.on_behalf_of(connection.cloned().unwrap_or_else(Caller::new))
    }

    /// A page, encoded: a short one if the turn is none of the whole daemon.
    async fn page(&self, lessor: &Lessor<S>, query: &ListQuery, turn: &Turn) -> Result<Vec<u8>, Status> {
        let (most, keys) =
            if turn.is_of_all() { (PART_BYTES, query.limit) } else { (SHORT_PAGE, SHORT_PAGE_KEYS) };
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
        let answer = lessor.acquire(call).await.map_err(response::failed)?;
        Ok(Response::new(response::acquired(&key, answer)?))
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        let lessor = self.lessor_for(&request);
        let (headers, _, request) = request.into_parts();
        request::small(&request)?;
        let (key, id) = request::one_lease(request.lease.as_ref())?;
        let given_up = request::is_repeated(&headers);
        match lessor.release(key, id, given_up).await.map_err(response::failed)? {
            Released::Done => Ok(Response::new(ReleaseResponse {})),
            Released::Lost(reason) => Err(response::lost(reason)),
            Released::NoRoom => Err(response::limit_exceeded("settled_ids", SETTLED_DEPARTURES)),
        }
    }

    async fn touch(&self, request: Request<TouchRequest>) -> Result<Response<TouchResponse>, Status> {
        let lessor = self.lessor_for(&request);
        let request = request.into_inner();
        request::small(&request)?;
        let (key, id) = request::one_lease(request.lease.as_ref())?;
        match lessor.touch(key, id).await.map_err(response::failed)? {
            Touched::Kept(remaining) => {
                Ok(Response::new(TouchResponse { remaining: Some(response::to_duration(remaining)) }))
            }
            Touched::Lost(reason) => Err(response::lost(reason)),
            Touched::Unreadable => Err(response::unreadable()),
        }
    }

    type KeepAliveStream = Answers;

    async fn keep_alive(
        &self,
        request: Request<Streaming<KeepAliveRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let untaken = request.extensions().get::<Untaken>().cloned().unwrap_or_default();
        let messages = request.into_inner();
        let answers = keepalive::serve(
            messages,
            self.lessor.on_behalf_of(Caller::new()),
            &self.limits,
            untaken,
            self.draining.clone(),
        );
        Ok(Response::new(answers))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let lessor = self.lessor_for(&request);
        let request = request.into_inner();
        request::small(&request)?;
        let key = request::key("key", &request.key)?;
        let get = async || {
            lessor.get(key.clone()).await.map_err(response::failed)?.ok_or_else(response::key_unknown)
        };
        let snapshot = get().await?;
        if snapshot.record.size() <= LARGE {
            return Ok(Response::new(GetResponse { lease: Some(response::to_lease(&snapshot)) }));
        }
        // Read anew when its turn has come, because those that wait for their turn keep nothing large.
        drop(snapshot);
        let mut turn = self.turns.try_take(lessor.turn().await);
        self.turns.take(&mut turn).await;
        let lease = response::to_lease(&get().await?);
        Ok(encoded(GetResponse { lease: Some(lease) }.encode_to_vec(), turn))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let lessor = self.lessor_for(&request);
        let request = request.into_inner();
        let (after, limit) = request::page(&request)?;
        let query = ListQuery { prefix: request.prefix, after, limit, include_free: request.include_free };
        // Nobody waits for a turn of the whole daemon here: callers who take none of their answers would make everybody wait.
        let mut turn = self.turns.try_take(lessor.turn().await);
        let mut message = self.page(&lessor, &query, &turn).await?;
        if message.len() <= LARGE {
            turn.leave_all();
        } else if !turn.is_of_all() {
            // A record that is large by itself waits as in `get`, and is read anew.
            drop(message);
            self.turns.take(&mut turn).await;
            message = self.page(&lessor, &query, &turn).await?;
        }
        Ok(encoded(message, turn))
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
        // As strings, which both formats quote: what a caller says must not look like a field of its own.
        tracing::info!(key = &*key, fencing_token, reason = &*reason, revoked, "revoked");
        Ok(Response::new(RevokeResponse { revoked: i32::try_from(revoked).unwrap_or(i32::MAX) }))
    }
}
