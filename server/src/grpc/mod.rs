//! The gRPC services.
//!
//! `request` reads and checks a call, the engine carries it out, and `response` writes the answer.
//! Errors of the engine become `tonic::Status` here and nowhere else.

/// Unary calls.
pub(crate) mod service;
/// The keepalive stream. The hot path.
pub(crate) mod keepalive;
/// Limits the rate of a keepalive stream.
mod rate_limiter;
/// Bounds the memory of keepalive answers that callers have not read.
pub(crate) mod unread;
/// The watch stream.
pub(crate) mod watch;
/// Reads and checks requests.
pub(crate) mod request;
/// Writes responses and errors.
pub(crate) mod response;
