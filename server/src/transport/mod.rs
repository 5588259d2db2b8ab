//! Connections, and the layers around every call.

/// Serves connections: how many, how long one may be silent, and until when during a drain.
pub(crate) mod listener;
/// Accepts connections, and writes answers that are ready together in one go.
pub(crate) mod accept;
/// The layer that counts calls.
pub(crate) mod metrics_layer;
/// The layer that gives each call its deadline and contains its panics.
pub(crate) mod bounds;
/// Bounds the size and time of a request on its way in.
pub(crate) mod receiving;
/// Bounds the memory and time of a response on its way out.
pub(crate) mod sending;
/// The layer that puts the store's identity on every response.
pub(crate) mod stamp;
/// Serves calls of the lease service without tonic's router.
pub(crate) mod direct_route;
