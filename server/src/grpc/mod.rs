//! The gRPC services.
//!
//! A call is read and checked by `request`, goes to the engine, and is answered by `response`.
//! Errors of the engine become `tonic::Status` here and nowhere else.

/// Unary calls.
pub(crate) mod service;
/// The keepalive stream. The hot path.
pub(crate) mod keepalive;
/// Holds a keepalive stream to its rate.
mod rate_limiter;
/// Bounds the memory of keepalive answers that callers have not read.
pub(crate) mod unread;
/// The watch stream.
pub(crate) mod watch;
/// Reads and checks requests.
pub(crate) mod request;
/// Writes responses and errors.
pub(crate) mod response;
